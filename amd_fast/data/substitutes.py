"""Who stands in for a lost clip: another of its class that keeps support and query apart."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import numpy.typing as npt

from amd_fast.data.draws import mix


class Substitutes:
    """Composes episodes without the lost clips: a pure function of the episode and of which clips are lost.

    Args:
        labels: class of every clip.
        groups: source recording of every clip.
    """

    def __init__(self, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_]) -> None:
        self._class = np.unique(labels, return_inverse=True)[1]
        self._group = np.unique(groups, return_inverse=True)[1].tolist()
        self._members: dict[int, list[int]] = {}

    def compose(self, clips: npt.NDArray[np.int64], shots: int, lost: Container[int], key: int) -> npt.NDArray[np.int64]:
        """An episode with other clips in place of the lost ones; all others stay where they are.

        A substitute has the class of the clip it stands for, and no group in common with the other side of the episode. It is not in
        the episode already, unless its class has no further clip: then a clip of its own side comes twice. Whoever stands in at a
        place that comes first may leave nobody for a later one: the result holds for good only if all that stand in can be read.

        Args:
            clips: positions ``[P]``, support first.
            shots: number of support clips in the episode (of all classes together).
            lost: positions that cannot be read.
            key: decides the order in which the class is searched.

        Returns:
            positions ``[P]``; -1 where a class has nobody left to stand in.
        """
        drawn = clips.tolist()
        chosen = [-1 if clip in lost else clip for clip in drawn]
        for place in [place for place, clip in enumerate(chosen) if clip < 0]:
            own, other = (chosen[:shots], chosen[shots:]) if place < shots else (chosen[shots:], chosen[:shots])
            chosen[place] = self._substitute(drawn[place], own, other, lost, mix(key + place))
        return np.array(chosen, dtype=np.int64)

    def _substitute(self, clip: int, own: list[int], other: list[int], lost: Container[int], key: int) -> int:
        members = self._of_class(int(self._class[clip]))
        start = key % len(members)
        forbidden = {self._group[item] for item in other if item >= 0}
        usable = [item for item in (*members[start:], *members[:start]) if item not in lost and self._group[item] not in forbidden]
        return next((item for item in usable if item not in own), next(iter(usable), -1))

    def _of_class(self, number: int) -> list[int]:
        if number not in self._members:
            self._members[number] = np.flatnonzero(self._class == number).tolist()
        return self._members[number]
