"""Time courses shared by figures and shapes."""

from __future__ import annotations

import numpy as np


def smoothstep(values: np.ndarray) -> np.ndarray:
    """``3 v^2 - 2 v^3`` of the values limited to [0, 1]: starts and ends at rest."""
    values = np.clip(values, 0.0, 1.0)
    return values * values * (3.0 - 2.0 * values)


def action_progress(frames: int, rng: np.random.Generator) -> np.ndarray:
    """How far a one-off action has come, per frame ``[T]`` in [0, 1].

    The action takes 55 to 100 % of the clip, starts anywhere that lets it finish, and eases in and out. Played backwards the
    distribution is the same, so that rests give no hint of the direction of time.
    """
    share = rng.uniform(0.55, 1.0)
    begin = rng.uniform(0.0, 1.0 - share)
    linear = np.clip((np.linspace(0.0, 1.0, frames) - begin) / share, 0.0, 1.0)
    return 0.5 * linear + 0.5 * smoothstep(linear)
