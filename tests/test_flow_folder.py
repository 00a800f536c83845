"""Precomputed flow: its layouts, its scale, and clips that use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from amd_fast.data.clips import ClipTransform, decode_clip
from amd_fast.data.flow_folder import FLOW_BOUND, flow_count, read_flow_folder
from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.data.sampling import segment_indices
from amd_fast.errors import DataError

LAYOUTS: dict[str, Callable[[Path, str, int], Path]] = {
    "folders": lambda folder, axis, k: folder / f"flow_{axis}" / f"{k:05d}.jpg",
    "named folders": lambda folder, axis, k: folder / axis / f"frame_{k:06d}.png",
    "u and v": lambda folder, axis, k: folder / {"x": "u", "y": "v"}[axis] / f"frame{k:06d}.jpg",
    "side by side": lambda folder, axis, k: folder / f"flow_{axis}_{k:05d}.jpg",
    "short names": lambda folder, axis, k: folder / f"{axis}_{k:05d}.jpg",
}


def write_flow(folder: Path, x: np.ndarray, y: np.ndarray, layout: str = "folders", start: int = 1) -> Path:
    """Stores displacements ``[n, h, w]`` in pixels."""
    for axis, values in (("x", x), ("y", y)):
        for k, plane in enumerate(values):
            path = LAYOUTS[layout](folder, axis, start + k)
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.round((np.clip(plane, -FLOW_BOUND, FLOW_BOUND) / FLOW_BOUND + 1) / 2 * 255).astype(np.uint8)
            assert cv2.imwrite(str(path), grey, [cv2.IMWRITE_JPEG_QUALITY, 100])
    return folder


def planes(*values: float, height: int = 24, width: int = 32) -> np.ndarray:
    return np.broadcast_to(np.array(values, np.float32)[:, None, None], (len(values), height, width))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", [0, 1, 100])
def test_every_layout(layout: str, start: int, tmp_path: Path) -> None:
    folder = write_flow(tmp_path / "clip", planes(-20, -3, 0, 8), planes(20, 5, -1, 0), layout, start)
    (folder / "img_00001.jpg").write_bytes(b"the frames may lie beside it")
    assert flow_count(folder) == 4
    flow = read_flow_folder(folder, [2, 0, 9, 2, 1])
    assert (flow.dtype, flow.shape) == (np.float16, (5, 24, 32, 2))
    step = 2 * FLOW_BOUND / 255
    expected = [(0, -1), (-20, 20), (8, 0), (0, -1), (-3, 5)]
    np.testing.assert_allclose(flow.mean((1, 2)), expected, atol=step)  # half a grey level, and one for the JPEG


def test_vectors_shrink_with_the_picture(tmp_path: Path) -> None:
    """Twelve pixels of a 24 x 32 picture are six of a 12 x 16 one."""
    folder = write_flow(tmp_path, planes(12), planes(-6))
    flow = read_flow_folder(folder, [0], short_side=12)
    assert flow.shape == (1, 12, 16, 2)
    np.testing.assert_allclose(flow.mean((0, 1, 2)), [6, -3], atol=0.1)
    np.testing.assert_allclose(read_flow_folder(folder, [0], bound=40).mean((0, 1, 2)), [24, -12], atol=0.3)


def test_a_clip_takes_its_flow_from_the_folder(tmp_path: Path) -> None:
    """No video is opened where nothing else is wanted, and a frame's flow is that of the frame sampled."""
    values = np.linspace(-1.5, 1.5, 29)
    folder = write_flow(tmp_path, planes(*values), planes(*-values))
    clip = decode_clip("not opened.mp4", 8, short_side=24, modalities=("flow",), extra={"flow": folder}, frame_count=30)
    expected = values[np.minimum(segment_indices(30, 8), 28)]
    np.testing.assert_allclose(clip["flow"].mean((1, 2)), np.stack([expected, -expected], axis=1), atol=0.17)
    shown = ClipTransform(21, ("flow",), train=False)(clip)["flow"].mean((2, 3))
    np.testing.assert_allclose(shown[:, 0], np.clip(expected / 21 * 56, -5, 5), atol=0.5)


def test_flow_fits_the_pictures_it_belongs_to(tmp_path: Path) -> None:
    """Extracted at another shape than the video's, it is stretched like the pictures were."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for k in range(3):
        cv2.imwrite(str(frames / f"img_{k:05d}.jpg"), np.full((48, 65, 3), 90, np.uint8))
    folder = write_flow(tmp_path / "flow", planes(4, 4), planes(2, 2))
    clip = decode_clip(frames, 2, short_side=40, modalities=("rgb", "flow"), extra={"flow": folder})
    assert clip["rgb"].shape[1:3] == clip["flow"].shape[1:3] == (40, 54)
    np.testing.assert_allclose(clip["flow"].mean((0, 1, 2)), [4 * 54 / 32, 2 * 40 / 24], atol=0.3)


def test_a_manifest_names_the_folders(tmp_path: Path) -> None:
    """A clip without one has its flow computed."""
    for name in ("still", "moving"):
        (tmp_path / name).mkdir()
        for k in range(3):
            cv2.imwrite(str(tmp_path / name / f"img_{k:05d}.png"), np.full((24, 32, 3), 90, np.uint8))
    write_flow(tmp_path / "moving_flow", planes(1, 1), planes(0, 0))
    table = pd.DataFrame({"path": ["still", "moving"], "label": "a", "frames": 3, "width": 32, "height": 24, "flow": ["", "moving_flow"]})
    loader = ClipLoader(Manifest(table, tmp_path), ("flow",), frames=2, size=16, workers=1)
    flow = loader.load_test(np.arange(2)).clips["flow"]
    loader.close()
    assert flow[0].abs().max() < 0.1
    np.testing.assert_allclose(flow[1].mean((0, 2, 3)), [1 * 18 / 24 / 16 * 56, 0], atol=0.3)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "cannot be read"),
    "empty": (lambda folder: folder.mkdir(), "no pairs"),
    "x alone": (lambda folder: write_flow(folder, planes(1, 2), planes()), "2 of x, 0 of y"),
    "one lost": (lambda folder: write_flow(folder, planes(1, 2), planes(1)), "picture 2 has x or y alone"),
    "damaged": (lambda folder: (write_flow(folder, planes(1), planes(1)) / "flow_y" / "00001.jpg").write_bytes(b"?"), "00001.jpg"),
    "sizes": (lambda folder: write_flow(folder, planes(1), planes(1, width=30)), "30 x 24, 32 x 24"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_folders_are_named(kind: str, tmp_path: Path) -> None:
    make, reason = BAD[kind]
    make(tmp_path / "clip")
    with pytest.raises(DataError, match=reason) as caught:
        read_flow_folder(tmp_path / "clip", [0])
    assert str(tmp_path / "clip") in str(caught.value)
    assert any(word in str(caught.value) for word in ("check", "expected", "copy", "extract"))
    with pytest.raises(DataError, match="-1"):
        read_flow_folder(write_flow(tmp_path / "good", planes(1), planes(1)), [-1])
