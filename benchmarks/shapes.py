"""The named shapes at which the ops are measured, checked and tuned: one registry for benchmarks, tests and tuning.

Each shape knows the fewest bytes that its op must move: every tensor of the op's contract read or written once. What an
implementation saves between the passes, or recomputes, is its own affair and does not count.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from amd_fast.errors import ConfigError

Direction = Literal["forward", "backward", "both"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")

_FLOAT32 = 4
_INT64 = 8


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """A batch for ``cross_modal_attention`` as the model calls it: a query per view, a token per frame (or patch) and modality.

    Attributes:
        name: Its name in tables.
        batch: Videos B.
        modalities: Modalities M.
        frames: Tokens per modality.
        heads: Heads H.
        width: Width of a head d.
    """

    name: str
    batch: int
    modalities: int = 2
    frames: int = 8
    heads: int = 8
    width: int = 64

    op = "cross_modal_attention"

    @property
    def rows(self) -> int:
        """Queries R: every modality's own and, where there are several modalities, the joint one."""
        return self.modalities + 1 if self.modalities > 1 else 1

    @property
    def tokens(self) -> int:
        """Tokens N."""
        return self.modalities * self.frames

    @property
    def sizes(self) -> str:
        """The sizes for tables."""
        return f"B={self.batch} R={self.rows} N={self.tokens} H={self.heads} d={self.width}"

    @property
    def elements(self) -> int:
        """Elements of the keys, the largest input."""
        return self.batch * self.tokens * self.heads * self.width

    def capped(self, elements: int) -> AttentionShape:
        """The same shape with fewer videos, so that the keys have at most this many elements (one video at least)."""
        return dataclasses.replace(self, batch=max(1, min(self.batch, elements * self.batch // self.elements)))

    def traffic(self, direction: Direction, item_size: int) -> int:
        """Fewest bytes: q, k, v, log-weights in, output and evidence out; backward, the gradients besides."""
        pairs = self.batch * self.heads
        query, key = pairs * self.rows * self.width * item_size, pairs * self.tokens * self.width * item_size
        weight, evidence = self.batch * self.rows * self.tokens * _FLOAT32, pairs * self.rows * _FLOAT32
        forward = query + 2 * key + weight + query + evidence
        backward = (query + 2 * key + weight + evidence) + query + (query + 2 * key)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


@dataclasses.dataclass(frozen=True)
class LossShape:
    """A batch for ``free_energy_loss``.

    Attributes:
        name: Its name in tables.
        batch: Queries (rows of the loss).
        views: Views V.
        classes: Classes C.
        channels: Channels of evidence K.
        bins: Observation bins O.
    """

    name: str
    batch: int
    views: int = 3
    classes: int = 5
    channels: int = 2
    bins: int = 8

    op = "free_energy_loss"

    @property
    def sizes(self) -> str:
        """The sizes for tables."""
        return f"rows={self.batch} V={self.views} C={self.classes}"

    @property
    def elements(self) -> int:
        """Elements of the logits, the largest input."""
        return self.batch * self.views * self.classes

    def capped(self, elements: int) -> LossShape:
        """The same shape with fewer queries, so that the logits have at most this many elements (one query at least)."""
        return dataclasses.replace(self, batch=max(1, min(self.batch, elements * self.batch // self.elements)))

    def traffic(self, direction: Direction, item_size: int) -> int:
        """Fewest bytes: all inputs in, seven terms out; backward, logits, labels, gradient, policy and teacher in, gradient out."""
        logits = self.elements * item_size
        per_view = self.batch * self.views
        context = per_view * (self.channels - 1) * _FLOAT32
        forward = logits + self.batch * _INT64 + context + per_view + self.batch * (4 * _FLOAT32 + _INT64) + 2 * per_view * _FLOAT32
        backward = logits + self.batch * (_FLOAT32 + 2 * _INT64) + per_view + per_view * _FLOAT32 + logits
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


Shape = AttentionShape | LossShape

# In order of importance, those that a figure has been promised for first: what a budget of time cuts off is at the end.
ATTENTION = (
    AttentionShape("feature-bank", 65536),
    AttentionShape("spatial-tokens", 256, frames=8 * 49),  # 7 x 7 patches of 8 frames
    AttentionShape("episode", 75),  # 5 classes, 5 examples and 10 queries each
    AttentionShape("half-bank", 32768),  # several peers take fewer than 65536 videos at once
    AttentionShape("many-modalities", 4096, modalities=8),
    AttentionShape("batched-training", 1200),  # 16 such episodes
    AttentionShape("long-clips", 8192, frames=32),
    AttentionShape("one-modality", 16384, modalities=1),
    AttentionShape("wide-heads", 16384, heads=4, width=128),
    AttentionShape("narrow-heads", 16384, heads=8, width=32),
    AttentionShape("dense-spatial-tokens", 32, frames=8 * 196),  # 14 x 14 patches
)
LOSS = (
    LossShape("feature-bank", 1 << 20),
    LossShape("two-views", 1 << 18, views=2, classes=64),  # where another library's divergence is the same term
    LossShape("episode", 50),
    LossShape("batched-training", 1024),
    LossShape("twenty-ways", 1 << 18, classes=20),
    LossShape("base-classes", 1 << 16, classes=64),
    LossShape("many-classes", 1 << 14, classes=1024),
    LossShape("many-views", 1 << 18, views=9),
    LossShape("one-view", 1 << 20, views=1),
    LossShape("many-views-and-classes", 1 << 14, views=9, classes=64),
)
SHAPES: dict[str, tuple[Shape, ...]] = {AttentionShape.op: ATTENTION, LossShape.op: LOSS}


def select(ops: list[str] | None = None, names: list[str] | None = None) -> list[Shape]:
    """The shapes of these ops with these names (None: all), the most important of each op first, the ops in turn.

    Raises:
        ConfigError: There is no such op, or no shape of that name in any of them.
    """
    for op in ops or ():
        if op not in SHAPES:
            raise ConfigError(f"op: got {op!r}, expected any of {', '.join(SHAPES)}; leave it out for all of them")
    chosen = [SHAPES[op] for op in ops or SHAPES]
    known = {shape.name for shapes in chosen for shape in shapes}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"shapes: got {name!r}, expected any of {', '.join(sorted(known))}; leave it out for all of them")
    longest = max(map(len, chosen))
    in_turn = [shapes[place] for place in range(longest) for shapes in chosen if place < len(shapes)]
    return [shape for shape in in_turn if names is None or shape.name in names]
