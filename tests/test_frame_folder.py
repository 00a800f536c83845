"""Clips as folders of pictures: order, pixels, faults by name, and the way through the index and the clip reader."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from amd_fast.data.clips import read_clip
from amd_fast.data.decode import decode_rgb, to_pixels
from amd_fast.data.frame_folder import FrameFolderReader
from amd_fast.data.index import index
from amd_fast.data.manifest import Manifest
from amd_fast.data.readers import DEFAULT_RATE, open_clip
from amd_fast.errors import DecodeError


def picture(shade: int, height: int = 30, width: int = 40) -> np.ndarray:
    """A gradient with its own mean, BGR."""
    ramp = np.linspace(0, 100, width, dtype=np.float32)[None, :, None] + np.array([0, 20, 50], np.float32)
    return np.broadcast_to(ramp + shade, (height, width, 3)).astype(np.uint8).copy()


def write(folder: Path, names: list[str], **size: int) -> Path:
    """One picture per name, the n-th of shade 8 n."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), picture(8 * n, **size))
    return folder


@pytest.mark.parametrize("pattern", ["img_{:05d}.jpg", "frame_{:06d}.JPG", "{:05d}.jpeg", "image{}.jpg", "{}.png", "a b#(1)_{}.png"])
@pytest.mark.parametrize("start", [0, 1, 97])
def test_frames_come_in_the_order_of_their_numbers(pattern: str, start: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "clip.d", [pattern.format(start + n) for n in range(12)])
    with open_clip(folder) as reader:
        assert isinstance(reader, FrameFolderReader)
        assert reader.frame_count == 12
        order = [11, 0, 3, 3, 99]
        pixels = reader.pixels(reader.frames(order))
        info = reader.check()
    assert pixels.shape == (5, 30, 40, 3) and pixels.dtype == np.uint8
    for row, position in zip(pixels, [11, 0, 3, 3, 11], strict=True):
        expected = picture(8 * position)[..., ::-1]
        assert np.abs(row.astype(int) - expected).max() <= (0 if pattern.endswith("png") else 4)
    assert (info.frames, info.width, info.height, info.fps) == (12, 40, 30, DEFAULT_RATE)
    assert info.codec == ("png folder" if pattern.endswith("png") else "jpeg folder")
    assert info.duration == 12 / DEFAULT_RATE


def test_a_constant_step_and_flow_files_beside_the_frames_are_no_fault(tmp_path: Path) -> None:
    folder = write(tmp_path / "every_fifth", [f"img_{n:05d}.jpg" for n in range(1, 30, 5)])
    for name in ("flow_x_00001.jpg", "flow_y_00001.jpg", "x_00001.jpg", ".hidden_3.jpg"):
        cv2.imwrite(str(folder / name), picture(0))
    (folder / "notes.txt").write_text("n")
    assert FrameFolderReader(folder).check().frames == 6


def test_pixels_equal_those_of_the_video_the_frames_come_from(tmp_path: Path) -> None:
    """Lossless pictures of a lossless video: same frames, same resizing, same network input, bit for bit."""
    path = tmp_path / "v.avi"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for _ in range(11):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    folder = tmp_path / "frames"
    folder.mkdir()
    for n, frame in enumerate(decode_rgb(path, range(11))):
        cv2.imwrite(str(folder / f"img_{n + 1:05d}.png"), frame[..., ::-1])
    with open_clip(path) as video, open_clip(folder) as pictures:
        for side in (None, 24, 96):
            for index_ in ([0, 5, 10], [7, 7, 2]):
                ours = pictures.pixels(pictures.frames(index_), short_side=side)
                np.testing.assert_array_equal(ours, to_pixels(video.frames(index_), short_side=side))
        grey = pictures.pixels(pictures.frames([4]), pixel_format="gray")[0]
        weights = np.array([0.299, 0.587, 0.114])
        expected = pictures.pixels(pictures.frames([4]))[0] @ weights
        assert grey.shape == (48, 64) and np.abs(grey - expected).max() <= 1
    ours, theirs = (read_clip(place, frames=4, size=32)["rgb"] for place in (folder, path))
    assert ours.equal(theirs)


def test_jpeg_pixels_are_a_full_decode_resized_by_area(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    image = np.random.default_rng(1).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "1.jpg"), image)
    full = cv2.imread(str(folder / "1.jpg"))[..., ::-1].astype(np.float64)
    expected = full.reshape(24, 4, 32, 4, 3).mean((1, 3))
    reader = FrameFolderReader(folder)
    assert np.abs(reader.pixels(reader.frames([0]), short_side=24)[0] - expected).max() <= 0.5 + 1e-9


def test_faults_are_named(tmp_path: Path) -> None:
    names = [f"img_{n:05d}.jpg" for n in range(1, 9)]

    def refused(folder: Path, says: str) -> None:
        with pytest.raises(DecodeError, match=says) as error, open_clip(folder) as reader:
            reader.check()
        assert str(folder) in str(error.value)
        assert "; " in str(error.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "the folder is empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/cover.jpg").touch()
    refused(tmp_path / "other", r"no numbered pictures \(1 other files\)")

    gap = write(tmp_path / "gap", names)
    (gap / names[3]).unlink()
    refused(gap, "missing between 'img_00003.jpg' and 'img_00005.jpg'")
    assert FrameFolderReader(gap).frame_count == 7  # reading goes on where a frame is lost after indexing

    mixed = write(tmp_path / "mixed", names)
    write(mixed, [names[0]], width=44)
    refused(mixed, "'img_00001.jpg' has 44 x 30 pixels, others 40 x 30")
    with pytest.raises(DecodeError, match="differ in size"):
        FrameFolderReader(mixed).frames([0, 1])

    for position, fault, says in (
        (4, lambda data: data[: len(data) // 2], "'img_00005.jpg' is truncated"),
        (2, lambda data: b"", r"'img_00003.jpg' is empty \(0 bytes\)"),
        (0, lambda data: b"no picture", "'img_00001.jpg' is no picture"),
    ):
        folder = write(tmp_path / f"damaged{position}", names)
        file = folder / names[position]
        file.write_bytes(fault(file.read_bytes()))
        refused(folder, says)
        with pytest.raises(DecodeError, match=says):
            FrameFolderReader(folder).frames([position])

    refused(write(tmp_path / "two", ["img_1.jpg", "shot_1.jpg"]), "2 series of pictures, such as 'img_1.jpg', 'shot_1.jpg'")
    refused(write(tmp_path / "same", ["1.jpg", "01.jpg"]), "have the same number")
    with pytest.raises(DecodeError, match="frame -1 was asked for"):
        FrameFolderReader(write(tmp_path / "fine", names)).frames([-1])


def test_index_of_frame_folders(tmp_path: Path) -> None:
    names = [f"img_{n:05d}.jpg" for n in range(1, 9)]
    for clip in ("walk/anna_c1", "walk/ben_c1", "run/train # 1 (x)", "train/jump/anna_c1"):
        write(tmp_path / "set" / clip, names)
    (write(tmp_path / "set/run/damaged", names) / names[2]).write_bytes(b"")
    write(tmp_path / "set/stray", names)
    m = index(tmp_path / "set", "frames", progress=False)
    assert list(zip(m.table["path"], m.labels.tolist(), strict=True)) == [
        ("run/train # 1 (x)", "run"),
        ("train/jump/anna_c1", "jump"),
        ("walk/anna_c1", "walk"),
        ("walk/ben_c1", "walk"),
    ]
    row = m.table.iloc[0]
    assert (row["frames"], row["fps"], row["width"], row["height"], row["codec"]) == (8, 25.0, 40, 30, "jpeg folder")
    why = dict(zip(m.rejected["path"], m.rejected["reason"], strict=True))
    assert why == {"run/damaged": "'img_00003.jpg' is empty (0 bytes)", "stray": "it lies outside the class folders"}
    m.to_csv(tmp_path / "m.csv")
    again = index(tmp_path / "m.csv", "csv", progress=False)  # rows whose path is a folder
    assert again.table["codec"].tolist() == ["jpeg folder"] * 4
    assert read_clip(Manifest.from_csv(tmp_path / "m.csv").file(0), frames=4, size=16)["rgb"].shape == (4, 3, 16, 16)
