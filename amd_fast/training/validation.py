"""Validation in training: clips encoded in shares by all ranks, the agent calibrated on all of their episodes, scored once."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol import Condition, Features, calibrate, calibration_condition, evaluate_condition
from amd_fast.models.afmir import AFMIR
from amd_fast.training.distributed import World


class Validated(NamedTuple):
    """Accuracy by method (single views, ``uniform``, ``ami``) and the fitted precision; the same on every rank."""

    accuracy: dict[str, float]
    precision: float


def share_of(number: int, world: World) -> slice:
    """This rank's adjoining part of ``number`` things; all ranks' parts together are everything, in order."""
    return slice(number * world.rank // world.size, number * (world.rank + 1) // world.size)


def clips_of_rank(manifest: Manifest, world: World) -> Manifest:
    """The clips that this rank encodes."""
    return Manifest(manifest.table.iloc[share_of(len(manifest), world)], manifest.root)


def build_bank(model: AFMIR, clips: Manifest, loader: ClipLoader, world: World) -> FeatureBank:
    """Every rank encodes its own clips (:func:`clips_of_rank`); every rank gets the bank of all."""
    own = FeatureBank.build(model, clips, loader=loader, progress=False) if len(clips) else None
    if world.size == 1 and own is not None:
        return own
    banks = [bank for bank in world.gather(own) if bank is not None]
    return FeatureBank(
        np.concatenate([bank.tokens for bank in banks]),
        np.concatenate([bank.log_weight for bank in banks]),
        pd.concat([bank.table for bank in banks], ignore_index=True),
        {"clips_lost": sum(bank.meta.get("clips_lost", 0) for bank in banks)},
    )


def validate(model: AFMIR, bank: FeatureBank, condition: Condition, world: World) -> Validated:
    """Calibrates the agent on as many episodes as are scored, and scores others; both on validation classes alone.

    Every rank learns from its share of the episodes; counts are summed over the ranks and the precision is fitted to all episodes,
    so all ranks end with the same agent.
    """
    condition = calibration_condition(bank, condition)
    features = Features.of(model, bank)
    part = share_of(condition.episodes, world)
    learning = replace(condition, episodes=part.stop - part.start)
    precision = calibrate(model, features, learning, start=condition.episodes + part.start)

    def scored() -> dict[str, float]:
        scores = evaluate_condition(model, features, condition)
        return {name: float((value.argmax(-1) == scores.target).mean()) for name, value in scores.log_probs.items()}

    return Validated(world.on_first(scored), precision)


def copy_agent(source: AFMIR, target: nn.Module) -> None:
    """Takes over what the agent of a model learned."""
    target.load_state_dict(source.generative_model.state_dict())
