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


@dataclass(frozen=True)
class WavData:
    """The data chunk of a WAV: where its size is written, that size, and how many bytes follow in the file."""

    size_at: int
    declared: int
    present: int
    is_streamed: bool

    @staticmethod
    def of(file: BinaryIO) -> WavData | None:
        """None if the file is no RIFF WAV or has no data chunk."""
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        magic, riff_bytes, kind = struct.unpack("<4sI4s", file.read(12).ljust(12))
        if (magic, kind) != (b"RIFF", b"WAVE"):
            return None
        at = 12
        for _ in range(MAX_CHUNKS):
            file.seek(at)
            if len(head := file.read(8)) < 8:
                return None
            name, declared = struct.unpack("<4sI", head)
            at += 8
            if name == b"data":
                unset = declared == 0 and (riff_bytes + 8 <= at or riff_bytes >= STREAMED_BYTES)
                is_streamed = unset or (declared >= STREAMED_BYTES and declared > end - at)
                return WavData(at - 4, declared, end - at, is_streamed)
            at += declared + declared % 2
        return None

    def with_size(self, file: BinaryIO) -> BinaryIO:
        """A copy of the file that declares what it has."""
        file.seek(0)
        data = bytearray(file.read())
        struct.pack_into("<I", data, 4, min(len(data) - 8, 0xFFFF_FFFF))
        struct.pack_into("<I", data, self.size_at, min(self.present, 0xFFFF_FFFF))
        return io.BytesIO(data)
