"""What the tests of free_energy_loss share: models and inputs, the formulas as plain loops, and comparing with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from amd_fast.active_inference import GenerativeModel
from amd_fast.ops import free_energy_loss
from amd_fast.ops.free_energy import FreeEnergyLoss

INF = math.inf
TERMS = ("total", "task", "distillation", "cross_entropy")
NUMBERS = {"temperature": 2.0, "margin": 0.05, "distillation_weight": 0.7, "cross_entropy_weight": 0.3}
CHANNELS = ("certainty", "surprise", "agreement", "log_evidence")


def make_model(views: int, channels: int = 2, bins: int = 6, precision: float = 3.0, seed: int = 0) -> GenerativeModel:
    """A generative model whose arrays are all random."""
    generator = torch.Generator().manual_seed(seed)

    def columns(shape: tuple[int, ...], dim: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05
        return values / values.sum(dim, keepdim=True)

    model = GenerativeModel(views, CHANNELS[:channels], bins, precision)
    model.likelihood.copy_(columns((views, channels, bins, views), 2))
    model.outcome_likelihood.copy_(columns((2, views, views), 0))
    model.state_prior.copy_(columns((views,), 0))
    model.habit.copy_(columns((views,), 0))
    return model


def make_inputs(
    rows: tuple[int, ...] = (7,), views: int = 3, classes: int = 5, channels: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, targets and context evidence (None for a single channel)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*rows, views, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, rows, generator=generator)
    context = torch.rand(*rows, views, channels - 1, generator=generator, dtype=torch.float64)
    return logits.to(dtype), target, context.to(torch.promote_types(dtype, torch.float32)) if channels > 1 else None


def make_presence(rows: tuple[int, ...], views: int, seed: int = 0) -> Tensor:
    return torch.rand(*rows, views, generator=torch.Generator().manual_seed(seed)) > 0.4


def log_sum_exp(values: list[float]) -> float:
    peak = max(values, default=-INF)
    return peak if peak == -INF else peak + math.log(sum(math.exp(x - peak) for x in values))


def loop_log_posterior(logits: list[float], tau: float) -> list[float]:
    scaled = [z / tau for z in logits]
    return [z - log_sum_exp(scaled) for z in scaled]


def loop_inference(
    log_p: dict[int, list[float]], context: list[list[float]], model: GenerativeModel
) -> tuple[dict[int, float], dict[int, float]]:
    """q(s) and ln pi over the views that are there (the keys of log_p)."""
    likelihood, outcome = model.likelihood.tolist(), model.outcome_likelihood.tolist()
    log_preference, prior, habit = model.log_preference.tolist(), model.state_prior.tolist(), model.habit.tolist()
    channels, bins = len(likelihood[0]), len(likelihood[0][0])
    score = {s: math.log(prior[s]) for s in log_p}
    for v in log_p:
        entropy = -sum(math.exp(x) * x for x in log_p[v] if x > -INF)
        number = sum(x > -INF for x in log_p[v])
        evidence = [1 - entropy / math.log(number) if number > 1 else 1.0, *context[v]]
        for k in range(channels):
            position = min(max(evidence[k], 0.0), 1.0) * (bins - 1)
            for o in range(bins):
                for s in log_p:
                    score[s] += max(0.0, 1 - abs(position - o)) * math.log(likelihood[v][k][o][s])
    state = {s: math.exp(score[s] - log_sum_exp(list(score.values()))) for s in log_p}
    weight = {}
    for u in log_p:
        risk = ambiguity = 0.0
        for o in range(2):
            predicted = sum(state[s] * outcome[o][s][u] for s in log_p)
            risk += predicted * (math.log(predicted) - log_preference[o])
            ambiguity -= sum(state[s] * outcome[o][s][u] * math.log(outcome[o][s][u]) for s in log_p)
        weight[u] = math.log(habit[u]) - float(model.precision) * (risk + ambiguity)
    return state, {u: weight[u] - log_sum_exp(list(weight.values())) for u in log_p}


def loop_row(
    logits: list[list[float]],
    y: int,
    context: list[list[float]],
    present: list[bool],
    model: GenerativeModel,
    temperature: float,
    margin: float,
    distillation_weight: float,
    cross_entropy_weight: float,
) -> dict[str, Any]:
    """Sections 4 and 5 of the design for one query, in Python floats: nothing shared with the code under test."""
    views = range(len(logits))
    there = [v for v in views if present[v] and max(logits[v]) > -INF]
    if not there:
        return {**dict.fromkeys(TERMS, 0.0), "state": [0.0 for _ in views], "policy": [0.0 for _ in views], "group": -1}
    log_p = {v: loop_log_posterior(logits[v], 1.0) for v in there}
    state, log_policy = loop_inference(log_p, context, model)
    policy = [math.exp(log_policy[u]) if u in there else 0.0 for u in views]

    task = -log_sum_exp([log_policy[u] + log_p[u][y] for u in there])
    cross_entropy = -sum(log_p[v][y] for v in there)
    distillation = 0.0
    teachers = [u for u in there if all(policy[u] - policy[w] > margin for w in views if w != u)]
    for u in teachers:
        teacher = loop_log_posterior(logits[u], temperature)
        for v in there:
            student = loop_log_posterior(logits[v], temperature)
            divergence = sum(math.exp(a) * (a - b) for a, b in zip(teacher, student, strict=True) if math.exp(a) > 0)
            distillation += policy[u] * temperature**2 * divergence * (v != u)
    return {
        "total": task + distillation_weight * distillation + cross_entropy_weight * cross_entropy,
        "task": task,
        "distillation": distillation,
        "cross_entropy": cross_entropy,
        "state": [state.get(s, 0.0) for s in views],
        "policy": policy,
        "group": teachers[0] if teachers else -1,
    }


def loop_oracle(
    logits: Tensor, target: Tensor, context: Tensor | None, model: GenerativeModel, present: Tensor | None, **numbers: float
) -> FreeEnergyLoss:
    """loop_row over all rows."""
    settings_ = {"temperature": 1.0, "margin": 0.1, "distillation_weight": 1.0, "cross_entropy_weight": 1.0, **numbers}
    lead, (views, classes) = target.shape, logits.shape[-2:]
    flat = logits.double().reshape(-1, views, classes).tolist()
    contexts = [[[] for _ in range(views)]] * len(flat) if context is None else context.double().reshape(len(flat), views, -1).tolist()
    there = [[True] * views] * len(flat) if present is None else present.reshape(len(flat), views).tolist()
    rows = [loop_row(z, y, c, p, model, **settings_) for z, y, c, p in zip(flat, target.reshape(-1).tolist(), contexts, there, strict=True)]
    dtypes = {name: torch.int64 if name == "group" else torch.float64 for name in FreeEnergyLoss._fields}
    values = [torch.tensor([row[name] for row in rows], dtype=dtype) for name, dtype in dtypes.items()]
    return FreeEnergyLoss(*(value.reshape((*lead, *value.shape[1:])) for value in values))


def assert_same(got: FreeEnergyLoss, want: FreeEnergyLoss, atol: float = 1e-10, rtol: float = 1e-10) -> None:
    for name, have, expected in zip(FreeEnergyLoss._fields, got, want, strict=True):
        torch.testing.assert_close(have, expected, atol=atol, rtol=rtol, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}")


def gradient(term: str, logits: Tensor, *args: Any, function: Any = free_energy_loss, **kwargs: Any) -> Tensor:
    """Gradient of the (unevenly weighted) sum of one term with respect to the logits."""
    leaf = logits.detach().clone().requires_grad_()
    value = getattr(function(leaf, *args, **kwargs), term)
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    (value * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad
