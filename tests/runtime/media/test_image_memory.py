"""Large images are decoded in bounded memory, and look as if they were decoded whole."""

from __future__ import annotations

import io
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from gemma3n_onnx.runtime.errors import MediaError
from gemma3n_onnx.runtime.media import image as module
from gemma3n_onnx.runtime.media.budget import MediaBudget, MediaCancelledError
from gemma3n_onnx.runtime.media.decoding import DecodingMemory
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.image import load_image, resize
from gemma3n_onnx.runtime.media.image_memory import coefficient_bytes
from media import encoded, photo

POLICY = FetchPolicy()
ALLOCATOR_BYTES = 2_000_000
# Prints the most memory that each file of a folder takes beside the process, and what is reserved for it, in bytes.
MEASURE = """
import ctypes
import sys
from pathlib import Path
from gemma3n_onnx.runtime.media import image
from gemma3n_onnx.runtime.media.decoding import DecodingMemory
from gemma3n_onnx.runtime.media.fetch import FetchPolicy

image.STRIP_PIXELS = 1 << 14

def memory(name):
    lines = Path("/proc/self/status").read_text().split(name + ":")[1].split()
    return int(lines[0]) * 1024

class Recorded(DecodingMemory):
    def reserved(self, needed, advice):
        self.needed = needed
        return super().reserved(needed, advice)

policy = FetchPolicy(decoding=Recorded())
for _ in range(2):  # the first time loads libraries
    for path in sorted(Path(sys.argv[1]).iterdir()):
        ctypes.CDLL(None).malloc_trim(0)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        image.load_image(path, policy, size=64)
        print(path.name, memory("VmHWM") - before, policy.decoding.needed)
"""


def whole(image: Image.Image, size: int) -> np.ndarray:
    """Every step on the whole image."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(values.astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(resize(image.convert("RGB"), size))


def pictures() -> dict[str, tuple[str, dict]]:
    return {
        "RGB": ("PNG", {}),
        "RGBA": ("PNG", {}),
        "LA": ("PNG", {}),
        "P": ("PNG", {"transparency": bytes(range(0, 256, 8))}),
        "1": ("PNG", {}),
        "I;16": ("PNG", {}),
        "CMYK": ("JPEG", {}),
        "L": ("JPEG", {}),
    }


def in_mode(mode: str) -> Image.Image:
    picture = photo().resize((97, 61))
    if mode == "P":
        return picture.quantize(32)
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257 + 3)
    return picture.convert(mode) if mode != "RGBA" else Image.merge("RGBA", (*picture.split(), picture.split()[0]))


@pytest.mark.parametrize("mode", pictures())
def test_strips_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP_PIXELS", 1000)
    format, options = pictures()[mode]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = encoded(in_mode(mode), format, exif=exif, **options)
        for size in (16, 128):
            square = load_image(file, POLICY, size=size)
            assert square.size == (size, size)
            np.testing.assert_array_equal(np.asarray(square), whole(Image.open(io.BytesIO(file)), size))


def test_a_huge_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(photo().resize((1600, 1200)), "JPEG", quality=95)
    exact = whole(Image.open(io.BytesIO(file)), 64)
    np.testing.assert_array_equal(np.asarray(load_image(file, POLICY, size=64)), exact)
    monkeypatch.setattr(module, "WHOLE_BYTES", 4_000_000)
    small = FetchPolicy(decoding=DecodingMemory(28_000_000))
    for data in (file, file[:-100]):
        difference = np.abs(np.asarray(load_image(data, small, size=64)).astype(int) - exact).mean()
        print(f"mean difference {difference:.2f} of 255")
        assert 0 < difference < 2


def test_an_image_that_takes_too_much_memory_is_refused() -> None:
    small = FetchPolicy(decoding=DecodingMemory(30_000_000))
    picture = photo().resize((1000, 1000))
    load_image(encoded(picture, "PNG"), small, size=64)
    for format, options in (("WEBP", {}), ("JPEG", {"progressive": True, "subsampling": 0})):
        with pytest.raises(MediaError, match=r"Decoding takes \d+ MB of memory, and 30 MB are allowed; scale"):
            load_image(encoded(picture, format, **options), small, size=64)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, 0), ({"progressive": True}, 3), ({"progressive": True, "subsampling": 0}, 6)],
)
def test_coefficients_that_a_jpeg_keeps(options: dict, wanted: int) -> None:
    file = io.BytesIO(encoded(photo().resize((64, 48)), "JPEG", **options))
    assert coefficient_bytes(Image.open(file), file) == wanted * 64 * 48


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measures memory as Linux and glibc report it")
def test_decoding_takes_no_more_memory_than_is_reserved(tmp_path: Path) -> None:
    picture = photo().resize((1200, 900))
    clear = Image.merge("RGBA", (*picture.split(), picture.split()[0]))
    files = {
        "a.png": (clear, {"compress_level": 1}),
        "b.jpg": (picture, {"progressive": True, "subsampling": 0}),
        "c.tif": (clear, {"compression": "tiff_adobe_deflate", "strip_size": 1 << 30}),
        "d.webp": (clear, {"method": 0}),
        "e.jp2": (clear.crop((0, 0, 800, 600)), {}),
    }
    if features.check("avif"):
        files["f.avif"] = clear, {"speed": 10, "subsampling": "4:4:4"}
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
    printed = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], check=True, capture_output=True, text=True)
    measured = [line.split() for line in printed.stdout.splitlines()][len(files) :]
    print(printed.stdout)
    assert [name for name, *_ in measured] == sorted(files)
    for name, peak, reserved in measured:
        assert int(peak) <= int(reserved) + ALLOCATOR_BYTES, name


def test_decoders_wait_for_each_other() -> None:
    memory = DecodingMemory(100, at_once=2)
    started = threading.Event()

    def decode() -> None:
        with memory.reserved(60, ""):
            started.set()

    with memory.reserved(50, ""):
        other = threading.Thread(target=decode)
        other.start()
        assert not started.wait(0.2)
        budget = MediaBudget()
        budget.cancel()
        with budget.active(), pytest.raises(MediaCancelledError), memory.reserved(60, ""):
            pass
    assert started.wait(5)
    other.join()
    with memory.reserved(1, ""), memory.reserved(1, ""):
        late = threading.Thread(target=decode)
        started.clear()
        late.start()
        assert not started.wait(0.2), "no more than two at once"
    assert started.wait(5)
    late.join()
