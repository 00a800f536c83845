"""The sequence header of H.264 (its sequence parameter set), as far as it tells how pictures are ordered and whether they may be fields."""

from __future__ import annotations

from collections.abc import Iterator

_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})  # those that say how colours are stored


def sequence_headers(extradata: bytes) -> Iterator[bytes]:
    """The headers, as NAL units, in the "avcC" record that mp4 and Matroska keep before the packets."""
    place = 6
    for _ in range(extradata[5] & 31 if len(extradata) > 5 else 0):
        length = int.from_bytes(extradata[place : place + 2])
        yield extradata[place + 2 : place + 2 + length]
        place += 2 + length


def allows_fields(header: bytes) -> bool:
    """Whether a sequence header (NAL unit of type 7) leaves it open to store a picture as two fields (``frame_mbs_only_flag`` is 0).

    A header that ends too soon reads as if zeros followed, so that a damaged one counts as allowing for it.
    """
    order, bits = _order(header)
    if order == 0:
        bits.exponential()
    elif order == 1:
        bits.take(1)
        for _ in range(2):
            bits.exponential()
        for _ in range(bits.exponential() & 255):
            bits.exponential()
    bits.exponential()  # reference frames
    bits.take(1)
    for _ in range(2):  # width and height
        bits.exponential()
    return not bits.take(1)


def shown_as_decoded(header: bytes) -> bool:
    """Whether a sequence header rules out that frames are shown in another order than they come in (``pic_order_cnt_type`` is 2)."""
    return len(header) > 4 and _order(header)[0] == 2


def _order(header: bytes) -> tuple[int, _Bits]:
    """How the pictures' order of display is coded, and what follows in the header."""
    bits = _Bits(header[4:].replace(b"\0\0\3", b"\0\0"))  # the third zero byte is kept from looking like a start code
    bits.exponential()  # the header's own number
    if header[1] in _HIGH_PROFILES:
        _skip_colours(bits)
    bits.exponential()  # of frame numbers
    return bits.exponential(), bits


def _skip_colours(bits: _Bits) -> None:
    chroma = bits.exponential()
    if chroma == 3:
        bits.take(1)
    for _ in range(2):  # bits of luma and chroma
        bits.exponential()
    bits.take(1)
    if bits.take(1):
        for size in [16] * 6 + [64] * (6 if chroma == 3 else 2):
            if bits.take(1):
                _skip_scaling_list(bits, size)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.exponential()
            following = (last + (code + 1 >> 1 if code & 1 else -(code >> 1))) % 256
        last = following or last


class _Bits:
    """Bits of a header from its start; zeros after its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def take(self, count: int) -> int:
        value = 0
        for _ in range(count):
            byte = self._data[self._place >> 3] if self._place >> 3 < len(self._data) else 0
            value = value << 1 | byte >> 7 - (self._place & 7) & 1
            self._place += 1
        return value

    def exponential(self) -> int:
        """A number in Exp-Golomb code, where small numbers are short; the signed ones count 0, 1, -1, 2, -2, ..."""
        zeros = 0
        while zeros < 32 and not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
