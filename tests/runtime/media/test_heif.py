"""HEIC pictures look as in the decoders of others, whole or in tiles, upright, and on white."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemma3n_onnx.runtime.errors import MediaError, PackageMissingError
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.heif import is_heic
from gemma3n_onnx.runtime.media.image import load_image
from heic import heic
from media import encoded, photo

POLICY = FetchPolicy()
PICTURE = photo().resize((200, 150))
TRANSPOSE = Image.Transpose
# Levels of 255: of YCbCr in 8 bits, with one chroma value for each pixel.
LOSSLESS = 3


def assert_looks_like(what: str, data: bytes, expected: Image.Image, largest: float, mean: float) -> None:
    image = load_image(data, POLICY)
    assert image.size == expected.size and image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")))
    print(f"{what}: difference {difference.max()} at most ({largest}), {difference.mean():.2f} in the mean ({mean})")
    assert difference.max() <= largest and difference.mean() <= mean


def test_a_file_of_libheif_is_the_picture_that_it_was_made_of() -> None:
    """Written by libheif 1.23 at quality 60, with half the chroma rows and columns."""
    data = (Path(__file__).parent / "picture.heic").read_bytes()
    assert_looks_like("libheif's file", data, Image.open("demo/picture.png"), 160, 2)


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize(
    ("turned", "back"),
    [
        ([], []),
        ([(b"irot", 1)], [TRANSPOSE.ROTATE_90]),
        ([(b"irot", 2)], [TRANSPOSE.ROTATE_180]),
        ([(b"irot", 3)], [TRANSPOSE.ROTATE_270]),
        ([(b"imir", 0)], [TRANSPOSE.FLIP_TOP_BOTTOM]),
        ([(b"imir", 1)], [TRANSPOSE.FLIP_LEFT_RIGHT]),
        ([(b"irot", 1), (b"imir", 1)], [TRANSPOSE.ROTATE_90, TRANSPOSE.FLIP_LEFT_RIGHT]),
        ([(b"imir", 1), (b"irot", 1)], [TRANSPOSE.FLIP_LEFT_RIGHT, TRANSPOSE.ROTATE_90]),
    ],
)
def test_tiles_and_turns(tile: int | None, turned: list[tuple[bytes, int]], back: list[Image.Transpose]) -> None:
    """The files are written by FFmpeg's encoder and boxes of our own, without loss."""
    expected = PICTURE
    for turn in back:
        expected = expected.transpose(turn)
    assert_looks_like(f"{tile}, {turned}", heic(PICTURE, tile, turned), expected, LOSSLESS, 1)


@pytest.mark.parametrize("tile", [None, 64])
def test_what_is_transparent_becomes_white(tile: int | None) -> None:
    picture = PICTURE.copy()
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    expected = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    assert_looks_like("alpha", heic(picture, tile), expected, LOSSLESS, 1)


@pytest.mark.parametrize(("matrix", "libheif"), [(6, (126.9, 107.8, 112.6)), (1, (128.2, 109.9, 112.5))])
def test_the_colour_matrix_is_the_one_that_the_file_names(matrix: int, libheif: tuple[float, ...]) -> None:
    """BT.601, which the stream names too, and BT.709; `libheif` 1.23 decodes to these means of red, green and blue."""
    data = (Path(__file__).parent / "picture.heic").read_bytes()
    written, named = (b"nclx" + struct.pack(">HHHB", 1, 13, each, 0x80) for each in (6, matrix))
    assert written in data
    means = np.asarray(load_image(data.replace(written, named), POLICY)).mean((0, 1))
    print(f"matrix {matrix}: mean colour {means.round(1)}, libheif's {libheif} (tolerance 1)")
    assert np.abs(means - libheif).max() < 1


def test_avif_is_not_taken_for_heic() -> None:
    assert is_heic(io.BytesIO(heic(PICTURE)))
    for other in (encoded(PICTURE, "AVIF"), encoded(PICTURE, "JPEG"), b"", bytes(100)):
        assert not is_heic(io.BytesIO(other))


def test_without_pillow_heif_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(PICTURE)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PackageMissingError, match=r'HEIC picture needs pillow-heif, .*"gemma3n-onnx\[heic\]"'):
        load_image(data, POLICY)


def too_large(data: bytes) -> bytes:
    return data.replace(struct.pack(">II", *PICTURE.size), struct.pack(">II", 20_000, 20_000))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: heic(PICTURE)[:-100], "damaged or incomplete"),
        (lambda: heic(PICTURE)[:60], "damaged or incomplete"),
        (lambda: heic(PICTURE, 64)[:-3000], "damaged or incomplete (the file is cut off)"),
        (lambda: heic(PICTURE, 64).replace(b"hvcC", b"free"), "damaged or incomplete"),
        (lambda: too_large(heic(PICTURE)), "too many pixels (20,000 x 20,000)"),
    ],
)
def test_what_cannot_be_read_is_told(data, says: str) -> None:
    with pytest.raises(MediaError) as raised:
        load_image(data(), POLICY)
    print(raised.value)
    assert says in str(raised.value) and str(raised.value).endswith(".") and "\n" not in str(raised.value)
