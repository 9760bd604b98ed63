"""What the encoders are given, against transformers' image processors and feature extractor."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import soxr
from PIL import Image
from transformers import Gemma3nAudioFeatureExtractor, SiglipImageProcessor, SiglipImageProcessorPil
from transformers.image_transforms import convert_to_rgb

from gemma3n_onnx.runtime.media.audio import LogMel, load_audio, mel_filters
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.image import load_image, resize, to_pixels
from media import LOG_MEL, RATE_HZ, chirp, encoded, gradient, noise, photo, sound, speech, tone

POLICY = FetchPolicy()
SENTENCES = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background, and mind that nothing sticks to the table.",
)
CLIPS = {
    "one frame": lambda: noise(1)[:513],
    "two frames and a part": lambda: noise(1)[:700],
    "an odd number of samples": lambda: noise(2, seed=1)[:20_011],
    "a multiple of 128": lambda: noise(3, seed=2)[: 128 * 300],
    "a tone": lambda: tone(1.5, 440),
    "a tone at full scale": lambda: tone(0.77, 7000, peak=1.0),
    "a chirp": lambda: chirp(5, 50, 8000),
    "a sentence": lambda: speech(SENTENCES[0])[0],
    "a long sentence with a pause": lambda: np.concatenate([speech(SENTENCES[1])[0], np.zeros(9000, np.float32)]),
    "30 s": lambda: noise(30, seed=3),
}
IMAGES = {
    "photograph": photo,
    "another photograph": lambda: photo("flower.jpg"),
    "portrait": lambda: photo().crop((200, 0, 330, 427)),
    "4000 x 30": lambda: Image.fromarray(gradient(4000, 30)),
    "20000 x 3": lambda: Image.fromarray(gradient(20_000, 3)),
    "3 x 2000": lambda: Image.fromarray(gradient(3, 2000)),
    "1 x 1": lambda: Image.fromarray(gradient(1, 1)),
    "the encoder's size": lambda: Image.fromarray(gradient(768, 768)),
    "grey": lambda: photo().convert("L"),
    "grey and alpha": lambda: photo().convert("LA"),
    "transparent": lambda: Image.fromarray(gradient(300, 200, 4)),
    "palette": lambda: photo().quantize(64),
    "palette, transparent": lambda: Image.open(_file(photo().quantize(64), "PNG", transparency=bytes(range(64)))),
    "one bit": lambda: photo().convert("1"),
    "CMYK JPEG": lambda: Image.open(_file(photo().convert("CMYK"), "JPEG")),
    "YCbCr": lambda: photo().convert("YCbCr"),
}


class Uncompiled(ModuleType):
    """numba, whose decorators leave functions as they are: librosa would compile for 20 s what no test asks it for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, _: object) -> Any:
        return self

    def __call__(self, *arguments: Any, **_: object) -> Any:
        return arguments[0] if arguments and isinstance(arguments[0], FunctionType) else self


@pytest.fixture(scope="module")
def librosa() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numba", Uncompiled("numba"))
        yield importlib.import_module("librosa")


def _file(image: Image.Image, format: str, **options: object):
    import io

    return io.BytesIO(encoded(image, format, **options))


@pytest.mark.parametrize("name", CLIPS)
def test_log_mel_is_transformers(name: str) -> None:
    samples = CLIPS[name]()
    expected = Gemma3nAudioFeatureExtractor()(samples)
    features, mask = LogMel(LOG_MEL)(samples)
    wanted, wanted_mask = expected["input_features"][0], expected["input_features_mask"][0]
    assert features.shape == wanted.shape and features.dtype == wanted.dtype
    print(f"{name}: {features.shape}, largest difference {np.abs(features - wanted).max():.3g}")
    np.testing.assert_array_equal(features, wanted)
    np.testing.assert_array_equal(mask, wanted_mask)


def test_mel_filters_are_librosas(librosa: Any) -> None:
    expected = librosa.filters.mel(sr=16_000, n_fft=1024, n_mels=128, fmin=125, fmax=7600, htk=True, norm=None)
    difference = np.abs(mel_filters(LOG_MEL) - expected.T).max()
    print(f"largest difference {difference:.3g}")
    assert difference < 1e-6


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_is_librosas(librosa: Any, rate: int) -> None:
    samples = noise(3.3, rate, seed=rate)
    expected = librosa.resample(samples, orig_sr=rate, target_sr=RATE_HZ)
    actual = load_audio(samples, POLICY, RATE_HZ, rate=rate)
    print(f"{rate} Hz: {len(actual)} samples, largest difference {np.abs(actual - expected).max():.3g}")
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_a_file_is_heard_as_by_librosa(librosa: Any, channels: int) -> None:
    import io

    samples = np.stack([noise(5, 44_100, seed) for seed in range(channels)], axis=-1)
    file = sound(samples, 44_100, "FLAC")
    expected, _ = librosa.load(io.BytesIO(file), sr=RATE_HZ, mono=True)
    actual = load_audio(file, POLICY, RATE_HZ)
    difference = np.abs(actual - expected).max()
    print(f"{channels} channels: largest difference {difference:.3g}")
    assert difference < 1e-6


def test_resampled_speech_keeps_its_features() -> None:
    """A negative control too: features of the same words at the wrong rate are far away."""
    at_16, _ = speech(SENTENCES[0])
    at_48 = soxr.resample(at_16, RATE_HZ, 48_000)
    log_mel = LogMel(LOG_MEL)
    expected, mask = log_mel(at_16)
    back, _ = log_mel(load_audio(at_48, POLICY, RATE_HZ, rate=48_000)[: len(at_16)])
    wrong, _ = log_mel(at_48[: len(at_16)])
    loud = mask[:, None] & (expected > expected.max() - 7)
    right, far = (np.abs(features - expected)[loud].mean() for features in (back, wrong))
    print(f"mean difference of loud bins {right:.3g}, at the wrong rate {far:.3g}")
    assert right < 0.01 and far > 0.5


def processors(size: int) -> dict[str, object]:
    options = {
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_normalize": False,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
    }
    return {"slow": SiglipImageProcessorPil(**options), "fast": SiglipImageProcessor(**options)}


def on_white(image: Image.Image) -> Image.Image:
    """`image`, or what transformers makes of it from 5.23 on; before, it dropped what says where one sees through."""
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    if np.asarray(convert_to_rgb(clear)).max() == 255 or not image.has_transparency_data:
        return image
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")


@pytest.mark.parametrize("size", [256, 768])
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_transformers(name: str, size: int) -> None:
    image = IMAGES[name]()
    pixels = to_pixels(resize(load_image(image, POLICY), size), 1 / 255)
    assert pixels.shape == (3, size, size) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    differences = {
        kind: np.abs(pixels - processor(on_white(image), return_tensors="np")["pixel_values"][0]).max()
        for kind, processor in processors(size).items()
    }
    print(f"{name} at {size}: " + ", ".join(f"{kind} {value * 255:.3g}/255" for kind, value in differences.items()))
    assert differences["slow"] <= 6e-8
    assert differences["fast"] <= 1 / 255 + 1e-6
