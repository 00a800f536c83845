"""Clips, manifests, run folders and feature banks that lie in a store (a real S3 server on the loopback) give what local ones give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from amd_fast import FeatureBank, cli, load_model, storage
from amd_fast.data import Manifest, index, read_clip, read_split_list
from amd_fast.data.decode import VideoReader, probe_video
from amd_fast.data.join import join as join_manifests
from amd_fast.data.readers import open_clip
from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import CheckpointError, DataError, DecodeError
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, OptimiserOptions, TrainConfig, ValidationOptions
from amd_fast.training.engine import Trainer, train
from amd_fast.training.mirror import RunMirror


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set; its folder."""
    folder = tmp_path_factory.mktemp("clips")
    synthesize(folder, classes=16, clips_per_class=3, size=48, workers=1, progress=False)
    return folder


def upload(folder: Path, uri: str, keep: Callable[[str], bool] = lambda name: True) -> str:
    for name in storage.files_below(folder):
        if keep(name):
            storage.upload(folder / name, storage.join(uri, name))
    return uri


# --------------------------------------------------------------------------------------------------------------------- clips


def test_clips_are_read_as_from_disk(bucket: Any, clips: Path, tmp_path: Path) -> None:
    video = next(clips.glob("train/*/*.mp4"))
    np.save(tmp_path / "heat.npy", np.random.default_rng(0).random((5, 12, 16), np.float32))
    uri, array = f"s3://{bucket.name}/clips/a # & ; ( ! [ @ é.mp4", f"s3://{bucket.name}/clips/heat [1].npy"
    storage.upload(video, uri)
    storage.upload(tmp_path / "heat.npy", array)
    wanted = ("rgb", "flow", "heat")
    there = read_clip(uri, 4, 32, wanted, extra={"heat": array})
    here = read_clip(video, 4, 32, wanted, extra={"heat": tmp_path / "heat.npy"})
    assert all(bool((there[name] == here[name]).all()) for name in wanted)
    assert probe_video(uri) == probe_video(video)


def test_a_clip_being_read_stays_in_the_cache(bucket: Any, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = sorted(clips.glob("train/*/*.mp4"))[:3]
    uris = [f"s3://{bucket.name}/{i}.mp4" for i in range(3)]
    for video, uri in zip(videos, uris, strict=True):
        storage.upload(video, uri)
    monkeypatch.setenv("AMD_FAST_CACHE_GB", "1e-9")
    with VideoReader(uris[0]) as reader:
        for uri in uris[1:]:
            probe_video(uri)
        assert len(list((storage.cache_folder() / "objects").glob("*/*.mp4"))) == 2
        assert len(reader.frames([0, 5])) == 2
    probe_video(uris[1])
    assert len(list((storage.cache_folder() / "objects").glob("*/*.mp4"))) == 1


def test_errors_name_the_uri(bucket: Any, clips: Path) -> None:
    uri = f"s3://{bucket.name}/bad.mp4"
    with pytest.raises(DecodeError, match=rf"cannot read {uri}: there is no such object"):
        VideoReader(uri)
    bucket.put_object(Key="bad.mp4", Body=b"no video at all")
    with pytest.raises(DecodeError, match=rf"cannot decode '{uri}': it cannot be opened as a video"):
        read_clip(uri)
    with pytest.raises(DataError, match=rf"modality 'heat': '{uri}' cannot be read"):
        read_clip(next(clips.glob("train/*/*.mp4")), modalities=("heat",), extra={"heat": uri})


# --------------------------------------------------------------------------------------------------------------------- manifests


def test_manifests_keep_their_paths_wherever_they_go(bucket: Any, clips: Path, tmp_path: Path) -> None:
    root = upload(clips, f"s3://{bucket.name}/set x", lambda name: name.endswith(".csv"))
    local, there = Manifest.from_csv(clips / "manifest.csv"), Manifest.from_csv(f"{root}/manifest.csv")
    assert there.hash() == local.hash() and there.root == root
    assert there.file(0) == f"{root}/{local.table['path'][0]}"
    there.to_csv(tmp_path / "local.csv")
    assert Manifest.from_csv(tmp_path / "local.csv").file(0) == there.file(0)
    there.to_csv(f"s3://{bucket.name}/above.csv")
    above = Manifest.from_csv(f"s3://{bucket.name}/above.csv")
    assert above.file(0) == there.file(0) and above.table["path"][0] == f"set x/{local.table['path'][0]}"
    local.to_csv(f"{root}/of_here.csv")
    assert Manifest.from_csv(f"{root}/of_here.csv").file(0) == local.file(0)
    train_there, test_here = there.subset("train"), local.subset("test")
    both = join_manifests([train_there, test_here], tmp_path)
    assert [both.file(row) for row in (0, len(train_there))] == [train_there.file(0), test_here.file(0)]
    assert Manifest.from_csv(f"file://{clips}/manifest.csv").file(0) == local.file(0)
    with pytest.raises(DataError, match=r"cannot read s3://.*none\.csv: there is no such object"):
        Manifest.from_csv(f"{root}/none.csv")


def test_a_bucket_is_indexed_as_a_folder_is(bucket: Any, clips: Path, tmp_path: Path) -> None:
    videos = sorted(clips.glob("train/*/*.mp4"))[:6]
    names = ("walk/a_1.mp4", "walk/deep/b_1.mp4", "jump # & ; ( ! [ @/c_1.mp4", "Über/d_2.MP4", "walk/.hidden.mp4", "outside_1.mp4")
    for name, video in zip(names, videos, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, tmp_path / name)
    np.save(tmp_path / "walk/a_1.heat.npy", np.zeros((3, 4, 4), np.float32))
    np.save(tmp_path / "walk/deep/b_1.heat.npy", np.zeros(3, np.float32))
    (tmp_path / "walk/broken_1.mp4").write_bytes(b"broken")
    root = upload(tmp_path, f"s3://{bucket.name}/set")
    bucket.upload_file(str(videos[0]), "set/walk/.hidden.mp4")
    here, there = (index(place, group="(.+)_", modalities=["heat"], progress=False) for place in (tmp_path, root))
    assert there.table.equals(here.table) and there.rejected["path"].tolist() == here.rejected["path"].tolist()
    assert there.rejected["reason"].tolist()[:2] == here.rejected["reason"].tolist()[:2] and there.root == root
    assert there.extra(0, ["heat"]) == {} or there.extra(0, ["heat"])["heat"] == f"{root}/walk/a_1.heat.npy"


def assert_indexed_alike(folder: Path, bucket: Any, layout: str, **options: Any) -> Manifest:
    """The manifest of a folder uploaded to the bucket, which is that of the folder itself."""
    root = upload(folder, f"s3://{bucket.name}/{layout} set")
    here, there = index(folder, layout, progress=False, **options), index(root, layout, progress=False, **options)
    assert there.root == root and there.table.equals(here.table) and there.notes == here.notes and len(here.table)
    assert there.rejected.equals(here.rejected)
    return there


def pictures(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        frame = np.random.default_rng(number).integers(0, 255, (36, 48, 3), np.uint8)
        assert cv2.imwrite(str(folder / f"img_{number:05d}.png"), frame)


def test_folders_of_frames_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    for place in ("train/walk/a_1", "train/walk/b # 1", "test/jump/c_1"):
        pictures(tmp_path / place)
    pictures(tmp_path / "train/walk/gap_1")
    (tmp_path / "train/walk/gap_1/img_00003.png").unlink()
    np.save(tmp_path / "train/walk/a_1.heat.npy", np.zeros((3, 4, 4), np.float32))
    manifest = assert_indexed_alike(tmp_path, bucket, "frames", modalities=["heat"])
    assert len(manifest) == 3 and manifest.rejected["reason"][0].startswith("frames are missing between")
    path = manifest.file(manifest.table["path"].tolist().index("train/walk/b # 1"))
    assert bool((read_clip(path, 4, 32)["rgb"] == read_clip(tmp_path / "train/walk/b # 1", 4, 32)["rgb"]).all())
    bucket.Object("frames set/train/walk/b # 1/img_00004.png").delete()
    with pytest.raises(DecodeError, match=r"'s3://.*b # 1'.*frames are missing"), open_clip(path) as reader:
        reader.check()
    with pytest.raises(DecodeError, match=r"s3://.*none: there is no such object"):
        open_clip(f"{manifest.root}/none")


KINETICS = "label,youtube_id,time_start,time_end,split\nair drumming,-VtLx-mcPds,12,22,train\nyoga,gonegonegon,1,11,train\n"
SSV2 = [{"id": "1", "template": "Pushing [something]"}, {"id": "22", "template": "Täglich"}, {"id": "3", "template": "Täglich"}]
BENCHMARKS = {
    "kinetics400": (
        ("train/air_drumming/-VtLx-mcPds_000012_000022.mp4", "val/yoga/ABCDEFGHIJK_000001_000011"),
        {"lists/train.csv": KINETICS},
    ),
    "ssv2": (("1.mp4", "22.mp4"), {"labels.json": '{"Pushing something": "0", "Täglich": "1"}', "train.json": json.dumps(SSV2)}),
    "hmdb51": (
        ("wave/A_wave_f_nm_np1_fr_med_0.mp4", "sit/B_sit_f_nm_np1_fr_med_1"),
        {
            "splits/wave_test_split1.txt": "A_wave_f_nm_np1_fr_med_0.avi 1 \nC_wave_f_nm_np1_fr_med_2.avi 2 \n",
            "splits/sit_test_split1.txt": "B_sit_f_nm_np1_fr_med_1.avi 2 \n",
        },
    ),
    "ucf101": (
        ("Archery/v_Archery_g01_c01.mp4", "HandstandPushups/v_HandStandPushups_g02_c03"),
        {"classInd.txt": "1 Archery\n2 HandstandPushups\n", "trainlist01.txt": "Archery/v_Archery_g01_c01.avi 1\n"},
    ),
}


@pytest.mark.parametrize("layout", BENCHMARKS)
def test_benchmarks_in_a_bucket(bucket: Any, clips: Path, tmp_path: Path, layout: str) -> None:
    """Videos and folders of frames, with the official lists among them; then with lists that lie elsewhere in a store."""
    names, lists = BENCHMARKS[layout]
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".mp4"):
            shutil.copy(next(clips.glob("train/*/*.mp4")), tmp_path / "set" / name)
        else:
            pictures(tmp_path / "set" / name)
    for place in ("set", "elsewhere"):
        for name, content in lists.items():
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name).write_text(content, encoding="utf-8")
    manifest = assert_indexed_alike(tmp_path / "set", bucket, layout)
    assert len(manifest) == len(names) and "listed clips are here" in manifest.notes[0]
    elsewhere = upload(tmp_path / "elsewhere", f"s3://{bucket.name}/official")
    for name in lists:
        (tmp_path / "set" / name).unlink()
    again = assert_indexed_alike(tmp_path / "set", bucket, layout, annotations=elsewhere)
    assert again.table.equals(manifest.table)
    if len(lists) == 1:
        assert index(manifest.root, layout, annotations=f"{elsewhere}/{next(iter(lists))}", progress=False).table.equals(manifest.table)
    with pytest.raises(DataError, match=r"no official lists of .* in s3://.*none of its files is one|nothing below it"):
        index(manifest.root, layout, annotations=f"s3://{bucket.name}/{layout} set/{names[0].partition('/')[0]}", progress=False)


def test_few_shot_lists_in_a_store(bucket: Any, clips: Path, tmp_path: Path) -> None:
    """A folder of lists and a single one, in two kinds of stores; the manifest is that of the lists on this machine."""
    for name in ("Run/a", "Walk/b", "Jump/c"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(clips.glob("train/*/*.mp4")), tmp_path / "set" / f"{name}.mp4")
    lists = tmp_path / "run_ARN"
    lists.mkdir()
    for split, line in (("train", "Run/a"), ("val", "Walk/b"), ("test", "Jump/c")):
        (lists / f"{split}list01.txt").write_text(f"\ufeff{line}\r\n", encoding="utf-8")
    here = index(tmp_path / "set", split_list=lists, progress=False)
    for root in (f"s3://{bucket.name}/lists", f"memory://{bucket.name}/lists"):
        place = upload(lists, f"{root}/run_ARN")
        there = index(tmp_path / "set", split_list=place, progress=False)
        assert there.table.equals(here.table) and there.split_name == "run_ARN"
        assert read_split_list(f"{place}/testlist01.txt").to_dict("records") == [{"split": "test", "label": "Jump", "video": "c"}]
        with pytest.raises(DataError, match=rf"there is no split list at {root}/none; give"):
            read_split_list(f"{root}/none")
        with pytest.raises(DataError, match=r"holds no lists named .*give one of its folders \(run_ARN\)"):
            read_split_list(root)
        storage.write_bytes(f"{place}/vallist02.txt", b"Sit/d\n")
        with pytest.raises(DataError, match=r"several lists for val, vallist01.txt and vallist02.txt"):
            read_split_list(place)
    assert index(tmp_path / "set", split_list=f"file://{lists}", progress=False).table.equals(here.table)


def test_lists_of_uris_and_the_command(bucket: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(clips.glob("train/*/*.mp4"))[:2]
    root = f"s3://{bucket.name}/lists"
    storage.upload(first, f"{root}/v/1.mp4")
    rows = f"path,label\nv/1.mp4,one\ns3://{bucket.name}/lists/v/none.mp4,one\n{second},two\n"
    storage.write_bytes(f"{root}/list.csv", rows.encode())
    assert cli.main(["index", f"{root}/list.csv", "--layout", "csv"]) == 0
    made = Manifest.from_csv(f"{root}/list.indexed.csv")
    assert made.table["path"].tolist() == ["v/1.mp4", str(second)] and made.table["frames"].min() > 0
    assert made.rejected["reason"][0].startswith("there is no such object")
    assert cli.main(["index", f"s3://{bucket.name}/lists/v", "--layout", "ssv2"]) == 2  # which cannot do without its lists
    assert cli.main(["index", f"s3://{bucket.name}/lists", "--output", str(tmp_path / "m.csv")]) == 0
    assert Manifest.from_csv(tmp_path / "m.csv").table["path"].tolist() == [f"{root}/v/1.mp4"]


# --------------------------------------------------------------------------------------------------------------------- runs


def configure(manifest: str, output: str, steps: int = 4) -> TrainConfig:
    return TrainConfig(
        output=output,
        threads=1,
        precision="fp32",
        checkpoint_every=1,
        tensorboard=False,
        model=ModelOptions(options={"dim": 32, "backbone_options": {"base": 8}}),
        data=DataOptions(manifest=manifest, size=32, frames=4, workers=1, cache="none"),
        episode=EpisodeOptions(ways=3, shots=1, queries=1),
        optimiser=OptimiserOptions(steps=steps, warmup_steps=2),
        validation=ValidationOptions(every=2, episodes=10),
    )


def test_a_run_goes_on_from_the_store_on_a_fresh_machine(bucket: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = upload(clips, f"s3://{bucket.name}/clips")
    output = f"s3://{bucket.name}/runs/first [1] é"
    config = configure(f"{root}/manifest.csv", output)
    train(replace(config, output=str(tmp_path / "whole")), progress=False)

    class PowerCutError(Exception):
        pass

    def save(trainer: Trainer, original: Callable[[Trainer], None] = Trainer.save) -> None:
        original(trainer)
        if trainer.step == 3:
            raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save)
        with pytest.raises(PowerCutError):
            train(config, progress=False)
    held = {"config.yaml", "metrics.jsonl", *(f"checkpoints/{name}" for name in ("best.safetensors", "last"))}
    assert set(storage.list_below(output)) == held | {f"checkpoints/step-00000{step}.safetensors" for step in (2, 3)}
    shutil.rmtree(storage.cache_folder())  # another machine
    with pytest.raises(CheckpointError, match=r"s3://.* already holds a run; pass --resume"):
        train(config, progress=False)
    result = train(TrainConfig.from_yaml(f"{output}/config.yaml"), resume=True, progress=False)
    assert result.folder == output and result.model().size == 32
    for name in ("best.safetensors", "last", "step-000004.safetensors"):
        assert storage.read_bytes(f"{output}/checkpoints/{name}") == (tmp_path / "whole" / "checkpoints" / name).read_bytes()
    assert storage.read_bytes(f"{output}/metrics.jsonl") == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert set(storage.list_below(output)) == held | {f"checkpoints/step-00000{step}.safetensors" for step in (3, 4)}
    assert not list((storage.cache_folder() / "work").iterdir())

    # What is done with a run: evaluated, encoded into a bank.
    options = ["--episodes", "20", "--ways", "3", "--shots", "1", "--calibration-split", "none"]
    assert cli.main(["evaluate", output, *options]) == 0
    assert "summary" in json.loads(storage.read_bytes(f"{output}/evaluation/results.json"))
    assert storage.read_bytes(f"{output}/evaluation/report.html").startswith(b"<!")
    model, manifest = load_model(f"{output}/checkpoints/best.safetensors"), Manifest.from_csv(f"{root}/manifest.csv").subset("val")
    bank = FeatureBank.build(model, manifest, f"{output}/bank", workers=1, progress=False)
    shutil.rmtree(storage.cache_folder())
    again = FeatureBank.open(f"{output}/bank")
    assert np.array_equal(again.tokens, bank.tokens) and isinstance(again.tokens, np.memmap)
    assert again.manifest.file(0) == manifest.file(0)
    storage.remove(f"{output}/bank/clips.csv")
    with pytest.raises(DataError, match="not a feature bank, or not a finished one"):
        FeatureBank.open(f"{output}/bank")


def run_of(mirror: RunMirror, step: int) -> None:
    """Saves what a run saves after so many steps."""
    folder = mirror.folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (mirror.folder / "config.yaml").write_text("config")
    (folder / f"step-{step:06d}.safetensors").write_text(f"state {step}")
    (folder / "last").write_text(f"step-{step:06d}.safetensors")
    for old in sorted(folder.glob("step-*"))[:-2]:
        old.unlink()


def test_a_store_that_is_down_does_not_stop_training(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import s3fs

    output, endpoint = f"s3://{bucket.name}/run", storage.remote.os.environ["AWS_ENDPOINT_URL"]

    def connect(address: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        s3fs.S3FileSystem.clear_instance_cache()

    mirror = RunMirror(output)
    run_of(mirror, 1)
    mirror.push()
    connect("http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AMD_FAST_REMOTE_TIMEOUT", "0.5")
    run_of(mirror, 2)
    mirror.push()
    assert "cannot write s3://" in caplog.text and "Training goes on" in caplog.text
    with pytest.raises(CheckpointError, match=rf"The run is complete in {mirror.folder}; the same command with --resume uploads it"):
        mirror.finish()
    connect(endpoint)
    monkeypatch.setenv("AMD_FAST_REMOTE_TIMEOUT", "5")
    assert storage.read_bytes(f"{output}/checkpoints/last") == b"step-000001.safetensors"
    other = RunMirror(output)  # a process started later: what is here is ahead of the store
    with pytest.raises(CheckpointError, match="already holds a run"):
        other.pull(resume=False)
    other.pull(resume=True)
    assert (other.folder / "checkpoints" / "last").read_text() == "step-000002.safetensors"
    run_of(other, 3)
    assert other.finish() == output and not other.folder.exists()
    assert storage.read_bytes(f"{output}/checkpoints/last") == b"step-000003.safetensors"


def test_a_reader_finds_every_checkpoint_complete(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = f"s3://{bucket.name}/run"
    original, seen = storage.upload, []

    def upload_and_look(file: Path, uri: str, **options: Any) -> None:
        original(file, uri, **options)
        if storage.exists(f"{output}/checkpoints/last"):
            name = storage.read_bytes(f"{output}/checkpoints/last").decode()
            seen.append(storage.read_bytes(f"{output}/checkpoints/{name}"))

    monkeypatch.setattr(storage, "upload", upload_and_look)
    mirror = RunMirror(output)
    for step in range(1, 5):
        run_of(mirror, step)
        mirror.push()
    assert set(seen) == {f"state {step}".encode() for step in range(1, 5)}
    assert storage.list_below(f"{output}/checkpoints") == ["last", "step-000003.safetensors", "step-000004.safetensors"]
