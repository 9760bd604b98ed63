"""What is written for optimum and transformers.js, fed as these feed it: KV caches that start empty and grow.

The libraries themselves are asked by `ci/consumers/run.sh`, in environments of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.options import ExportOptions, check_options
from gemma3n_onnx.runtime import ArtifactError, OnnxGemma3n
from oracle import LONG, TOLERANCE, assert_close, generate_greedily, oracle_logits, random_prompt

STEPS = 24
DECODER = {"optimum": "model", "transformers.js": "onnx/decoder_model_merged"}
EMBEDDING = {"transformers.js": "onnx/embed_tokens"}


class Consumer:
    """Greedy generation with the graphs of a layout."""

    def __init__(self, folder: Path, layout: str, suffix: str = "") -> None:
        self.decoder = onnxruntime.InferenceSession(folder / f"{DECODER[layout]}{suffix}.onnx")
        self.embedding = None
        if layout in EMBEDDING:
            self.embedding = onnxruntime.InferenceSession(folder / f"{EMBEDDING[layout]}{suffix}.onnx")
        self.names = [output.name for output in self.decoder.get_outputs()]

    def run(self, ids: list[int], past: dict[str, np.ndarray], length: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        feeds = {"input_ids": np.array([ids])}
        if self.embedding is not None:
            feeds = dict(zip(("inputs_embeds", "per_layer_inputs"), self.embedding.run(None, feeds), strict=True))
            assert feeds["per_layer_inputs"].ndim == 4
        feeds["attention_mask"] = np.ones((1, length + len(ids)), np.int64)
        feeds["position_ids"] = np.arange(length, length + len(ids))[None]
        for value in self.decoder.get_inputs():
            if value.name.startswith("past"):
                batch, heads, rows, width = value.shape
                assert (batch, rows) == ("batch_size", "past_sequence_length")
                feeds[value.name] = past.get(value.name, np.zeros((1, heads, 0, width), np.float32))
        found = dict(zip(self.names, self.decoder.run(None, feeds), strict=True))
        logits = found.pop("logits")
        return logits[0, -1], {name.replace("present", "past_key_values"): value for name, value in found.items()}

    def generate(self, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
        made: list[int] = []
        all_logits = []
        past: dict[str, np.ndarray] = {}
        ids, length = prompt, 0
        for _ in range(steps):
            logits, past = self.run(ids, past, length)
            length += len(ids)
            ids = [int(logits.argmax())]
            made += ids
            all_logits.append(logits)
        return made, np.stack(all_logits)


@pytest.mark.parametrize("layout", [*DECODER])
@pytest.mark.parametrize(("kind", "prompt"), [("shallow", 1), ("shallow", LONG), ("untied", LONG)])
def test_its_tokens_are_transformers(request, exported, layout, kind, prompt):
    checkpoint, oracle = (request.getfixturevalue(f"{kind}_{what}") for what in ("checkpoint", "oracle"))
    ids = random_prompt(prompt, seed=5)
    made, logits = Consumer(exported(checkpoint, layout=layout), layout).generate(ids, STEPS)
    theirs = oracle_logits(oracle, [*ids, *made[:-1]], STEPS)
    assert_close(f"{layout}, {kind}, prompt of {prompt}", logits, theirs, TOLERANCE)
    assert made == theirs.argmax(-1).tolist()


@pytest.mark.parametrize("layout", [*DECODER])
@pytest.mark.parametrize("kind", ["shallow", "untied"])
def test_quantized_it_answers_as_the_native_layout(request, exported, layout, kind):
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    native = OnnxGemma3n.from_pretrained(exported(checkpoint, precision="int4"), memory_budget=0)
    ours = generate_greedily(native, random_prompt(LONG), 8)
    suffix = "_q4" if layout in EMBEDDING else ""
    consumer = Consumer(exported(checkpoint, layout=layout, precision="int4"), layout, suffix)
    made, logits = consumer.generate(random_prompt(LONG), 8)
    same = next((i for i, (a, b) in enumerate(zip(made, ours.tokens)) if a != b), 8)
    assert same > 0
    # Table rows come in fp16 here; where activations are rounded to int8 that shows.
    assert np.abs(logits[:same] - ours.logits[:same]).max() <= 2e-2 * np.ptp(ours.logits)


def test_no_attention_is_without_new_keys(shallow_checkpoint, exported):
    """ONNX Runtime 1.30, which transformers.js brings, crashes on those."""
    for layout, name in DECODER.items():
        graph = ir.load(exported(shallow_checkpoint, layout=layout) / f"{name}.onnx").graph
        nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
        assert len(nodes) == 10
        assert all(len(node.outputs) == 3 and all(value.name for value in node.outputs) for node in nodes)


def test_their_configs(shallow_multimodal_checkpoint, exported):
    folder = exported(shallow_multimodal_checkpoint, layout="optimum")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and config["num_key_value_heads"] and config["head_dim"]
    assert not list(folder.glob("*encoder*"))
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        OnnxGemma3n.from_pretrained(folder)
    folder = exported(shallow_multimodal_checkpoint, layout="transformers.js")
    text = Checkpoint.open(shallow_multimodal_checkpoint).config
    assert json.loads((folder / "processor_config.json").read_text()) == {
        "processor_class": "Gemma3nProcessor",
        "image_seq_length": text["vision_soft_tokens_per_image"],
        "audio_seq_length": text["audio_soft_tokens_per_image"],
    }
    names = {path.name for path in (folder / "onnx").glob("*.onnx")}
    assert names == {"audio_encoder.onnx", "decoder_model_merged.onnx", "embed_tokens.onnx", "vision_encoder.onnx"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layout": "gguf"}, "Unknown layout 'gguf'"),
        ({"layout": "optimum", "target": "cuda", "precision": "bf16"}, "needs --target cpu"),
        ({"layout": "optimum", "logits": "all"}, "and --logits last"),
        ({"layout": "optimum", "modalities": ("text", "vision")}, "is text-only"),
        ({"layout": "transformers.js", "precision": "mixed"}, "does not support precision mixed"),
    ],
)
def test_what_a_layout_has_no_place_for_is_refused(options, told):
    with pytest.raises(ExportOptionError, match=told):
        check_options(ExportOptions(**options))
