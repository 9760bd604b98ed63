"""Decodes images to RGB and converts them to the vision encoder's input."""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gemma3n_onnx.runtime.errors import Gemma3nError, MediaError

from .budget import current_budget
from .fetch import FetchPolicy, Source, open_media
from .heif import is_heic, open_heic
from .image_memory import JPEGS, coefficient_bytes, first_scan, pixel_bytes
from .limits import check_size, too_large
from .orientation import turn_of

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageSource = Source | Image | np.ndarray

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
END_OF_JPEG = b"\xff\xd9"
# A JPEG of which decoding would take more is decoded at 1/2, 1/4 or 1/8, but at least `DRAFT` times the size wanted.
WHOLE_BYTES = 256_000_000
DRAFT = 2
STRIP_PIXELS = 1 << 20
STRIP_COPIES = 6  # cropped, turned, RGBA, white, composed, RGB

# Pillow warns of decompression bombs through process-wide warning filters, which are not thread-safe.
_filters = threading.Lock()


def load_image(
    source: ImageSource, policy: FetchPolicy, warn: Callable[[str], None] = lambda _: None, size: int | None = None
) -> Image:
    """Loads an image in mode RGB, EXIF orientation applied; of an animation, the first frame.

    Source: any `open_media` source, a PIL image, or an array [height, width] or [height, width, 1, 3 or 4] of
    uint8, uint16, or float from 0 to 1. Transparency becomes white, as in transformers' image processors; 16-bit
    and float values are scaled to 8 bits. A JPEG without its end is decoded as far as it goes, as browsers do it, and
    `warn` is told.

    With `size`, the image is resized to that square, as by `resize`, in less memory. A JPEG of which decoding would
    take more than `WHOLE_BYTES` is then decoded at a fraction of its size, which moves its pixels slightly.

    Raises:
        MediaError: not an image, damaged, in an unsupported format, or larger than `limits` or `policy` allow.
        MediaNotFoundError, UrlRefusedError: as `open_media` raises them.
        PackageMissingError: a HEIC picture, and pillow-heif is not installed.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _to_rgb(source, size)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), size)
    with open_media(source, policy) as file:
        return _decode(file, policy, size, warn)


def resize(image: Image, size: int) -> Image:
    """The image stretched to a square by bilinear interpolation."""
    from PIL import Image

    return image.resize((size, size), Image.Resampling.BILINEAR)


def to_pixels(square: Image, rescale: float) -> np.ndarray:
    """A square RGB image as [3, size, size] fp32, values times `rescale`."""
    values = (np.arange(256) * rescale).astype(np.float32)
    return values[np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))]


def _decode(file: BinaryIO, policy: FetchPolicy, size: int | None, warn: Callable[[str], None]) -> Image:
    try:
        heic = is_heic(file)
        image: Any = open_heic(file) if heic else _open(file)
        check_size(*image.size)
        current_budget().spend("pixels", math.prod(image.size))
        kept = 0 if heic else coefficient_bytes(image, file)
        draft = None
        if size is not None and not heic and kept + pixel_bytes(image) > WHOLE_BYTES:
            draft = DRAFT * size, DRAFT * size
            image.draft(None, draft)  # has no effect on formats other than JPEG
        needed = kept + pixel_bytes(image) + _conversion_bytes(image.size, size)
        with policy.decoding.reserved(needed, "scale the image down, or save it as a JPEG that is not progressive"):
            if heic:
                return _to_rgb(image.to_pillow(), size)
            if not _load(image):
                del image
                image = _ended_jpeg(file, draft)
                lack = "lack detail" if image.info.get("progressive") else "be blank at the bottom"
                warn(f"The end of the JPEG is missing, so the picture may {lack}.")
            return _to_rgb(image, size)
    except Gemma3nError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise _damaged(error) from error


def _load(image: Image) -> bool:
    """Decodes an image; False for a JPEG without its end."""
    try:
        image.load()
    except OSError:
        if image.format not in JPEGS:
            raise
        return False
    return True


def _ended_jpeg(file: BinaryIO, draft: tuple[int, int] | None) -> Image:
    """A JPEG that ends too early, with an end marker added, at which libjpeg fills what is missing."""
    scan = first_scan(file)
    file.seek(0)
    data = file.read()
    if scan is None or scan[1] >= len(data):
        raise OSError("the file ends before its picture begins")
    image = _open(io.BytesIO(data + END_OF_JPEG))
    if draft is not None:
        image.draft(None, draft)
    image.load()
    return image


def _open(file: BinaryIO) -> Image:
    from PIL import Image, UnidentifiedImageError

    file.seek(0)
    try:
        with _filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            return Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise too_large(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,}") from error
    except UnidentifiedImageError as error:
        empty = not file.seek(0) and not file.read(1)
        what = "The file is empty" if empty else "This is not an image in a supported format"
        raise MediaError(f"{what}; give one of {', '.join([*_formats(), 'HEIC'])}.") from error


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow has."""
    from PIL import Image

    return [name for name in FORMATS if name in Image.OPEN]


def _to_rgb(image: Image, size: int | None) -> Image:
    """Strip by strip, so that no second copy of the whole image is made. Resizing each strip to the new width, then all
    of them to the new height, is what Pillow does with a whole image."""
    from PIL import Image

    check_size(*image.size)
    budget = current_budget()
    try:
        image.load()
        turn = turn_of(image)
        width, height = turn.size(image)
        result = Image.new("RGB", (size or width, height))
        rows = max(1, STRIP_PIXELS // max(width, result.width))
        for top in range(0, height, rows):
            budget.check()
            strip = _strip_to_rgb(turn.rows(image, top, min(top + rows, height)))
            if size is not None:
                strip = strip.resize((size, strip.height), Image.Resampling.BILINEAR)
            result.paste(strip, (0, top))
        return result if size is None else resize(result, size)
    except Gemma3nError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise _damaged(error) from error


def _conversion_bytes(sides: tuple[int, int], size: int | None) -> int:
    """What `_to_rgb` takes beside the decoded image, either side of which may be its height."""
    resized = math.prod(sides) if size is None else max(sides) * size
    return 4 * resized + STRIP_COPIES * 4 * max(STRIP_PIXELS, *sides)


def _strip_to_rgb(strip: Image) -> Image:
    from PIL import Image

    if strip.mode.startswith(("I", "F")):
        strip = _from_array(_unsigned(strip))
    if "A" in strip.getbands() or strip.info.get("transparency") is not None:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return strip.convert("RGB")


def _unsigned(image: Image) -> np.ndarray:
    """16- or 32-bit grey -> uint16 (Pillow may hold it in mode I) or unchanged floats."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        return values
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise MediaError("This image has grey values beyond 16 bits; save it with 8 or 16 bits per channel.")
    return values.astype(np.uint16)


def _from_array(values: np.ndarray) -> Image:
    """In mode L, RGB or RGBA."""
    from PIL import Image

    shape = " x ".join(map(str, values.shape))
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        raise MediaError(f"The image array {shape} has its channels first; transpose it to height x width x channels.")
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or not values.size:
        raise MediaError(
            "An image array must be height x width or height x width x (1, 3 or 4), not "
            f"{shape or 'a scalar'}; reshape it."
        )
    check_size(values.shape[1], values.shape[0])
    if values.dtype == np.uint16:
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise MediaError("The image array has NaN or infinite values; give finite values from 0 to 1.")
        if values.min() < 0 or values.max() > 1:
            raise MediaError(
                f"The image array has values from {values.min():g} to {values.max():g}; "
                "scale floats to 0 to 1, or give uint8."
            )
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise MediaError(f"An image array must be uint8, uint16 or float, not {values.dtype}; convert it.")
    grey = values.ndim == 3 and values.shape[2] == 1
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if grey else values))


def _damaged(error: Exception) -> MediaError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return MediaError(f"The image is damaged or incomplete ({reason}); save or download it again.")
