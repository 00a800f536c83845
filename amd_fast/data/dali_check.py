"""Whether DALI works on a device at all: a tiny stream of two pictures goes through the graph before any clip does.

A driver too old, a library that is missing or memory that is full makes every batch fail, with messages that look as if the clips
were bad. So the machine is asked once, for each device and what is wanted of it.
"""

from __future__ import annotations

import functools
import io
import os
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
import torch

from amd_fast.data.cut import CutStream
from amd_fast.data.dali_graph import Parts, Sample, definition, inputs_of
from amd_fast.data.decoders import dali_obstacle
from amd_fast.data.views import IMAGENET_MEAN, IMAGENET_STD, View

_SIDE, _STEP = 256, 4
_SIZE = 224  # _SIDE / RESIZE_RATIO: nothing is resized
_LARGEST_ERROR = 16.0  # grey levels on average: compression takes 1 to 3
# Encoders of FFmpeg for what the device may decode, the surest first.
_ENCODERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cuda": {"h264": ("libx264", "libopenh264"), "mpeg4": ("mpeg4",)},
    "cpu": {"mjpeg": ("mjpeg",)},
}
_MEMORY = r"out of memory|out_of_memory|memoryallocation|bad_alloc"
_REMEDIES = {
    r"optical.?flow|nvof": "the driver's optical flow library is missing or too old; in a container, start it with "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, or leave 'flow' out",
    r"driver|unsupported ptx|no kernel image": "update the driver, or install the DALI for its version of CUDA",
    _MEMORY: "free memory of the GPU, or read fewer or smaller clips at a time",
}


class Check(NamedTuple):
    """What is found out about a device.

    Attributes:
        problem: why DALI does not work there and the remedy, two clauses; None where it does.
        backwards: whether the GPU's vectors say where the second frame's content was, and not where the first frame's goes. DALI's
            text leaves it open.
    """

    problem: str | None
    backwards: bool = False


_found: dict[tuple[torch.device, bool, bool], Check] = {}
_lock = threading.Lock()


def check_dali(device: torch.device, *, rgb: bool, flow: bool) -> Check:
    """Tells whether DALI works on a device; asks it the first time. Call it where DALI will be used, in a thread that may hang."""
    with _lock:  # two tests at a time could run out of what one has room for
        key = (device, rgb, flow)
        if key not in _found:
            _found[key] = examine(device, rgb=rgb, flow=flow)
        return _found[key]


def examine(device: torch.device, *, rgb: bool, flow: bool) -> Check:
    """The same, asked anew."""
    try:
        pictures, stream = tiny_stream(device.type)
        outputs = _run(stream, device, Parts(rgb, flow))
    except Exception as error:  # whatever a driver, a library or the lack of one comes up with
        return Check(explained(error))
    if rgb:
        shown = outputs[0][0].transpose(0, 2, 3, 1) * (255 * IMAGENET_STD) + 255 * IMAGENET_MEAN
        edge = (_SIDE - _SIZE) // 2
        difference = float(np.abs(shown - pictures[:, edge : edge + _SIZE, edge : edge + _SIZE]).mean())
        if not difference <= _LARGEST_ERROR:
            return Check(f"it shows other pictures than were put in, {difference:.0f} grey levels off; update the driver and DALI")
    return Check(None, backwards=bool(flow and device.type == "cuda" and np.median(outputs[-1][0, 0, ..., 0]) < 0))


def explained(error: BaseException) -> str:
    """What went wrong in a line, and the remedy."""
    reason = reason_of(error)
    remedies = (remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, reason, re.IGNORECASE))
    return f"{reason}; {next(remedies, 'look at what amd-fast doctor says of the driver and of DALI')}"


def reason_of(error: BaseException) -> str:
    """The text of one of DALI's errors, without its trace."""
    text = str(error).split("Current pipeline object")[0].split("Stacktrace")[0]
    return " ".join(text.split()) or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or bool(re.search(_MEMORY, str(error), re.IGNORECASE))


@functools.cache
def tiny_stream(device: str) -> tuple[np.ndarray, CutStream]:
    """Two pictures of a texture that moves to the right, uint8 ``[2, H, W, 3]``, and the stream of them.

    Raises:
        RuntimeError: the device decodes nothing that can be encoded here.
    """
    obstacles = []
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE // 8, _SIDE // 8 + 1, 3), dtype=np.uint8)
    texture = cv2.resize(noise, (_SIDE + 8, _SIDE), interpolation=cv2.INTER_CUBIC)
    pictures = np.stack([texture[:, _STEP : _STEP + _SIDE], texture[:, :_SIDE]])
    for codec, encoders in _ENCODERS[device].items():
        obstacle = dali_obstacle(codec, device)
        encoder = next((name for name in encoders if name in av.codecs_available), None)
        if obstacle is None and encoder is not None:
            data = _encoded(pictures, encoder, "yuvj420p" if codec == "mjpeg" else "yuv420p")
            return pictures, CutStream(data, np.arange(2, dtype=np.int32), codec, _SIDE, _SIDE, packets=2, hidden=False)
        obstacles.append(obstacle or f"FFmpeg has no encoder for {codec} here")
    raise RuntimeError("; ".join(obstacles))


def _encoded(pictures: np.ndarray, encoder: str, pixel_format: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream: Any = container.add_stream(encoder, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = _SIDE, _SIDE, pixel_format, 8_000_000
        stream.codec_context.max_b_frames, stream.codec_context.thread_count = 0, 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _run(stream: CutStream, device: torch.device, parts: Parts) -> list[np.ndarray]:
    gpu = device.index if device.type == "cuda" else None
    edge = (_SIDE - _SIZE) // 2
    both = np.arange(2)
    sample = Sample(os.devnull, stream, both, both[None], View(_SIDE, _SIDE, edge, edge, _SIZE), {})
    pipeline = definition(_SIZE, parts, gpu)(batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
    for name, values in inputs_of([sample], parts).items():
        pipeline.feed_input(name, values)
    return [np.array(output.as_cpu().as_tensor()) for output in pipeline.run()]
