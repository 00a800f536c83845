"""Small clips of three actions, shared by the web page's tests (loaded with runpy: tests are no package)."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

MOVES = ("right", "down", "still")


def write_clip(path: Path, move: str, number: int) -> Path:
    """A bright square on noise that moves to the right, down, or not at all; VP8 in webm, as browsers record."""
    rng = np.random.default_rng(number)
    ground = rng.integers(0, 80, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for step in range(12):
            picture = ground.copy()
            y, x = 4 + number % 5 + (3 * step if move == "down" else 0), 4 + number % 7 + (4 * step if move == "right" else 0)
            picture[y : y + 10, x : x + 10] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path
