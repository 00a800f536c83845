"""Clips: what is decoded, and what cropping, flipping and normalising do to it in every modality."""

from __future__ import annotations

import pickle
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import amd_fast.data
from amd_fast.data.clips import FLOW_UNIT, RESIZE_RATIO, ClipTransform, RawClip, decode_clip, read_clip
from amd_fast.data.decode import decode_frames, decode_rgb, to_pixels
from amd_fast.data.flow import dis_flow
from amd_fast.data.sampling import segment_indices
from amd_fast.errors import ConfigError, DataError, DecodeError, ImplementationError

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
FRAMES = 30


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A texture that moves 2 pixels to the right and 1 up per frame, 112 x 80 pixels."""
    return write_video(tmp_path_factory.mktemp("clips") / "moving.mp4", FRAMES)


def write_video(path: Path, frames: int) -> Path:
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((200, 240, 3)).astype(np.float32), (0, 0), 3)
    wide = (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 112, 80, "yuv420p"
        for k in range(frames):
            picture = np.ascontiguousarray(wide[20 + k : 100 + k, 100 - 2 * k : 212 - 2 * k])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbered(path: Path, frames: int, shape: tuple[int, ...] = (6, 8), dtype: type = np.float32) -> Path:
    """An array whose every value is its frame's number."""
    np.save(path, np.broadcast_to(np.arange(frames).reshape(-1, *[1] * len(shape)), (frames, *shape)).astype(dtype))
    return path


# -------------------------------------------------------------------------------------------------------- decode_clip


@pytest.mark.parametrize("seed", [None, 4])
def test_clip_holds_the_sampled_frames_and_the_flow_to_the_next(video: Path, seed: int | None) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    clip = decode_clip(video, 8, short_side=40, modalities=("rgb", "flow"), rng=rng)
    index = segment_indices(FRAMES, 8, None if seed is None else np.random.default_rng(seed))
    assert clip.keys() == {"rgb", "flow"}
    assert clip.frames == 8
    assert clip.nbytes == 8 * 40 * 56 * (3 + 4)
    assert (clip["rgb"].dtype, clip["rgb"].shape) == (np.uint8, (8, 40, 56, 3))
    np.testing.assert_array_equal(clip["rgb"], decode_rgb(video, index, 40))
    first = np.minimum(index, FRAMES - 2)
    grey = to_pixels(decode_frames(video, [*first, *first + 1]), short_side=40, pixel_format="gray")
    expected = np.stack([dis_flow(grey[t], grey[8 + t]) for t in range(8)]).astype(np.float16)
    np.testing.assert_array_equal(clip["flow"], expected)
    np.testing.assert_allclose(np.median(clip["flow"][:, 8:-8, 8:-8].astype(float), axis=(0, 1, 2)), [1.0, -0.5], atol=0.15)  # half size


def test_single_modalities_and_known_frame_count(video: Path) -> None:
    both = decode_clip(video, 5, short_side=40, modalities=("rgb", "flow"))
    for name in ("rgb", "flow"):
        alone = decode_clip(video, 5, short_side=40, modalities=(name,), frame_count=FRAMES)
        assert alone.keys() == {name}
        np.testing.assert_array_equal(alone[name], both[name])


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_clips_shorter_than_the_sample(tmp_path: Path, frames: int) -> None:
    path = write_video(tmp_path / "short.mp4", frames)
    clip = decode_clip(path, 8, short_side=40, modalities=("rgb", "flow"))
    np.testing.assert_array_equal(clip["rgb"], decode_rgb(path, segment_indices(frames, 8), 40))
    assert clip["flow"].shape == (8, 40, 56, 2)
    motion = np.abs(clip["flow"].astype(float)).mean(axis=(1, 2, 3))
    assert (motion < 0.01).all() if frames == 1 else (motion > 0.3).all()  # the last frame shows how it came about


@pytest.mark.parametrize(("count", "expected"), [(30, [3, 11, 18, 26]), (10, [1, 3, 6, 8]), (120, [14, 46, 74, 106]), (1, [0, 0, 0, 0])])
def test_further_modalities_cover_the_same_time_span(tmp_path: Path, count: int, expected: list[int]) -> None:
    path = numbered(tmp_path / "thermal.npy", count)
    clip = decode_clip("not opened.mp4", 4, short_side=40, modalities=("thermal",), extra={"thermal": path}, frame_count=FRAMES)
    assert clip["thermal"].shape == (4, 6, 8)
    assert clip["thermal"][:, 0, 0].tolist() == expected


def test_types_and_sizes_of_further_modalities(tmp_path: Path, video: Path) -> None:
    rng = np.random.default_rng(0)
    fine = rng.random((5, 90, 120, 6)).astype(np.float32)
    np.save(tmp_path / "fine.npy", fine)
    files = {
        "half": numbered(tmp_path / "half.npy", 30, (24, 32), np.float16),
        "depth": numbered(tmp_path / "depth.npy", 30, (24, 32, 1), np.uint16),
        "fine": tmp_path / "fine.npy",
        "unused": tmp_path / "there is no such file.npy",
    }
    clip = decode_clip(video, 5, short_side=30, modalities=("half", "rgb", "depth", "fine", "absent"), extra=files)
    assert clip.keys() == {"rgb", "half", "depth", "fine"}
    assert (clip["half"].dtype, clip["half"].shape) == (np.float16, (5, 24, 32))
    assert (clip["depth"].dtype, clip["depth"].shape) == (np.float32, (5, 24, 32, 1))
    assert clip["fine"].shape == (5, 30, 40, 6)  # no larger than the pictures
    np.testing.assert_allclose(clip["fine"], fine.reshape(5, 30, 3, 40, 3, 6).mean(axis=(2, 4)), atol=1e-5)


def test_raw_clips_can_be_sent_to_other_processes(video: Path) -> None:
    clip = decode_clip(video, 2, short_side=20, modalities=("rgb",))
    copy = pickle.loads(pickle.dumps(clip))
    assert isinstance(copy, RawClip)
    np.testing.assert_array_equal(copy["rgb"], clip["rgb"])


# ------------------------------------------------------------------------------------------------------ ClipTransform


def coordinates(height: int = 64, width: int = 96, frames: int = 3, sensor: tuple[int, int] = (16, 24)) -> RawClip:
    """A clip in which every modality says where in the picture it is: x and y as shares of width and height."""

    def grid(h: int, w: int) -> np.ndarray:
        x, y = np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h)
        return np.stack([x, y], axis=-1)

    place = grid(height, width)
    colours = np.round(255 * np.concatenate([place, place[..., :1]], axis=-1)).astype(np.uint8)
    clip = RawClip(rgb=np.stack([colours] * frames), flow=np.stack([place.astype(np.float16)] * frames))
    clip["sensor"] = np.stack([grid(*sensor).astype(np.float32)] * frames)
    return clip


def places(out: dict[str, torch.Tensor], raw: RawClip, side: float) -> dict[str, np.ndarray]:
    """Undo the normalisation: x and y as shares of the picture, ``[T, 2, size, size]``; x keeps the sign the flow has."""
    rgb = (out["rgb"].numpy() * STD[:, None, None] + MEAN[:, None, None])[:, :2]
    flow = out["flow"].numpy() * FLOW_UNIT * side
    sensor = raw["sensor"].reshape(-1, 2)
    restored = out["sensor"].numpy() * sensor.std(axis=0)[:, None, None] + np.median(sensor, axis=0)[:, None, None]
    return {"rgb": rgb, "flow": flow, "sensor": restored}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sensor", [(16, 24), (16, 20)])
def test_all_modalities_and_frames_show_the_same_cut(seed: int, sensor: tuple[int, int]) -> None:
    raw = coordinates(sensor=sensor)
    transform = ClipTransform(32, ("rgb", "flow", "sensor"), train=True, scale=(0.5, 0.8))
    out = transform(raw, np.random.default_rng(seed))
    share = np.random.default_rng(seed).random(4)[0]
    side = round(64 * (0.5 + 0.3 * share))
    shown = places(out, raw, side)
    for values in shown.values():
        np.testing.assert_array_equal(values, np.broadcast_to(values[:1], values.shape))
        assert (np.diff(values[0, 0], axis=1) >= -0.01).all()
    for axis in (0, 1):
        centre = {name: values[0, axis].mean() for name, values in shown.items()}
        assert centre["flow"] == pytest.approx(centre["rgb"], abs=0.004)
        assert centre["sensor"] == pytest.approx(centre["rgb"], abs=0.012)
        extent = np.ptp(shown["rgb"][0, axis])
        assert extent == pytest.approx(side * 31 / 32 / (96, 64)[axis], abs=0.02)
        inner = (slice(4, -4), slice(4, -4))
        np.testing.assert_allclose(shown["sensor"][0, axis][inner], shown["rgb"][0, axis][inner], atol=0.02)


def test_crops_cover_the_picture_and_its_edges() -> None:
    raw = coordinates()
    transform = ClipTransform(32, ("rgb",), train=True, scale=(0.5, 1.0))
    rng = np.random.default_rng(0)
    views = [transform.draw(64, 96, rng) for _ in range(2000)]
    left, top, side = np.array([(view.left, view.top, view.side) for view in views]).T
    assert left.min() == 0
    assert top.min() == 0
    assert (left + side).max() == 96
    assert (top + side).max() == 64
    assert (side.min(), side.max()) == (32, 64)
    assert transform(raw, rng)["rgb"].shape == (3, 3, 32, 32)


@pytest.mark.parametrize("size", [32, 56, 20])
def test_flip_mirrors_pictures_and_turns_horizontal_flow(size: int) -> None:
    rng = np.random.default_rng(1)
    raw = RawClip(
        rgb=rng.integers(0, 256, (4, 64, 80, 3), dtype=np.uint8),
        flow=rng.normal(0, 1, (4, 64, 80, 2)).astype(np.float16),
        thermal=rng.normal(20, 3, (4, 24, 30)).astype(np.float16),
    )
    names = ("rgb", "flow", "thermal")
    mirrored = 0
    for seed in range(20):
        plain = ClipTransform(size, names, train=True, flip=False)(raw, np.random.default_rng(seed))
        flipped = ClipTransform(size, names, train=True, flip=True)(raw, np.random.default_rng(seed))
        if torch.equal(plain["rgb"], flipped["rgb"]):
            assert all(torch.equal(plain[name], flipped[name]) for name in names)
            continue
        mirrored += 1
        torch.testing.assert_close(flipped["rgb"], plain["rgb"].flip(-1))
        torch.testing.assert_close(flipped["flow"], plain["flow"].flip(-1) * torch.tensor([-1.0, 1.0]).view(2, 1, 1))
        torch.testing.assert_close(flipped["thermal"], plain["thermal"].flip(-1), atol=0.15, rtol=0)  # warpAffine rounds to 1/32 pixel
    assert 4 <= mirrored <= 16
    assert all(torch.equal(plain[name], ClipTransform(size, names, train=False)(raw)[name]) is False for name in names)


def test_centre_crop_is_cut_from_the_middle_without_resizing() -> None:
    raw = RawClip(rgb=np.random.default_rng(0).integers(0, 256, (2, 64, 100, 3), dtype=np.uint8))
    out = ClipTransform(56, ("rgb",), train=False)(raw)["rgb"]
    expected = (raw["rgb"][:, 4:60, 22:78] / 255 - MEAN) / STD
    np.testing.assert_allclose(out.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


@given(size=st.integers(1, 512))
def test_decoded_for_a_size_the_centre_crop_needs_no_resizing(size: int) -> None:
    assert ClipTransform(size, (), train=False).draw(round(size * RESIZE_RATIO), 4 * size).side == size


def test_flow_is_measured_in_shares_of_the_picture() -> None:
    """3 pixels a frame, cut to a square of 40 shown at 24: 1.8 pixels there, in units of 24/56 pixels."""
    flow = np.broadcast_to(np.array([3, -1.5], np.float16), (2, 40, 50, 2))
    out = ClipTransform(24, ("flow",), train=False, resize_ratio=1.0)(RawClip(flow=flow))["flow"]
    np.testing.assert_allclose(out[:, 0], 3 * 24 / 40 / (24 / 56), rtol=1e-3)
    np.testing.assert_allclose(out[:, 1], -1.5 * 24 / 40 / (24 / 56), rtol=1e-3)
    wild = RawClip(flow=np.full((2, 40, 50, 2), -300, np.float16))
    assert (ClipTransform(24, ("flow",), train=False)(wild)["flow"] == -5).all()


def test_flow_values_do_not_depend_on_the_size(video: Path) -> None:
    """The same clip at two resolutions: the same motion in the same units."""
    mean = [read_clip(video, 8, size, ("flow",))["flow"][:, :, 6:-6, 6:-6].median(-1)[0].median(-1)[0].mean(0) for size in (42, 70)]
    torch.testing.assert_close(mean[0], mean[1], atol=0.06, rtol=0)
    torch.testing.assert_close(mean[1], torch.tensor([2.0, -1.0]) / 80 * RESIZE_RATIO * 56, atol=0.15, rtol=0)


def test_sensor_values_are_standardised_over_the_whole_clip() -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(0, 1, (6, 24, 32)).astype(np.float32)
    transform = ClipTransform(24, ("s",), train=False, resize_ratio=1.0)
    reference = transform(RawClip(s=plain))["s"]
    np.testing.assert_allclose(reference[:, 0], (plain[:, :, 4:28] - np.median(plain)) / plain.std(), atol=1e-5)
    torch.testing.assert_close(transform(RawClip(s=300 + 40 * plain))["s"], reference, atol=1e-4, rtol=0)
    torch.testing.assert_close(transform(RawClip(s=np.stack([plain, 5 - plain], axis=-1)))["s"][:, :1], reference)


@pytest.mark.filterwarnings("error")
def test_sensor_gaps_and_dead_sensors() -> None:
    values = np.random.default_rng(0).normal(20, 2, (3, 24, 24)).astype(np.float32)
    values[0, :5], values[1, 7, 7] = np.nan, np.inf
    transform = ClipTransform(24, ("s",), train=False, resize_ratio=1.0)
    out = transform(RawClip(s=values))["s"]
    assert torch.isfinite(out).all()
    assert (out[0, 0, :4] == 0).all()
    assert (transform(RawClip(s=np.full((3, 24, 24), 21.5, np.float16)))["s"] == 0).all()
    assert (transform(RawClip(s=np.full((3, 24, 24), np.nan, np.float32)))["s"] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(16, 70), width=st.integers(16, 70), size=st.integers(1, 48), frames=st.integers(1, 4),
    train=st.booleans(), flip=st.booleans(), seed=st.integers(0, 999), channels=st.sampled_from([None, 1, 3, 5]),
)  # fmt: skip
def test_any_clip_gives_finite_tensors_of_the_right_shape(height, width, size, frames, train, flip, seed, channels) -> None:
    rng = np.random.default_rng(seed)
    raw = RawClip(
        rgb=rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8),
        flow=rng.normal(0, 3, (frames, height, width, 2)).astype(np.float16),
        depth=rng.normal(0, 3, (frames, 1 + height // 3, 1 + width // 3, *([] if channels is None else [channels]))).astype(np.float16),
    )
    before = {name: array.copy() for name, array in raw.items()}
    transform = ClipTransform(size, ("flow", "depth", "missing", "rgb"), train=train, flip=flip)
    out = transform(raw, np.random.default_rng(seed))
    assert list(out) == ["flow", "depth", "rgb"]
    for name, count in (("rgb", 3), ("flow", 2), ("depth", channels or 1)):
        assert out[name].shape == (frames, count, size, size)
        assert out[name].dtype == torch.float32
        assert out[name].is_contiguous()
        assert torch.isfinite(out[name]).all()
        np.testing.assert_array_equal(raw[name], before[name])
    again = transform(raw, np.random.default_rng(seed))
    assert all(torch.equal(out[name], again[name]) for name in out)


def test_choosing_frames_of_a_longer_clip() -> None:
    rng = np.random.default_rng(0)
    raw = RawClip(rgb=rng.integers(0, 256, (6, 32, 40, 3), dtype=np.uint8), s=rng.normal(0, 1, (6, 8, 10)).astype(np.float32))
    transform = ClipTransform(24, ("rgb", "s"), train=True)
    everything = transform(raw, np.random.default_rng(3))
    chosen = transform(raw, np.random.default_rng(3), index=[4, 0, 4])
    assert all(torch.equal(chosen[name], everything[name][[4, 0, 4]]) for name in chosen)
    with pytest.raises(DataError, match="holds 6 frames"):
        transform(raw, rng, index=[6])
    assert ClipTransform(24, ("rgb",), train=False)(RawClip()) == {}


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"size": 0}, {"scale": (0.9, 0.5)}, {"scale": (0.5, 1.5)}, {"resize_ratio": 0.9}):
        with pytest.raises(ConfigError, match="clip transform needs"):
            ClipTransform(**{"size": 24, "modalities": ("rgb",), "train": True, **wrong})
    with pytest.raises(ConfigError, match="rng="):
        ClipTransform(24, ("rgb",), train=True)(coordinates())


# ---------------------------------------------------------------------------------------------------------- read_clip


def test_read_clip(video: Path, tmp_path: Path) -> None:
    thermal = numbered(tmp_path / "t.npy", 12, (24, 32))
    clip = amd_fast.data.read_clip(video, frames=4, size=64, modalities=("thermal", "rgb", "flow"), extra={"thermal": thermal})
    assert list(clip) == ["thermal", "rgb", "flow"]
    assert [tuple(tensor.shape) for tensor in clip.values()] == [(4, channels, 64, 64) for channels in (1, 3, 2)]
    raw = decode_rgb(video, segment_indices(FRAMES, 4), 73)
    expected = (raw[:, 4:68, 19:83] / 255 - MEAN) / STD
    assert raw.shape == (4, 73, 102, 3)
    np.testing.assert_allclose(clip["rgb"].numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    assert read_clip(video)["rgb"].shape == (8, 3, 224, 224)


def test_read_clip_in_training(video: Path) -> None:
    first = read_clip(video, 4, 32, train=True, rng=np.random.default_rng(0))["rgb"]
    same = read_clip(video, 4, 32, train=True, rng=np.random.default_rng(0))["rgb"]
    other = read_clip(video, 4, 32, train=True, rng=np.random.default_rng(1))["rgb"]
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert read_clip(video, 4, 32, train=True)["rgb"].shape == (4, 3, 32, 32)
    torch.testing.assert_close(read_clip(video, 4, 32, rng=np.random.default_rng(0)), read_clip(video, 4, 32))  # test ignores rng


def test_read_clip_says_what_is_wrong(video: Path, tmp_path: Path) -> None:
    with pytest.raises(ImplementationError, match="dali"):
        read_clip(video, decoder="dali")
    with pytest.raises(ConfigError, match="'pyav'"):
        read_clip(video, decoder="decord")
    with pytest.raises(DataError, match=r"'thermal'.*moving.*extra="):
        read_clip(video, modalities=("rgb", "thermal"))
    with pytest.raises(DataError, match=r"moving.*frames=0"):
        read_clip(video, frames=0)
    with pytest.raises(DecodeError, match=r"nowhere\.mp4"):
        read_clip(tmp_path / "nowhere.mp4")
    with pytest.raises(DataError, match="at least 16 x 16"):
        read_clip(video, size=8, modalities=("flow",))


def _archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3), b=np.zeros(3))


def _cut(path: Path) -> None:
    np.save(path, np.zeros((10, 24, 32), np.float32))
    path.write_bytes(path.read_bytes()[:5000])


BAD_ARRAYS = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("36.6, 36.7"),
    "truncated": _cut,
    "pickled": lambda path: np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "archive": _archive,
    "flat": lambda path: np.save(path, np.zeros((10, 768))),
    "five": lambda path: np.save(path, np.zeros((10, 2, 2, 2, 2))),
    "no_frames": lambda path: np.save(path, np.zeros((0, 24, 32))),
    "words": lambda path: np.save(path, np.full((10, 24, 32), "a")),
    "complex": lambda path: np.save(path, np.zeros((10, 24, 32), np.complex64)),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_bad_arrays_are_named_with_a_remedy(kind: str, video: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.npy"
    BAD_ARRAYS[kind](path)
    with pytest.raises(DataError, match=f"modality 'thermal'.*{kind}.npy.*numpy.save") as caught:
        read_clip(video, modalities=("rgb", "thermal"), extra={"thermal": path})
    assert not isinstance(caught.value, DecodeError)
