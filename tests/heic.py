"""Writes HEIC pictures as phones do: tiles in a grid, turned by a property, with an alpha plane beside them."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

LOSSLESS = {"x265-params": "log-level=none:lossless=1:keyint=1"}
ALPHA = b"urn:mpeg:hevc:2015:auxid:1\0"


@dataclass(frozen=True)
class _Item:
    kind: bytes
    data: bytes
    properties: tuple[bytes, ...]
    references: tuple[tuple[bytes, int], ...] = field(default=())
    """Types and numbers, from 1."""


def heic(picture: Image.Image, tile: int | None = None, turned: Sequence[tuple[bytes, int]] = ()) -> bytes:
    """`picture`, of even sides, in lossless HEVC 4:4:4; with `tile`, in squares of that side. `turned` are properties
    irot or imir and their value."""
    colours = picture.convert("RGB")
    turns = tuple(_box(name, bytes([value])) for name, value in turned)
    if tile is None:
        items = [*_coded([colours], turns)]
    else:
        columns, rows = -(-picture.width // tile), -(-picture.height // tile)
        boxes = [(x * tile, y * tile, (x + 1) * tile, (y + 1) * tile) for y in range(rows) for x in range(columns)]
        parts = _coded([colours.crop(box) for box in boxes])
        geometry = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *picture.size)
        size = _box(b"ispe", struct.pack(">III", 0, *picture.size))
        joined = tuple((b"dimg", number) for number in range(2, len(parts) + 2))
        items = [_Item(b"grid", geometry, (size, *turns), joined), *parts]
    if picture.mode == "RGBA":
        (alpha,) = _coded([picture.getchannel("A")], (_box(b"auxC", bytes(4), ALPHA),))
        items.append(_Item(alpha.kind, alpha.data, alpha.properties, ((b"auxl", 1),)))
    return _file(items)


def _coded(pictures: Sequence[Image.Image], more: tuple[bytes, ...] = ()) -> list[_Item]:
    """Key frames of one stream, by way of an MP4."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx265", rate=1, options=LOSSLESS)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "gray" if pictures[0].mode == "L" else "yuv444p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    with av.open(io.BytesIO(file.getvalue())) as container:
        stream = container.streams.video[0]
        size = _box(b"ispe", struct.pack(">III", 0, *pictures[0].size))
        properties = (size, _box(b"hvcC", bytes(stream.codec_context.extradata)), *more)
        return [_Item(b"hvc1", bytes(packet), properties) for packet in container.demux(stream) if packet.size]


def _file(items: Sequence[_Item]) -> bytes:
    """The first item is the primary one."""
    start = _box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    offset = len(start) + len(_meta(items, 0)) + 8
    return start + _meta(items, offset) + _box(b"mdat", *(item.data for item in items))


def _meta(items: Sequence[_Item], offset: int) -> bytes:
    """The box of all but the data, which begin at `offset` in the file."""
    numbered = [*enumerate(items, 1)]
    kinds = [_full(b"infe", struct.pack(">HH4s", number, 0, item.kind), b"\0", version=2) for number, item in numbered]
    references, places, properties, associations = [], [], [], []
    for number, item in numbered:
        for kind in dict.fromkeys(kind for kind, _ in item.references):
            targets = [target for each, target in item.references if each == kind]
            references.append(_box(kind, struct.pack(f">HH{len(targets)}H", number, len(targets), *targets)))
        places.append(struct.pack(">HHHHII", number, 0, 0, 1, offset, len(item.data)))
        offset += len(item.data)
        indices = range(len(properties) + 1, len(properties) + len(item.properties) + 1)
        properties += item.properties
        associations.append(struct.pack(f">HB{len(indices)}H", number, len(indices), *indices))
    count = struct.pack(">H", len(items))
    wide_indices = 1
    return _full(
        b"meta",
        _full(b"hdlr", bytes(4), b"pict", bytes(13)),
        _full(b"pitm", struct.pack(">H", 1)),
        _full(b"iinf", count, *kinds),
        _full(b"iref", *references),
        _box(
            b"iprp",
            _box(b"ipco", *properties),
            _full(b"ipma", struct.pack(">I", len(items)), *associations, flags=wide_indices),
        ),
        _full(b"iloc", b"\x44\x00", count, *places, version=1),
    )


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def _full(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)
