"""The measurement: features, the gate, the clock."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import amd_fast
from amd_fast.evaluation import scoring
from amd_fast.evaluation.protocol import Draw, Features, score
from amd_fast.models.matchers import Clips, Match
from amd_fast.models.matchers.products import OF_CLASSES, Pairs, class_views, pair_views

from .loops import loop_of

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}
"""``"processor"``: what this process used, for machines on which other work runs; all its threads are added up."""
TOLERANCE = 1e-5
_PREPARED = 128  # clips prepared together
_FLOOR_ROWS = 4 << 20  # bytes of rows gathered at a time: more would leave the cache


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is scored.

    Attributes:
        classes, clips: of the bank, and per class.
        modalities, frames, dim: M, T and D.
        ways, queries: per episode, and per class.
        episodes: that ours and the floor score.
        loop_episodes: that the loop scores; its time for all of them is extrapolated.
        rounds: in which all three take turns.
    """

    classes: int = 24
    clips: int = 100
    modalities: int = 2
    frames: int = 8
    dim: int = 2048
    ways: int = 5
    queries: int = 1
    episodes: int = 10_000
    loop_episodes: int = 200
    rounds: int = 3


@dataclasses.dataclass
class Result:
    """One matcher at one number of shots; seconds, of the chosen clock, are medians over the rounds, for ``Sizes.episodes`` episodes.

    Attributes:
        matcher, shots: what was measured.
        ours: scores, beliefs and fusion of all episodes, from prepared clips.
        prepare: preparing all clips of the bank, once.
        loop: the loop's time, extrapolated from ``loop_episodes``.
        floor: one gather and one matrix product of the same bytes and operations, in pieces that stay in the cache, or of all
            clips with each other where that is what ours does.
        error: largest difference from the loop's log-posteriors, relative to their size or to 1.
        plan: how ours went about it.
        ranges: least and most seconds of each over the rounds.
    """

    matcher: str
    shots: int
    ours: float
    prepare: float
    loop: float
    floor: float
    error: float
    plan: str
    ranges: dict[str, tuple[float, float]]

    @property
    def ratio(self) -> float:
        """How many times longer the loop takes."""
        return self.loop / self.ours

    @property
    def over_floor(self) -> float:
        """Ours in parts of the floor."""
        return self.ours / self.floor


class WrongResultError(AssertionError):
    """Ours and the loop do not agree: nothing is timed."""


@dataclasses.dataclass
class Case:
    """A bank of random clips and episodes over it; classes differ, so that posteriors are neither flat nor certain."""

    sizes: Sizes
    model: amd_fast.AFMIR
    name: str
    tokens: Tensor
    descriptors: Tensor
    drawn: Draw

    @classmethod
    def make(cls, name: str, shots: int, sizes: Sizes) -> Case:
        """Features are the same for all matchers."""
        torch.manual_seed(0)
        number = sizes.classes * sizes.clips
        modalities = tuple(f"modality{m}" for m in range(sizes.modalities))
        model = amd_fast.create_model("afmir_small", modalities=modalities, dim=sizes.dim, matcher=name).eval()
        shape = (sizes.modalities, sizes.frames, sizes.dim)
        tokens = torch.randn(number, *shape).add_(0.3 * torch.randn(sizes.classes, *shape).repeat_interleave(sizes.clips, 0))
        tokens.div_(tokens.std(-1, keepdim=True))  # as after a layer norm
        own = tokens.mean(2)
        descriptors = own if sizes.modalities == 1 else torch.cat([own, own.mean(1, keepdim=True)], 1)
        return cls(sizes, model, name, tokens, descriptors, _draw(sizes, shots))

    def prepare(self) -> Clips:
        """All clips of the bank, as the matcher reads them."""
        parts = []
        with torch.inference_mode():
            for first in range(0, len(self.tokens), _PREPARED):
                here = slice(first, first + _PREPARED)
                tokens = self.tokens[here]
                present = torch.ones(len(tokens), len(self.model.views), dtype=torch.bool)
                parts.append(self.model.matcher.clips(tokens, torch.zeros(tokens.shape[:3]), self.descriptors[here], present))
            return self.model.matcher.settle(Clips.cat(parts))

    def ours(self, clips: Clips, episodes: int | None = None) -> Tensor:
        """Log-posteriors ``[E, Q, V + 1, ways]`` of every view and of the fusion."""
        drawn = self.drawn._replace(support=self.drawn.support[:episodes], query=self.drawn.query[:episodes])
        features = Features(None, clips)  # type: ignore[arg-type]  # scoring looks at the clips alone
        return torch.cat([_posteriors(part.output) for part in score(self.model, features, drawn, self.sizes.ways)])

    def loop(self, first: int, episodes: int) -> Tensor:
        """The same for some episodes, one at a time."""
        one = loop_of(self.model.matcher, self.name)
        features = self.descriptors if self.model.matcher.reads == "descriptors" else self.tokens
        labels = torch.from_numpy(self.drawn.support_label)
        found = []
        with torch.inference_mode():
            for number in range(first, first + episodes):
                support, query = (torch.from_numpy(side[number]) for side in (self.drawn.support, self.drawn.query))
                match: Match = one(features[support], features[query], labels, self.sizes.ways)
                found.append(_posteriors(self.model.judge(match)))
        return torch.cat(found)

    def plan(self, clips: Clips) -> scoring.Plan:
        """How :meth:`ours` goes about it."""
        distinct = len(np.unique(np.concatenate([self.drawn.support, self.drawn.query], 1)))
        sides = self.drawn.support.shape[1], self.drawn.query.shape[1]
        return scoring.plan(self.model.matcher, clips, len(self.drawn.support), *sides, self.sizes.ways, distinct=distinct)

    def floor(self, clips: Clips, episodes: int | None = None) -> Callable[[], None]:
        """Gathers and matrix products of the plan, for the first episodes or all, and nothing else."""
        support, query = torch.from_numpy(self.drawn.support[:episodes]), torch.from_numpy(self.drawn.query[:episodes])
        index, ways, matcher, planned = torch.cat([support, query], 1), self.sizes.ways, self.model.matcher, self.plan(clips)

        def call() -> None:
            with torch.inference_mode():
                for rows in dict.fromkeys(product.rows for product in matcher.products.values()):
                    wanted = {name: product.pairs for name, product in matcher.products.items() if product.rows == rows}
                    looked_up = [pairs for name, pairs in wanted.items() if name in planned.looked_up]
                    gathered = [pairs for name, pairs in wanted.items() if name not in planned.looked_up]
                    values = clips.rows[rows]
                    for _ in looked_up:
                        table = (values[:, :, 0] @ values[:, :, 0].mT).flatten(1)
                        table.index_select(1, (index[:, :, None] * values.shape[1] + index[:, None]).flatten())
                    of_classes = [pairs for pairs in gathered if pairs in OF_CLASSES]
                    for part in values:
                        if of_classes:
                            _sum_and_multiply(part, support, query, of_classes, ways)
                        elif gathered:
                            _gather_and_multiply(part, index, gathered, support.shape[1], ways)

        return call


def _sum_and_multiply(rows: Tensor, support: Tensor, query: Tensor, wanted: list[Pairs], ways: int) -> None:
    """Products with the sums of the clips of every class; adding up is part of the gather, and where there is one clip nothing but it."""
    flat, shots = rows.flatten(1), support.shape[1] // ways
    query = query if "prototype" in wanted else query[:, :0]
    step = max(1, _FLOOR_ROWS // (4 * (ways + query.shape[1]) * flat.shape[1]))
    memory = _Memory(flat)
    for first in range(0, len(support), step):
        seen, asked = support[first : first + step], query[first : first + step]
        queries = torch.index_select(flat, 0, asked.flatten(), out=memory(asked.numel(), flat.shape[1], "queries"))
        if shots == 1:
            total = torch.index_select(flat, 0, seen.flatten(), out=memory(seen.numel(), flat.shape[1], "support"))
        else:
            total = F.embedding_bag(seen.reshape(-1, shots), flat, mode="sum")
        sides = total.view(len(seen), ways, *rows.shape[1:]), queries.view(*asked.shape, *rows.shape[1:])
        for pairs in wanted:
            left, right = class_views(pairs, *sides)
            torch.bmm(left, right.mT, out=memory(len(left), left.shape[1], right.shape[1], pairs))


class _Memory:
    """Tensors that are used again, by name and shape."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.held: dict[tuple[int | str, ...], Tensor] = {}

    def __call__(self, *key: int | str) -> Tensor:
        if key not in self.held:
            self.held[key] = self.like.new_empty([size for size in key if isinstance(size, int)])
        return self.held[key]


def _gather_and_multiply(rows: Tensor, index: Tensor, wanted: list[Pairs], support: int, ways: int) -> None:
    flat = rows.flatten(1)
    step = max(1, _FLOOR_ROWS // (4 * index.shape[1] * flat.shape[1]))
    memory = _Memory(flat)
    for first in range(0, len(index), step):
        chosen = index[first : first + step]
        gathered = torch.index_select(flat, 0, chosen.flatten(), out=memory(chosen.numel(), flat.shape[1]))
        clips = gathered.view(*chosen.shape, *rows.shape[1:])
        for pairs in wanted:
            left, right = (side.flatten(0, -3) for side in pair_views(pairs, clips, support, ways))
            torch.bmm(left, right.mT, out=memory(len(left), left.shape[1], right.shape[1], pairs))


def measure(name: str, shots: int, sizes: Sizes, clock: Clock = time.perf_counter) -> Result:
    """Times one matcher by a clock, one of ``CLOCKS``.

    Raises:
        WrongResultError: ours and the loop disagree by more than ``TOLERANCE``.
    """
    case = Case.make(name, shots, sizes)
    started = clock()
    clips = case.prepare()
    prepare = clock() - started
    theirs = case.loop(0, sizes.loop_episodes)
    error = float(((case.ours(clips, sizes.loop_episodes) - theirs).abs() / theirs.abs().clamp(min=1)).max())
    if not error <= TOLERANCE:
        raise WrongResultError(f"{name}, {shots}-shot: log-posteriors differ by {error:.1e} from the loop's, more than {TOLERANCE:.0e}")
    floor = case.floor(clips)
    case.floor(clips, sizes.loop_episodes)()  # warm, as ours is by now
    each = max(1, sizes.loop_episodes // sizes.rounds)
    seconds: dict[str, list[float]] = {"ours": [], "floor": [], "loop": []}
    for number in range(sizes.rounds):
        seconds["ours"].append(_timed(clock, lambda: case.ours(clips)))
        seconds["floor"].append(_timed(clock, floor))
        seconds["loop"].append(_timed(clock, lambda number=number: case.loop(number * each, each)) * sizes.episodes / each)  # type: ignore[misc]
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    ranges = {key: (min(values), max(values)) for key, values in seconds.items()}
    planned = case.plan(clips)
    text = f"{'looked up: ' + ', '.join(sorted(planned.looked_up)) if planned.looked_up else 'gathered'}, chunks of {planned.chunk}"
    return Result(name, shots, middle["ours"], prepare, middle["loop"], middle["floor"], error, text, ranges)


def _timed(clock: Clock, call: Callable[[], object]) -> float:
    started = clock()
    call()
    return clock() - started


def _posteriors(output: amd_fast.EpisodeOutput) -> Tensor:
    return torch.cat([output.view_log_probs, output.log_probs[:, :, None]], 2)


def _draw(sizes: Sizes, shots: int) -> Draw:
    """Episodes over clips numbered class by class, each a group of its own."""
    generator = np.random.default_rng(shots)
    classes = generator.random((sizes.episodes, sizes.classes)).argsort(1)[:, : sizes.ways]
    clips = np.stack([_choose(generator, sizes, shots + sizes.queries) for _ in range(sizes.ways)], 1) + classes[..., None] * sizes.clips
    support, query = clips[..., :shots], clips[..., shots:]
    ways = np.arange(sizes.ways)
    episodes = sizes.episodes
    return Draw(support.reshape(episodes, -1), query.reshape(episodes, -1), np.repeat(ways, shots), np.repeat(ways, sizes.queries))


def _choose(generator: np.random.Generator, sizes: Sizes, number: int) -> np.ndarray:
    return generator.random((sizes.episodes, sizes.clips)).argsort(1)[:, :number]


def cases(matchers: list[str], shots: list[int]) -> Iterator[tuple[str, int]]:
    """What is measured, in order."""
    for count in shots:
        for name in matchers:
            yield name, count
