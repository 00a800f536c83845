"""Clips that could not be read after indexing, each logged by name until too many stop the run; and those that one decoder refuses."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from amd_fast.errors import DataError

if TYPE_CHECKING:
    from amd_fast.data.cutting import Refused

logger = logging.getLogger(__name__)

LEAST_LOST = 10
"""A run is not stopped for fewer lost clips than this, whatever their share."""
_NAMED = 5  # clips named in the message that stops a run
_REASONS = 4  # reasons listed there
_SAID = 20  # reasons for refusals that are told apart


class Losses:
    """Counts lost clips against those seen.

    Args:
        clips: number of clips there are.
        most: largest share of the clips seen so far that may be lost; below ``LEAST_LOST`` clips the share does not count.
    """

    def __init__(self, clips: int, most: float) -> None:
        self.reasons: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._most = most
        self._seen = np.zeros(clips, dtype=bool)
        self._lock = threading.Lock()

    def see(self, positions: Iterable[int]) -> None:
        """Counts clips as seen."""
        self._seen[list(positions)] = True

    def add(self, position: int, path: str, reason: str) -> None:
        """Counts a clip as lost, and logs it the first time.

        Raises:
            DataError: more than the tolerated share of the clips is lost; lists reasons with their counts, and the first names.
        """
        with self._lock:
            if position in self.reasons:
                return
            self.reasons[position], self._paths[position] = reason, path
            lost, seen = len(self.reasons), int(self._seen.sum())
        logger.warning("clip %s lost: %s", path, reason)
        if lost >= LEAST_LOST and lost > self._most * seen:
            raise DataError(f"{lost} of the {seen} clips read so far are lost, more than data.max_lost={self._most:g} allows: {self}")

    def __str__(self) -> str:
        """Reasons with their counts, most frequent first, and the first names."""
        with self._lock:
            named = [(self._paths[position], reason) for position, reason in self.reasons.items()]
        counts = Counter(reason.replace(path, "…") for path, reason in named)
        listed = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(_REASONS))
        further = f"; and {len(counts) - _REASONS} more reasons" if len(counts) > _REASONS else ""
        more = ", ..." if len(named) > _NAMED else ""
        return f"{listed}{further}. The first: {', '.join(path for path, _ in named[:_NAMED])}{more}"


class Refusals:
    """Files that DALI refuses and PyAV reads: each is tried once, and each reason is logged once. Holds one path per file."""

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._logged: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def add(self, refusals: Iterable[Refused]) -> None:
        """Remembers refusals, and logs the reasons among them that are new, with an example."""
        with self._lock:
            examples: dict[str, str] = {}
            for refusal in refusals:
                if refusal.path not in self._paths:
                    self._paths.add(refusal.path)
                    reason = refusal.reason if refusal.reason in self._counts or len(self._counts) < _SAID else "other reasons"
                    self._counts[reason] += 1
                    examples.setdefault(reason, refusal.path)
            new = [(reason, path) for reason, path in examples.items() if reason not in self._logged]
            self._logged |= Counter({reason: self._counts[reason] for reason, _ in new})
        for reason, path in new:
            count = self._logged[reason]
            logger.warning("DALI does not read %d clip%s, such as %s (%s)", count, "" if count == 1 else "s", path, reason)

    def sum_up(self) -> None:
        """Logs how many there are, where more have come since their reasons were logged."""
        if self._counts != self._logged:
            listed = "; ".join(f"{count} x {reason}" for reason, count in self._counts.most_common())
            logger.info("DALI did not read %d clips: %s", len(self._paths), listed)
