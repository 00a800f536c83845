"""Ways to read videos: this library's, and peers written as their users write them.

Each reads one clip in one thread; the harness runs as many threads as it says. Libraries with threads of their own are told to use one,
DALI excepted, which reads batches with the same number of threads. Of this library's ways to read videos the one that ``decoder="auto"``
takes comes first: that is what the others are compared with.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from torch import Tensor

from amd_fast.data.clips import ClipTransform, decode_clip
from amd_fast.data.containers import open_container
from amd_fast.data.decoders import choose_decoder, dali_obstacle
from amd_fast.data.flow import DEFAULT_PRESET, FlowPreset
from amd_fast.errors import DataError, DecodeError

from .work import Clip, Work

Group = Literal["video", "frame folder", "flow"]
Read = Callable[[Clip], Mapping[str, Tensor]]
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


@dataclass(frozen=True)
class Contender:
    """One way to read clips.

    Attributes:
        name: what tables call it; no two of a group have the same.
        group: contenders of a group start from the same files and give the same tensors.
        read: reads a clip: ``{"rgb": ..., "flow": ...}``; called from several threads.
        peer: whether it is someone else's.
        package: the package whose version is recorded.
        load: reads many clips at once with threads of its own, in place of ``read``, which gets those that it refuses (``DataError``).
        setting: of this library's, the value of ``data.decoder`` that asks for it.
        device: "cuda" where a GPU decodes.
    """

    name: str
    group: Group
    read: Read
    peer: bool = True
    package: str = ""
    load: Callable[[Sequence[Clip]], list[Mapping[str, Tensor]]] | None = None
    setting: str = ""
    device: str = "cpu"


def ours(work: Work, group: Group, preset: FlowPreset = DEFAULT_PRESET) -> Contender:
    """The path of the episode loader on the CPU."""
    modalities = ("rgb", "flow") if group == "flow" else ("rgb",)
    transform = ClipTransform(work.size, modalities, train=False)

    def read(clip: Clip) -> Mapping[str, Tensor]:
        path = clip.path if group != "frame folder" or clip.folder is None else clip.folder
        raw = decode_clip(
            path, work.frames, short_side=work.short_side, modalities=modalities, frame_count=clip.frame_count, flow_preset=preset
        )
        return transform(raw)

    flow = f" + DIS {preset}" if group == "flow" else ""
    return Contender(f"amd_fast{flow}", group, read, peer=False, package="amd_fast", setting="pyav")


def dali(work: Work, clips: Sequence[Clip], threads: int) -> Contender:
    """Our path through DALI, on the GPU where there is one; PyAV reads what it refuses, as it does with ``decoder="auto"``.

    Raises:
        ImplementationError: DALI decodes none of these codecs here.
    """
    import torch

    from amd_fast.data.dali import ClipJob, DaliDecoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    codecs = list(dict.fromkeys(clip.codec for clip in clips))
    if all(dali_obstacle(codec, device) for codec in codecs):
        choose_decoder(codecs[0] if codecs else None, "dali", device)  # raises, with what to do
    decoder = DaliDecoder(("rgb",), work.frames, work.size, device=device, threads=threads)
    transform = ClipTransform(work.size, ("rgb",), train=False)

    def load(batch: Sequence[Clip]) -> list[Mapping[str, Tensor]]:
        done = decoder.load([ClipJob(clip.path, transform, frame_count=clip.frame_count) for clip in batch])
        if device == "cuda":
            torch.cuda.synchronize()
        for result in done:
            if isinstance(result, DataError):
                raise result
        return [result for result in done if not isinstance(result, DataError)]

    package = next((name for name in _DALI if _version(name)), _DALI[0])
    options: dict[str, Any] = {"peer": False, "package": package, "load": load, "setting": "dali", "device": device}
    return Contender(f"amd_fast, DALI ({device})", "video", ours(work, "video").read, **options)


def pyav_linear(work: Work) -> Contender:
    """PyAV written plainly: decode from the start, keep what is wanted."""

    def read(clip: Clip) -> Mapping[str, Tensor]:
        pictures = pyav_pictures(clip.path, clip.indices)
        return {"rgb": work.finish([pictures[index] for index in clip.indices])}

    return Contender("PyAV, linear decode", "video", read, package="av")


def pyav_pictures(path: str, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """Frames by number, as RGB, each decoded from the start of the video on in one thread."""
    numbers, last = set(wanted), max(wanted)
    pictures = {}
    with open_container(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                pictures[number] = frame.to_ndarray(format="rgb24")
            if number == last:
                break
    return pictures


def opencv(work: Work, flow: bool = False) -> Contender:
    """OpenCV's capture: grab every frame, retrieve the wanted ones; with flow also Farneback's to the next frame."""

    def read(clip: Clip) -> Mapping[str, Tensor]:
        wanted = sorted({*clip.indices, *(index for pair in clip.pairs for index in pair)} if flow else set(clip.indices))
        pictures = opencv_pictures(clip.path, wanted)
        result = {"rgb": work.finish([pictures[index] for index in clip.indices])}
        if flow:
            result["flow"] = work.flow([pictures[index] for pair in clip.pairs for index in pair], farneback)
        return result

    name = "OpenCV + Farneback" if flow else "OpenCV, grab and retrieve"
    return Contender(name, "flow" if flow else "video", read, package="opencv-python-headless")


def opencv_pictures(path: str, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """Frames by number, ascending ones, as RGB."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    pictures: dict[int, np.ndarray] = {}
    try:
        for number in range(wanted[-1] + 1):
            if not capture.grab():
                break
            if number in wanted:
                pictures[number] = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
    if len(pictures) < len(wanted):
        raise DecodeError(f"{path!r}: OpenCV shows fewer frames than there are")
    return pictures


def farneback(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Flow between two grey pictures by Farneback's method with the parameters of OpenCV's tutorial."""
    return np.asarray(cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0))  # type: ignore[call-overload]


def decord(work: Work) -> Contender:
    """Decord's VideoReader."""
    package = importlib.import_module("decord")

    def read(clip: Clip) -> Mapping[str, Tensor]:
        batch = package.VideoReader(clip.path, ctx=package.cpu(0), num_threads=1).get_batch(list(clip.indices)).asnumpy()
        return {"rgb": work.finish(list(batch))}

    return Contender("decord", "video", read, package="decord")


def torchcodec(work: Work, seek_mode: str) -> Contender:
    """Torchcodec's VideoDecoder."""
    decoders = importlib.import_module("torchcodec.decoders")

    def read(clip: Clip) -> Mapping[str, Tensor]:
        decoder = decoders.VideoDecoder(clip.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)
        return {"rgb": work.finish(list(decoder.get_frames_at(list(clip.indices)).data.numpy()))}

    return Contender(f"torchcodec, {seek_mode}", "video", read, package="torchcodec")


def pil_folder(work: Work) -> Contender:
    """Frame folders as the repositories of TRX and HyRSM read them: PIL and torchvision's transforms, picture by picture."""
    import torch
    from PIL import Image
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.Resize(work.short_side),
            transforms.CenterCrop(work.size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    def read(clip: Clip) -> Mapping[str, Tensor]:
        if clip.folder is None:
            raise DecodeError(f"{clip.path!r}: there is no folder of its frames")
        pictures = [Image.open(clip.folder / f"img_{index + 1:05d}.jpg") for index in clip.indices]
        return {"rgb": torch.stack([steps(picture.convert("RGB")) for picture in pictures])}

    return Contender("PIL + torchvision", "frame folder", read, package="pillow")


def available(work: Work, groups: Sequence[Group], clips: Sequence[Clip] = (), threads: int = 2) -> tuple[list[Contender], list[str]]:
    """The contenders that can read these clips here, and why the others cannot."""
    made: list[Contender] = []
    missing: list[str] = []
    if "video" in groups:
        made += [ours(work, "video"), pyav_linear(work), opencv(work)]
        makers: dict[str, Callable[[], list[Contender]]] = {
            "decord": lambda: [decord(work)],
            "torchcodec": lambda: [torchcodec(work, mode) for mode in ("exact", "approximate")],
            "DALI": lambda: [dali(work, clips, threads)],
        }
        for name, make in makers.items():
            try:
                made += make()
            except (ImportError, OSError, RuntimeError) as error:  # installed, it may still lack a library of its own
                missing.append(f"{name}: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}")
        made.sort(key=lambda contender: contender.device == "cpu")  # what a GPU decodes first: "auto" takes that
    if "flow" in groups:
        made += [ours(work, "flow"), opencv(work, flow=True)]
    if "frame folder" in groups:
        made += [ours(work, "frame folder"), pil_folder(work)]
    return made, missing


def versions(contenders: Sequence[Contender]) -> dict[str, str]:
    """Versions of the packages that read."""
    found: dict[str, str] = {}
    for package in dict.fromkeys(contender.package for contender in contenders):
        version = _version(package) or _version(package.removesuffix("-headless"))
        if version:
            found[package] = version
    return found


def _version(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def libraries() -> dict[str, Any]:
    """The FFmpeg that PyAV brings along."""
    import av

    return {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
