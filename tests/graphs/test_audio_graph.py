"""The audio encoder's config, names and graph, whatever its weights."""

import dataclasses
import math
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from gemma3n_onnx.export import trace
from gemma3n_onnx.graphs import ops
from gemma3n_onnx.graphs.audio import AudioConfig, AudioEncoder, checkpoint_shapes
from gemma3n_onnx.graphs.config import ConfigError

FULL = AudioConfig(text_hidden_size=2048)
SMALL = AudioConfig(text_hidden_size=96, hidden_size=64, num_heads=4, num_layers=2)
HF = {"text_config": {"hidden_size": 2048, "vocab_size": 262400}, "audio_config": {"model_type": "gemma3n_audio"}}


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return trace.trace_audio(SMALL)


def test_names_and_shapes_are_those_of_transformers() -> None:
    from transformers import Gemma3nAudioConfig, Gemma3nTextConfig
    from transformers.models.gemma3n import modeling_gemma3n as hf

    audio = Gemma3nAudioConfig()
    with torch.device("meta"):
        embedder = hf.Gemma3nMultimodalEmbedder(audio, Gemma3nTextConfig(hidden_size=2048))
        parts = {"audio_tower": hf.Gemma3nAudioEncoder(audio), "embed_audio": embedder}
    theirs = {f"{part}.{name}": tuple(p.shape) for part, m in parts.items() for name, p in m.named_parameters()}
    ours = checkpoint_shapes(FULL)
    assert ours == theirs
    assert sum(name.startswith("audio_tower.") for name in ours) == 269
    assert sum(name.startswith("embed_audio.") for name in ours) == 4


def test_every_parameter_is_an_initializer_without_data(model: ir.Model) -> None:
    without_data = {
        name: tuple(value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is None and value.shape is not None
    }
    assert without_data == checkpoint_shapes(SMALL)


def test_large_weights_are_read_as_they_stand(model: ir.Model) -> None:
    """Nothing transposes or casts a matrix; other constants are small."""
    for name, value in model.graph.initializers.items():
        users = {node.op_type for node in value.consumers()}
        if value.const_value is not None:
            assert value.const_value.size <= 4096, name
        elif name == "embed_audio.embedding.weight":
            assert users == {"Slice"}
        elif len(value.shape) == 2:
            assert users == {"Gemm"}, name


def test_inputs_and_output_vary_in_clips_and_frames(model: ir.Model) -> None:
    shapes = {value.name: [str(size) for size in value.shape] for value in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes == {
        "input_features": ["clips", "frames", "128"],
        "input_features_mask": ["clips", "frames"],
        "audio_features": ["audio_tokens", "96"],
    }
    assert model.graph.inputs[1].dtype == ir.DataType.BOOL


def test_every_size_derived_from_the_frames_is_recognisable_in_a_trace() -> None:
    steps, chunks = trace._AUDIO_SIZES
    halved = math.ceil(trace.AXES["frames"] / 2)
    assert halved == 2 * steps
    assert math.ceil(halved / 2) == steps
    assert math.ceil(steps / FULL.chunk_size) == chunks
    assert steps % FULL.chunk_size, "the trace has no padding"
    assert math.ceil(steps / FULL.reduction_factor) % chunks == 0


def test_a_fixed_size_in_the_graph_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMMA3N_CACHE", str(tmp_path))

    def fixed(size: ops.Size, by: int) -> ops.Size:
        number = -(-size.number // by)
        return ops.Size(number, torch.tensor([number]))

    monkeypatch.setattr(ops, "ceil_divide", fixed)
    trace._trace_audio.cache_clear()
    with pytest.raises(AssertionError, match="The traced size 25932 is a constant"):
        trace.trace_audio(SMALL)
    trace._trace_audio.cache_clear()


def test_more_frames_than_the_soft_tokens_hold_are_refused() -> None:
    encoder = AudioEncoder(SMALL).eval()
    frames = SMALL.soft_tokens * 16 + 1
    with pytest.raises(RuntimeError, match="negative"):
        encoder(torch.zeros(1, frames, SMALL.mel_bins), torch.ones(1, frames, dtype=torch.bool))


def test_config_defaults_are_those_of_transformers() -> None:
    from transformers import Gemma3nAudioConfig

    assert AudioConfig.from_hf(HF) == FULL
    assert AudioConfig.from_hf({**HF, "audio_config": Gemma3nAudioConfig().to_dict()}) == FULL


def test_config_values_are_read() -> None:
    changed = dataclasses.replace(
        FULL, hidden_size=64, num_heads=4, logit_cap=30.0, subsample_channels=(16, 8), soft_tokens=9
    )
    audio = {
        "hidden_size": 64,
        "conf_num_attention_heads": 4,
        "conf_attention_logit_cap": 30,
        "sscp_conv_channel_size": [16, 8],
    }
    assert AudioConfig.from_hf({**HF, "audio_config": audio, "audio_soft_tokens_per_image": 9}) == changed


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (None, "no audio encoder"),
        ({"model_type": "whisper"}, "'whisper'"),
        ({"conf_attention_context_right": 2}, "conf_attention_context_right is 2"),
        ({"conf_attention_context_left": 14}, "context_left is 14; only 1 to the chunk size plus one"),
        ({"conf_attention_chunk_size": 10**6}, "only chunks of up to 1024"),
        ({"conf_num_hidden_layers": 10**7}, "up to 1,024"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"conf_attention_context_left": 0}, "must be a positive whole number"),
        ({"gradient_clipping": 100.0}, "gradient_clipping is 100"),
        ({"conf_attention_logit_cap": 0.0}, "logit_cap is 0.0"),
        ({"conf_num_attention_heads": 7}, "multiple of its 7 heads"),
        ({"hidden_size": "1536"}, "hidden_size is '1536'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"conf_residual_weight": None}, "residual_weight is None"),
        ({"sscp_conv_channel_size": [128]}, "1 subsampling channels"),
        ({"sscp_conv_kernel_size": [3, 3]}, "wrong type"),
        ({"sscp_conv_kernel_size": [[3, 3, 3], [3, 3]]}, "must be a pair"),
        ({"input_feat_size": 1, "sscp_conv_kernel_size": [[3, 9], [3, 3]]}, "too few"),
        ({"vocab_offset": 262400}, "the audio ids begin at 262400"),
    ],
)
def test_config_refuses_what_the_graph_cannot_do(audio: dict | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AudioConfig.from_hf({**HF, "audio_config": audio})


def test_config_needs_the_width_of_the_text_model() -> None:
    with pytest.raises(ConfigError, match=r"no text_config\.hidden_size"):
        AudioConfig.from_hf({"audio_config": {}, "text_config": {}})
