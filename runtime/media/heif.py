"""Decodes HEIC pictures: boxes of ISO/IEC 14496-12 and 23008-12, and pixels with PyAV's HEVC decoder.

Phones store a picture as a grid of tiles, each an item of its own. FFmpeg's demuxer shows these as separate streams,
and PyAV does not say how they fit together; hence the parser.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from gemma3n_onnx.runtime.errors import MediaError, PackageMissingError

from .limits import MAX_PIXELS, check_size

if TYPE_CHECKING:
    from PIL.Image import Image

# Brands of files with pictures in HEVC; "mif1" alone may also be AVIF.
BRANDS = (b"heic", b"heix", b"heim", b"heis")
ALPHA = (b"urn:mpeg:hevc:2015:auxid:1", b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha")
LIMITED_RANGE, FULL_RANGE = 1, 2  # as FFmpeg numbers them


def is_heic(file: BinaryIO) -> bool:
    file.seek(0)
    head = file.read(64)
    size = min(int.from_bytes(head[:4], "big"), len(head))
    return head[4:8] == b"ftyp" and any(head[at : at + 4] in BRANDS for at in range(8, size, 4))


def read_heic(file: BinaryIO) -> Image:
    """The primary picture, upright, in mode RGB, or RGBA if it has an alpha plane. Colour profiles are ignored.

    Raises:
        MediaError: a kind of picture that is not supported, or too large. PackageMissingError: PyAV is not installed.
        Other exceptions: the file is damaged.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise PackageMissingError(
            'Reading a HEIC picture needs PyAV, which is not installed; pip install "gemma3n-onnx[video]".'
        ) from error
    file.seek(0)
    return _Pictures(file.read()).primary()


@dataclass
class _Item:
    """A picture or a part of one: `data` is HEVC in hvc1, the geometry of the tiles in grid."""

    kind: bytes = b""
    data: bytes = b""
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)

    def property(self, kind: bytes) -> bytes | None:
        return next((content for name, content in self.properties if name == kind), None)


class _Pictures:
    """The items of a file."""

    def __init__(self, data: bytes) -> None:
        meta = dict(_boxes(_box(_boxes(data), b"meta")[4:]))
        self.items: defaultdict[int, _Item] = defaultdict(_Item)
        self.references = _references(meta.get(b"iref", bytes(4)))
        pitm = _Cursor(_box(meta.items(), b"pitm"))
        self.primary_id = pitm.number(4 if pitm.version() else 2)
        for number, kind in _kinds(_box(meta.items(), b"iinf")):
            self.items[number].kind = kind
        for number, content in _contents(_box(meta.items(), b"iloc"), (data, meta.get(b"idat", b""))):
            self.items[number].data = content
        for number, property_ in _properties(_box(meta.items(), b"iprp")):
            self.items[number].properties.append(property_)

    def primary(self) -> Image:
        picture = self.pixels(self.primary_id)
        for number, targets in self.references[b"auxl"]:
            item = self.items[number]
            if self.primary_id in targets and (item.property(b"auxC") or b"")[4:].startswith(ALPHA):
                picture.putalpha(self.pixels(number).convert("L").resize(picture.size))
        return _upright(picture, self.items[self.primary_id])

    def pixels(self, number: int) -> Image:
        """An item in mode RGB, not turned."""
        item = self.items[number]
        if (extent := item.property(b"ispe")) is not None:
            check_size(*struct.unpack_from(">II", extent, 4))
        if item.kind == b"hvc1":
            (picture,) = _decode([item])
            return picture
        if item.kind == b"grid":
            tiles = next((targets for source, targets in self.references[b"dimg"] if source == number), [])
            return _assemble(item.data, [self.items[tile] for tile in tiles])
        raise MediaError(
            f"A HEIC picture of type {item.kind.decode(errors='replace')!r} is not supported; save it as JPEG or PNG."
        )


def _assemble(geometry: bytes, tiles: Sequence[_Item]) -> Image:
    """The tiles, row by row, cut to the size that `geometry` says."""
    from PIL import Image

    cursor = _Cursor(geometry)
    cursor.number(1)
    size = 4 if cursor.number(1) & 1 else 2
    rows, columns = cursor.number(1) + 1, cursor.number(1) + 1
    width, height = cursor.number(size), cursor.number(size)
    check_size(width, height)
    if len(tiles) != rows * columns:
        raise ValueError(f"{rows} x {columns} tiles are declared, but there are {len(tiles)}")
    whole = Image.new("RGB", (width, height))
    for place, tile in enumerate(_decode(tiles)):
        check_size(columns * tile.width, rows * tile.height)
        whole.paste(tile, (place % columns * tile.width, place // columns * tile.height))
    return whole


def _decode(items: Sequence[_Item]) -> Iterator[Image]:
    """The pixels of items in HEVC, which are alike but for their data."""
    import av

    codec = av.CodecContext.create("hevc", "r")
    codec.extradata = items[0].property(b"hvcC")
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    colour = _colour(items[0])
    count = 0
    for packet in (*(av.Packet(item.data) for item in items), None):
        for frame in codec.decode(packet):
            count += 1
            yield frame.to_image(**colour)
    if count != len(items):
        raise ValueError(f"{count} of {len(items)} pictures can be decoded")


def _colour(item: _Item) -> dict[str, Any]:
    """How YCbCr becomes RGB, where the file says so and not the HEVC stream."""
    content = item.property(b"colr")
    if content is None or content[:4] != b"nclx":
        return {}
    _, _, matrix, full = struct.unpack_from(">HHHB", content, 4)
    return {"src_colorspace": matrix, "src_color_range": FULL_RANGE if full >> 7 else LIMITED_RANGE}


def _upright(picture: Image, item: _Item) -> Image:
    """The picture after the item's transformations, in their order."""
    from PIL import Image

    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    for kind, content in item.properties:
        if kind == b"clap":
            picture = picture.crop(_aperture(content, *picture.size))
        elif kind == b"irot" and (angle := content[0] & 3):
            picture = picture.transpose(turns[angle - 1])
        elif kind == b"imir":
            sideways = content[0] & 1
            picture = picture.transpose(
                Image.Transpose.FLIP_LEFT_RIGHT if sideways else Image.Transpose.FLIP_TOP_BOTTOM
            )
    return picture


def _aperture(content: bytes, width: int, height: int) -> tuple[int, int, int, int]:
    """The box that a clean aperture leaves: left, top, right, bottom. Its offsets are those of the centres."""
    numbers = struct.unpack_from(">IIIIiIiI", content)
    wide, high, right, down = (numbers[i] / numbers[i + 1] for i in range(0, 8, 2))
    left, top = round((width - wide) / 2 + right), round((height - high) / 2 + down)
    box = (left, top, left + round(wide), top + round(high))
    if not (0 <= left < box[2] <= width and 0 <= top < box[3] <= height):
        raise ValueError("the clean aperture lies outside the picture")
    return box


class _Cursor:
    """Big-endian numbers of a box, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("a box is too short")
        return self._data[start : self._at]

    def version(self) -> int:
        """Of a full box, whose flags are skipped."""
        version = self.number(1)
        self.number(3)
        return version

    def rest(self) -> bytes:
        return self._data[self._at :]


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Types and contents."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        elif size == 0:
            size = len(data) - at
        if size < head or at + size > len(data):
            raise ValueError(f"the box {kind.decode(errors='replace')!r} is cut off")
        yield kind, data[at + head : at + size]
        at += size


def _box(boxes: Iterable[tuple[bytes, bytes]], wanted: bytes) -> bytes:
    for kind, content in boxes:
        if kind == wanted:
            return content
    raise ValueError(f"there is no box {wanted.decode()!r}")


def _kinds(iinf: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and types of the items."""
    cursor = _Cursor(iinf)
    cursor.number(4 if cursor.version() else 2)
    for _, content in _boxes(cursor.rest()):
        entry = _Cursor(content)
        number = entry.number(4 if entry.version() > 2 else 2)
        entry.number(2)
        yield number, entry.take(4)


def _references(iref: bytes) -> defaultdict[bytes, list[tuple[int, list[int]]]]:
    """By type: items and those that they refer to."""
    cursor = _Cursor(iref)
    size = 4 if cursor.version() else 2
    found: defaultdict[bytes, list[tuple[int, list[int]]]] = defaultdict(list)
    for kind, content in _boxes(cursor.rest()):
        entry = _Cursor(content)
        source, count = entry.number(size), entry.number(2)
        found[kind].append((source, [entry.number(size) for _ in range(count)]))
    return found


def _contents(iloc: bytes, sources: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """Items and their data; `sources` are the file and the box idat, by construction method."""
    cursor = _Cursor(iloc)
    version = cursor.version()
    sizes, more = cursor.number(1), cursor.number(1)
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, more & 15
    wide, total = 4 if version > 1 else 2, 0
    for _ in range(cursor.number(wide)):
        number = cursor.number(wide)
        method = cursor.number(2) & 15 if version else 0
        cursor.number(2)
        base, parts = cursor.number(base_size), []
        for _ in range(cursor.number(2)):
            cursor.number(index_size if version else 0)
            start, length = base + cursor.number(offset_size), cursor.number(length_size)
            if method >= len(sources):
                continue
            stop = start + length if length else len(sources[method])
            total += stop - start
            if stop > len(sources[method]) or total > sum(map(len, sources)):
                raise ValueError("an item lies outside the file, or over another one")
            parts.append(sources[method][start:stop])
        yield number, b"".join(parts)


def _properties(iprp: bytes) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
    """Items and their properties, in order."""
    boxes = [*_boxes(iprp)]
    listed = [*_boxes(_box(boxes, b"ipco"))]
    for kind, content in boxes:
        if kind != b"ipma":
            continue
        cursor = _Cursor(content)
        version = cursor.number(1)
        size = 2 if cursor.number(3) & 1 else 1
        for _ in range(cursor.number(4)):
            number = cursor.number(4 if version else 2)
            for _ in range(cursor.number(1)):
                index = cursor.number(size) & (0x7FFF if size == 2 else 0x7F)
                if index:
                    yield number, listed[index - 1]
