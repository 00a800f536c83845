"""The optimiser and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from amd_fast.training.config import OptimiserOptions


def make_optimiser(module: nn.Module, options: OptimiserOptions) -> torch.optim.AdamW:
    """AdamW, its step one fused kernel for many parameters at once."""
    return torch.optim.AdamW(parameter_groups(module, options.weight_decay), lr=options.learning_rate, fused=True)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and convolutions, none for biases, norms, temperatures and embeddings."""
    decay = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    rest = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then half a cosine down to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def set_learning_rate(optimiser: torch.optim.Optimizer, options: OptimiserOptions, step: int) -> None:
    """Sets the learning rate of a step (0-based)."""
    factor = learning_rate_factor(step, options.warmup_steps, options.steps)
    for group in optimiser.param_groups:
        group["lr"] = options.learning_rate * factor
