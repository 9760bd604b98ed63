"""Files that the page is tried with, beside the demo's: a film of the picture, a picture that is none, a document."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image


def main(folder: Path) -> None:
    picture = np.asarray(Image.open(folder / "picture.png").convert("RGB"))
    with av.open(folder / "film.webm", "w") as film:
        stream = film.add_stream("libvpx", rate=10)
        stream.height, stream.width = picture.shape[:2]
        stream.bit_rate = 4_000_000
        for _ in range(10):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "notes.pdf").write_bytes(b"%PDF-1.4\n")


main(Path(sys.argv[1]))
