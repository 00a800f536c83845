"""What to do about one's clips: only what this very measurement shows, re-encoding a few of them included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import cv2

from amd_fast.data.decode import VideoReader
from amd_fast.data.pixels import resize, scaled_size
from amd_fast.errors import DataError

from .contenders import ours
from .run import Report, Result, single_threaded
from .work import Clip, Work

_TRIED = 3
_WORTHWHILE = 1.15  # times faster; less is within what a busy machine makes up
_QUALITY = 95
_CRF = "20"


def try_short_gop(clips: Sequence[Clip], work: Work, folder: Path, rounds: int = 3) -> dict[str, float]:
    """Re-encodes the largest clips (H.264, resized once, two keyframes per wanted frame) and reads both versions in turns.

    Returns:
        ``clips`` tried, distance of keyframes ``gop``, times faster ``speedup``, bytes after over bytes before ``size_ratio``; empty where
        this FFmpeg has no H.264 encoder.
    """
    if "libx264" not in av.codecs_available:
        return {}
    slowest = list(clips)[:_TRIED]
    gop = max(1, round(statistics.mean(clip.frame_count for clip in slowest) / work.frames / 2))
    again = [_encoded(clip, folder / f"gop_{number}.mp4", work, gop) for number, clip in enumerate(slowest)]
    contender = ours(work, "video")
    taken: dict[bool, list[float]] = {False: [], True: []}
    with single_threaded():
        for _ in range(rounds):
            for changed, versions in ((False, slowest), (True, again)):
                start = time.thread_time()
                for clip in versions:
                    contender.read(clip)
                taken[changed].append(time.thread_time() - start)
    size = sum(Path(clip.path).stat().st_size for clip in again) / sum(Path(clip.path).stat().st_size for clip in slowest)
    return {"clips": len(slowest), "gop": gop, "speedup": min(taken[False]) / min(taken[True]), "size_ratio": size}


def _encoded(clip: Clip, path: Path, work: Work, gop: int) -> Clip:
    with VideoReader(clip.path) as reader, av.open(str(path), "w") as container:
        rate = reader.stream.average_rate or 25
        stream = container.add_stream("libx264", rate=rate, options={"g": str(gop), "crf": _CRF, "preset": "veryfast", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        height, width = reader.pixels(reader.frames([0])).shape[1:3]  # upright
        width, height = scaled_size(width, height, min(work.short_side, width, height))
        stream.width, stream.height = width // 2 * 2, height // 2 * 2  # as 4:2:0 needs it
        for first in range(0, clip.frame_count, 32):
            frames = reader.frames(range(first, min(first + 32, clip.frame_count)))
            for picture in reader.pixels(frames):
                small = resize(picture, (stream.width, stream.height))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(small, format="rgb24")))
        container.mux(stream.encode(None))
    return Clip(str(path), clip.frame_count, clip.indices, "h264")


def extract_frames(clips: Sequence[Clip], work: Work, folder: Path) -> tuple[list[Clip], dict[str, float]]:
    """Writes all frames as JPEG files at the short side that is needed, as laboratories do before training.

    Returns:
        The clips with their folders, and what it cost: seconds per clip, and bytes of the folders over bytes of the videos.
    """
    start = time.perf_counter()
    extracted, size = [], 0
    for number, clip in enumerate(clips):
        target = folder / f"{number:05d}"
        target.mkdir(parents=True)
        with VideoReader(clip.path) as reader:
            for first in range(0, clip.frame_count, 32):
                frames = reader.frames(range(first, min(first + 32, clip.frame_count)))
                for position, picture in enumerate(reader.pixels(frames, short_side=work.short_side), first + 1):
                    path = target / f"img_{position:05d}.jpg"
                    if not cv2.imwrite(str(path), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]):
                        raise DataError(f"cannot write {str(path)!r}; free some space")
                    size += path.stat().st_size
        extracted.append(replace(clip, folder=target))
    seconds = time.perf_counter() - start
    videos = sum(Path(clip.path).stat().st_size for clip in clips)
    return extracted, {"seconds_per_clip": seconds / len(clips), "size_ratio": size / videos, "quality": _QUALITY}


def advise(report: Report) -> list[str]:
    """Sentences, each with the numbers that justify it."""
    lines = []
    stages = report.stages
    shares = ", ".join(f"{name} {share:.0%}" for name, share in stages.items())
    lines.append(f"Where our time goes where PyAV decodes: {shares}.")
    distances = [clip["frames_per_keyframe"] for clip in report.clips if clip["frames_per_keyframe"]]
    trial = report.trial
    if distances and trial:
        wanted = statistics.mean(clip["frames"] for clip in report.clips) / report.work.frames
        text = (
            f"a keyframe every {trial['gop']:.0f} frames and a short side of at most {report.work.short_side} (H.264, crf {_CRF}) "
            f"made the {trial['clips']:.0f} largest {trial['speedup']:.1f} times faster to read, "
            f"at {trial['size_ratio']:.1f} times their size"
        )
        apart = f"Keyframes are {statistics.mean(distances):.0f} frames apart, one frame in {wanted:.0f} is wanted"
        verdict = "re-encoding once would pay" if trial["speedup"] >= _WORTHWHILE else "leave the files as they are"
        lines.append(f"{apart}; {text}: {verdict}.")
    larger = [clip for clip in report.clips if min(clip["width"], clip["height"]) > report.work.short_side]
    if larger and stages.get("convert and resize", 0.0) > 0.1:
        lines.append(
            f"{len(larger)} of {len(report.clips)} clips are stored larger than needed, and colours and size take "
            f"{stages['convert and resize']:.0%} of the time: resize them once to a short side of {report.work.short_side}."
        )
    lines += [*_setting(report), *_peers(report)]
    if (folders := report.folders) and (mine := report.ours("frame folder")) and (video := report.ours("video")):
        lines.append(
            f"Folders of JPEG files are read {mine.rate() / video.rate():.1f} times as fast as the videos, "
            f"take {folders['size_ratio']:.1f} times their size, and took {folders['seconds_per_clip']:.2f} s a clip to write."
        )
    load = report.machine.get("load")
    if load and load[0] > 1.5 * (report.machine.get("cores") or 1):
        lines.append("The machine was busy with other things; compare processor times, and measure again when it is quiet.")
    return lines


def _setting(report: Report) -> list[str]:
    """What to set in this library: a decoder other than the one that "auto" takes, where it is worth it and loses no clip."""
    usual = report.ours("video")
    if usual is None:
        return []
    others = [each for each in report.results if each.group == "video" and each.setting and each.wall and each is not usual]
    lines = [_refusals(each) for each in (usual, *others) if each.refused]
    known = f"`--data.decoder auto`, the default, reads {usual.rate():.1f} clips/s here, by {_decoder(usual)}"
    allowed = [each for each in others if each.exact and not each.refused]
    best = max(allowed, key=lambda each: each.rate(), default=usual)
    if best is not usual and (not usual.exact or best.rate() >= _WORTHWHILE * usual.rate()):
        also = ", and `--decoder` where you evaluate or extract" if best.setting == "pyav" else ""
        lines.append(f"{known}: {_decoder(best)} reads {best.rate():.1f}, so set `--data.decoder {best.setting}`{also}.")
    else:
        against = "".join(f", {_decoder(each)} {each.rate():.1f}" for each in others)
        lines.append(f"{known}{against}: there is nothing to set.")
    return lines


def _decoder(result: Result) -> str:
    return {"dali": "DALI", "pyav": "PyAV"}[result.setting]


def _refusals(result: Result) -> str:
    return (
        f"{_decoder(result)} refuses {len(result.refused)} of {result.clips} clips, which `--data.decoder auto` has PyAV read and "
        f"`--data.decoder {result.setting}` would lose."
    )


def _peers(report: Report) -> list[str]:
    """How others do, for comparison."""
    exact = [ratio for ratio in report.ratios("video") if ratio.peer and ratio.exact and ratio.clock == "wall"]
    fastest = min(exact, key=lambda ratio: ratio.median, default=None)
    lines = []
    if fastest is not None:
        lines.append(f"Of other libraries that return the right frames {fastest.other} is the fastest: {fastest} times our time.")
    wrong = [result.name for result in report.results if result.group == "video" and result.wall and result.faults]
    if wrong:
        lines.append(f"Wrong frames come from {', '.join(wrong)}: do not use them on these files.")
    return lines
