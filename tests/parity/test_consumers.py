"""What is written for optimum and transformers.js, fed as these feed it: KV caches that start empty and grow.

The libraries themselves are asked by `ci/consumers/run.sh`, in environments of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.options import ExportOptions, check_options
from gemma3n_onnx.runtime import ArtifactError, OnnxGemma3n
from oracle import LONG, TOLERANCE, WINDOW, assert_close, generate_greedily, oracle_logits, random_prompt

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

    def run(
        self, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """ids [B, S], mask [B, T] -> logits [B, V] of the last positions, and the caches."""
        feeds = {"input_ids": ids}
        if self.embedding is not None:
            feeds = dict(zip(("inputs_embeds", "per_layer_inputs"), self.embedding.run(None, feeds), strict=True))
            assert feeds["per_layer_inputs"].ndim == 4
        feeds["attention_mask"] = mask
        feeds["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
        for value in self.decoder.get_inputs():
            if value.name.startswith("past"):
                batch, heads, rows, width = value.shape
                assert (batch, rows) == ("batch_size", "past_sequence_length")
                feeds[value.name] = past.get(value.name, np.zeros((len(ids), heads, 0, width), np.float32))
        found = dict(zip(self.names, self.decoder.run(None, feeds), strict=True))
        logits = found.pop("logits")
        return logits[:, -1], {name.replace("present", "past_key_values"): value for name, value in found.items()}

    def generate(self, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
        """Tokens, and their logits [steps, V]."""
        tokens, logits = self.generate_batch(np.array([prompt]), np.ones((1, len(prompt)), np.int64), steps)
        return tokens[0].tolist(), logits[0]

    def generate_batch(self, ids: np.ndarray, mask: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """ids, mask [B, S] -> tokens [B, steps], and their logits [B, steps, V]."""
        all_logits = []
        past: dict[str, np.ndarray] = {}
        for _ in range(steps):
            logits, past = self.run(ids, mask, past)
            ids = logits.argmax(-1)[:, None]
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            all_logits.append(logits)
        stacked = np.stack(all_logits, axis=1)
        return stacked.argmax(-1), stacked


@pytest.mark.parametrize("layout", [*DECODER])
@pytest.mark.parametrize(("kind", "prompt"), [("shallow", 1), ("shallow", LONG), ("untied", LONG)])
def test_its_tokens_are_transformers(request, exported, layout, kind, prompt):
    checkpoint, oracle = (request.getfixturevalue(f"{kind}_{what}") for what in ("checkpoint", "oracle"))
    ids = random_prompt(prompt, seed=5)
    made, logits = Consumer(exported(checkpoint, layout=layout), layout).generate(ids, STEPS)
    theirs = oracle_logits(oracle, [*ids, *made[:-1]], STEPS)
    assert_close(f"{layout}, {kind}, prompt of {prompt}", logits, theirs, TOLERANCE)
    assert made == theirs.argmax(-1).tolist()


def padded(prompts: list[list[int]], before: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [B, S]. Of n missing tokens, `before(n)` are in front of the prompt."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        start = before(width - len(prompt))
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


# Of three lengths, the longest longer than the window.
PROMPTS = [random_prompt(length, seed=length) for length in (3, WINDOW + 5, LONG)]


@pytest.mark.parametrize("layout", [*DECODER])
def test_each_row_of_a_left_padded_batch_is_as_alone(shallow_checkpoint, exported, shallow_oracle, layout):
    """Also beside a row of padding alone, whose logits mean nothing but are finite."""
    consumer = Consumer(exported(shallow_checkpoint, layout=layout), layout)
    tokens, logits = consumer.generate_batch(*padded([*PROMPTS, []], lambda n: n), STEPS)
    assert np.isfinite(logits).all()
    ids, mask = padded(PROMPTS, lambda n: n)
    tokens, logits = tokens[:-1], logits[:-1]
    for prompt, made, found in zip(PROMPTS, tokens.tolist(), logits, strict=True):
        theirs = oracle_logits(shallow_oracle, [*prompt, *made[:-1]], STEPS)
        assert_close(f"{layout}, prompt of {len(prompt)} padded to {ids.shape[1]}", found, theirs, TOLERANCE)
        assert made == theirs.argmax(-1).tolist() == consumer.generate(prompt, STEPS)[0]
    with torch.no_grad():
        whole = shallow_oracle.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=STEPS)
    assert tokens.tolist() == whole[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("layout", [*DECODER])
@pytest.mark.parametrize("side", ["right", "both"])
def test_padding_elsewhere_is_as_in_transformers(shallow_checkpoint, exported, shallow_oracle, layout, side):
    """transformers' logits for the same mask, in one pass; its windows count padding too."""
    ids, mask = padded(PROMPTS, {"right": lambda n: 0, "both": lambda n: n // 2}[side])
    consumer = Consumer(exported(shallow_checkpoint, layout=layout), layout)
    tokens, logits = consumer.generate_batch(ids, mask, STEPS)
    whole = torch.tensor(np.concatenate([ids, tokens[:, :-1]], axis=1))
    whole_mask = torch.nn.functional.pad(torch.tensor(mask), (0, STEPS - 1), value=1)
    positions = (whole_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = shallow_oracle(whole, attention_mask=whole_mask, position_ids=positions, use_cache=False).logits
    width = ids.shape[1]
    for row, found in enumerate(logits):
        columns = [int(mask[row].nonzero()[0].max()), *range(width, width + STEPS - 1)]
        assert_close(f"{layout}, padded {side}, row {row}", found, theirs[row, columns].numpy(), TOLERANCE)


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
