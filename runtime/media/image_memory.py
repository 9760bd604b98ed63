"""The memory that decoding an image takes, at most."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

JPEGS = ("JPEG", "MPO")  # MPO: several JPEGs, of which the first is read
START_OF_SCAN = 0xDA
# Bytes a pixel, measured: these decoders hold copies of the image.
DECODER_BYTES = {"AVIF": 20, "HEIC": 20, "JPEG2000": 32, "TIFF": 12, "WEBP": 22}
MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
COEFFICIENT_BYTES = 2


def pixel_bytes(image: Any) -> int:
    """Of an opened `PIL.Image.Image` or `HeifFile`."""
    name = getattr(image, "format", None) or "HEIC"
    return math.prod(image.size) * DECODER_BYTES.get(name, MODE_BYTES.get(image.mode, 4))


def coefficient_bytes(image: ImageFile, file: BinaryIO) -> int:
    """What libjpeg keeps of a JPEG in several scans, at whatever size it decodes: all DCT coefficients."""
    if image.format not in JPEGS:
        return 0
    layers: list[tuple[int, int, int, int]] = image.layer  # type: ignore[attr-defined]
    scan = first_scan(file)
    if scan is not None and scan[0] == len(layers) and not image.info.get("progressive"):
        return 0
    areas = [across * down for _, across, down, _ in layers]
    whole = max(across for _, across, _, _ in layers) * max(down for _, _, down, _ in layers)
    return math.ceil(math.prod(image.size) * COEFFICIENT_BYTES * sum(areas) / whole)


def first_scan(file: BinaryIO) -> tuple[int, int] | None:
    """How many components a JPEG's first scan has, and where its data begin; None if the file ends before."""
    at, marker, head = 2, 0, b""
    while marker != START_OF_SCAN:
        file.seek(at)
        head = file.read(5)
        if len(head) < 5 or head[0] != 0xFF:
            return None
        marker = head[1]
        at += 2 + int.from_bytes(head[2:4], "big")
    return head[4], at
