"""Finds how much sound a WAV declares, and how much it has."""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

# Programs that write a WAV to a pipe declare no bytes, or about the most that 31 or 32 bits can say.
STREAMED_BYTES = 0x7FFF_F000
MAX_CHUNKS = 1000
IN_DS64 = 0xFFFF_FFFF  # in an RF64, for the size that its chunk ds64 has in 64 bits


@dataclass(frozen=True)
class WavData:
    """The data chunk of a RIFF or RF64 WAV: its declared size, and how many bytes follow in the file.

    `file_size_at` and `size_at` are where the sizes of the file and of the chunk are written, in struct's `format`.
    """

    declared: int
    present: int
    is_streamed: bool
    file_size_at: int
    size_at: int
    format: str

    @staticmethod
    def of(file: BinaryIO) -> WavData | None:
        """None if the file is no such WAV or has no data chunk."""
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        magic, _, kind = struct.unpack("<4sI4s", file.read(12).ljust(12))
        if magic not in (b"RIFF", b"RF64") or kind != b"WAVE":
            return None
        at, ds64 = 12, None
        for _ in range(MAX_CHUNKS):
            file.seek(at)
            if len(head := file.read(8)) < 8:
                return None
            name, declared = struct.unpack("<4sI", head)
            at += 8
            if name == b"ds64" and magic == b"RF64" and len(sizes := file.read(16)) == 16:
                ds64 = at, struct.unpack("<QQ", sizes)[1]
            if name == b"data":
                places = 4, at - 4, "<I"
                if ds64 is not None and declared == IN_DS64:
                    places, declared = (ds64[0], ds64[0] + 8, "<Q"), ds64[1]
                unset = declared == 0 and at < end and not _is_chunk(file, at, end)
                is_streamed = unset or (declared >= STREAMED_BYTES and declared > end - at)
                return WavData(declared, end - at, is_streamed, *places)
            at += declared + declared % 2
        return None

    def with_size(self, file: BinaryIO) -> BinaryIO:
        """A copy of the file whose header declares the bytes that are there."""
        file.seek(0)
        data = bytearray(file.read())
        struct.pack_into(self.format, data, self.file_size_at, min(len(data) - 8, 0xFFFF_FFFF))
        struct.pack_into(self.format, data, self.size_at, min(self.present, 0xFFFF_FFFF))
        return io.BytesIO(data)


def _is_chunk(file: BinaryIO, at: int, end: int) -> bool:
    """Whether another chunk begins here, rather than sound."""
    file.seek(at)
    name, size = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
    return name.replace(b" ", b"").isalnum() and at + 8 + size <= end
