"""AFMIR: active inference over the views of a clip, mutual distillation in training, adaptive fusion at test time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amd_fast import ops
from amd_fast.active_inference import Beliefs, GenerativeModel, certainty, fuse
from amd_fast.errors import ConfigError, DataError
from amd_fast.models.backbones import channels_of, create_backbone, frame_features
from amd_fast.models.evidence import CHANNELS, context_evidence
from amd_fast.models.matchers import Clips, Match, create_matcher
from amd_fast.models.matchers.prototype import PrototypeMatcher, class_means
from amd_fast.models.readout import CrossModalReadout, view_names


@dataclass
class LossOptions:
    """Weights and settings of the free-energy distillation loss (`docs/method.md`, section 5)."""

    distillation: float = 1.0
    """Weight of mutual distillation."""
    cross_entropy: float = 1.0
    """Weight of each view's own cross-entropy."""
    temperature: float = 1.0
    """Temperature of teacher and student in distillation."""
    margin: float = 0.1
    """A sample belongs to a view's group where that view's policy exceeds every other by more than this."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"loss.temperature must be positive, got {self.temperature}")
        for name in ("distillation", "cross_entropy", "margin"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} must not be negative, got {getattr(self, name)}")


@dataclass
class EpisodeOutput:
    """What the model says of the queries of E episodes.

    Attributes:
        log_probs: ``[E, Q, ways]`` log-posterior of the fused prediction (AMI).
        view_log_probs: ``[E, Q, V, ways]`` of each view: modalities in order, then joint. Uniform where the view is missing.
        beliefs: state posterior, free energies and policy of every query, ``[E, Q, ...]``.
        loss: mean total loss, or None without query labels.
        terms: the loss terms per query, or None.
        evidence: ``[E, Q, V, K]``, what the beliefs were inferred from.
        present: ``[E, Q, V]`` bool.
    """

    log_probs: Tensor
    view_log_probs: Tensor
    beliefs: Beliefs
    loss: Tensor | None
    terms: Any | None
    evidence: Tensor
    present: Tensor


class AFMIR(nn.Module):
    """Few-shot action recogniser with one backbone per modality.

    Args:
        modalities: names in order, e.g. ``("rgb", "flow")``; M >= 1.
        backbone: name of the backbone, see :mod:`amd_fast.models.backbones`; also ``timm:<name>`` and ``hf:<model id>``.
        dim: token and descriptor width D.
        heads, seeds, joint: of the read-out; without ``joint`` the views are the modalities alone.
        matcher: one of :func:`~amd_fast.list_matchers`; those but ``"prototype"`` and ``"cosine"`` read frame tokens, not descriptors.
        matcher_options: further arguments of the matcher, see :mod:`amd_fast.models.matchers`.
        evidence: evidence channels; the first is always ``"certainty"``.
        num_bins: observation bins O.
        asi: whether trust is inferred; without, all views are trusted alike in training and after it, for ablations.
        pretrained: load ImageNet weights into the backbones.
        channels: input channels of modalities other than rgb (3), flow (2) and one-channel ones.
        backbone_options: passed on to the backbone.
        frames, size: frames per clip and side of the images (pixels) that the model is meant for; what reads clips for it looks here.
        loss: settings of the loss.
        impl: implementation of both ops, ``"auto"``, ``"triton"`` or ``"reference"``.
    """

    def __init__(
        self,
        modalities: tuple[str, ...] = ("rgb", "flow"),
        *,
        backbone: str = "resnet50",
        dim: int = 512,
        heads: int = 8,
        seeds: int = 1,
        joint: bool = True,
        matcher: str = "prototype",
        matcher_options: Mapping[str, Any] | None = None,
        evidence: tuple[str, ...] = ("certainty", "surprise"),
        num_bins: int = 8,
        asi: bool = True,
        pretrained: bool = False,
        channels: Mapping[str, int] | None = None,
        backbone_options: Mapping[str, Any] | None = None,
        frames: int = 8,
        size: int = 224,
        loss: LossOptions | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        modalities, evidence = tuple(modalities), tuple(evidence)
        _check_names(modalities, evidence, dim, heads)
        self.modalities, self.views, self.evidence, self.dim, self.impl = modalities, view_names(modalities, joint), evidence, dim, impl
        self.loss, self.frames, self.size = loss or LossOptions(), frames, size
        widths = {name: (channels or {}).get(name, channels_of(name)) for name in modalities}
        self.channels = widths
        self.backbones = nn.ModuleDict(
            {
                name: create_backbone(backbone, count, pretrained=pretrained, size=size, frames=frames, **(backbone_options or {}))
                for name, count in widths.items()
            }
        )
        self.projections = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(2 * int(self.backbones[name].width), dim), nn.LayerNorm(dim)) for name in modalities}  # type: ignore[arg-type]
        )
        self.readout = CrossModalReadout(len(modalities), dim, heads, seeds, joint, impl)
        self.matcher = create_matcher(matcher, len(self.views), dim, len(modalities), **(matcher_options or {}))
        self.generative_model = GenerativeModel(
            len(self.views), evidence=evidence, num_bins=num_bins, precision=float(asi), learn_precision=asi
        )

    def encode(self, clips: Mapping[str, Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of every frame and modality.

        Args:
            clips: ``{modality: [B, T, channels, h, w]}``. A modality that is not in the mapping counts as missing for all clips.
            present: ``[B, M]`` bool, False where a clip lacks a modality (its pixels are then not looked at).

        Returns:
            tokens ``[B, M, T, D]`` and log_weight ``[B, M, T]`` float32 (0, or -inf where missing).

        Raises:
            DataError: shapes do not fit each other or the model.
        """
        batch, frames = self._check_clips(clips)
        tokens = {name: self.projections[name](with_deviation(frame_features(self.backbones[name], clip))) for name, clip in clips.items()}
        nothing = torch.zeros_like(next(iter(tokens.values())))
        stacked = torch.stack([tokens.get(name, nothing) for name in self.modalities], 1)
        # Filled on the device: a list of flags would be copied there, which makes the host wait and which no CUDA graph can hold.
        weights = [0.0 if name in clips else float("-inf") for name in self.modalities]
        log_weight = torch.stack([stacked.new_full((batch, frames), weight, dtype=torch.float32) for weight in weights], 1)
        return stacked, log_weight if present is None else log_weight.masked_fill(~present[..., None], float("-inf"))

    def describe(self, tokens: Tensor, log_weight: Tensor) -> Tensor:
        """Descriptors of every view, ``[B, M, T, D], [B, M, T] -> [B, V, D]``."""
        return self.readout(tokens, log_weight)[0]

    def views_present(self, log_weight: Tensor) -> Tensor:
        """``[B, M, T] -> [B, V]`` bool: a view is there when one of its tokens is."""
        own = torch.isfinite(log_weight).any(-1)
        return own if len(self.views) == len(self.modalities) else torch.cat([own, own.any(-1, keepdim=True)], -1)

    def read(self, tokens: Tensor, log_weight: Tensor, descriptors: Tensor | None = None) -> Clips:
        """Clips as the matcher reads them: ``[B, M, T, D], [B, M, T]``, and the descriptors ``[B, V, D]`` where they are at hand."""
        if descriptors is None and self.matcher.reads == "tokens":
            descriptors = tokens.new_zeros(len(tokens), len(self.views), 0)
        there = self.views_present(log_weight)
        return self.matcher.clips(tokens, log_weight, self.describe(tokens, log_weight) if descriptors is None else descriptors, there)

    def match_clips(self, support: Clips, query: Clips, labels: Tensor | None = None, *, ways: int) -> Match:
        """Scores of the query clips ``[E, Q]`` against the support clips ``[E, S]``.

        ``labels [E, S]`` int64 in 0..ways-1, or None where the support comes class by class, equally many of each.
        """
        return self.matcher.match(support, query, labels, ways)

    def match(self, support: Tensor, labels: Tensor, query: Tensor, support_present: Tensor, query_present: Tensor, *, ways: int) -> Match:
        """Scores of the queries against the support: descriptors ``[E, clips, V, D]``, presence ``[E, clips, V]``, labels ``[E, S]``.

        Raises:
            ConfigError: the matcher reads tokens; :meth:`read` and :meth:`match_clips` work with every matcher.
        """
        if not isinstance(self.matcher, PrototypeMatcher):
            raise ConfigError("this model's matcher compares frames, which descriptors do not have; use model.read and model.match_clips")
        classes = class_means(self.matcher.prepare(support), labels, support_present, ways)
        answer: Match = self.matcher(self.matcher.prepare(query), classes, query_present)
        return answer

    def judge(self, match: Match, target: Tensor | None = None, *, distillation: float | None = None) -> EpisodeOutput:
        """From scores to beliefs, fused posterior and, where the classes ``target [E, Q]`` are known, the loss.

        ``distillation`` takes the place of ``self.loss.distillation``, for schedules.
        """
        output = weigh_views(match, self.generative_model)
        if target is None:
            return output
        terms = ops.free_energy_loss(
            _usable_logits(match),
            target,
            self.generative_model,
            context_evidence=output.evidence[..., 1:],
            temperature=self.loss.temperature,
            margin=self.loss.margin,
            distillation_weight=self.loss.distillation if distillation is None else distillation,
            cross_entropy_weight=self.loss.cross_entropy,
            present=match.present,
            impl=self.impl,
        )
        return EpisodeOutput(
            output.log_probs, output.view_log_probs, output.beliefs, terms.total.mean(), terms, output.evidence, output.present
        )

    def calibrate(self, outputs: Sequence[EpisodeOutput], targets: Sequence[Tensor]) -> float:
        """Learns the generative model's counts and precision from episodes over classes that the encoders were not trained on.

        Counts start afresh: what an earlier calibration learned, with other encoders or another number of shots, does not fit.

        Args:
            outputs: one or more batches of episodes, all with Q queries.
            targets: ``[E, Q]`` each, int64, the classes of their queries.

        Returns:
            The fitted precision gamma (0: uniform fusion explains the episodes best).
        """
        agent = self.generative_model
        log_probs = torch.cat([output.view_log_probs for output in outputs])
        present = torch.cat([output.present for output in outputs])
        observation, target = agent.observe(torch.cat([output.evidence for output in outputs])), torch.cat(list(targets))
        agent.reset_counts()
        agent.learn(observation, log_probs.argmax(-1) == target[..., None], present=present)
        return agent.fit_precision(log_probs, observation, target, present=present)

    def forward(
        self,
        support: Mapping[str, Tensor],
        support_labels: Tensor,
        query: Mapping[str, Tensor],
        query_labels: Tensor | None = None,
        *,
        support_present: Tensor | None = None,
        query_present: Tensor | None = None,
        ways: int | None = None,
    ) -> EpisodeOutput:
        """Recognises the queries of E episodes from their support.

        Args:
            support, query: ``{modality: [E, clips, T, channels, h, w]}``; E may be left out (it is then left out of the result too).
            support_labels, query_labels: int64 ``[E, clips]``, values 0..ways-1.
            support_present, query_present: bool ``[E, clips, M]``, False where a clip lacks a modality.
            ways: number of classes; by default the largest support label + 1, which costs a host synchronisation on a GPU.

        Raises:
            DataError: shapes or labels do not fit.
        """
        single = support_labels.dim() == 1
        if single:
            support, query = ({name: clip[None] for name, clip in side.items()} for side in (support, query))
            support_labels, query_labels = support_labels[None], None if query_labels is None else query_labels[None]
            support_present, query_present = (None if p is None else p[None] for p in (support_present, query_present))
        if set(support) != set(query):
            raise DataError(f"support has the modalities {sorted(support)}, query {sorted(query)}; give both the same")
        episodes, shots = support_labels.shape
        clips = {name: torch.cat([support[name], query[name]], 1).flatten(0, 1) for name in support}
        queries = next(iter(query.values())).shape[1]
        present = self._join_presence(support_present, query_present, episodes, shots, queries, support_labels.device)
        seen, asked = self.read(*self.encode(clips, present)).split(episodes, shots)
        ways = int(support_labels.max()) + 1 if ways is None else ways
        output = self.judge(self.match_clips(seen, asked, support_labels, ways=ways), query_labels)
        return _without_episode_axis(output) if single else output

    def _join_presence(
        self, support: Tensor | None, query: Tensor | None, episodes: int, shots: int, queries: int, device: torch.device
    ) -> Tensor | None:
        if support is None and query is None:
            return None
        count = len(self.modalities)
        sides = [
            torch.ones(episodes, clips, count, dtype=torch.bool, device=device) if side is None else side
            for side, clips in ((support, shots), (query, queries))
        ]
        return torch.cat(sides, 1).flatten(0, 1)

    def _check_clips(self, clips: Mapping[str, Tensor]) -> tuple[int, int]:
        unknown = sorted(set(clips) - set(self.modalities))
        if unknown or not clips:
            raise DataError(f"got clips of {unknown or 'no modality'}; this model was made for {list(self.modalities)}")
        shape = None
        for name, clip in clips.items():
            if clip.dim() != 5 or clip.shape[2] != self.channels[name]:
                raise DataError(f"clips of {name!r} must be [B, T, {self.channels[name]}, height, width], got {list(clip.shape)}")
            if shape is not None and clip.shape[:2] != shape:
                raise DataError(f"clips of {name!r} are [B, T] = {list(clip.shape[:2])}, those of another modality {list(shape)}")
            shape = clip.shape[:2]
        assert shape is not None
        return shape[0], shape[1]  # no int(): an exported encoder takes any number of clips


def weigh_views(match: Match, agent: GenerativeModel) -> EpisodeOutput:
    """From scores to beliefs and the fused posterior: what the agent makes of a match. The loss stays None."""
    logits = _usable_logits(match)
    view_log_probs = torch.log_softmax(logits, -1)
    with torch.no_grad():
        evidence = torch.cat([certainty(logits)[..., None], context_evidence(agent.evidence[1:], match)], -1)
        beliefs = agent.infer(agent.observe(evidence), match.present)
    return EpisodeOutput(fuse(view_log_probs, beliefs.policy), view_log_probs, beliefs, None, None, evidence, match.present)


def _usable_logits(match: Match) -> Tensor:
    """The logits, 0 where a view is missing: its posterior is then uniform."""
    return torch.where(match.present[..., None], match.logits, torch.zeros_like(match.logits))


def with_deviation(features: Tensor) -> Tensor:
    """Appends to every frame how far it lies from the clip's mean: ``[B, T, width] -> [B, T, 2 * width]``.

    What stays the same over a clip (scene, camera, clothes) is in the first half alone, what changes (the action) also in the second;
    both are read as sets, so the order of frames still tells nothing.
    """
    return torch.cat([features, (features - features.mean(1, keepdim=True)).abs()], -1)


def _check_names(modalities: tuple[str, ...], evidence: tuple[str, ...], dim: int, heads: int) -> None:
    if not modalities or len(set(modalities)) < len(modalities) or "joint" in modalities:
        raise ConfigError(f"modalities must be different names other than 'joint', at least one; got {modalities}")
    if not evidence or evidence[0] != "certainty":
        raise ConfigError(f"the first evidence channel must be 'certainty', got {evidence}")
    unknown = [name for name in evidence[1:] if name not in CHANNELS]
    if unknown:
        raise ConfigError(f"unknown evidence channels {unknown}; choose from {sorted(CHANNELS)}")
    if dim % heads:
        raise ConfigError(f"dim ({dim}) must be a multiple of heads ({heads})")


def _without_episode_axis(output: EpisodeOutput) -> EpisodeOutput:
    def first(value: Any) -> Any:
        return value[0] if isinstance(value, Tensor) and value.dim() else value

    beliefs = Beliefs(*(first(item) for item in output.beliefs))
    terms = None if output.terms is None else type(output.terms)(*(first(item) for item in output.terms))
    return EpisodeOutput(
        first(output.log_probs), first(output.view_log_probs), beliefs, output.loss, terms, first(output.evidence), first(output.present)
    )
