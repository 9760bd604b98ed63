"""The largest picture that is decoded."""

from __future__ import annotations

from gemma3n_onnx.runtime.errors import MediaError

MAX_PIXELS = 100_000_000
# The maximum of JPEG; resizing a one-column image allocates `size` times its height.
MAX_SIDE = 65_535


def check_size(width: int, height: int) -> None:
    """Raises MediaError for a picture beyond `MAX_PIXELS` or `MAX_SIDE`."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise too_large(f"{width:,} x {height:,}")


def too_large(found: str) -> MediaError:
    return MediaError(
        f"The image has too many pixels ({found}); "
        f"scale it to at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} on a side."
    )
