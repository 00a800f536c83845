"""Writes the synthetic set: real video files, a manifest and the definitions of the classes."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import cv2
import numpy as np
import pandas as pd
from av.video.stream import VideoStream

from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.catalogue import ActionClass, catalogue, confusable_pairs
from amd_fast.data.synth.damage import KINDS, MODALITY
from amd_fast.data.synth.render import FPS, ClipSpec, render_clip
from amd_fast.errors import ConfigError, DataError
from amd_fast.progress import progress_bar
from amd_fast.resources import available_cores

VERSION = 3  # of the drawings: raise it whenever the same settings would give other pixels
SETTINGS, CLASSES, MANIFEST = "synth.json", "classes.json", "manifest.csv"
SEEN_IN_VALIDATION = {"rgb": ("dark", "blurred"), "flow": ("shake", "frozen")}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the contents of a set."""

    classes: int
    clips_per_class: int
    size: int
    seed: int
    codec: str
    damage: bool
    version: int = VERSION


@dataclass(frozen=True)
class _Codec:
    encoder: str
    pixel_format: str
    container: str
    suffix: str
    options: dict[str, str]


# One thread each, and no macroblock tree: with either, equal frames do not always give equal bytes.
_CODECS = {
    "h264": _Codec("libx264", "yuv420p", "mp4", "mp4", {"crf": "20", "preset": "veryfast", "threads": "1", "g": "24", "mbtree": "0"}),
    "vp9": _Codec(
        "libvpx-vp9", "yuv420p", "webm", "webm",
        {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "7", "threads": "1", "row-mt": "0", "g": "24"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """One clip to be drawn and written."""

    path: str
    spec: ClipSpec
    codec: str


def synthesize(
    root: str | os.PathLike[str],
    *,
    classes: int = 80,
    clips_per_class: int = 20,
    size: int = 96,
    seed: int = 0,
    codec: str = "h264",
    damage: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Writes a synthetic few-shot action set and returns its manifest.

    A class is a motion program and an appearance; the classes are split over train, val and test as 48 : 12 : 20. Training classes have
    ``clips_per_class`` clean clips. With ``damage``, a validation class has 60 % of that number clean and as many damaged, a test class
    80 % and as many, half of the damaged ones in the RGB frames and half in the motion; without, every class has ``clips_per_class``.

    Writes ``manifest.csv``, ``classes.json`` (definitions and confusable pairs), ``synth.json`` (settings) and
    ``<split>/<label>/<label>_<number>.mp4``. The same settings give the same files, whatever the number of workers. What an interrupted
    call left is completed by the next; a complete set is recognised and kept.

    Args:
        root: folder to write to; made where it does not exist.
        classes: number of classes, 5 or more.
        clips_per_class: clips of a training class, 2 or more.
        size: width and height in pixels, even, from 48 to 512.
        seed: chooses everything that varies between clips.
        codec: ``h264`` (mp4) or ``vp9`` (webm).
        damage: whether validation and test classes also have clips with sensor damage.
        workers: processes; by default one for each core available.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: a setting is out of range, or the folder holds a set with other settings.
        DataError: the files cannot be written (disk full, no permission, encoder missing).
    """
    settings = Settings(classes, clips_per_class, size, seed, codec, damage)
    _check(settings)
    defined = catalogue(classes)
    folder = Path(root)
    rows = list(_rows(settings, defined))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, settings)
        done = _finished(folder, rows)
        if done is not None:
            return done
        jobs = [_Job(str(folder / row["path"]), spec, codec) for row, spec in rows if not (folder / row["path"]).is_file()]
        for parent in {Path(job.path).parent for job in jobs}:
            parent.mkdir(parents=True, exist_ok=True)
        _write_clips(jobs, workers if workers is not None else available_cores(), progress)
        _write_json(folder / CLASSES, _definitions(defined))
        manifest = Manifest(pd.DataFrame([row for row, _ in rows]), folder)
        manifest.to_csv(folder / MANIFEST)
    except OSError as error:
        raise DataError(
            f"Cannot write the synthetic set to {folder}: {error.strerror or error}. Make room there (the default set needs about "
            "50 MB), or choose a folder that is writable; the same command then continues where it stopped."
        ) from error
    return manifest


def _check(settings: Settings) -> None:
    if settings.codec not in _CODECS:
        raise ConfigError(f"codec={settings.codec!r} is unknown. Choose one of: {', '.join(_CODECS)}.")
    if settings.clips_per_class < 2:
        raise ConfigError(f"clips_per_class={settings.clips_per_class} is too few. Choose 2 or more: support and query clip of an episode.")
    if settings.size % 2 or not 48 <= settings.size <= 512:
        raise ConfigError(f"size={settings.size} is not possible. Choose an even number of pixels from 48 to 512.")
    if settings.seed < 0:
        raise ConfigError(f"seed={settings.seed} is negative. Choose 0 or more.")


def _clips(settings: Settings, split: str) -> tuple[int, int]:
    """Numbers of clean and of damaged clips of a class."""
    if split == "train" or not settings.damage:
        return settings.clips_per_class, 0
    half = max(1, round(settings.clips_per_class * {"val": 0.6, "test": 0.8}[split]))
    return half, half


def _kind(split: str, number: int, class_number: int) -> str:
    """Kind of damage of a class's damaged clip: modalities take turns, and so do the kinds; every class starts with another kind."""
    modality = "rgb" if number % 2 == 0 else "flow"
    kinds = SEEN_IN_VALIDATION[modality] if split == "val" else tuple(KINDS[modality])
    return kinds[(number // 2 + class_number) % len(kinds)]


def _rows(settings: Settings, defined: Iterable[ActionClass]) -> Iterator[tuple[dict[str, Any], ClipSpec]]:
    suffix = _CODECS[settings.codec].suffix
    for class_number, action in enumerate(defined):
        clean, damaged = _clips(settings, action.split)
        for number in range(clean + damaged):
            kind = "" if number < clean else _kind(action.split, number - clean, class_number)
            # From the label, not the class's position: a clip stays the same when the number of classes changes.
            words = np.random.SeedSequence([settings.seed, zlib.crc32(action.label.encode()), number]).generate_state(1)
            spec = ClipSpec(action.program, action.look, int(words[0]), settings.size, kind)
            yield _row(settings, action, f"{action.label}_{number:03d}", suffix, spec), spec


def _row(settings: Settings, action: ActionClass, name: str, suffix: str, spec: ClipSpec) -> dict[str, Any]:
    return {
        "path": f"{action.split}/{action.label}/{name}.{suffix}",
        "label": action.label,
        "group": name,
        "split": action.split,
        "frames": spec.frames,
        "fps": float(FPS),
        "width": settings.size,
        "height": settings.size,
        "codec": settings.codec,
        "damage": spec.damage,
        "damaged_modality": MODALITY.get(spec.damage, ""),
        "motion": action.program.name,
        "appearance": action.look.name,
        "seed": str(spec.seed),
    }


def _claim(folder: Path, settings: Settings) -> None:
    """Writes the settings into a new folder; refuses a folder that holds something else."""
    path = folder / SETTINGS
    if not path.exists():
        if (folder / MANIFEST).exists():
            raise ConfigError(f"{folder} holds a manifest that was not written by synth. Choose another folder.")
        _write_json(path, asdict(settings))
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}). Remove the folder, or choose another one.") from error
    wanted = asdict(settings)
    different = [f"{name}={there.get(name)!r} there, {wanted[name]!r} asked for" for name in wanted if there.get(name) != wanted[name]]
    if different:
        raise ConfigError(f"{folder} holds a set with other settings ({'; '.join(different)}). Remove it, or choose another folder.")


def _finished(folder: Path, rows: list[tuple[dict[str, Any], ClipSpec]]) -> Manifest | None:
    """The manifest of a complete set, or None."""
    if not (folder / MANIFEST).is_file() or not all((folder / row["path"]).is_file() for row, _ in rows):
        return None
    manifest = Manifest.from_csv(folder / MANIFEST)
    return manifest if list(manifest.table["path"]) == [row["path"] for row, _ in rows] else None


def _definitions(defined: tuple[ActionClass, ...]) -> dict[str, Any]:
    return {
        "classes": [
            {
                "label": action.label,
                "split": action.split,
                "motion": {"name": action.program.name, **asdict(action.program)},
                "appearance": {"name": action.look.name, **asdict(action.look)},
            }
            for action in defined
        ],
        "pairs": confusable_pairs(defined),
        "classes_per_split": dict(Counter(action.split for action in defined)),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def _write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def encode(frames: np.ndarray, codec: str = "h264", fps: int = FPS) -> bytes:
    """A video file in memory.

    Args:
        frames: uint8 RGB ``[T, height, width, 3]``, height and width even.
        codec: ``h264`` (mp4) or ``vp9`` (webm).
        fps: frames per second.

    Raises:
        DataError: the installed PyAV lacks the encoder.
    """
    kind = _CODECS[codec]
    buffer = io.BytesIO()
    # Without bitexact, webm holds a random identifier and the library's version.
    with av.open(buffer, "w", format=kind.container, options={"fflags": "+bitexact"}) as container:
        try:
            stream = cast(VideoStream, container.add_stream(kind.encoder, rate=Fraction(fps), options=dict(kind.options)))
        except (av.error.FFmpegError, ValueError) as error:
            raise DataError(
                f"PyAV {av.__version__} has no {kind.encoder} encoder ({error}). Install PyAV from PyPI, or choose another codec."
            ) from error
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = kind.pixel_format
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _write_clip(job: _Job) -> None:
    _write_bytes(Path(job.path), encode(render_clip(job.spec), job.codec))


def _write_batch(jobs: list[_Job]) -> int:
    cv2.setNumThreads(1)
    for job in jobs:
        _write_clip(job)
    return len(jobs)


def _write_clips(jobs: list[_Job], workers: int, progress: bool) -> None:
    with progress_bar(disable=not progress) as display:
        task = display.add_task("Writing clips", total=len(jobs), note="")
        batches = [jobs[start : start + 8] for start in range(0, len(jobs), 8)]
        if workers <= 1 or len(batches) <= 1:
            threads = cv2.getNumThreads()
            try:
                for batch in batches:
                    display.advance(task, _write_batch(batch))
            finally:
                cv2.setNumThreads(threads)
            return
        # A fresh interpreter for each worker: forking a process that runs threads (PyTorch's, OpenCV's) can hang.
        with ProcessPoolExecutor(min(workers, len(batches)), mp_context=multiprocessing.get_context("spawn")) as pool:
            pending: list[Future[int]] = [pool.submit(_write_batch, batch) for batch in batches]
            try:
                for finished in as_completed(pending):
                    display.advance(task, finished.result())
            except BrokenProcessPool as error:
                raise DataError(
                    "A process that writes clips ended early. From a script, call synthesize under `if __name__ == '__main__':`, "
                    "or with workers=1; if the machine ran out of memory, use fewer workers."
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
