"""Motion programs: an action of a figure or a shape, how it is seen, and which way time runs.

Any program can be played backwards: its frames are then the same set, in reverse order, so only motion tells the two apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from amd_fast.data.synth.figures import FIGURES


@dataclass(frozen=True)
class Program:
    """A named motion.

    Attributes:
        action: key of ``FIGURES`` or ``SHAPES``.
        view: ``side`` or ``above`` for figures, empty for shapes.
        backwards: frames in reverse order.
    """

    action: str
    view: str = ""
    backwards: bool = False

    @property
    def is_figure(self) -> bool:
        """Whether a jointed figure performs it."""
        return self.action in FIGURES

    @property
    def name(self) -> str:
        """For example ``sit_down_side_reversed``."""
        return "_".join(part for part in (self.action, self.view, "reversed" if self.backwards else "") if part)

    @property
    def reverse(self) -> Program:
        """The same motion with time running the other way."""
        return Program(self.action, self.view, not self.backwards)
