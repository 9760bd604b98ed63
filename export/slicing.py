"""MatFormer slices: a row of a slice table becomes a validated configuration and cuts of the checkpoint's tensors.

A slice keeps some layers of a checkpoint and, of each kept layer's feed-forward network, the first channels.
The rules follow Google's MatFormer Lab and the published table, `matformer_configs/gemma3n.csv`.
"""

from __future__ import annotations

import copy
import csv
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3n_onnx.export.errors import SliceError
from gemma3n_onnx.graphs.config import TextConfig

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Checkpoint

REFERENCE_LAYERS = 35
REFERENCE_WIDTH = 16384
REFERENCE_HIDDEN = 2048
"""Dimensions of E4B, the source of the published slices."""

WIDTH_MULTIPLE = 32
"""The smallest block size of the 4-bit matrix product; blocks of `down_proj` run along the FFN width."""

Ranges = tuple[tuple[int, int], ...]
"""Half-open `(start, stop)` ranges, ascending, none adjacent to the next."""


@dataclass(frozen=True)
class SliceSpec:
    """One row of a slice table, not yet checked against a checkpoint.

    Raises:
        SliceError: a width is not positive, or a skipped layer is negative or repeated.
    """

    name: str
    widths: tuple[int, ...]
    """FFN width of each kept layer; entry i is layer i *after* skipping."""
    skipped: tuple[int, ...] = ()
    """Indices of the removed layers in the checkpoint."""
    effective_params_b: float | None = None
    mmlu: float | None = None
    """MMLU accuracy of the pre-trained model, in percent."""
    reference: bool = False
    """Whether this is a published slice, whose widths scale down with a checkpoint narrower than E4B."""

    def __post_init__(self) -> None:
        if not self.widths:
            raise SliceError("FFN hidden dims is empty; it needs one width for each kept layer.")
        for layer, width in enumerate(self.widths):
            if width <= 0:
                raise SliceError(f"FFN hidden dims: layer {layer} has width {width}; a width must be positive.")
        for layer in self.skipped:
            if layer < 0:
                raise SliceError(f"Layers skipped: {layer} is not a layer number; the first layer is 0.")
            if self.skipped.count(layer) > 1:
                raise SliceError(f"Layers skipped: layer {layer} is repeated; a layer is skipped once.")


# --- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceTable:
    source: str
    """The name in messages: the file's path, or "the published table"."""
    specs: tuple[SliceSpec, ...]


_COLUMNS = {
    "name": "name",
    "layers": "layers",
    "# layers": "layers",
    "effective_params_b": "effective",
    "# effective params (b)": "effective",
    "mmlu_pt": "mmlu",
    "mmlu pt accuracy": "mmlu",
    "ffn_hidden_dims": "widths",
    "ffn hidden dims": "widths",
    "layers_skipped": "skipped",
    "layers skipped": "skipped",
}
_REQUIRED = {
    "name": "name",
    "layers": "# Layers",
    "widths": "FFN Hidden Dims",
    "skipped": "Layers Skipped",
}
_INTEGER = r"-?[0-9](?:_?[0-9]){0,8}"
_ELEMENT = re.compile(rf"({_INTEGER})(?:\s*\*\s*({_INTEGER}))?")


def load_slices(given: Path | None = None, own: Path | None = None) -> SliceTable:
    """The given CSV, else the checkpoint's own, else the published table.

    Columns have their published or their short names; unknown columns are ignored. A list cell holds integers
    (underscores allowed) and products `a * b` in brackets, and must be quoted if it has commas. Widths in a file are
    absolute; only widths of the published table scale with the checkpoint.

    Raises:
        SliceError: no such file, not a CSV, a missing column, or an invalid row; the message names line, column
            and rule.
    """
    path = own if given is None else given
    if path is None:
        table = resources.files("gemma3n_onnx.matformer_configs") / "gemma3n.csv"
        return SliceTable("the published table", _parse(table.read_text("utf-8"), "gemma3n.csv", reference=True))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SliceError(f"There is no slice table at {path}; give the path of a CSV.") from error
    except UnicodeDecodeError as error:
        raise SliceError(f"{path} is not a CSV: it is not UTF-8 text.") from error
    except OSError as error:
        raise SliceError(f"{path} cannot be read as a CSV: {error.strerror}.") from error
    return SliceTable(str(path), _parse(text, str(path), reference=False))


def _parse(text: str, source: str, *, reference: bool) -> tuple[SliceSpec, ...]:
    if "\0" in text:
        raise SliceError(f"{source} is not a CSV: it contains binary data.")
    # One list item per physical line, so that `line_num` is the line in the file.
    reader = csv.reader(text.splitlines(keepends=True), skipinitialspace=True, strict=True)
    columns: dict[str, tuple[int, str]] = {}
    specs: dict[str, SliceSpec] = {}
    lines: dict[str, int] = {}
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _header(cells, f"{source}, line {reader.line_num}")
                width = len(cells)
                continue
            where = f"{source}, line {reader.line_num}"
            if len(cells) != width:
                raise SliceError(
                    f"{where}: {len(cells)} cells under {width} columns; put a list with commas in double quotes."
                )
            spec = _row(cells, columns, where, reference)
            key = _key(spec.name)
            if key in specs:
                raise SliceError(
                    f"{where}, column {columns['name'][1]!r}: {spec.name!r} is already the slice of line "
                    f"{lines[key]}; a name must be unique."
                )
            specs[key], lines[key] = spec, reader.line_num
    except csv.Error as error:
        raise SliceError(f"{source}, line {reader.line_num}: not a CSV row: {error}.") from error
    if not specs:
        raise SliceError(f"{source} has no slices: it needs a header and at least one row.")
    return tuple(specs.values())


def _header(cells: list[str], where: str) -> dict[str, tuple[int, str]]:
    """`{field: (place, the column's own title)}`."""
    columns: dict[str, tuple[int, str]] = {}
    for place, cell in enumerate(cells):
        title = " ".join(cell.split())
        field = _COLUMNS.get(title.casefold())
        if field in columns:
            raise SliceError(f"{where}: columns {columns[field][1]!r} and {title!r} mean the same; keep one.")
        if field:
            columns[field] = place, title
    for field, title in _REQUIRED.items():
        if field not in columns:
            raise SliceError(f"{where}: column {title!r} is missing.")
    return columns


def _row(cells: list[str], columns: Mapping[str, tuple[int, str]], where: str, reference: bool) -> SliceSpec:
    def cell(field: str) -> tuple[str, str]:
        """The cell's text, and its position for messages."""
        if field not in columns:
            return "", where
        place, title = columns[field]
        return cells[place].strip().strip("'\"").strip(), f"{where}, column {title!r}"

    name, at = cell("name")
    if not name:
        raise SliceError(f"{at}: empty; a slice needs a name.")
    widths = _integers(*cell("widths"))
    layers, at = cell("layers")
    if not re.fullmatch(_INTEGER, layers):
        raise SliceError(f"{at}: {layers!r} is not an integer.")
    if int(layers) != len(widths):
        raise SliceError(
            f"{at}: {layers} layers, but {columns['widths'][1]!r} has {len(widths)} widths; it needs one for each."
        )
    skipped = _integers(*cell("skipped"))
    effective, mmlu = _number(*cell("effective")), _number(*cell("mmlu"))
    try:
        return SliceSpec(name, widths, skipped, effective, mmlu, reference)
    except SliceError as error:
        raise SliceError(f"{where}: column {error}") from error


def _integers(cell: str, where: str) -> tuple[int, ...]:
    if cell.startswith("[") != cell.endswith("]"):
        raise SliceError(f"{where}: a bracket of {cell[:40]!r} is missing; a list is written [a, b * c].")
    inside = cell.removeprefix("[").removesuffix("]").strip().removesuffix(",")
    if not inside:
        return ()
    numbers = []
    for place, element in enumerate(inside.split(",")):
        match = _ELEMENT.fullmatch(element.strip())
        if match is None:
            raise SliceError(
                f"{where}: entry {place}, {element.strip()[:40]!r}, is neither an integer nor a product `a * b`."
            )
        numbers.append(int(match[1]) * int(match[2] or 1))
    return tuple(numbers)


def _number(cell: str, where: str) -> float | None:
    if not cell:
        return None
    try:
        number = float(cell.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise SliceError(f"{where}: {cell[:40]!r} is not a number of at least 0.")
    return number


# --- names -------------------------------------------------------------------------------------------------

_LONG_NAMES = {
    "main model": "e4b",
    "main model (e4b)": "e4b",
    "config for official e2b model": "e2b",
}
_LONG_NAME = re.compile(r"config for (e[0-9.]+b) \((layer|block)-level\)")


def _key(name: str) -> str:
    """The short name in lower case, of a short or a published name in any case."""
    key = " ".join(name.casefold().split())
    if match := _LONG_NAME.fullmatch(key):
        return f"{match[1]}-{match[2]}"
    return _LONG_NAMES.get(key, key)


def find_slice(name: str, table: SliceTable) -> SliceSpec:
    """The slice called `name`: its name in the table, its published name, or an unambiguous prefix (`E2.49B`).

    Raises:
        SliceError: unknown (the message names the table and the nearest names), or ambiguous (the message names
            the candidates).
    """
    by_key = {_key(spec.name): spec for spec in table.specs}
    key = _key(name)
    if key in by_key:
        return by_key[key]
    longer = [spec for candidate, spec in by_key.items() if candidate.startswith(f"{key}-")]
    if len(longer) == 1:
        return longer[0]
    if longer:
        choices = " or ".join(spec.name for spec in longer)
        raise SliceError(f"The slice name {name!r} is ambiguous; choose {choices}.")
    nearest = [by_key[match].name for match in difflib.get_close_matches(key, by_key)]
    hint = (
        f"the nearest are {', '.join(nearest)}"
        if nearest
        else f"its slices are {', '.join(s.name for s in by_key.values())}"
    )
    raise SliceError(f"There is no slice {name!r} in {table.source}; {hint}.")


# --- a slice of a checkpoint -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorCut:
    """The part of a checkpoint tensor that becomes a tensor of the slice; None is all rows or columns."""

    source: str
    rows: Ranges | None = None
    columns: Ranges | None = None


@dataclass(frozen=True)
class Slice:
    """The kept part of a checkpoint. Tensor names are relative to the decoder
    (`layers.7.mlp.up_proj.weight`)."""

    name: str
    source: TextConfig
    """The checkpoint's decoder."""
    config: TextConfig
    """The slice's decoder."""
    keep: tuple[int, ...]
    """Indices of the kept layers in the checkpoint."""
    mmlu: float | None = None
    """The published MMLU accuracy of this slice, in percent."""

    @property
    def skipped(self) -> tuple[int, ...]:
        """Indices of the removed layers in the checkpoint."""
        return tuple(i for i in range(self.source.num_layers) if i not in self.keep)

    def hf_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the checkpoint's `config.json`, full or text-only, that describes the slice."""
        sliced = copy.deepcopy(dict(config))
        sliced["tie_word_embeddings"] = self.config.tied_head
        sliced.get("text_config", sliced).update(
            tie_word_embeddings=self.config.tied_head,
            vocab_size=self.config.vocab_size,
            vocab_size_per_layer_input=self.config.vocab_size_per_layer_input,
            num_hidden_layers=self.config.num_layers,
            intermediate_size=list(self.config.intermediate_sizes),
            layer_types=list(self.config.layer_types),
            activation_sparsity_pattern=list(self.config.activation_sparsity),
            num_kv_shared_layers=self.config.num_kv_shared_layers,
        )
        return sliced

    def source_of(self, name: str) -> TensorCut:
        """The part of a checkpoint tensor that becomes tensor `name` of the slice.

        Raises:
            SliceError: the slice has no such layer, or that layer computes no K and V.
        """
        groups = _merged(self.keep, self.config.hidden_size_per_layer_input)
        if len(self.keep) == self.source.num_layers:
            groups = None
        if name == "embed_tokens_per_layer.weight":
            return TensorCut(name, columns=groups)
        if name == "per_layer_model_projection.weight":
            return TensorCut(name, rows=groups)
        layer, rest = _split(name)
        if layer is None:
            return TensorCut(name)
        if layer >= self.config.num_layers:
            raise SliceError(f"{name}: slice {self.name} has only {self.config.num_layers} layers.")
        if layer >= self.config.num_kv_layers and _KV_TENSOR.match(rest):
            raise SliceError(f"{name}: layer {layer} of slice {self.name} reads a donor's K and V.")
        original = self.keep[layer]
        source = f"layers.{original}.{rest}"
        width = self.config.intermediate_sizes[layer]
        if width == self.source.intermediate_sizes[original]:
            return TensorCut(source)
        if rest in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            return TensorCut(source, rows=((0, width),))
        if rest == "mlp.down_proj.weight":
            return TensorCut(source, columns=((0, width),))
        return TensorCut(source)


def dropped(names: Iterable[str], slice_: Slice) -> set[str]:
    """The checkpoint's tensors that the slice does not use: skipped layers, and K, V and their norms in KV-shared
    layers.
    """
    unused = set()
    for name in names:
        layer, rest = _split(name)
        if layer is None:
            continue
        if layer in slice_.skipped or (layer >= slice_.source.num_kv_layers and _KV_TENSOR.match(rest)):
            unused.add(name)
    return unused


def choose_slice(checkpoint: Checkpoint, name: str | None, table: Path | None) -> Slice:
    """The slice called `name` in the given table, else the checkpoint's own, else the published one; None is the whole
    checkpoint.

    Raises:
        SliceError: there is no such slice, or it cannot be cut from the checkpoint.
    """
    if name is None:
        return whole(checkpoint.text_config)
    spec = find_slice(name, load_slices(table, checkpoint.slice_table))
    return resolve(spec, checkpoint.text_config)


def whole(config: TextConfig, name: str = "whole", mmlu: float | None = None) -> Slice:
    """The unsliced checkpoint."""
    return Slice(name, config, config, tuple(range(config.num_layers)), mmlu)


def resolve(spec: SliceSpec, config: TextConfig) -> Slice:
    """Checks a slice against a checkpoint and resolves it to the kept layers and their widths.

    A checkpoint with E4B's hidden size of 2048 is cut to the widths as written. A narrower one is a scaled-down test
    model: the widths of a published slice are multiplied by its FFN width / 16384, so all its layers must have the same
    FFN width.

    A checkpoint that already is the slice is returned whole: it has the slice's number of layers (out of E4B's 35) and
    its widths, or, if narrower, widths in the same proportions.

    Raises:
        SliceError: the checkpoint has too few layers or channels for the slice, or the slice breaks a rule.
    """
    narrow = spec.reference and config.hidden_size != REFERENCE_HIDDEN
    mmlu = None if narrow else spec.mmlu
    if _is_already(spec, config, narrow):
        return whole(config, spec.name, mmlu)
    layers = len(spec.widths) + len(spec.skipped)
    if layers != config.num_layers:
        raise SliceError(
            f"Slice {spec.name} needs a checkpoint of {layers} layers ({len(spec.widths)} FFN widths and "
            f"{len(spec.skipped)} skipped layers), but this one has {config.num_layers}: the list of widths "
            f"must have "
            "one entry for each kept layer, and a slice can only remove layers."
        )
    _check_skipped(spec, config)
    keep = tuple(i for i in range(config.num_layers) if i not in spec.skipped)
    widths = _scaled(spec, config) if narrow else spec.widths
    for layer, (original, width) in enumerate(zip(keep, widths)):
        _check_width(f"Slice {spec.name}, layer {layer}", width, config.intermediate_sizes[original])
    sliced = replace(
        config,
        intermediate_sizes=widths,
        layer_types=tuple(config.layer_types[i] for i in keep),
        activation_sparsity=tuple(config.activation_sparsity[i] for i in keep),
        num_kv_shared_layers=sum(i >= config.num_kv_layers for i in keep),
    )
    return Slice(spec.name, config, sliced, keep, mmlu)


def _is_already(spec: SliceSpec, config: TextConfig, narrow: bool) -> bool:
    if config.num_layers != len(spec.widths) or config.num_layers + len(spec.skipped) != REFERENCE_LAYERS:
        return False
    found = config.intermediate_sizes
    if not narrow:
        return found == spec.widths
    return all(width * spec.widths[0] == wanted * found[0] for width, wanted in zip(found, spec.widths))


def _scaled(spec: SliceSpec, config: TextConfig) -> tuple[int, ...]:
    full = config.intermediate_sizes[0]
    if set(config.intermediate_sizes) != {full}:
        raise SliceError(
            f"Slice {spec.name} cannot be scaled to this checkpoint: its layers differ in FFN width "
            f"({min(config.intermediate_sizes)} to {max(config.intermediate_sizes)}), so it is already a "
            f"slice."
        )
    for width in spec.widths:
        if width * full % REFERENCE_WIDTH:
            raise SliceError(
                f"Slice {spec.name} cannot be scaled to this checkpoint: {width} * {full} / "
                f"{REFERENCE_WIDTH} "
                "is not an integer."
            )
    return tuple(width * full // REFERENCE_WIDTH for width in spec.widths)


def _check_width(where: str, width: int, original: int) -> None:
    if width > original:
        raise SliceError(f"{where}: FFN width {width} is above the checkpoint's {original}; a slice can only narrow.")
    if original % WIDTH_MULTIPLE == 0 and width % WIDTH_MULTIPLE:
        raise SliceError(f"{where}: FFN width {width} is not a multiple of {WIDTH_MULTIPLE}, which the kernels need.")


def _check_skipped(spec: SliceSpec, config: TextConfig) -> None:
    readers: dict[int, list[int]] = {}
    for layer in range(config.num_kv_layers, config.num_layers):
        readers.setdefault(config.kv_source(layer), []).append(layer)
    for layer in spec.skipped:
        if layer >= config.num_layers:
            raise SliceError(
                f"Slice {spec.name} skips layer {layer}, but the checkpoint's layers are 0 to {config.num_layers - 1}."
            )
        if layer in readers:
            raise SliceError(
                f"Slice {spec.name} skips layer {layer}, a KV donor: layers "
                f"{', '.join(map(str, readers[layer]))} read "
                f"its K and V, and without it they have no donor of their type, {config.layer_types[layer]}."
            )
    shared = set(range(config.num_kv_layers, config.num_layers))
    if shared and shared <= set(spec.skipped):
        raise SliceError(
            f"Slice {spec.name} skips all KV-shared layers, {min(shared)} to {max(shared)}; keep at least one."
        )


_LAYER_TENSOR = re.compile(r"layers\.([0-9]+)\.(.+)")
_KV_TENSOR = re.compile(r"self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")


def _split(name: str) -> tuple[int | None, str]:
    """`layers.7.mlp.up_proj.weight` -> (7, `mlp.up_proj.weight`); None for a tensor outside the layers."""
    match = _LAYER_TENSOR.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def _merged(groups: tuple[int, ...], size: int) -> Ranges | None:
    """The ranges of rows or columns that groups of `size` cover: (0, 1, 3) by 4 -> ((0, 8), (12, 16))."""
    starts = [groups[0], *(b for a, b in pairwise(groups) if b != a + 1)]
    stops = [*(a + 1 for a, b in pairwise(groups) if b != a + 1), groups[-1] + 1]
    return tuple((start * size, stop * size) for start, stop in zip(starts, stops))
