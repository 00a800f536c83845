"""What a stream says its luma and chroma are made of, and how to mend colours that were taken for those of BT.601."""

from __future__ import annotations

import numpy as np

# Share of red and of blue in the luma, by FFmpeg's number of the colour space; those not named here are taken for BT.601, as swscale does.
_SHARES = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
_BT601 = (0.299, 0.114)


def from_bt601(colour_space: int) -> np.ndarray | None:
    """The matrix float32 ``[3, 3]`` that makes right what was converted to RGB as BT.601; None where it is right.

    Luma and chroma are linear in red, green and blue, so one matrix on a pixel's colours undoes the wrong conversion and does the right
    one, whatever range the stream has. Greys stay as they are. Only what the wrong conversion cut off at 0 and 255 is lost.

    Args:
        colour_space: FFmpeg's number, such as 1 for BT.709.
    """
    shares = _SHARES.get(colour_space)
    return None if shares is None else (_to_rgb(shares) @ np.linalg.inv(_to_rgb(_BT601))).astype(np.float32)


def _to_rgb(shares: tuple[float, float]) -> np.ndarray:
    """From luma and the differences of blue and red to it, halved to fit -1/2..1/2, to red, green and blue."""
    red, blue = shares
    green = 1 - red - blue
    to_blue, to_red = 2 * (1 - blue), 2 * (1 - red)
    return np.array([[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]])
