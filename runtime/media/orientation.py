"""Turns images upright, as their EXIF orientation says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Turn:
    """`method`: the name of a PIL.Image.Transpose. The upright image's upper rows are stored as columns if it
    `swaps_sides`, as the last rows or columns if they come `from_end`."""

    method: str = ""
    swaps_sides: bool = False
    from_end: bool = False

    def size(self, image: Image) -> tuple[int, int]:
        """Width and height of the upright image."""
        width, height = image.size
        return (height, width) if self.swaps_sides else (width, height)

    def rows(self, image: Image, top: int, bottom: int) -> Image:
        """Rows of the upright image."""
        from PIL.Image import Transpose

        width, height = image.size
        end = width if self.swaps_sides else height
        first, last = (end - bottom, end - top) if self.from_end else (top, bottom)
        stored = image.crop((first, 0, last, height) if self.swaps_sides else (0, first, width, last))
        return stored.transpose(Transpose[self.method]) if self.method else stored


UPRIGHT = Turn()
TURNS = {
    2: Turn("FLIP_LEFT_RIGHT"),
    3: Turn("ROTATE_180", from_end=True),
    4: Turn("FLIP_TOP_BOTTOM", from_end=True),
    5: Turn("TRANSPOSE", swaps_sides=True),
    6: Turn("ROTATE_270", swaps_sides=True),
    7: Turn("TRANSVERSE", swaps_sides=True, from_end=True),
    8: Turn("ROTATE_90", swaps_sides=True, from_end=True),
}


def turn_of(image: Image) -> Turn:
    return TURNS.get(image.getexif().get(ORIENTATION, 1), UPRIGHT)
