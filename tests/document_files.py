"""The files a reader of the documentation would bring along, by name; used by document_blocks.py."""

import functools
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import cv2
import numpy as np
import pytest

from amd_fast import cli
from amd_fast.data.decode import decode_rgb


@functools.cache
def _first_run() -> tempfile.TemporaryDirectory[str]:
    """Synthetic clips and a model trained on them for a few steps, made once a process."""
    made = tempfile.TemporaryDirectory()
    small = "--data.size 32 --data.frames 4 --optimiser.steps 4 --validation.episodes 10 --threads 1"
    with chdir(made.name):
        assert cli.main(["synth", "clips", "--classes", "20", "--clips", "5", "--size", "48", "--workers", "1"]) == 0
        assert cli.main(["train", "--data.manifest", "clips/manifest.csv", "--output", "runs/first", *small.split()]) == 0
    return made


def first_run(folder: Path) -> None:
    """What the commands of README.md leave behind: the synthetic set `clips` and the trained `runs/first`."""
    shutil.copytree(_first_run().name, folder, dirs_exist_ok=True)


def own_videos(folder: Path) -> None:
    """A reader's own clips: 16 classes, four people, one clip each and a second one of anna, thermal for some."""
    sources = sorted((folder / "clips").rglob("*.mp4"))
    labels = ["draw_circle", "push_away", *sorted({path.parent.name for path in sources})[:14]]
    rng = np.random.default_rng(0)
    for position, label in enumerate(labels):
        parent = folder / "videos" / label
        parent.mkdir(parents=True)
        for number, name in enumerate(("anna_c1", "anna_c2", "ben_c1", "cem_c1", "dana_c1")):
            shutil.copy(sources[(5 * position + number) % len(sources)], parent / f"{name}.mp4")
            if number < 2:
                np.save(parent / f"{name}.thermal.npy", rng.normal(20, 5, (10, 12, 16)).astype(np.float32))


def new_actions(folder: Path) -> None:
    """A few examples of three actions that the model was not trained on, and a clip to recognise."""
    classes = sorted((folder / "clips" / "test").iterdir())[:3]
    for number, source in enumerate(classes):
        target = folder / "actions" / f"action_{number}"
        target.mkdir(parents=True)
        for clip in sorted(source.glob("*.mp4"))[: number + 1]:
            shutil.copy(clip, target)
    shutil.copy(sorted(classes[0].glob("*.mp4"))[-1], folder / "unknown.mp4")


def benchmark_sets(folder: Path) -> None:
    """The public data sets in small: three classes of two clips each, named and listed as they are distributed."""
    sources = sorted((folder / "clips").rglob("*.mp4"))
    layouts = {
        "UCF-101": ("{0}/v_{0}_g0{1}_c01.avi", ["Archery", "ApplyLipstick", "BlowingCandles"]),
        "hmdb51_org": ("{0}/A Movie #{1}_{0}_f_cm_np1_le_med_0.avi", ["catch", "cartwheel", "fencing"]),
        "k400": ("train/{0}/{2}_00001{1}_00002{1}.mp4", ["air_drumming", "baking_cookies", "blasting_sand"]),
        "20bn-something-something-v2": ("{3}.webm", ["Opening something", "Closing something", "Tearing something"]),
        "ucf_frames": ("{0}/v_{0}_g0{1}_c01", ["Archery", "ApplyLipstick", "BlowingCandles"]),
    }
    lists = {"UCF-101": "ucf_ARN", "hmdb51_org": "hmdb_ARN", "k400": "kinetics_CMN", "20bn-something-something-v2": "ssv2_OTAM"}
    for name, (pattern, labels) in layouts.items():
        listed = folder / "splits" / lists.get(name, "")
        listed.mkdir(parents=True, exist_ok=True)
        for position, (split, label) in enumerate(zip(("train", "val", "test"), labels, strict=True)):
            paths = [pattern.format(label, number, f"{label:x<10.10}{number}", 2 * position + number) for number in (1, 2)]
            for source, path in zip(sources, paths, strict=False):
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                if Path(path).suffix:
                    shutil.copy(source, folder / name / path)
                else:
                    frames(source, folder / name / path)
            if name in lists:
                classes = f"{split}0" if name.startswith("20bn") else label.replace("_", " ") if name == "k400" else label
                (listed / f"{split}list03.txt").write_text("".join(f"{classes}/{Path(path).stem}\n" for path in paths))
            official = folder / "testTrainMulti_7030_splits"
            official.mkdir(exist_ok=True)
            if name == "hmdb51_org":
                (official / f"{label}_test_split1.txt").write_text("".join(f"{Path(path).name} 1 \n" for path in paths))
    (folder / "labels").mkdir()
    clips = [
        {"id": str(i + 1), "template": f"{verb} [something]"} for i, verb in enumerate(np.repeat(["Opening", "Closing", "Tearing"], 2))
    ]
    (folder / "labels" / "train.json").write_text(json.dumps(clips))


def frames(video: Path, folder: Path) -> None:
    """The frames of a video as a folder of JPEG files."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(decode_rgb(video, range(4)), 1):
        cv2.imwrite(str(folder / f"img_{number:05d}.jpg"), picture[..., ::-1])


def bucket(folder: Path) -> None:
    """An S3 server with a bucket that holds the reader's own videos; the environment is set for it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    server.start()
    host, port = server.get_host_and_port()
    credentials = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(credentials, AWS_ENDPOINT_URL=f"http://{host}:{port}", AMD_FAST_CACHE=str(folder / "cache"))
    store = importlib.import_module("boto3").resource("s3").create_bucket(Bucket="bucket")
    for file in (folder / "videos").rglob("*.*"):
        store.upload_file(str(file), str(file.relative_to(folder)))


PREPARATIONS: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (benchmark_sets, bucket, first_run, new_actions, own_videos)
}
