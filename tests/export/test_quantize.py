"""Quantized matrices against ONNX Runtime, which reads them, and its own quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime.capi._pybind_state import quantize_matmul_4bits

from gemma3n_onnx.export.errors import CheckpointError, ExportError, ExportOptionError
from gemma3n_onnx.export.quantization.config import METHODS, PerRow, QuantizationConfig, Storage
from gemma3n_onnx.export.quantization.options import QuantizationOptions
from gemma3n_onnx.export.quantization.quantize import dequantize, pack, quantize, unpack
from gemma3n_onnx.export.quantization.recipes import precision_for
from gemma3n_onnx.export.quantization.threads import one_thread_an_operation
from gemma3n_onnx.export.stored import BlockQuantizedTensor, RowQuantizedTensor, StoredTensor, lay_out, work_of
from gemma3n_onnx.export.weights import WeightStream, _all_finite, as_stored, attach
from gemma3n_onnx.graphs.passes.quantize_dynamic import products
from gemma3n_onnx.runtime.artifact import TableInfo
from gemma3n_onnx.runtime.engine.ort import Session
from gemma3n_onnx.runtime.engine.providers.cpu import CPUProvider
from gemma3n_onnx.runtime.engine.tables import EmbeddingTable

ROWS, COLUMNS = 48, 256
CONFIGS = [QuantizationConfig(bits, block, method) for bits in (4, 8) for block in (32, 128) for method in METHODS]
FILE = "data.bin"


def matrix(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Values of the long-tailed kind that trained weights are, a row of zeros and one constant row among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.1
    values *= 1 + 2 * (torch.rand(rows, columns, generator=generator) > 0.98)
    values[3], values[5] = 0.0, 0.25
    return values


def graph(kind: str, rows: int, columns: int) -> ir.Model:
    """A product x @ w.T, or rows of w."""
    w = ir.Value(name="w", shape=ir.Shape([rows, columns]), type=ir.TensorType(ir.DataType.FLOAT))
    if kind == "Gemm":
        x = ir.Value(name="x", shape=ir.Shape(["n", columns]), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node("Gemm", [x, w], {"transB": 1})
    else:
        x = ir.Value(name="x", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
        w.dtype = ir.DataType.FLOAT16
        node = ir.node("Gather", [w, x], {"axis": 0})
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(w.dtype)
    node.outputs[0].shape = ir.Shape(["n", rows if kind == "Gemm" else columns])
    made = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    return ir.Model(made, ir_version=10)


def written(folder: Path, values: torch.Tensor, config: QuantizationConfig, chunk: int = 7) -> BlockQuantizedTensor:
    """`values`, a few rows at a time, as an export writes them."""
    (stored,) = lay_out(FILE, {"w": tuple(values.shape)}, lambda _: config).values()
    assert isinstance(stored, BlockQuantizedTensor)
    blocks = (block.numpy() for block in values.split(chunk))
    info = WeightStream(folder, lambda _: None).write_file(FILE, {"w": stored}, lambda _: blocks)
    assert info.bytes == stored.nbytes
    return stored


def loaded(folder: Path, model: ir.Model, stored: BlockQuantizedTensor, *, int8_activations: bool) -> Session:
    attach(model, {"w": stored})
    for node in model.graph:
        if node.op_type == "MatMulNBits" and not int8_activations:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    ir.save(model, folder / "graph.onnx")
    return Session(folder / "graph.onnx", CPUProvider(), quantized=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 8, 64])
def test_packing_is_undone(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8), 4).tolist() == [[0x21, 0xF3]]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_onnxruntime_multiplies_by_what_dequantize_gives(tmp_path: Path, config: QuantizationConfig) -> None:
    values = matrix()
    session = loaded(tmp_path, graph("Gemm", ROWS, COLUMNS), written(tmp_path, values, config), int8_activations=False)
    product = session.run({"x": np.eye(COLUMNS, dtype=np.float32)})["y"]
    np.testing.assert_allclose(product.T, as_stored(values, config), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_int8_activations_cost_little(tmp_path: Path, config: QuantizationConfig) -> None:
    values = matrix()
    session = loaded(tmp_path, graph("Gemm", ROWS, COLUMNS), written(tmp_path, values, config), int8_activations=True)
    x = np.random.default_rng(0).standard_normal((5, COLUMNS), dtype=np.float32)
    exact = x @ as_stored(values, config).numpy().T
    assert np.abs(session.run({"x": x})["y"] - exact).max() < 0.02 * np.ptp(exact)


@pytest.mark.parametrize("config", [s for s in CONFIGS if s.method in ("rtn", "k-quant")], ids=str)
def test_onnxruntime_gathers_the_rows_that_dequantize_gives(tmp_path: Path, config: QuantizationConfig) -> None:
    values = matrix()
    session = loaded(tmp_path, graph("Gather", ROWS, COLUMNS), written(tmp_path, values, config), int8_activations=True)
    ids = np.array([0, 3, 5, ROWS - 1, 7])
    rows = session.run({"x": ids})["y"]
    np.testing.assert_allclose(rows, as_stored(values, config)[ids].half(), rtol=1e-3)


@pytest.mark.parametrize(
    "config", [QuantizationConfig(4, 32), QuantizationConfig(4, 128, "search"), QuantizationConfig(8, 64)], ids=str
)
def test_a_table_on_disk_gives_the_same_rows(tmp_path: Path, config: QuantizationConfig) -> None:
    values = matrix()
    stored = written(tmp_path, values, config)
    info = TableInfo(FILE, f"int{config.bits}", ROWS, COLUMNS, 2.0, config.block, stored.scales.offset)
    ids = np.array([ROWS - 1, 3, 0, 5])
    np.testing.assert_array_equal(
        EmbeddingTable(tmp_path, info, "fp32").rows(ids), 2 * as_stored(values, config)[ids].numpy()
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_first_rows_are_a_matrix_of_their_own(tmp_path: Path, config: QuantizationConfig) -> None:
    values = matrix()
    stored = written(tmp_path, values, config).first_rows(20)
    session = loaded(tmp_path, graph("Gemm", 20, COLUMNS), stored, int8_activations=False)
    product = session.run({"x": np.eye(COLUMNS, dtype=np.float32)})["y"]
    np.testing.assert_allclose(product.T, as_stored(values, config)[:20], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block", [32, 128])
def test_rounding_to_nearest_is_as_good_as_onnxruntimes_quantizer(block: int) -> None:
    values = matrix(64, 256)
    groups = 256 // block
    codes, scales, zeros = (
        np.zeros((64, groups, block // 2), np.uint8),
        np.zeros(64 * groups, np.float32),
        np.zeros((64, (groups + 1) // 2), np.uint8),
    )
    quantize_matmul_4bits(codes, np.ascontiguousarray(values.numpy().T), scales, zeros, block, 64, 256, True)
    low, high = codes & 0xF, codes >> 4
    theirs = (np.stack((low, high), -1).reshape(64, groups, block) - 8.0) * scales.reshape(64, groups, 1)
    ours = as_stored(values, QuantizationConfig(4, block)).numpy()
    ours_error, theirs_error = (np.square(x.reshape(64, 256) - values.numpy()).mean() for x in (ours, theirs))
    print(f"mean squared error {ours_error:.3e}, onnxruntime's {theirs_error:.3e}")
    assert ours_error == pytest.approx(theirs_error, rel=0.01)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("bits", [2, 4])
def test_searching_beats_rounding(bits: int, block: int) -> None:
    values = matrix()
    errors = {
        m: float((as_stored(values, QuantizationConfig(bits, block, m)) - values).square().mean()) for m in METHODS
    }
    print({method: f"{error:.3e}" for method, error in errors.items()})
    assert errors["search"] < 0.95 * errors["rtn"]
    assert errors["k-quant"] < errors["rtn"]


def test_half_quadratic_splitting_lowers_its_norm() -> None:
    values = matrix(seed=1)

    def norm(method: str) -> float:
        return float((as_stored(values, QuantizationConfig(4, 64, method)) - values).abs().pow(0.7).sum())

    found = {method: norm(method) for method in METHODS}
    print(found)
    assert found["hqq"] < found["rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_constants_stay(method: str) -> None:
    values = torch.stack([torch.zeros(64), torch.full((64,), 0.5), torch.full((64,), -0.5)])
    torch.testing.assert_close(as_stored(values, QuantizationConfig(4, 32, method)), values, rtol=2e-3, atol=0)


def test_stored_values_do_not_depend_on_how_rows_come(tmp_path: Path) -> None:
    values, config = matrix(), QuantizationConfig(4, 32, "k-quant")
    files = []
    for chunk in (1, 48):
        (tmp_path / str(chunk)).mkdir()
        written(tmp_path / str(chunk), values, config, chunk)
        files.append((tmp_path / str(chunk) / FILE).read_bytes())
    assert files[0] == files[1]


def test_quantize_and_dequantize_fit_each_other() -> None:
    values = matrix()
    for config in CONFIGS:
        once = as_stored(values, config)
        bound = (values.amax() - values.amin()) / config.largest
        assert (dequantize(quantize(values, config), config) == once).all()
        cut = 2 if config.method in ("search", "k-quant") else 1  # the largest may be given up for the others
        assert (once - values).abs().max() <= 1.05 * cut * bound


def test_products_in_int8_are_near_those_of_the_weights(tmp_path: Path) -> None:
    values = matrix()
    (stored,) = lay_out(FILE, {"w": (ROWS, COLUMNS)}, lambda _: PerRow()).values()
    assert isinstance(stored, RowQuantizedTensor) and stored.nbytes == ROWS * COLUMNS + 4 * ROWS
    model = graph("Gemm", ROWS, COLUMNS)
    assert products(model) == {"w"}
    WeightStream(tmp_path, lambda _: None).write_file(FILE, {"w": stored}, lambda _: iter([values.numpy()]))
    attach(model, {"w": stored})
    ir.save(model, tmp_path / "graph.onnx")
    session = Session(tmp_path / "graph.onnx", CPUProvider(), quantized=True)
    x = np.random.default_rng(0).standard_normal((40, COLUMNS), dtype=np.float32)
    exact = x @ as_stored(values, PerRow()).numpy().T
    error = np.abs(session.run({"x": x})["y"] - exact).max() / np.ptp(exact)
    print(f"error {error:.2e} of the range")
    assert 0 < error < 0.02
    assert float((as_stored(values, PerRow()) - values).abs().max()) <= float(values.abs().amax()) / 254 * 1.01


def test_only_weights_of_products_are_products() -> None:
    assert products(graph("Gather", ROWS, COLUMNS)) == set()
    model = graph("Gemm", ROWS, COLUMNS)
    model.graph.append(ir.node("Transpose", [next(iter(model.graph)).inputs[1]]))
    assert products(model) == set()
    scaled = graph("Gemm", ROWS, COLUMNS)
    next(iter(scaled.graph)).attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
    assert products(scaled) == set()


@pytest.mark.parametrize(("value", "error"), [(float("nan"), CheckpointError), (1e9, ExportError)])
def test_values_that_cannot_be_quantized(tmp_path: Path, value: float, error: type[Exception]) -> None:
    values = matrix()
    values[9, 9] = value
    with pytest.raises(error, match="Tensor w"):
        written(tmp_path, values, QuantizationConfig(4, 32))


def test_a_weight_used_otherwise_is_refused() -> None:
    model = graph("Gemm", ROWS, COLUMNS)
    (node,) = model.graph
    extra = ir.node("Transpose", [node.inputs[1]])
    model.graph.append(extra)
    stored = BlockQuantizedTensor.at(FILE, 0, (ROWS, COLUMNS), QuantizationConfig(4, 32))
    with pytest.raises(AssertionError, match="Transpose"):
        attach(model, {"w": stored})


@pytest.mark.parametrize(("columns", "block"), [(256, 128), (96, 32), (48, 16), (24, None), (7, None)])
def test_the_largest_block_that_fits(columns: int, block: int | None) -> None:
    fitting = QuantizationConfig(4, 128).fitting(columns)
    assert (fitting and fitting.block) == block


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"bits": 3, "block": 32}, "bits 3 is not supported; choose one of 2, 4, 8"),
        ({"bits": 4, "block": 33}, "block 33 is not supported"),
        ({"bits": 4, "block": 32, "method": "magic"}, "method magic is not supported; choose one of rtn, search"),
    ],
)
def test_unknown_configs(arguments: dict, told: str) -> None:
    with pytest.raises(ExportOptionError, match=told):
        QuantizationConfig(**arguments)


def test_options_replace_parts_of_a_recipe() -> None:
    recipe = precision_for("int4", "cpu", QuantizationOptions(64, "hqq", 8, 8))
    assert recipe.weights == QuantizationConfig(4, 64, "hqq")
    assert recipe.tokens is not None and (recipe.tokens.bits, recipe.tokens.block, recipe.tokens.has_zeros) == (
        8,
        64,
        False,
    )
    assert recipe.per_layer is not None and (recipe.per_layer.bits, recipe.per_layer.block) == (8, 64)
    assert precision_for("int4", "cpu", QuantizationOptions()) == precision_for("int4", "cpu")


@pytest.mark.parametrize(
    ("precision", "options", "told"),
    [
        ("fp32", QuantizationOptions(block=64), "--block-size needs a quantized --precision"),
        ("int4", QuantizationOptions(embedding_bits=3), "--embedding-bits is 3; choose one of 4, 8"),
        ("int4", QuantizationOptions(block=5), "block 5 is not supported"),
        ("int4", QuantizationOptions(prefill="int4"), "--prefill is 'int4'; choose int8 or shared"),
        ("bf16", QuantizationOptions(prefill="int8"), "--prefill needs a quantized --precision"),
    ],
)
def test_options_that_do_not_fit(precision: str, options: QuantizationOptions, told: str) -> None:
    with pytest.raises(ExportOptionError, match=told):
        precision_for(precision, "cpu", options)


def test_exceptions_keep_what_options_leave() -> None:
    recipe = precision_for("mixed", "cpu", QuantizationOptions(ple_bits=8))
    assert recipe.of_weight("layers.0.self_attn.q_proj.weight", (256, 256)) == QuantizationConfig(8, 128)
    assert recipe.of_weight("layers.0.mlp.up_proj.weight", (256, 256)) == QuantizationConfig(4, 128, "search")
    larger = precision_for("mixed", "cpu", QuantizationOptions(block=64))
    assert larger.of_weight("layers.0.self_attn.q_proj.weight", (256, 256)) == QuantizationConfig(8, 64)


def test_altup_and_vectors_are_not_quantized() -> None:
    recipe = precision_for("int4", "cpu")
    assert recipe.of_weight("layers.0.mlp.up_proj.weight", (256, 128)) == recipe.weights
    assert recipe.of_weight("layers.0.laurel.linear_right.weight", (128, 16)) == QuantizationConfig(4, 16, "search")
    assert recipe.of_weight("layers.0.altup.modality_router.weight", (4, 128)) == "fp32"
    assert recipe.of_weight("layers.0.laurel.post_laurel_norm.weight", (128,)) == "fp32"
    assert recipe.of_weight("altup_projections.0.weight", (128, 128)) == recipe.weights


def test_quantized_and_plain_tensors_lie_one_after_another() -> None:
    shapes = {"a": (64, 256), "b": (7,), "c": (32, 32)}
    storage = {"a": QuantizationConfig(4, 32), "b": "fp32", "c": QuantizationConfig(8, 32, "hqq")}
    weights = lay_out(FILE, shapes, storage.__getitem__)
    assert isinstance(weights["a"], BlockQuantizedTensor) and isinstance(weights["b"], StoredTensor)
    assert weights["a"].nbytes == 64 * 128 + 64 * 8 * 2
    assert weights["c"].nbytes == 32 * 32 + 32 * 2 + 32
    ends = [stored.end for stored in weights.values()]
    assert all(stored.offset >= end for stored, end in zip([*weights.values()][1:], ends))


def test_the_work_that_is_told_adds_up(tmp_path: Path) -> None:
    values = torch.randn(64, 256).numpy()
    storage: dict[str, Storage] = {"a": PerRow(), "b": "bf16", **{m: QuantizationConfig(4, 32, m) for m in METHODS}}
    weights = lay_out(FILE, dict.fromkeys(storage, (64, 256)), storage.__getitem__)
    told: list[float] = []
    WeightStream(tmp_path, told.append).write_file(FILE, weights, lambda _: iter([values[:40], values[40:]]))
    assert sum(told) == pytest.approx(work_of(weights.values()))
    assert len(told) == 2 * len(storage), "each block counts once it is written"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_change_nothing(threads: Callable[[int], None]) -> None:
    values = torch.randn(700, 2048, generator=torch.Generator().manual_seed(0))
    made = []
    for count in (1, 3):
        threads(count)
        made.append(quantize(values, QuantizationConfig(4, 128, "search")))
        assert torch.get_num_threads() == count
    assert torch.equal(made[0].codes, made[1].codes) and torch.equal(made[0].scales, made[1].scales)


def test_callers_at_once_share_the_workers(threads: Callable[[int], None]) -> None:
    threads(3)
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as callers:
        made = [*callers.map(lambda _: quantize(values, QuantizationConfig(4, 128, "search")).codes, range(200))]
    assert all(torch.equal(codes, made[0]) for codes in made)
    assert torch.get_num_threads() == 3


def test_the_number_of_threads_comes_back_after_an_error(threads: Callable[[int], None]) -> None:
    threads(3)

    def fail() -> None:
        with one_thread_an_operation(), one_thread_an_operation():
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found_anywhere(value: float, dtype: torch.dtype) -> None:
    for count in (1, 7, 1000):
        values = torch.linspace(-3, 3, count).to(dtype)
        assert _all_finite(values)
        for place in {0, count // 2, count - 1}:
            spoiled = values.clone()
            spoiled[place] = value
            assert not _all_finite(spoiled)
