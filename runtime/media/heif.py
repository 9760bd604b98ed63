"""Reads HEIC pictures with pillow-heif."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO

from gemma3n_onnx.runtime.errors import PackageMissingError

if TYPE_CHECKING:
    from pillow_heif import HeifFile

# Brands of files with pictures in HEVC; "mif1" alone may also be AVIF, which Pillow reads.
BRANDS = (b"heic", b"heix", b"heim", b"heis")


def is_heic(file: BinaryIO) -> bool:
    file.seek(0)
    head = file.read(64)
    size = min(int.from_bytes(head[:4], "big"), len(head))
    return head[4:8] == b"ftyp" and any(head[at : at + 4] in BRANDS for at in range(8, size, 4))


def open_heic(file: BinaryIO) -> HeifFile:
    """The file of a picture; `to_pillow` decodes the primary one, upright, in mode RGB, or RGBA if it has an alpha
    plane. Colour profiles are ignored.

    Raises:
        PackageMissingError: pillow-heif is not installed. Other exceptions: the file is damaged.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise PackageMissingError(
            'Reading a HEIC picture needs pillow-heif, which is not installed; pip install "gemma3n-onnx[heic]".'
        ) from error
    _check_whole(file)
    file.seek(0)
    return pillow_heif.open_heif(file)


def _check_whole(file: BinaryIO) -> None:
    """Raises ValueError if a box ends after the file: libheif leaves tiles that are cut off blank."""
    end, at = file.seek(0, 2), 0
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        (size,) = struct.unpack_from(">I", head)
        if size == 1:
            (size,) = struct.unpack_from(">Q", head.ljust(16, b"\0"), 8)
        if size == 0:  # up to the end of the file
            return
        if size < 8 or at + size > end:
            raise ValueError("the file is cut off")
        at += size
