"""Every kind of image becomes RGB as it looks."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from gemma3n_onnx.runtime.errors import MediaError
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.image import load_image, resize, to_pixels
from media import encoded, gradient, photo

POLICY = FetchPolicy()
PIXELS = gradient(40, 30)


def loaded(source: object) -> np.ndarray:
    image = load_image(source, POLICY)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    return np.asarray(image)


def test_every_source_gives_the_same_image(tmp_path: Path) -> None:
    png = encoded(Image.fromarray(PIXELS), "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(png)
    text = base64.b64encode(png).decode()
    sources = [path, str(path), png, bytearray(png), text, f"data:image/png;base64,{text}", Image.fromarray(PIXELS)]
    for source in [*sources, PIXELS]:
        np.testing.assert_array_equal(loaded(source), PIXELS)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP", "JPEG2000", "AVIF"])
def test_formats(format: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    smooth = np.asarray(photo().resize((64, 48)))
    difference = np.abs(loaded(encoded(Image.fromarray(smooth), format)).astype(int) - smooth).mean()
    print(f"{format}: mean difference {difference:.3g} of 255")
    assert difference == 0 if format in ("PNG", "BMP", "TIFF", "PPM") else difference < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(orientation: int) -> None:
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](PIXELS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(loaded(file), PIXELS)
    np.testing.assert_array_equal(loaded(Image.open(io.BytesIO(file))), PIXELS)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colours * (alpha / 255) + 255 * (1 - alpha / 255)


def test_what_is_transparent_becomes_white() -> None:
    rgba = gradient(40, 30, 4)
    expected = on_white(rgba[..., :3], rgba[..., 3:])
    for source in (rgba, Image.fromarray(rgba), encoded(Image.fromarray(rgba), "PNG")):
        assert np.abs(loaded(source) - expected).max() <= 1
    grey = Image.fromarray(rgba).convert("LA")
    values = np.asarray(grey)
    expected = on_white(values[..., [0, 0, 0]], values[..., 1:])
    assert np.abs(loaded(encoded(grey, "PNG")) - expected).max() <= 1


def test_a_transparent_palette_gives_no_warning() -> None:
    palette = photo().resize((60, 40)).quantize(32)
    alpha = np.arange(32) * 8
    file = encoded(palette, "PNG", transparency=bytes(alpha.tolist()))
    expected = on_white(np.asarray(palette.convert("RGB")), alpha[np.asarray(palette)][..., None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(loaded(file) - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(format: str) -> None:
    grey = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    result = loaded(encoded(Image.fromarray(grey), format))
    difference = np.abs(result[..., 0] - grey / 257).max()
    print(f"{format}: largest difference {difference:.3g} of 255")
    assert difference <= 0.5 and (result[..., 0] == result[..., 2]).all()


def test_colour_of_16_bits() -> None:
    """Pillow keeps the upper byte of each channel."""
    import struct
    import zlib

    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    difference = np.abs(loaded(file) - values / 257).max()
    print(f"largest difference {difference:.3g} of 255")
    assert difference <= 1


def test_float_tiff_from_0_to_1() -> None:
    values = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    np.testing.assert_array_equal(loaded(encoded(Image.fromarray(values), "TIFF"))[..., 0], np.rint(values * 255))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(loaded(file).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, -2])
def test_a_jpeg_without_its_end_is_read_as_far_as_it_goes(
    options: dict[str, Any], kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Pillow reads it where told to, and as FFmpeg does but for the rows after the last that is whole."""
    file = encoded(photo(), "JPEG", quality=90, **options)
    cut = file[: round(kept * len(file)) if kept > 0 else round(kept)]
    told: list[str] = []
    image = load_image(cut, POLICY, told.append)
    assert told == [
        "The end of the JPEG is missing, so the picture may "
        + ("lack detail." if options.get("progressive") else "be blank at the bottom.")
    ]
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        pillows = np.asarray(Image.open(io.BytesIO(cut)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(image), pillows)
    ffmpegs = decoded_by_ffmpeg(cut)
    whole = int(image.height * kept * 0.8) // 16 * 16 if kept > 0 else image.height
    if options.get("progressive") or not whole:
        return
    difference = np.abs(pillows[:whole].astype(int) - ffmpegs[:whole])
    print(f"{whole} rows of {image.height}: mean difference from FFmpeg {difference.mean():.2f} of 255 (tolerance 2)")
    assert difference.mean() < 2


def decoded_by_ffmpeg(file: bytes) -> np.ndarray:
    import av

    with av.open(io.BytesIO(file)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)


def test_a_whole_jpeg_and_other_formats_give_no_warning() -> None:
    told: list[str] = []
    for format in ("JPEG", "PNG", "WEBP"):
        load_image(encoded(photo(), format), POLICY, told.append)
    load_image(encoded(photo(), "JPEG") + b"more", POLICY, told.append)
    assert told == []


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("orientation", [1, 2, 4, 6, 8])
def test_avif_is_upright_and_on_white(orientation: int) -> None:
    """Pillow writes the EXIF orientation as the file's irot and imir; FFmpeg decodes the same pixels, unturned."""
    rgba = photo().resize((80, 60)).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(rgba, "PNG", exif=exif)))))
    file = encoded(rgba, "AVIF", quality=100, subsampling="4:4:4", exif=exif)  # takes the orientation out of `exif`
    difference = np.abs(loaded(file) - on_white(values[..., :3], values[..., 3:]))
    print(f"orientation {orientation}: largest difference {difference.max():.1f}, mean {difference.mean():.2f} of 255")
    assert difference.max() <= 12 and difference.mean() < 1.5
    opaque = encoded(photo().resize((80, 60)), "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(loaded(opaque) - decoded_by_ffmpeg(opaque)).mean() < 1.5


def test_cmyk_jpeg_is_pillows_rgb() -> None:
    file = encoded(photo().convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(loaded(file), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS[..., 0], PIXELS[..., [0, 0, 0]]),
        (PIXELS[..., :1], PIXELS[..., [0, 0, 0]]),
        (np.dstack([PIXELS, np.full((30, 40), 255, np.uint8)]), PIXELS),
        (PIXELS.astype(np.uint16) * 257, PIXELS),
        ((PIXELS / 255).astype(np.float64), PIXELS),
        ((PIXELS / 255).astype(np.float32), PIXELS),
        (PIXELS[::-1, ::2], PIXELS[::-1, ::2]),
    ],
    ids=["grey", "one channel", "opaque", "uint16", "float64", "float32", "a view"],
)
def test_arrays(array: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(loaded(array), expected)


def test_a_given_image_stays_as_it_is() -> None:
    palette = photo().quantize(16)
    palette.info["transparency"] = bytes(range(16))
    loaded(palette)
    assert palette.mode == "P" and palette.info["transparency"] == bytes(range(16))


def test_the_smallest_and_the_widest() -> None:
    assert to_pixels(resize(load_image(gradient(1, 1), POLICY), 768), 1 / 255).shape == (3, 768, 768)
    assert to_pixels(resize(load_image(gradient(20_000, 2), POLICY), 256), 1 / 255).shape == (3, 256, 256)


def test_pixels_are_grey_levels_times_the_factor() -> None:
    pixels = to_pixels(Image.fromarray(gradient(64, 64)), 1 / 255)
    assert np.abs(pixels - gradient(64, 64).transpose(2, 0, 1) / 255).max() < 1e-7
    assert to_pixels(resize(Image.new("RGB", (3, 3), "white"), 8), 1.0).min() == 255


def test_no_warning_of_bombs_leaks() -> None:
    """95 million pixels: more than Pillow warns of, less than is refused."""
    file = encoded(Image.new("1", (9_746, 9_746)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match="too many pixels"):
            load_image(encoded(Image.new("1", (10_001, 10_001)), "PNG"), POLICY)
        from gemma3n_onnx.runtime.media.image import _open

        assert _open(io.BytesIO(file)).size == (9_746, 9_746)


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, gemma3n_onnx.runtime, gemma3n_onnx.runtime.media.image, gemma3n_onnx.runtime.media.audio, "
        "gemma3n_onnx.runtime.media.video; print({'PIL', 'soundfile', 'soxr', 'av'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
