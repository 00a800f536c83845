"""Logistic regression on the support clips of thousands of episodes at once: Newton's method in the span of each support set.

The minimum of ``|W|^2 / 2 + C sum_i -ln softmax(W x_i + b)[y_i]`` has W in the span of the few x_i, so an episode is solved in as many
dimensions as it has support clips, whatever D is, and the Hessian is small enough to be solved exactly. scikit-learn finds the same
minimum one episode at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_STEPS = 40
_TOLERANCE = 1e-7  # largest entry of the gradient; C times the number of clips is its scale
_NUMBERS = 4 << 20  # float64 numbers of a chunk's Hessians


class _Problem(NamedTuple):
    """``points [E, n, n + 1]`` (1 behind the coordinates), ``wanted [n, ways]`` one-hot, and C."""

    points: Tensor
    wanted: Tensor
    strength: float


def logistic_log_probs(
    features: NDArray[np.floating],
    support: NDArray[np.integer],
    query: NDArray[np.integer],
    ways: int,
    *,
    strength: float = 10.0,
) -> NDArray[np.floating]:
    """Log-probabilities ``[E, Q, ways]`` float32 of the queries, by a logistic regression per episode.

    Args:
        features: ``[clips, D]``, best of unit length.
        support: ``[E, ways * shots]`` rows, class by class.
        query: ``[E, Q]`` rows.
        ways: classes per episode.
        strength: C, the inverse of the regularisation, as in scikit-learn.
    """
    vectors = torch.from_numpy(np.ascontiguousarray(features)).double()
    seen, asked = torch.from_numpy(np.asarray(support)).long(), torch.from_numpy(np.asarray(query)).long()
    number = seen.shape[1]
    wanted = torch.eye(ways, dtype=torch.float64).repeat_interleave(number // ways, 0)
    # Of two classes scikit-learn fits one weight vector, the difference of ours, and so regularises half as strongly.
    strength = strength / 2 if ways == 2 else strength
    chunk = max(1, _NUMBERS // (ways * (number + 1)) ** 2)
    parts = [
        _scores(vectors, seen[first : first + chunk], asked[first : first + chunk], wanted, strength)
        for first in range(0, len(seen), chunk)
    ]
    return torch.cat(parts).float().numpy()


def _scores(vectors: Tensor, seen: Tensor, asked: Tensor, wanted: Tensor, strength: float) -> Tensor:
    examples, queries = vectors[seen], vectors[asked]
    coordinates, project = _span(examples @ examples.mT)
    problem = _Problem(_with_one(coordinates), wanted, strength)
    weights = _minimum(problem)
    return torch.log_softmax(_with_one(queries @ examples.mT @ project) @ weights.mT, -1)


def _span(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates ``[E, n, n]`` of the examples in an orthonormal basis of their span, and the map from products with them to these."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[:, -1:].clamp(min=1e-300)
    root = torch.where(kept, values, 1.0).sqrt()[:, None]
    inside = kept[:, None]
    return torch.where(inside, vectors * root, 0.0), torch.where(inside, vectors / root, 0.0)


def _with_one(points: Tensor) -> Tensor:
    return torch.cat([points, torch.ones_like(points[..., :1])], -1)


def _minimum(problem: _Problem) -> Tensor:
    """``[E, ways, n + 1]`` weights and intercepts: Newton steps, halved where they overshoot."""
    episodes, _, width = problem.points.shape
    ways = problem.wanted.shape[1]
    weights = problem.points.new_zeros(episodes, ways, width)
    for _ in range(_STEPS):
        slope, probability = _gradient(problem, weights)
        if slope.abs().max() < _TOLERANCE:
            break
        step = torch.linalg.solve(_hessian(problem, probability), slope.flatten(1)[..., None])[..., 0].view_as(slope)
        weights = _best_of(problem, weights, step)
    return weights


def _best_of(problem: _Problem, weights: Tensor, step: Tensor) -> Tensor:
    """The lowest of a full, half, quarter ... step, and none, for every episode."""
    lengths = (0.0, 1.0, 0.5, 0.25, 0.125, 1 / 64)
    values = torch.stack([_objective(problem, weights - length * step) for length in lengths])
    best = torch.tensor(lengths, dtype=weights.dtype)[values.argmin(0)]
    return weights - best[:, None, None] * step


def _objective(problem: _Problem, weights: Tensor) -> Tensor:
    fit = (torch.log_softmax(problem.points @ weights.mT, -1) * problem.wanted).sum((-1, -2))
    return weights[..., :-1].square().sum((-1, -2)) / 2 + weights[..., -1].sum(-1).square() / 2 - problem.strength * fit


def _gradient(problem: _Problem, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient ``[E, ways, n + 1]`` and the probabilities ``[E, n, ways]`` it came from.

    The sum of the intercepts changes no probability; half its square is added to the objective so that the minimum is one point.
    """
    probability = torch.softmax(problem.points @ weights.mT, -1)
    slope = problem.strength * (probability - problem.wanted).mT @ problem.points
    slope[..., :-1] += weights[..., :-1]
    slope[..., -1] += weights[..., -1].sum(-1, keepdim=True)
    return slope, probability


def _hessian(problem: _Problem, probability: Tensor) -> Tensor:
    """``[E, ways * (n + 1), ways * (n + 1)]``."""
    points = problem.points
    episodes, _, width = points.shape
    ways = probability.shape[-1]
    spread = torch.diag_embed(probability) - probability[..., :, None] * probability[..., None, :]  # [E, n, ways, ways]
    outer = (points[..., :, None] * points[..., None, :]).flatten(2)  # [E, n, width * width]
    blocks = problem.strength * spread.flatten(2).mT @ outer
    hessian = blocks.view(episodes, ways, ways, width, width).transpose(2, 3).reshape(episodes, ways * width, ways * width)
    own = torch.ones(ways, width, dtype=points.dtype)
    own[:, -1] = 0.0
    intercept = 1.0 - own.flatten()
    return hessian + torch.diag(own.flatten()) + intercept[:, None] * intercept
