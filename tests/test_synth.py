"""The synthetic action set: what is drawn, what damage does, what is written, and that each modality carries what it should."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd_fast.data.manifest import Manifest
from amd_fast.data.synth import ClipSpec, catalogue, confusable_pairs, encode, render_clip, synthesize, writing
from amd_fast.data.synth.appearance import BUILDS, COLOURS, SILHOUETTES, TEXTURES, Appearance
from amd_fast.data.synth.command import synth_command
from amd_fast.data.synth.damage import KINDS, MODALITY, apply
from amd_fast.data.synth.figures import FIGURES
from amd_fast.data.synth.programs import Program
from amd_fast.data.synth.shapes import SHAPES, shape_placement
from amd_fast.data.synth.skeleton import CHANNELS, INDEX, SHANK, SOLE, THIGH, TORSO, joints, project
from amd_fast.errors import ConfigError, DataError

SMALL = {"classes": 8, "clips_per_class": 2, "size": 48, "progress": False}
DISC = Appearance("disc", "checks", "blue", "white")
SLIM = Appearance("slim", "plain", "red", "blue")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def decoded(path: str | Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return synthesize(tmp_path_factory.mktemp("synth"), **SMALL, workers=1)


# ---- classes ----------------------------------------------------------------------------------------------------------------


def test_default_catalogue_has_eighty_classes_split_by_class() -> None:
    classes = catalogue()
    labels = [action.label for action in classes]
    assert len(set(labels)) == len(labels) == 80
    assert {split: sum(action.split == split for action in classes) for split in ("train", "val", "test")} == {
        "train": 48,
        "val": 12,
        "test": 20,
    }


def test_every_split_has_pairs_that_only_motion_and_pairs_that_only_appearance_tells_apart() -> None:
    classes = {action.label: action for action in catalogue()}
    pairs = confusable_pairs(tuple(classes.values()))
    for kind in ("motion_only", "appearance_only"):
        assert {classes[one].split for one, _ in pairs[kind]} == {"train", "val", "test"}
    for one, other in pairs["motion_only"]:
        assert classes[one].look == classes[other].look and classes[one].program.backwards != classes[other].program.backwards
    for one, other in pairs["appearance_only"]:
        assert classes[one].program == classes[other].program and classes[one].look != classes[other].look


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_classes_bring_new_motions_and_new_appearances(split: str) -> None:
    train = [action for action in catalogue(100) if action.split == "train"]
    actions, looks = ({action.program.action for action in train}, {action.look for action in train})
    new = [action for action in catalogue() if action.split == split]
    assert sum(action.program.action not in actions for action in new) >= len(new) // 2
    assert all(action.look not in looks for action in new)


def test_catalogue_names_only_what_exists() -> None:
    for action in catalogue(100):
        figure = action.program.is_figure
        assert action.program.action in (FIGURES if figure else SHAPES)
        assert action.look.silhouette in (BUILDS if figure else SILHOUETTES)
        assert action.look.texture in (("plain", "hoops", "halves", "belted") if figure else TEXTURES)
        assert action.look.colour in COLOURS and action.look.second in COLOURS
        assert action.program.view in (("side", "above") if figure else ("",))


@pytest.mark.parametrize("count", [4, 1000])
def test_impossible_number_of_classes_names_the_range(count: int) -> None:
    with pytest.raises(ConfigError, match=rf"classes={count} .* 5 to \d+"):
        catalogue(count)


# ---- drawing ----------------------------------------------------------------------------------------------------------------


def test_every_class_draws_a_moving_subject_of_the_announced_length() -> None:
    for number, action in enumerate(catalogue(100)):
        spec = ClipSpec(action.program, action.look, seed=number, size=48)
        frames = render_clip(spec)
        assert frames.shape == (spec.frames, 48, 48, 3) and frames.dtype == np.uint8
        assert 24 <= spec.frames <= 40
        changed = np.abs(frames.astype(int) - np.median(frames, axis=0)).max(axis=(0, 3)) > 40
        assert 0.01 < changed.mean() < 0.95, action.label


@pytest.mark.parametrize(
    ("program", "look"), [(Program("slide"), DISC), (Program("sit_down", "side"), SLIM), (Program("walk", "above"), SLIM)]
)
def test_backwards_is_the_same_frames_in_reverse_order(program: Program, look: Appearance) -> None:
    forwards, backwards = (render_clip(ClipSpec(p, look, seed=3, size=48)) for p in (program, program.reverse))
    np.testing.assert_array_equal(forwards[::-1], backwards)


def test_pixels_depend_on_the_seed_and_on_nothing_else() -> None:
    spec = ClipSpec(Program("kick", "side"), SLIM, seed=5, size=48)
    np.testing.assert_array_equal(render_clip(spec), render_clip(spec))
    other = render_clip(ClipSpec(Program("kick", "side"), SLIM, seed=6, size=48))
    assert other.shape != render_clip(spec).shape or (other != render_clip(spec)).any()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_stay_within_reach_of_the_frame(name: str) -> None:
    for seed in range(5):
        place = shape_placement(name, 30, np.random.default_rng(seed))
        for values in (place.x, place.y, place.angle, place.scale_x, place.scale_y):
            assert values.shape == place.x.shape and values.shape[1] == 30 and np.isfinite(values).all()
        assert np.ptp(place.x) <= 0.7 and np.ptp(place.y) <= 0.7


angles = st.floats(-2.0, 2.0)


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries({name: angles for name in CHANNELS if name not in ("x", "y", "lift")}), st.booleans())
def test_limbs_keep_their_lengths_and_the_figure_rests_on_the_floor(pose: dict[str, float], pinned: bool) -> None:
    points = joints({name: np.array([value, 0.5 * value]) for name, value in pose.items()}, pinned_feet=pinned)
    for first, second, length in (("hip_l", "knee_l", THIGH), ("knee_r", "ankle_r", SHANK), ("pelvis", "chest", TORSO)):
        np.testing.assert_allclose(np.linalg.norm(points[:, INDEX[first]] - points[:, INDEX[second]], axis=-1), length, rtol=1e-12)
    np.testing.assert_allclose(points[:, :, 2].min(axis=1), SOLE, atol=1e-12)
    if pinned:
        np.testing.assert_allclose(points[:, [INDEX["ankle_l"], INDEX["ankle_r"]], :2].mean(axis=1), 0.0, atol=1e-12)


def test_standing_and_sitting_have_the_heights_of_a_body() -> None:
    standing = joints({"yaw": np.zeros(1)}, pinned_feet=True)[0]
    sitting = joints({f"{name}_{side}": np.full(1, np.pi / 2) for name in ("hip", "knee") for side in "lr"}, pinned_feet=True)[0]
    assert standing[INDEX["head"], 2] == pytest.approx(0.25 + 0.25 + 0.29 + 0.13, abs=0.08)
    assert standing[INDEX["pelvis"], 2] - sitting[INDEX["pelvis"], 2] == pytest.approx(THIGH, abs=0.04)
    assert sitting[INDEX["pelvis"], 0] == pytest.approx(-THIGH)  # the seat is behind the feet


def test_projection_from_the_side_and_from_above() -> None:
    point = np.array([0.3, 0.2, 0.75])
    side, near, _ = project(point, 0.0, 1e9)
    np.testing.assert_allclose(side, [0.3, -0.3], atol=1e-6)
    assert near == pytest.approx(-0.2)
    above, near, zoom = project(point, np.pi / 2, 2.0)
    np.testing.assert_allclose(above, np.array([0.3, -0.2]) * 2.0 / 1.7, atol=1e-12)
    assert near == pytest.approx(0.3) and zoom == pytest.approx(2.0 / 1.7)


# ---- damage -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return render_clip(ClipSpec(Program("circle"), DISC, seed=1, size=96))


def damaged(frames: np.ndarray, kind: str) -> np.ndarray:
    result = apply(frames, kind, np.random.default_rng(0))
    assert result.dtype == np.uint8 and result.shape[1:] == frames.shape[1:]
    return result


def grey(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def flow(frames: np.ndarray, step: int = 1) -> np.ndarray:
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pictures = grey(frames)
    return np.stack([solver.calc(pictures[i], pictures[i + 1], None) for i in range(0, len(pictures) - 1, step)])


def test_damage_of_rgb_keeps_the_frames_and_most_of_the_motion(clean: np.ndarray) -> None:
    before = flow(clean)
    for kind in KINDS["rgb"]:
        frames = damaged(clean, kind)
        assert len(frames) == len(clean), kind
        assert np.abs(frames.astype(float) - clean).mean() > 4, kind
        after = flow(frames)
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.35, kind


def test_damage_of_flow_destroys_the_motion_and_leaves_single_frames(clean: np.ndarray) -> None:
    before = flow(clean)
    frozen, dropped, shaken = (damaged(clean, kind) for kind in ("frozen", "dropped", "shake"))
    for frames in (frozen, dropped):
        assert all((clean == frame).all(axis=(1, 2, 3)).any() for frame in frames)  # every frame is one of the clip
    assert (np.diff(frozen.astype(int), axis=0) == 0).all(axis=(1, 2, 3)).mean() > 0.75
    assert 6 <= len(dropped) <= 8
    after = flow(shaken)
    assert np.abs(after).mean() > 3 * np.abs(before).mean()
    assert abs(np.corrcoef(before.ravel(), after.ravel())[0, 1]) < 0.3
    assert abs(float(shaken.mean()) - float(clean.mean())) < 5


def test_dark_inverted_and_noisy_do_what_they_say(clean: np.ndarray) -> None:
    assert damaged(clean, "dark").mean() < 0.3 * clean.mean()
    np.testing.assert_array_equal(damaged(clean, "inverted"), 255 - clean)
    noisy = damaged(clean, "noisy")
    colour_error = np.abs(noisy.astype(float) - clean).mean()
    assert np.abs(grey(noisy).astype(float) - grey(clean)).mean() < 0.4 * colour_error


def test_unknown_damage_lists_the_known_ones(clean: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"'rain'.*blurred"):
        apply(clean, "rain", np.random.default_rng(0))


# ---- files ------------------------------------------------------------------------------------------------------------------


def test_files_hold_what_the_manifest_says(small: Manifest) -> None:
    table = Manifest.from_csv(small.root / "manifest.csv").table
    assert list(table["path"]) == list(small.table["path"])
    assert table["group"].is_unique
    for row in table.itertuples():
        with av.open(str(small.root / row.path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height, stream.average_rate) == ("h264", 48, 48, 25)
            assert sum(1 for _ in container.decode(stream)) == row.frames


def test_decoded_frames_are_the_drawn_ones(small: Manifest) -> None:
    classes = {action.label: action for action in catalogue(8)}
    row = small.table.iloc[0]
    action = classes[row["label"]]
    drawn = render_clip(ClipSpec(action.program, action.look, int(row["seed"]), 48, row["damage"]))
    difference = np.abs(decoded(small.root / row["path"]).astype(int) - drawn)
    assert difference.mean() < 6


def test_same_files_for_any_number_of_workers(small: Manifest, tmp_path: Path) -> None:
    synthesize(tmp_path, **SMALL, workers=2)
    assert contents(tmp_path) == contents(small.root)


def test_another_seed_gives_other_clips(small: Manifest, tmp_path: Path) -> None:
    other = synthesize(tmp_path, **SMALL, workers=1, seed=1)
    assert list(other.table["path"]) == list(small.table["path"])
    assert not set(other.table["seed"]) & set(small.table["seed"])


def test_a_clip_does_not_depend_on_the_number_of_classes(small: Manifest) -> None:
    more = {row["path"]: row["seed"] for row, _ in writing._rows(writing.Settings(80, 2, 48, 0, "h264", True), catalogue(80))}
    fewer = dict(zip(small.table["path"], small.table["seed"], strict=True))
    assert fewer.items() <= more.items()


def test_no_class_is_in_two_splits_and_damage_is_where_it_belongs() -> None:
    rows = [row for row, _ in writing._rows(writing.Settings(80, 20, 96, 0, "h264", True), catalogue(80))]
    splits: dict[str, set[str]] = {}
    kinds: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for row in rows:
        splits.setdefault(row["label"], set()).add(row["split"])
        kinds[row["split"]].append(row["damage"])
        assert row["damaged_modality"] == MODALITY.get(row["damage"], "")
    assert all(len(found) == 1 for found in splits.values())
    assert set(kinds["train"]) == {""}
    assert set(kinds["val"]) == {"", "dark", "blurred", "shake", "frozen"}
    assert set(kinds["test"]) == {"", *MODALITY}
    for split, number in (("val", 12), ("test", 16)):
        assert kinds[split].count("") == len(kinds[split]) // 2
        modalities = [row["damaged_modality"] for row in rows if row["split"] == split]
        assert modalities.count("rgb") == modalities.count("flow") == len(modalities) // 4
        label = next(row["label"] for row in rows if row["split"] == split)
        assert sum(row["label"] == label and not row["damage"] for row in rows) == number


def test_without_damage_every_class_has_the_same_number_of_clean_clips() -> None:
    rows = [row for row, _ in writing._rows(writing.Settings(80, 4, 96, 0, "h264", False), catalogue(80))]
    assert len(rows) == 320 and not any(row["damage"] for row in rows)


def test_an_interrupted_set_is_completed_and_a_complete_one_is_kept(small: Manifest, tmp_path: Path) -> None:
    manifest = synthesize(tmp_path, **SMALL, workers=1)
    complete = contents(tmp_path)
    kept = tmp_path / manifest.table["path"][0]
    before = kept.stat().st_mtime_ns
    (tmp_path / "manifest.csv").unlink()
    lost = tmp_path / manifest.table["path"][1]
    lost.unlink()
    lost.with_name(lost.name + ".part").write_bytes(b"half a file")
    synthesize(tmp_path, **SMALL, workers=1)
    assert contents(tmp_path) == complete
    times = {path: (tmp_path / path).stat().st_mtime_ns for path in complete}
    synthesize(tmp_path, **SMALL, workers=1)
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in complete} == times
    assert kept.stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(small: Manifest) -> None:
    before = contents(small.root)
    with pytest.raises(ConfigError, match=r"seed=0 there, 7 asked for"):
        synthesize(small.root, **SMALL, seed=7)
    assert contents(small.root) == before


def test_a_folder_with_a_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,label\n")
    with pytest.raises(ConfigError, match="not written by synth"):
        synthesize(tmp_path, **SMALL)
    assert (tmp_path / "manifest.csv").read_text() == "path,label\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"codec": "av1"}, "codec='av1'"),
        ({"size": 33}, "size=33"),
        ({"clips_per_class": 1}, "clips_per_class=1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synthesize(tmp_path / "new", **{**SMALL, **setting})
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_reported_and_leaves_no_half_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.endswith(".mp4.part"):
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"No space left on device.*Make room"):
        synthesize(tmp_path, **SMALL, workers=1)
    assert not [path for path in contents(tmp_path) if path.endswith((".part", ".mp4", "manifest.csv"))]
    monkeypatch.undo()
    assert len(synthesize(tmp_path, **SMALL, workers=1)) == len(contents(tmp_path)) - 3


@pytest.mark.parametrize(("codec", "magic"), [("h264", (4, b"ftyp")), ("vp9", (0, b"\x1a\x45\xdf\xa3"))])
def test_equal_frames_give_equal_bytes(codec: str, magic: tuple[int, bytes]) -> None:
    frames = render_clip(ClipSpec(Program("crawl", "side"), SLIM, seed=2, size=48))
    # x264 with its macroblock tree gave up to four different files in twenty-five runs.
    (data,) = {encode(frames, codec) for _ in range(15 if codec == "h264" else 3)}
    assert data[magic[0] :].startswith(magic[1])


def test_vp9_set(tmp_path: Path) -> None:
    manifest = synthesize(tmp_path, classes=5, clips_per_class=2, size=48, codec="vp9", damage=False, workers=1, progress=False)
    row = manifest.table.iloc[0]
    assert row["path"].endswith(".webm") and row["codec"] == "vp9"
    with av.open(str(tmp_path / row["path"])) as container:
        assert container.streams.video[0].codec_context.name in ("vp9", "libvpx-vp9")
        assert sum(1 for _ in container.decode(video=0)) == row["frames"]


def test_definitions_of_the_classes_are_written(small: Manifest) -> None:
    definitions = json.loads((small.root / "classes.json").read_text())
    assert [entry["label"] for entry in definitions["classes"]] == list(dict.fromkeys(small.table["label"]))
    assert {tuple(pair) for pair in definitions["pairs"]["motion_only"]} == set(confusable_pairs(catalogue(8))["motion_only"])


def test_command_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synth_command(str(tmp_path), classes=5, clips=2, size=48, workers=1)
    printed = capsys.readouterr().out
    assert "train" in printed and str(tmp_path / "manifest.csv") in printed.replace("\n", "")


# ---- what each modality carries ---------------------------------------------------------------------------------------------


def _features(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours of what stands out from the still picture, blind to order; directions of motion, blind to colour."""
    still = np.median(frames, axis=0)
    salient = np.abs(frames - still).max(axis=-1)
    weights = np.where(salient > 40, salient, 0.0)
    colours, _ = np.histogramdd(frames.reshape(-1, 3), bins=4, range=[(0, 256)] * 3, weights=weights.ravel())
    vectors = flow(frames, step=4)
    size, angle = np.hypot(vectors[..., 0], vectors[..., 1]), np.arctan2(vectors[..., 1], vectors[..., 0])
    directions, _ = np.histogram(angle, 8, (-np.pi, np.pi), weights=size)
    return np.sqrt(colours.ravel() / colours.sum()), np.sqrt(directions / directions.sum())


def _accuracy(one: np.ndarray, other: np.ndarray) -> float:
    """2-way 1-shot nearest neighbour, over every choice of supports and query."""
    hits = []
    for own, rest in ((one, other), (other, one)):
        within = np.square(own[:, None] - own).sum(axis=-1)
        across = np.square(own[:, None] - rest).sum(axis=-1)
        better = within[:, :, None] < across[:, None, :]
        hits.append(better[~np.eye(len(own), dtype=bool)].mean())
    return float(np.mean(hits))


def _clips(program: Program, look: Appearance, first_seed: int) -> tuple[np.ndarray, np.ndarray]:
    specs = [ClipSpec(program, look, seed, size=64) for seed in range(first_seed, first_seed + 12)]
    colours, directions = zip(*(_features(render_clip(spec)) for spec in specs), strict=True)
    return np.stack(colours), np.stack(directions)


def test_only_flow_tells_reversed_motion_and_only_colour_tells_looks_apart() -> None:
    motion, look = [], []
    for program, one, other in (
        (Program("slide"), DISC, Appearance("disc", "plain", "red", "red")),
        (Program("walk", "above"), Appearance("stocky", "plain", "green", "green"), Appearance("stocky", "plain", "red", "red")),
        (Program("drop"), Appearance("star", "plain", "yellow", "yellow"), Appearance("star", "plain", "purple", "purple")),
    ):
        base, reverse = _clips(program, one, 0), _clips(program.reverse, one, 100)
        painted = _clips(program, other, 200)
        motion.append([_accuracy(a, b) for a, b in zip(base, reverse, strict=True)])
        look.append([_accuracy(a, b) for a, b in zip(base, painted, strict=True)])
    (motion_by_colour, motion_by_flow), (look_by_colour, look_by_flow) = np.mean(motion, axis=0), np.mean(look, axis=0)
    assert motion_by_flow > 0.85 and abs(motion_by_colour - 0.5) < 0.1
    assert look_by_colour > 0.85 and abs(look_by_flow - 0.5) < 0.12
