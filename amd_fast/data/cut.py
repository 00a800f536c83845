"""A small video made of the few packets that a clip's frames need, for decoders that read a stream from its first frame to the last.

Nothing is decoded: the packets from the last safe starting point before each wanted frame up to that frame are copied, pictures that
nothing refers to and nobody wants are left out, and the rest is written to memory as Matroska, the n-th frame shown n milliseconds
after the first. The frames of the result, counted in display order, are the frames asked for.

Where a decoder may start in the middle is decided by the codec's own marks, not by the container's alone: H.264 at IDR pictures after
which nothing is shown that came before; HEVC at IDR, BLA and CRA pictures (the last are renamed BLA, what leads them is left out);
MPEG-4 part 2 at I-pictures (B-pictures before them are left out); VP8, VP9, AV1 and intra-only codecs at key frames.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate, chain
from typing import Any

import av
import numpy as np

from amd_fast.data.decode import VideoReader
from amd_fast.data.h264 import allows_fields, sequence_headers
from amd_fast.data.packets import picture_type

_TICK = Fraction(1, 1000)  # what Matroska counts in
_KEYFRAME_CODECS = frozenset({"vp8", "vp9", "av1"})  # their key frames forget all that came before
_IDR, _PARAMETERS, _DELIMITER = 5, 7, 9  # H.264 types of NAL units
_IRAP, _CRA, _BLA_WITHOUT_LEADING, _LEADING = range(16, 22), 21, 18, range(6, 10)  # HEVC
_AV1_HEADER, _AV1_FRAME = 3, 6  # a frame's header alone, and a whole frame


@dataclass(frozen=True, slots=True)
class CutStream:
    """A stream of the packets that some frames need.

    Attributes:
        data: a Matroska file.
        frames: int32, for each frame asked for its position in display order in ``data``.
        codec: FFmpeg's name of the codec, such as "h264".
        width, height: pixels of a frame as stored; the container's rotation is not applied.
        packets: number of packets kept.
        hidden: whether ``data`` has packets that hold a picture more than they show, or none (VP9 and AV1 do that).
        interlaced: whether the pictures may be stored as two fields each (H.264 does that).
        pixel_format: FFmpeg's name, such as "yuv420p"; empty where only decoding tells.
        colour_space: FFmpeg's number of what the stream says that its luma and chroma are made of; 2 where it does not say.
    """

    data: bytes
    frames: np.ndarray
    codec: str
    width: int
    height: int
    packets: int
    hidden: bool
    interlaced: bool = False
    pixel_format: str = "yuv420p"
    colour_space: int = 2


def cut_stream(reader: VideoReader, indices: Iterable[int]) -> CutStream | None:
    """Cuts out what some frames of a video need.

    Args:
        reader: the opened video; its packets are not changed.
        indices: positions in display order, at least one, in any order, repeats allowed; one past the end means the last frame.

    Returns:
        The cut stream, or None where it cannot be told without decoding which packets are needed: the order of display is unknown (see
        ``packets``), the codec is none of the above, or the first packet is no safe start.
    """
    reader.describe_pixels()
    table, times = reader.table, reader.table.times
    if times is None:
        return None
    units = _units_of(reader, table.packets)
    if units is None:
        return None
    wanted = [table.shown[min(int(i), len(table.shown) - 1)] for i in indices]
    kept = _needed(times, units, set(wanted))
    if kept is None:
        return None
    order = {times[k]: rank for rank, k in enumerate(sorted(kept, key=lambda k: times[k]))}
    contents = [units[k].spliced() if spliced else bytes(table.packets[k]) for k, spliced in kept.items()]
    context = reader.stream.codec_context
    ranks, keys = [order[times[k]] for k in kept], [units[k].start for k in kept]
    return CutStream(
        data=_written(reader.stream, contents, ranks, keys),
        frames=np.array([order[time] for time in wanted], dtype=np.int32),
        codec=reader.codec,
        width=context.width,
        height=context.height,
        packets=len(kept),
        hidden=any(units[k].hidden for k in kept),
        interlaced=_may_be_interlaced(reader, table.packets),
        pixel_format=context.pix_fmt or "",
        colour_space=int(context.colorspace),
    )


@dataclass(slots=True)
class _Unit:
    """What a packet's content says about itself.

    Attributes:
        start: decoding can start here, once what leads it is left out.
        leads: depends, if shown before the start that precedes it, on what came before that; nothing else depends on it.
        droppable: nothing refers to it.
        spliced: the content, for a packet that others than its own predecessors precede.
        hidden: holds a picture more than it shows, or none.
    """

    start: bool
    leads: bool
    droppable: bool
    spliced: Callable[[], bytes]
    hidden: bool = False


def _needed(times: list[int], units: list[_Unit], wanted: set[int]) -> dict[int, bool] | None:
    """Positions of the packets needed, ascending; True for those that follow a gap. None where no start precedes a wanted frame."""
    starts = _clean_starts(times, units)
    start_times = [times[k] for k in starts]
    places = [(bisect.bisect_right(start_times, times[k]) - 1, k) for k, time in enumerate(times) if time in wanted]
    if min(places)[0] < 0:
        return None
    kept: dict[int, bool] = {}
    for start, end in _merged(sorted((starts[place], k) for place, k in places)):
        for k in range(start, end + 1):
            leads = times[k] < times[start]
            if times[k] in wanted or not (leads or units[k].droppable):
                kept[k] = k == start > 0
    return kept


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (first, last), ascending in the first, with those that touch or overlap made one."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _clean_starts(times: list[int], units: list[_Unit]) -> list[int]:
    """Starts before which all is shown that precedes them, and after which all that follows and cannot be left out; ascending."""
    beyond = max(times) + 1
    latest_before = [min(times) - 1, *accumulate(times, max)]
    needed = [beyond if unit.leads else time for time, unit in zip(times, units, strict=True)]
    earliest_after = [*reversed([*accumulate(reversed([*needed[1:], beyond]), min)])]
    return [k for k, unit in enumerate(units) if unit.start and latest_before[k] < times[k] < earliest_after[k]]


def _units_of(reader: VideoReader, packets: list[Any]) -> list[_Unit] | None:
    codec = reader.stream.codec_context.codec
    extradata = reader.stream.codec_context.extradata or b""
    name = codec.canonical_name
    if name in ("h264", "hevc"):
        length_size = _length_size(name, extradata)
        return None if length_size is None else [_NAL_CODECS[name](packet, length_size) for packet in packets]
    if name == "mpeg4" and extradata:  # size and coding tools, which a picture in the middle may lack
        return [_mpeg4_unit(packet) for packet in packets]
    if name in _KEYFRAME_CODECS or codec.intra_only:
        hides = {"vp9": _vp9_hides, "av1": _av1_hides}.get(name)
        return [_Unit(packet.is_keyframe, False, False, partial(bytes, packet), hides is not None and hides(packet)) for packet in packets]
    return None


def _length_size(codec: str, extradata: bytes) -> int | None:
    """Bytes of the length before each NAL unit (mp4 and Matroska); None for streams with start codes."""
    place = {"h264": 4, "hevc": 21}[codec]
    return (extradata[place] & 3) + 1 if len(extradata) > place and extradata[0] == 1 else None


def _nal_units(packet: Any, length_size: int) -> Iterator[tuple[int, memoryview]]:
    """Place and content of the NAL units of a packet."""
    data = memoryview(packet)
    place = 0
    while place + length_size < len(data):
        length = int.from_bytes(data[place : place + length_size])
        place += length_size
        yield place, data[place : place + length]
        place += length


def _h264_unit(packet: Any, length_size: int) -> _Unit:
    slices = [unit[0] for _, unit in _nal_units(packet, length_size) if 1 <= unit[0] & 31 <= _IDR]

    def spliced() -> bytes:  # the delimiter tells this picture from an IDR picture before it that looks alike
        return (2).to_bytes(length_size) + bytes([_DELIMITER, 0xF0]) + bytes(packet)

    is_start = bool(slices) and all(head & 31 == _IDR for head in slices)
    return _Unit(is_start, False, bool(slices) and not any(head >> 5 & 3 for head in slices), spliced)


def _may_be_interlaced(reader: VideoReader, packets: list[Any]) -> bool:
    """Whether a sequence header of an H.264 stream, before its packets or among them, allows for pictures made of two fields."""
    extradata = reader.stream.codec_context.extradata or b""
    if reader.codec != "h264" or (length_size := _length_size("h264", extradata)) is None:
        return False
    within = (unit for packet in packets if packet.is_keyframe for _, unit in _nal_units(packet, length_size))
    among = (bytes(unit) for unit in within if unit[0] & 31 == _PARAMETERS)
    return any(allows_fields(header) for header in chain(sequence_headers(extradata), among))


def _hevc_unit(packet: Any, length_size: int) -> _Unit:
    heads = [(place, unit[0] >> 1 & 63, unit[1] & 7) for place, unit in _nal_units(packet, length_size) if len(unit) > 1]
    kinds = {kind for _, kind, _ in heads if kind < 32}  # of the slices

    def spliced() -> bytes:
        data = bytearray(bytes(packet))
        for place, kind, _ in heads:
            if kind == _CRA:  # a CRA picture in the middle of a stream promises what precedes it; a BLA picture does not
                data[place] = data[place] & 0x81 | _BLA_WITHOUT_LEADING << 1
        return bytes(data)

    start = bool(kinds) and all(kind in _IRAP for kind in kinds)
    leads = bool(kinds) and all(kind in _LEADING for kind in kinds)
    # Even types below 16 are not referred to by pictures of their own temporal layer; only where there is one layer, by none.
    droppable = bool(kinds) and all(kind < 16 and kind % 2 == 0 for kind in kinds) and all(layer == 1 for _, _, layer in heads)
    return _Unit(start, leads, droppable, spliced)


_NAL_CODECS: dict[str, Callable[[Any, int], _Unit]] = {"h264": _h264_unit, "hevc": _hevc_unit}


def _mpeg4_unit(packet: Any) -> _Unit:
    kind = picture_type(packet)
    return _Unit(kind == "I", kind == "B", kind == "B", partial(bytes, packet))


def _vp9_hides(packet: Any) -> bool:
    """Whether a VP9 packet holds several pictures (a superframe) or shows one from before."""
    data = memoryview(packet)
    head, marker = data[0], data[-1]
    pictures = (marker & 7) + 1
    index = 2 + pictures * ((marker >> 3 & 3) + 1)  # bytes of the table of sizes, which starts and ends with the marker
    if marker >> 5 == 6 and pictures > 1 and index < len(data) and data[-index] == marker:
        return True
    return bool(head >> (2 if head >> 4 & 3 == 3 else 3) & 1)  # profile 3 has one reserved bit more


def _av1_hides(packet: Any) -> bool:
    """Whether an AV1 temporal unit holds more than one picture, or shows one from before."""
    data = bytes(packet)
    place = pictures = 0
    while place < len(data):
        head = data[place]
        kind, has_extension, has_size = head >> 3 & 15, head >> 2 & 1, head >> 1 & 1
        place += 1 + has_extension
        size, place = _leb128(data, place) if has_size else (len(data) - place, place)
        if kind in (_AV1_HEADER, _AV1_FRAME) and size:
            pictures += 1
            if kind == _AV1_HEADER and data[place] >> 7:
                return True
        place += size
    return pictures != 1


def _leb128(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for k in range(8):
        byte = data[place + k]
        value |= (byte & 127) << 7 * k
        if not byte & 128:
            return value, place + k + 1
    return value, place + 8


def _written(source: Any, contents: list[bytes], ranks: list[int], keys: list[bool]) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream_from_template(source, opaque=True)
        latest = max(k - rank for k, rank in enumerate(ranks))  # so that no frame is shown before it is decoded
        for k, (content, rank, key) in enumerate(zip(contents, ranks, keys, strict=True)):
            packet = av.Packet(content)
            packet.pts, packet.dts, packet.time_base, packet.duration = rank, k - latest, _TICK, 1
            packet.is_keyframe, packet.stream = key, stream
            container.mux(packet)
    return file.getvalue()
