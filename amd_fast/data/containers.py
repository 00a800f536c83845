"""Opening video files with PyAV, whatever bytes their titles and comments are."""

from __future__ import annotations

from typing import Any

import av

# Real files (HMDB51 has some) carry text that is not UTF-8. From release 19 on PyAV keeps such bytes by itself.
_TOLERANT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def open_container(file: Any, **options: Any) -> Any:
    """``av.open`` for reading; text that is not UTF-8 is no error. Arguments, result and errors are PyAV's."""
    return av.open(file, **_TOLERANT, **options)
