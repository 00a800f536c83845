"""The episodic protocol on a feature bank: draw episodes, calibrate on validation classes, score all views and fusions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from amd_fast.active_inference import fuse
from amd_fast.data.episodes import EpisodeSampler
from amd_fast.errors import EpisodeError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol_file import EpisodeList
from amd_fast.evaluation.result import EvaluationResult
from amd_fast.evaluation.scores import ConditionScores
from amd_fast.evaluation.scoring import matches
from amd_fast.models.afmir import AFMIR, EpisodeOutput
from amd_fast.models.matchers import Clips, Match

QueryClips = Literal["all", "clean", "damaged", "mixed"]
QUERY_CLIPS: tuple[str, ...] = get_args(QueryClips)
_READ, _JUDGED = 256, 4096  # clips prepared, and episodes judged, together


@dataclass(frozen=True)
class Condition:
    """One way of asking: episode shape and which clips the queries are drawn from.

    Attributes:
        queries: per class.
        query_clips: ``"all"``: support and queries alike come from all clips. Where the manifest knows of damage, support clips are
            clean and the queries ``"clean"``, ``"damaged"``, or ``"mixed"`` (any clip).
        listed: the episodes themselves, in place of drawing them; the other attributes describe them then.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 1
    episodes: int = 10_000
    seed: int = 0
    query_clips: QueryClips = "all"
    listed: EpisodeList | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, listed: EpisodeList) -> Condition:
        """The condition that a list of episodes stands for."""
        kind: QueryClips = listed.query_clips  # type: ignore[assignment]
        return cls(listed.ways, listed.shots, listed.queries, len(listed), listed.seed, kind, listed)

    @property
    def name(self) -> str:
        """For tables: ``damaged, 1-shot``."""
        return f"{self.query_clips}, {self.shots}-shot"


class Features(NamedTuple):
    """A bank and its clips as one model's matcher reads them."""

    bank: FeatureBank
    clips: Clips

    @classmethod
    def of(cls, model: AFMIR, bank: FeatureBank) -> Features:
        """Every clip of a bank, prepared.

        Raises:
            DataError: the bank was made by another model.
        """
        bank.check(model)
        model.eval()
        with torch.inference_mode():
            parts = [model.read(*batch) for batch in bank.token_batches(_READ, next(model.parameters()).device)]
            return cls(bank, model.matcher.settle(Clips.cat(parts)))


class Draw(NamedTuple):
    """Episodes as rows of a bank: ``support [E, ways * shots]``, ``query [E, ways * queries]`` and their classes within the episode."""

    support: np.ndarray
    query: np.ndarray
    support_label: np.ndarray
    query_label: np.ndarray


class Scored(NamedTuple):
    """What the model says of every query of every episode; see :class:`~amd_fast.models.afmir.EpisodeOutput`."""

    output: EpisodeOutput
    target: Tensor


def has_damage(bank: FeatureBank) -> bool:
    """Whether the manifest tells damaged clips from clean ones, and holds both."""
    return "damage" in bank.table and 0 < int((bank.table["damage"] != "").sum()) < len(bank)


def sampler(bank: FeatureBank, condition: Condition) -> EpisodeSampler:
    """The episode sampler of a condition. Classes are numbered as they first occur: what they are called decides nothing."""
    support_pool = query_pool = None
    if condition.query_clips != "all":
        if not has_damage(bank):
            raise EpisodeError(f"query_clips={condition.query_clips!r} needs a manifest with clean and damaged clips (column 'damage')")
        clean = (bank.table["damage"] == "").to_numpy()
        support_pool, query_pool = clean, {"clean": clean, "damaged": ~clean, "mixed": None}[condition.query_clips]
    shape: dict[str, Any] = {"ways": condition.ways, "shots": condition.shots, "queries": condition.queries, "seed": condition.seed}
    clips: dict[str, Any] = {"groups": bank.groups, "support_pool": support_pool, "query_pool": query_pool}
    try:
        return EpisodeSampler(pd.factorize(bank.labels)[0], **shape, **clips)
    except EpisodeError:
        EpisodeSampler(bank.labels, **shape, **clips)  # says the same of classes by their names
        raise


def draw(bank: FeatureBank, condition: Condition, start: int = 0) -> Draw:
    """Draws ``condition.episodes`` episodes, numbered from ``start``, or finds those that the condition lists."""
    if condition.listed is not None:
        support, query = condition.listed.rows(bank.table, bank.meta.get("lost"))
    else:
        support, query = sampler(bank, condition).batch(start, condition.episodes)
    classes = np.arange(condition.ways)
    return Draw(support, query, np.repeat(classes, condition.shots), np.repeat(classes, condition.queries))


def list_episodes(bank: FeatureBank, condition: Condition) -> EpisodeList:
    """The episodes of a condition, clip by clip."""
    support, query, _, _ = draw(bank, condition)
    return EpisodeList.of(bank.table, support, query, condition.ways, condition.seed, condition.query_clips)


def score(model: AFMIR, features: Features, drawn: Draw, ways: int, *, chunk: int | None = None) -> Iterator[Scored]:
    """Scores drawn episodes, see :mod:`amd_fast.evaluation.scoring`; ``chunk`` takes the place of the planned number of episodes."""
    device = features.clips.present.device
    support, query = (torch.from_numpy(side).to(device) for side in (drawn.support, drawn.query))
    target = torch.from_numpy(drawn.query_label).to(device)
    parts = list(matches(model.matcher, features.clips, support, query, ways, chunk=chunk))
    with torch.inference_mode():
        whole = [torch.cat(field) for field in zip(*parts, strict=True)]
        for part in zip(*(field.split(_JUDGED) for field in whole), strict=True):
            yield Scored(model.judge(Match(*part)), target.expand(len(part[0]), -1))


def calibration_condition(bank: FeatureBank, condition: Condition) -> Condition:
    """The same episode shape on another bank: no more ways than it has classes, queries of every kind it has."""
    ways = min(condition.ways, len(np.unique(bank.labels)))
    return replace(condition, ways=ways, query_clips="mixed" if has_damage(bank) else "all", listed=None)


def test_conditions(bank: FeatureBank, condition: Condition) -> list[Condition]:
    """Clean and damaged queries apart where the manifest tells them apart, else all clips alike; listed episodes as they are."""
    if condition.listed is not None:
        return [condition]
    kinds: tuple[QueryClips, ...] = ("clean", "damaged") if has_damage(bank) else ("all",)
    return [replace(condition, query_clips=kind) for kind in kinds]


def calibrate(model: AFMIR, features: Features, condition: Condition, *, start: int = 0) -> float:
    """Calibrates the model on a condition's episodes, see :meth:`AFMIR.calibrate`; returns the fitted precision."""
    parts = list(score(model, features, draw(features.bank, condition, start), condition.ways))
    return model.calibrate([part.output for part in parts], [part.target for part in parts])


def methods_of(model: AFMIR, output: EpisodeOutput) -> dict[str, Tensor]:
    """Log-posteriors ``[E, Q, ways]`` of every single view, of uniform fusion, and of adaptive multimodal inference."""
    methods = {name: output.view_log_probs[:, :, number] for number, name in enumerate(model.views)}
    share = output.present.to(output.log_probs.dtype)
    methods["uniform"] = fuse(output.view_log_probs, share / share.sum(-1, keepdim=True).clamp(min=1))
    methods["ami"] = output.log_probs
    return methods


@contextmanager
def restored(model: AFMIR) -> Iterator[None]:
    """Gives the generative model back as it was: calibrating for a test does not change the model."""
    state = {name: value.clone() for name, value in model.generative_model.state_dict().items()}
    try:
        yield
    finally:
        model.generative_model.load_state_dict(state)


def evaluate_condition(model: AFMIR, features: Features, condition: Condition) -> ConditionScores:
    """Scores one condition with the generative model as it stands."""
    bank = features.bank
    drawn = draw(bank, condition)
    outputs = [part.output for part in score(model, features, drawn, condition.ways)]
    methods = [methods_of(model, output) for output in outputs]
    classes, code = np.unique(bank.labels, return_inverse=True)
    known = has_damage(bank)
    listed = EpisodeList.of(bank.table, drawn.support, drawn.query, condition.ways)
    return ConditionScores(
        name=condition.name if known else f"{condition.shots}-shot",
        ways=condition.ways,
        shots=condition.shots,
        queries=condition.queries,
        seed=condition.seed,
        classes=classes.tolist(),
        episode_classes=code[drawn.support[:, :: condition.shots]],
        query_id=drawn.query,
        target=np.broadcast_to(drawn.query_label, drawn.query.shape),
        log_probs={name: torch.cat([method[name] for method in methods]).float().cpu().numpy() for name in methods[0]},
        policy=torch.cat([output.beliefs.policy for output in outputs]).float().cpu().numpy(),
        views=model.views,
        support_id=drawn.support,
        protocol=listed.hash,
        episode_keys=listed.keys(),
        present=torch.cat([output.present for output in outputs]).cpu().numpy(),
        damage=bank.table["damage"].to_numpy(str)[drawn.query] if known else None,
        damaged_modality=bank.table["damaged_modality"].to_numpy(str)[drawn.query] if known else None,
    )


def evaluate(
    model: AFMIR,
    bank: FeatureBank,
    *,
    ways: int = 5,
    shots: int | tuple[int, ...] = 1,
    queries: int = 1,
    episodes: int = 10_000,
    seed: int = 0,
    calibration: FeatureBank | None = None,
    calibration_episodes: int = 1000,
    listed: Sequence[EpisodeList] = (),
) -> EvaluationResult:
    """Evaluates a model on the classes of a bank.

    Args:
        model: left as it is.
        bank: clips of the novel classes. Where its manifest marks damaged clips, clean and damaged queries are conditions of their own.
        ways, shots, queries: shape of the episodes; several numbers of shots give several conditions. ``queries`` is per class.
        episodes: per condition.
        seed: of the episodes.
        calibration: clips of the validation classes; the generative model is calibrated on them anew for each number of shots.
            None: it is used as it was saved with the model.
        calibration_episodes: episodes drawn for that.
        listed: lists of episodes to score, each a condition of its own, in place of those that ``ways`` to ``seed`` describe.

    Raises:
        EpisodeError: the bank, or the calibration clips, cannot give such episodes.
        DataError: the bank was made by another model, or lacks listed clips.
    """
    features = Features.of(model, bank)
    learning = None if calibration is None else Features.of(model, calibration)
    counts = (shots,) if isinstance(shots, int) else shots
    asked = [Condition.of(each) for each in listed] or [Condition(ways, count, queries, episodes, seed) for count in counts]
    scores, precisions = [], {}
    for condition in asked:
        with restored(model):
            if learning is not None:
                precisions[condition.shots] = _calibrate_apart(model, learning, condition, calibration_episodes)
            scores += [evaluate_condition(model, features, each) for each in test_conditions(bank, condition)]
    return EvaluationResult(scores, {"precision": precisions, "clips": len(bank), "clips_lost": bank.meta.get("clips_lost", 0)})


def _calibrate_apart(model: AFMIR, learning: Features, condition: Condition, episodes: int) -> float:
    """Calibrates for a condition, on episodes of another seed."""
    wanted = replace(condition, episodes=episodes, seed=condition.seed + 1)
    try:
        return calibrate(model, learning, calibration_condition(learning.bank, wanted))
    except EpisodeError as error:
        clean = " (their support is drawn from the clean clips alone)" if has_damage(learning.bank) else ""
        raise EpisodeError(
            f"the calibration split ({len(learning.bank)} clips) cannot calibrate the trust for {condition.shots} shots{clean}: "
            f"{error}. Or give --calibration-split (calibration=) other classes, or none"
        ) from error
