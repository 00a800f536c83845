"""Small videos and a manifest of them, shared by the loader's tests (loaded with runpy: tests are no package)."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pandas as pd

from amd_fast.data.manifest import Manifest

FRAMES = 12


ENCODERS = {"mpeg4": ("mpeg4", {"g": "4"}), "vp9": ("libvpx-vp9", {"g": "4", "deadline": "realtime", "cpu-used": "8"})}


def write_video(path: Path, number: int, side: int = 32, frames: int = FRAMES, codec: str = "mpeg4") -> Path:
    """Noise of its own that moves to the right; the grey level of the upper left corner tells the frame."""
    noise = np.random.default_rng(number).integers(60, 250, (side, 3 * side, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        encoder, options = ENCODERS[codec]
        stream = container.add_stream(encoder, rate=25, options=options)
        stream.codec_context.thread_count = 1
        stream.width, stream.height, stream.pix_fmt = side + 8, side, "yuv420p"
        for k in range(frames):
            picture = np.ascontiguousarray(noise[:, k : k + side + 8])
            picture[: side // 4, : side // 4] = 16 * k
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_manifest(
    folder: Path,
    *,
    classes: int = 4,
    clips: int = 6,
    per_group: int = 1,
    thermal: bool = False,
    side: int = 32,
    codec: str = "mpeg4",
) -> Manifest:
    """``classes x clips`` videos; ``per_group`` consecutive clips of a class share a recording."""
    rows = []
    for number in range(classes * clips):
        label, clip = divmod(number, clips)
        write_video(folder / f"{number:03}.mp4", number, side, codec=codec)
        row = {"path": f"{number:03}.mp4", "label": f"class {label}", "group": f"{label}-{clip // per_group}"}
        row |= {"frames": FRAMES, "fps": 25.0, "width": side + 8, "height": side, "codec": codec}
        if thermal:
            np.save(folder / f"{number:03}.npy", np.random.default_rng(number).random((FRAMES, 6, 8)).astype(np.float32))
            row["thermal"] = f"{number:03}.npy"
        rows.append(row)
    return Manifest(pd.DataFrame(rows), folder)
