"""The artifact format: a folder of graphs and tables, described by `manifest.json`.

The runtime owns these dataclasses and the exporter fills them in. They hold everything that the runtime needs to know
about a model; it recomputes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError, ArtifactNotFoundError, shown

FORMAT = "gemma3n-onnx"
FORMAT_VERSION = "5.2"
MANIFEST = "manifest.json"
EXPORT_ID = "gemma3n_onnx.export_id"
"""The metadata property of a graph that repeats the manifest's `export_id`."""
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_NOT_COMPUTED = {"producer", "source", "slice", "mmlu", "files", "export_id"}
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_NAME_BYTES = 255  # of a file, in every common file system

INPUTS_EMBEDS, PER_LAYER_INPUTS = "inputs_embeds", "per_layer_inputs"
POSITION_IDS, ATTENTION_MASK = "position_ids", "attention_mask"
"""Decoder inputs, without the KV caches, whose names are in the manifest."""
LOGITS = "logits"
TARGETS, TARGET_LOGPROBS = "targets", "target_logprobs"
TOP_LOGPROBS, TOP_IDS = "top_logprobs", "top_ids"
"""Input and outputs of a scorer."""
NEXT_TOKEN, NEXT_LOGIT = "next_token", "next_logit"
"""Outputs [B, 1, 1] of a decoder with a built-in argmax: the most likely token's id and logit."""

_NO_PACKING = "session.disable_prepacking"
_CPU_SESSION_CONFIG = {
    # Float weights stay memory-mapped; prepacking would copy each of them into private memory.
    _NO_PACKING: "1",
    # Constant folding widens fp16 and bf16 weights at load. Above the default limit, a head is widened at every step.
    "optimization.constant_folding_max_output_size_in_bytes": str(1 << 40),
}


def cpu_session_config(quantized: bool) -> dict[str, str]:
    """CPU session configuration of an artifact's graphs; quantized weights are prepacked (slow otherwise)."""
    return {key: value for key, value in _CPU_SESSION_CONFIG.items() if key != _NO_PACKING or not quantized}


FLOAT_DTYPES = ("fp32", "fp16", "bf16")
QUANTIZED_BITS = {"int4": 4, "int8": 8}
BYTES_PER_VALUE = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


_LARGEST = {"layers": 1024, "tokens": 1 << 24, "width": 1 << 20, "samples": 1 << 30, "bytes": 1 << 50}


def _require_ranges(info: object, **ranges: tuple[float, float]) -> None:
    """Raises ValueError if a field, or an item of it, is outside its range, both ends included; None is inside."""
    for name, (low, high) in ranges.items():
        value = getattr(info, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:  # NaN is in no range
                raise ValueError(f"{name} is {shown(number)}, but must be from {low:g} to {high:g}")


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output. `shape` holds sizes, or names for the dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphInfo:
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class CacheInfo:
    """One KV cache: two buffers [batch, kv_heads, capacity, head_dim], each bound as past and as present.

    The cache keeps `window` positions (see `kv_window`), or all if None. Attention covers the last `attention_window`
    positions, or all if None.
    """

    layer: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    dtype: str
    kv_heads: int
    head_dim: int
    window: int | None
    attention_window: int | None

    def __post_init__(self) -> None:
        tokens = (1, _LARGEST["tokens"])
        _require_ranges(self, layer=(0, _LARGEST["layers"]), kv_heads=(1, 1 << 16), head_dim=(1, _LARGEST["width"]))
        _require_ranges(self, window=tokens, attention_window=tokens)


@dataclass(frozen=True)
class TableInfo:
    """A raw row-major file of `rows` x `width` values; rows are multiplied by `scale` when read.

    With `int4` or `int8`, the file has unsigned codes (int4: two a byte, the first in the low bits), then, at byte
    `scales_offset`, an fp16 scale for every `block` values of a row. A value is scale * (code - 8), or - 128 for int8.
    """

    file: str
    dtype: str
    rows: int
    width: int
    scale: float
    block: int | None
    scales_offset: int | None

    def __post_init__(self) -> None:
        width = (1, _LARGEST["width"])
        _require_ranges(self, rows=(1, 1 << 31), width=width, block=width, scales_offset=(0, _LARGEST["bytes"]))
        _require_ranges(self, scale=(1e-6, 1e6))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's values, without scales."""
        bits = QUANTIZED_BITS.get(self.dtype)
        return self.width * BYTES_PER_VALUE[self.dtype] if bits is None else self.width * bits // 8

    @property
    def scale_row_bytes(self) -> int:
        return 0 if self.block is None else self.width // self.block * BYTES_PER_VALUE["fp16"]


@dataclass(frozen=True)
class QuantizationInfo:
    """How a matrix is quantized: each `block` values of a row (None: the whole row) share a scale and, in some
    methods, a zero point."""

    bits: int
    block: int | None
    method: str


@dataclass(frozen=True)
class SoftTokens:
    """The prompt text of one image or clip: `prefix`, `count` times `token`, `suffix`."""

    token: str
    token_id: int
    count: int
    prefix: str
    suffix: str

    def __post_init__(self) -> None:
        _require_ranges(self, count=(1, 1 << 16))
        if not self.token:
            raise ValueError("token is empty")


@dataclass(frozen=True)
class VisionInfo:
    """The vision encoder and its preprocessing: images are resized to a square, one of `image_sizes`, and multiplied
    by `rescale`.

    Matrix products run in `compute_dtype`, everything else in fp32. Weights are stored in it too, unless it is fp32."""

    graph: GraphInfo
    soft_tokens: SoftTokens
    image_sizes: tuple[int, ...]
    default_image_size: int
    rescale: float
    compute_dtype: str

    def __post_init__(self) -> None:
        _require_ranges(self, image_sizes=(1, 1 << 13), rescale=(sys.float_info.min, 1))
        if self.default_image_size not in self.image_sizes:
            raise ValueError(f"default_image_size is {self.default_image_size}, which is none of image_sizes")


@dataclass(frozen=True)
class LogMelInfo:
    """The audio encoder's log-mel front end; lengths are in samples."""

    sample_rate_hz: int
    frame_length: int
    hop_length: int
    fft_length: int
    mel_bins: int
    min_frequency_hz: float
    max_frequency_hz: float
    preemphasis: float
    mel_floor: float
    max_samples: int
    pad_multiple: int

    def __post_init__(self) -> None:
        _require_ranges(self, sample_rate_hz=(1_000, 768_000), fft_length=(1, 1 << 16), mel_bins=(1, 1024))
        _require_ranges(self, frame_length=(2, self.fft_length), hop_length=(1, self.fft_length))
        _require_ranges(self, max_frequency_hz=(1, self.sample_rate_hz / 2), preemphasis=(0, 1))
        _require_ranges(self, min_frequency_hz=(0, self.max_frequency_hz), mel_floor=(sys.float_info.min, 1))
        _require_ranges(self, max_samples=(self.frame_length + 1, _LARGEST["samples"]), pad_multiple=(1, 1 << 16))
        if self.min_frequency_hz == self.max_frequency_hz:
            raise ValueError(f"min_frequency_hz and max_frequency_hz are both {self.max_frequency_hz:g}")


@dataclass(frozen=True)
class AudioInfo:
    """The audio encoder and its front end; `compute_dtype` as in `VisionInfo`."""

    graph: GraphInfo
    soft_tokens: SoftTokens
    log_mel: LogMelInfo
    compute_dtype: str


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _require_ranges(self, bytes=(0, _LARGEST["bytes"]))


@dataclass(frozen=True)
class ParameterCounts:
    """`text` counts the decoder with its tables, `effective` excludes both embedding tables; no encoder counts 0."""

    text: int
    effective: int
    per_layer_embeddings: int
    token_embeddings: int
    vision: int
    audio: int


@dataclass(frozen=True)
class Manifest:
    """`token_embeddings` has `vocab_size` rows, then the hard rows of the ids from `first_hard_token_id` on, if any.

    `quantization` lists the quantized matrices; all others are stored as `storage`. `prefill`: a decoder without
    logits and with int8 matrices, faster on prompts. `candidates`: the graph that selects the top logits on the
    device. `scorer`: a decoder that returns log-probabilities of given tokens; artifacts before format 5.1 have none.
    `export_id`: see `export_id_of`; in the metadata of each graph, too, since files of two exports do not belong
    together; before format 5.2 there is none. `step_bytes`: bytes in memory of the weights that a decode step reads.
    `mmlu`: the slice's published MMLU, in percent.
    """

    format: str
    format_version: str
    producer: str
    source: str
    slice: str
    precision: str
    storage: str
    compute_dtype: str
    quantization: Mapping[str, QuantizationInfo]
    target: str
    logits: str
    modalities: tuple[str, ...]
    parameters: ParameterCounts
    num_layers: int
    vocab_size: int
    max_context: int
    bos_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    decoder: GraphInfo
    embedding: GraphInfo
    prefill: GraphInfo | None
    candidates: GraphInfo | None
    caches: tuple[CacheInfo, ...]
    step_bytes: int
    mmlu: float | None
    token_embeddings: TableInfo
    per_layer_embeddings: TableInfo
    first_hard_token_id: int
    vision: VisionInfo | None
    audio: AudioInfo | None
    files: Mapping[str, FileInfo]
    scorer: GraphInfo | None = None
    export_id: str | None = None

    def __post_init__(self) -> None:
        tokens = (1, _LARGEST["tokens"])
        _require_ranges(self, num_layers=(1, _LARGEST["layers"]), vocab_size=tokens, max_context=tokens)
        _require_ranges(self, step_bytes=(0, _LARGEST["bytes"]), mmlu=(0, 100))

    @property
    def encoders(self) -> dict[str, VisionInfo | AudioInfo]:
        """The artifact's encoders, by modality."""
        both = {"vision": self.vision, "audio": self.audio}
        return {modality: info for modality, info in both.items() if info is not None}

    @property
    def graphs(self) -> list[GraphInfo]:
        text = (self.decoder, self.embedding, self.prefill, self.candidates, self.scorer)
        return [*filter(None, text), *(encoder.graph for encoder in self.encoders.values())]

    @property
    def weight_files(self) -> set[str]:
        """The large files; all others are read whole at load, or are as small."""
        tables = {self.token_embeddings.file, self.per_layer_embeddings.file}
        return tables | {f"{graph.file}.data" for graph in self.graphs}


def load_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest, the sizes of the files it names, and the checksums of all but the weights.

    Raises:
        ArtifactNotFoundError: no folder, or no manifest in it.
        ArtifactError: unreadable manifest, unknown version, missing key, a value out of range; a file that is missing,
            damaged or a link to elsewhere.
    """
    if not os.path.isdir(folder):  # unlike `Path.is_dir`, False for a name that is too long
        raise ArtifactNotFoundError(f"There is no artifact folder {folder}; export one with gemma3n-export.")
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            raise ArtifactNotFoundError(
                f"{folder} is a checkpoint, not an artifact (it has no {MANIFEST}); export it with gemma3n-export "
                f"--model {folder}, and give the folder that this writes."
            )
        raise ArtifactNotFoundError(
            f"{folder} has no {MANIFEST}, so it is not an exported artifact; export one with gemma3n-export."
        )
    manifest = read_manifest(path)
    for name, info in manifest.files.items():
        _check_file(folder / name, info)
    verify_checksums(folder, manifest, names=manifest.files.keys() - manifest.weight_files)
    return manifest


def _check_file(file: Path, info: FileInfo) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file.parent} lacks the file {file.name}; copy it again or export the artifact again.")
    if not is_own_file(file):
        raise ArtifactError(f"{file} is a link to a file elsewhere; copy that file into the folder.")
    if (found := file.stat().st_size) != info.bytes:
        raise ArtifactError(
            f"{file} has {found:,} bytes, but the manifest says {info.bytes:,}; "
            "copy it again or export the artifact again."
        )


def is_own_file(file: Path) -> bool:
    """Whether a file lies in its folder once links are resolved, or in that of the Hugging Face cache's blobs: a
    snapshot there, in `snapshots/COMMIT`, is a folder of links to `../../blobs`."""
    folder, target = (Path(os.path.realpath(path)) for path in (file.parent, file))
    places = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    return any(target.is_relative_to(place) for place in places)


def fingerprint(folder: Path, manifest: Manifest) -> tuple[tuple[int, int, int] | None, ...]:
    """Differs once a file of the artifact has been written, replaced or removed. Reads none of them."""

    def of(name: str) -> tuple[int, int, int] | None:
        try:
            found = os.stat(folder / name)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    return tuple(map(of, (MANIFEST, *manifest.files)))


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest, but none of the files that it names.

    Raises:
        ArtifactError: unreadable manifest, unknown version, missing key, a value out of range, a file outside its
            folder.
    """
    try:
        if not is_own_file(path):
            raise ArtifactError(f"{path} is a link to a file elsewhere; copy that file into the folder.")
        if (size := path.stat().st_size) > _MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} has {size:,} bytes, which no manifest has; export the artifact again.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); export the artifact again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError(f"{path} does not describe a {FORMAT} artifact; export it with gemma3n-export.")
    version = str(data.get("format_version"))[:40]
    if version.split(".", maxsplit=1)[0] != FORMAT_VERSION.split(".", maxsplit=1)[0]:
        raise ArtifactError(
            f"{path} has format version {version}, but this runtime reads {FORMAT_VERSION}; "
            "install the matching gemma3n-onnx or export the artifact again."
        )
    manifest = _parse(Manifest, data, str(path))
    for name in manifest.files:
        if not _is_plain_name(name):
            raise ArtifactError(
                f"{path} names the file {shown(name)}, which is not in its folder; export the artifact again."
            )
    _check_consistency(manifest, path)
    if manifest.export_id not in (None, export_id_of(data, manifest.weight_files)):
        raise ArtifactError(
            f"{path} was changed after the export: its export_id does not fit what it says; copy it again or export "
            "the artifact again."
        )
    return manifest


def export_id_of(data: Mapping[str, Any], weight_files: Iterable[str]) -> str:
    """Identifies what the artifact of a manifest computes: a hash of the graphs' inputs and outputs, the constants and
    the checksums of the weights, but not of where they come from. `data`: the manifest as JSON has it."""
    content = {key: value for key, value in data.items() if key not in _NOT_COMPUTED}
    content["files"] = {name: data["files"][name] for name in weight_files if name in data["files"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verify_checksums(
    folder: Path,
    manifest: Manifest,
    progress: Callable[[str, int], None] | None = None,
    names: Iterable[str] | None = None,
) -> None:
    """Verifies the SHA-256 of every file, or of those in `names`; calls `progress(file, bytes)` while it reads.

    Raises:
        ArtifactError: a file differs from what was exported; the message names the first.
    """
    for name in manifest.files if names is None else sorted(names):
        report = None if progress is None else functools.partial(progress, name)
        try:
            differs = sha256_of(folder / name, report) != manifest.files[name].sha256
        except OSError as error:
            raise ArtifactError(f"{folder / name} cannot be read ({error.strerror}); check its permissions.") from error
        if differs:
            hint = ", or load it with chat_template=FILE" if name == CHAT_TEMPLATE_FILE else ""
            raise ArtifactError(
                f"{folder / name} is damaged: its SHA-256 differs from the manifest's; "
                f"copy it again or export the artifact again{hint}.",
                option="chat_template" if hint else None,
            )


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Calls `progress(bytes)` while it reads."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def _is_plain_name(name: str) -> bool:
    fits = len(name.encode(errors="replace")) <= _MAX_NAME_BYTES
    return fits and name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def _check_consistency(manifest: Manifest, path: Path) -> None:
    """Checks the invariants that table reads and cache layouts rely on."""

    def require(holds: bool, complaint: str) -> None:
        if not holds:
            raise ArtifactError(f"{path}: {complaint}; export the artifact again.")

    for token_id in (manifest.bos_token_id, manifest.pad_token_id, *manifest.eos_token_ids):
        require(0 <= token_id < manifest.vocab_size, f"token id {token_id} is outside the vocabulary")
    for graph in manifest.graphs:
        require(graph.file in manifest.files, f"the graph {shown(graph.file)} is not among the files")
    if (top := manifest.candidates) is not None:
        widths = [tensor.shape[-1:] for tensor in top.outputs]
        require(len(top.inputs) == 1 and len(widths) == 2, f"{top.file} does not have one input and two outputs")
        require(_are_sizes(widths), f"the outputs of {top.file} have no fixed width")
    if (scorer := manifest.scorer) is not None:
        widths = [tensor.shape[-1:] for tensor in scorer.outputs if tensor.name == TOP_IDS]
        require(len(widths) == 1 and _are_sizes(widths), f"{scorer.file} has no {TOP_IDS} of a fixed width")
    for name, wanted in (("compute_dtype", FLOAT_DTYPES), ("storage", FLOAT_DTYPES), ("logits", ("last", "all"))):
        value = getattr(manifest, name)
        require(value in wanted, f"{name} is {shown(value)}, but must be {' or '.join(wanted)}")
    require(TOKENIZER_FILE in manifest.files, f"{TOKENIZER_FILE} is not among the files")
    for table in (manifest.token_embeddings, manifest.per_layer_embeddings):
        require(table.file in manifest.files, f"the table {table.file!r} is not among the files")
        known = (*FLOAT_DTYPES, *QUANTIZED_BITS)
        require(table.dtype in known, f"the table {table.file} has the unknown dtype {table.dtype!r}")
        needed, found = table.rows * table.row_bytes, manifest.files[table.file].bytes
        if table.dtype in QUANTIZED_BITS:
            block = table.block or 0
            require(block > 0 and table.width % block == 0, f"the table {table.file} has blocks of {table.block}")
            require(table.scales_offset == needed, f"the scales of {table.file} begin at {table.scales_offset}")
            needed += table.rows * table.scale_row_bytes
        require(
            needed == found,
            f"the table {table.file} of {table.rows} x {table.width} {table.dtype} values takes {needed:,} bytes, "
            f"but the file has {found:,}",
        )
    rows = 2 * manifest.vocab_size - manifest.first_hard_token_id
    require(
        rows == manifest.token_embeddings.rows,
        f"the token table has {manifest.token_embeddings.rows} rows, which does not match vocab_size "
        f"{manifest.vocab_size} and first_hard_token_id {manifest.first_hard_token_id}",
    )
    for name in ("vision", "audio"):
        require(
            (name in manifest.encoders) == (name in manifest.modalities),
            f"the modalities {manifest.modalities} do not match the {name} encoder",
        )
    for name, encoder in manifest.encoders.items():
        soft = encoder.soft_tokens
        require(0 <= soft.token_id < manifest.vocab_size, f"soft token {soft.token_id} is outside the vocabulary")
        require(bool(encoder.graph.inputs), f"{name} has no inputs")
        require(len(encoder.graph.outputs) == 1, f"{name} has {len(encoder.graph.outputs)} outputs instead of one")
        require(encoder.compute_dtype in FLOAT_DTYPES, f"{name} has the unknown dtype {encoder.compute_dtype!r}")
    for cache in manifest.caches:
        require(cache.dtype in FLOAT_DTYPES, f"the cache of layer {cache.layer} has the unknown dtype {cache.dtype!r}")


def _are_sizes(widths: list[tuple[int | str, ...]]) -> bool:
    return all(len(width) == 1 and isinstance(width[0], int) and width[0] > 0 for width in widths)


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value`, decoded from JSON, as the type `kind`; a mismatch raises ArtifactError with its place."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        hints = typing.get_type_hints(kind)
        optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
        if missing := hints.keys() - optional - value.keys():
            raise ArtifactError(f"{where} has no {sorted(missing)[0]!r}; export the artifact again.")
        given = {name: hint for name, hint in hints.items() if name in value}
        fields = {name: _parse(hint, value[name], f"{where}: {name}") for name, hint in given.items()}
        try:
            return kind(**fields)  # type: ignore[operator]
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}; export the artifact again.") from error
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {key: _parse(arguments[1], item, f"{where}: {key}") for key, item in value.items()}
    options = arguments if origin in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if dataclasses.is_dataclass(option):
            return None if value is None and type(None) in options else _parse(option, value, where)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    for option in options:
        if type(value) is option:
            return value
    raise _mismatch(where, " or ".join(getattr(o, "__name__", str(o)) for o in options), value)


def _mismatch(where: str, wanted: str, value: Any) -> ArtifactError:
    return ArtifactError(f"{where} is {shown(value)} but must be {wanted}; export the artifact again.")
