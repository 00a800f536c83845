"""Episodes one at a time, as few-shot code is usually written: a loop over episodes, in it one over views, in it one over classes.

Every function takes the features of one episode's clips and returns a :class:`~amd_fast.models.matchers.Match` with E = 1. They are
written for this benchmark from the papers, with the layout that published implementations share; they share nothing with the library
but parameters and the cosine of class means that the spread of an episode is read from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from amd_fast.models.matchers import Match, Matcher
from amd_fast.models.matchers.frames import OTAMMatcher
from amd_fast.models.matchers.tuples import TupleMatcher

Views = list[tuple[int, ...]]
"""The modalities of every view."""


def loop_of(matcher: Matcher, name: str) -> Callable[..., Match]:
    """The loop of a matcher: ``(support, query, labels, ways) -> Match``; descriptors ``[clips, V, D]`` or tokens ``[clips, M, T, D]``."""
    if name in ("prototype", "cosine"):
        return lambda *episode: _prototypes(matcher, name == "cosine", *episode)
    if isinstance(matcher, TupleMatcher):
        return lambda *episode: _trx(matcher, *episode)
    return lambda *episode: _frames(matcher, *episode)


def _prototypes(matcher: Matcher, cosine: bool, support: Tensor, query: Tensor, labels: Tensor, ways: int) -> Match:
    logits: list[Tensor] = []
    distances: list[Tensor] = []
    spreads: list[Tensor] = []
    for view in range(support.shape[1]):
        seen, asked = support[:, view], query[:, view]
        if cosine:
            seen, asked = F.normalize(seen, dim=-1), F.normalize(asked, dim=-1)
        prototypes = torch.stack([seen[labels == c].mean(0) for c in range(ways)])
        if cosine:
            prototypes = F.normalize(prototypes, dim=-1)
        squared = (asked[:, None] - prototypes[None]).square().sum(-1)
        between = (prototypes[:, None] - prototypes[None]).square().sum(-1).sqrt()
        logits.append(-squared / matcher.log_temperature[view].exp())
        distances.append(squared.sqrt())
        spreads.append(between.sum() / (ways * (ways - 1)))
    return _match(logits, distances, spreads)


def _views(matcher: Matcher, modalities: int) -> Views:
    return [(m,) for m in range(modalities)] + ([tuple(range(modalities))] if matcher.num_views > modalities else [])


def _frames(matcher: Matcher, support: Tensor, query: Tensor, labels: Tensor, ways: int) -> Match:
    frames = support.shape[2]
    smoothing = matcher.smoothing if isinstance(matcher, OTAMMatcher) else None
    logits: list[Tensor] = []
    distances: list[Tensor] = []
    spreads: list[Tensor] = []
    for view in _views(matcher, support.shape[1]):
        similarity = []
        for m in view:
            seen, asked = F.normalize(support[:, m], dim=-1), F.normalize(query[:, m], dim=-1)
            if smoothing is None:
                seen = F.normalize(torch.stack([seen[labels == c].mean(0) for c in range(ways)]), dim=-1)
            similarity.append(asked.flatten(0, 1) @ seen.flatten(0, 1).T)
        distance = 1 - torch.stack(similarity).mean(0)
        pairs = distance.view(len(query), frames, -1, frames).permute(0, 2, 1, 3)
        if smoothing is not None:
            cost = (_otam(pairs, smoothing) + _otam(pairs.transpose(2, 3), smoothing)) / 2
            by_class = torch.stack([cost[:, labels == c].mean(1) for c in range(ways)], 1)
        else:
            by_class = pairs.min(3)[0].mean(2) + pairs.min(2)[0].mean(2)
        distances.append(by_class)
        logits.append(-by_class / matcher.log_temperature[len(logits)].exp())
        spreads.append(_spread_of_frames(support, view, labels, ways))
    return _match(logits, distances, spreads)


def _spread_of_frames(support: Tensor, view: tuple[int, ...], labels: Tensor, ways: int) -> Tensor:
    spreads = []
    for m in view:
        mean = F.normalize(support[:, m], dim=-1).mean(1)
        classes = F.normalize(torch.stack([mean[labels == c].mean(0) for c in range(ways)]), dim=-1)
        spreads.append((1 - classes @ classes.T).fill_diagonal_(0.0).sum() / (ways * (ways - 1)))
    return torch.stack(spreads).mean()


def _otam(distance: Tensor, smoothing: float) -> Tensor:
    """Cost per frame from the cost at zero distances, cell by cell over all pairs of an episode."""

    def cumulative(values: Tensor) -> Tensor:
        padded = F.pad(values, (1, 1))
        rows, last = padded.shape[2], padded.shape[3] - 1
        total = torch.zeros_like(padded)
        for m in range(1, last + 1):
            total[:, :, 0, m] = padded[:, :, 0, m] + total[:, :, 0, m - 1]
        for row in range(1, rows):
            for m in range(1, last + 1):
                before = [total[:, :, row - 1, m - 1], total[:, :, row, m - 1]]
                if m in (1, last):
                    before.append(total[:, :, row - 1, m])
                exponentials = torch.stack([torch.exp(-value / smoothing) for value in before]).sum(0)
                total[:, :, row, m] = padded[:, :, row, m] - smoothing * torch.log(exponentials)
        return total[:, :, -1, -1]

    return (cumulative(distance) - cumulative(torch.zeros_like(distance[:1, :1]))) / distance.shape[3]


def _trx(matcher: TupleMatcher, support: Tensor, query: Tensor, labels: Tensor, ways: int) -> Match:
    frames, dim = support.shape[2:]
    position = torch.arange(frames)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    encoding = 0.1 * torch.stack([position.sin(), position.cos()], -1).flatten(1)[:, :dim]
    tuples = [torch.tensor(chosen) for chosen in itertools.combinations(range(frames), matcher.tuple_size)]
    keys, values = [], []
    for m in range(support.shape[1]):
        key_map, value_map = (torch.cat(list(weight[m]), 1) for weight in (matcher.key, matcher.value))
        both = []
        for clips in (support[:, m] + encoding, query[:, m] + encoding):
            joined = torch.stack([clips.index_select(1, chosen).flatten(1) for chosen in tuples], 1)
            key = F.linear(joined, key_map, matcher.key_bias[m])
            both.append((F.layer_norm(key, key.shape[-1:], matcher.norm_weight[m], matcher.norm_bias[m]), F.linear(joined, value_map)))
        keys.append((both[0][0], both[1][0]))
        values.append((both[0][1], both[1][1]))
    logits: list[Tensor] = []
    distances: list[Tensor] = []
    spreads: list[Tensor] = []
    for view in _views(matcher, support.shape[1]):
        columns = []
        for c in range(ways):
            scores = []
            for m in view:
                class_key = keys[m][0][labels == c].flatten(0, 1)
                scores.append(keys[m][1] @ class_key.T / math.sqrt(matcher.width))
            weights = torch.softmax(torch.stack(scores).mean(0), -1)
            apart = [(values[m][1] - weights @ values[m][0][labels == c].flatten(0, 1)).square().sum(-1).mean(1) for m in view]
            columns.append(torch.stack(apart).mean(0))
        squared = torch.stack(columns, 1)
        logits.append(-squared / matcher.log_temperature[len(logits)].exp())
        distances.append(squared.sqrt())
        spreads.append(_spread_of_values([values[m][0] for m in view], labels, ways))
    return _match(logits, distances, spreads)


def _spread_of_values(values: list[Tensor], labels: Tensor, ways: int) -> Tensor:
    spreads = []
    for value in values:
        classes = torch.stack([value.mean(1)[labels == c].mean(0) for c in range(ways)])
        spreads.append((classes[:, None] - classes[None]).square().sum(-1).sqrt().sum() / (ways * (ways - 1)))
    return torch.stack(spreads).mean()


def _match(logits: list[Tensor], distances: list[Tensor], spreads: list[Tensor]) -> Match:
    scores = torch.stack(logits, 1)[None]
    return Match(scores, torch.stack(distances, 1)[None], torch.stack(spreads)[None], torch.ones(scores.shape[:3], dtype=torch.bool))
