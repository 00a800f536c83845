"""Random scores of an evaluation, shared by the tests of metrics, statistics and report (loaded with runpy: tests are no package)."""

from __future__ import annotations

import numpy as np

from amd_fast.evaluation.scores import ConditionScores


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return (x - np.log(np.exp(x).sum(axis=-1, keepdims=True))).astype(np.float32)


def make_scores(
    episodes: int = 40, ways: int = 4, queries: int = 2, pool: int = 9, views: tuple[str, ...] = ("rgb", "flow", "joint"), seed: int = 0,
    name: str = "clean, 1-shot", damage: bool = True,
) -> ConditionScores:  # fmt: skip
    rng = np.random.default_rng(seed)
    classes = [f"class {i} <&>" for i in range(pool)]
    episode_classes = np.stack([rng.choice(pool, ways, replace=False) for _ in range(episodes)])
    target = np.tile(np.repeat(np.arange(ways), queries), (episodes, 1))
    signal = 1.5 * (target[..., None] == np.arange(ways))
    log_probs = {m: log_softmax(signal + rng.normal(size=(*target.shape, ways))) for m in (*views, "uniform", "ami")}
    kinds = rng.choice(["rgb", "flow", ""], size=target.shape)
    return ConditionScores(
        name=name, ways=ways, shots=1, queries=queries, seed=seed, classes=classes, episode_classes=episode_classes,
        query_id=rng.integers(0, 500, target.shape), target=target, log_probs=log_probs,
        policy=np.exp(log_softmax(rng.normal(size=(*target.shape, len(views))))), views=views,
        damaged_modality=kinds if damage else None, damage=np.where(kinds == "", "", "dark") if damage else None,
    )  # fmt: skip
