"""The compressed packets of a video stream and, where it can be known without decoding, the order in which they are shown.

A decoder numbers frames in display order; packets come in decoding order. Where the order of display is known beforehand,
any frame can be reached from the keyframe before it. Where it is not, only a full decode tells which frame is the n-th, and
``PacketTable.times`` is None. Trusting timestamps too readily gives wrong frames in silence, so the rules here are conservative:

* mp4, mov, Matroska, WebM: presentation times, if present, distinct, and reordered where the codec reorders;
* AVI has no presentation times. MPEG-4 part 2 (DivX, XviD) is ordered by picture type, after packed B-frames have been
  taken apart; intra-only codecs (MJPEG ...) are shown in storage order;
* everything else is counted by decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from av.bitstream import BitStreamFilterContext

VOP_START = b"\x00\x00\x01\xb6"
"""What an MPEG-4 part 2 picture starts with."""
_TIMED_FORMATS = frozenset({"mov", "mp4", "matroska", "webm"})
_MAX_NOT_CODED = 19  # bytes; an MPEG-4 packet this small says "nothing new" and may yield no frame (same bound as FFmpeg's)
_VOP_TYPES, _CUT_OFF = "IPBS", "?"


@dataclass(slots=True)
class PacketTable:
    """Packets of one video stream in decoding order.

    Attributes:
        packets: the packets, held in memory (as large as the compressed stream).
        times: per packet, the time stamp its frame will carry; None where the order of display is unknown.
            Packets that are decoded but never shown (cut off by an edit list) keep their time here and are not in ``shown``.
        shown: time stamps of all frames, in display order; empty where ``times`` is None.
        keyframes: (time stamp, position in ``packets``) of the packets at which decoding can start, ascending in both.
        timed: True where the stamps are presentation times in units of the stream's time base, False where they are plain ranks.
    """

    packets: list[Any]
    times: list[int] | None = None
    shown: list[int] = field(default_factory=list)
    keyframes: list[tuple[int, int]] = field(default_factory=list)
    timed: bool = False


def read_packets(container: Any, stream: Any) -> PacketTable:
    """Demultiplex (without decoding) all packets of a stream and work out their order of display."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    codec = stream.codec_context.codec
    if not packets:
        return PacketTable(packets)
    if _TIMED_FORMATS & set(container.format.name.split(",")):
        return _ordered_by_time(packets, stream)
    if codec.intra_only and all(packet.is_keyframe for packet in packets):
        return _ordered_by_rank(packets, list(range(len(packets))), [True] * len(packets))
    if container.format.name == "avi" and codec.canonical_name == "mpeg4":
        return _ordered_by_picture_type(packets, stream)
    return PacketTable(packets)


def _ordered_by_time(packets: list[Any], stream: Any) -> PacketTable:
    times = [packet.pts for packet in packets]
    if None in times or len(set(times)) < len(times):
        return PacketTable(packets)
    context = stream.codec_context
    if context.has_b_frames and len(times) > 1 and times == sorted(times):
        return PacketTable(packets)  # nothing is reordered: copied from an AVI, these are decoding times in disguise
    if context.codec.canonical_name == "mpeg4" and min(packet.size for packet in packets) <= _MAX_NOT_CODED:
        return PacketTable(packets)
    keyframes = [(packet.pts, k) for k, packet in enumerate(packets) if packet.is_keyframe]
    if not keyframes or keyframes[0] != (min(times), 0) or any(a >= b for a, b in pairwise(keyframes)):
        return PacketTable(packets)  # starts in the middle of a group of pictures: how many frames are lost, only the decoder knows
    shown = sorted(packet.pts for packet in packets if not packet.is_discard)
    return PacketTable(packets, times, shown, keyframes, timed=True) if shown else PacketTable(packets)


def _ordered_by_rank(packets: list[Any], ranks: list[int], is_start: list[bool]) -> PacketTable:
    """Stamp packets with their position in display order; the decoder hands the stamp on to the frame."""
    for packet, rank in zip(packets, ranks, strict=True):
        packet.pts = rank
    keyframes = [(rank, k) for k, rank in enumerate(ranks) if is_start[k]]
    return PacketTable(packets, ranks, list(range(len(packets))), keyframes)


def _ordered_by_picture_type(packets: list[Any], stream: Any) -> PacketTable:
    types = [_picture_types(packet) for packet in packets]
    if any(len(kinds) > 1 for kinds in types):
        packets = _unpack_b_frames(packets, stream)
        types = [_picture_types(packet) for packet in packets]
    coded = [packet for packet, kinds in zip(packets, types, strict=True) if kinds]  # DivX pads with packets that hold no picture
    order = "".join(types)
    if len(order) != len(coded) or _CUT_OFF in order or not coded or min(packet.size for packet in coded) <= _MAX_NOT_CODED:
        return PacketTable(packets)
    anchors = [k for k, kind in enumerate(order) if kind != "B"]
    if order[0] != "I" or (len(anchors) < len(order) and anchors[:2] != [0, 1]):
        return PacketTable(packets)  # B-frames that lack a reference are dropped by the decoder
    return _ordered_by_rank(coded, display_ranks(order), [kind == "I" for kind in order])


def display_ranks(types: str) -> list[int]:
    """Positions in display order of pictures given in decoding order by type: a B is shown before the anchor that precedes it.

    >>> display_ranks("IPBBPB")
    [0, 3, 1, 2, 5, 4]
    """
    if "B" not in types:
        return list(range(len(types)))
    order: list[int] = []
    anchor: int | None = None
    for k, kind in enumerate(types):
        if kind == "B":
            order.append(k)
        else:
            if anchor is not None:
                order.append(anchor)
            anchor = k
    if anchor is not None:
        order.append(anchor)
    ranks = [0] * len(order)
    for rank, k in enumerate(order):
        ranks[k] = rank
    return ranks


def _unpack_b_frames(packets: list[Any], stream: Any) -> list[Any]:
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream)
    unpacked = [out for packet in packets for out in unpack.filter(packet)]
    return unpacked + list(unpack.filter(None))


def picture_type(packet: Any) -> str | None:
    """I, P, B or S: type of the first MPEG-4 part 2 picture in a packet; None where it holds none."""
    kinds = _picture_types(packet)
    return kinds[0] if kinds and kinds[0] != _CUT_OFF else None


def _picture_types(packet: Any) -> str:
    """Types of all MPEG-4 part 2 pictures in a packet, in order; ``_CUT_OFF`` for one that ends before its type."""
    data, types = bytes(packet), ""
    place = data.find(VOP_START)
    while place >= 0:
        types += _VOP_TYPES[data[place + 4] >> 6] if place + 4 < len(data) else _CUT_OFF
        place = data.find(VOP_START, place + 4)
    return types
