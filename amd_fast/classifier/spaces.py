"""Where clips are compared: a trained model's views, or, without a model, views that need no training.

A space turns clips into arrays that are kept (``encode``, once per clip), these into what its matcher reads (``read``), and gives the
scores of query clips against a support (``match``). All spaces share the agent that weighs the views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from amd_fast.active_inference import GenerativeModel
from amd_fast.data.clips import RESIZE_RATIO, RawClip
from amd_fast.data.reading import views_of_a_test
from amd_fast.errors import ConfigError, DataError
from amd_fast.models.afmir import AFMIR
from amd_fast.models.matchers import Clips, Match, class_means
from amd_fast.models.readout import one_set
from amd_fast.models.weights import weights_hash
from amd_fast.storage import read_bytes

Arrays = dict[str, Tensor]
"""What is kept of encoded clips, by name; the first dimension counts clips."""


SCALE = 0.25
"""Temperature of views without a model, in units of the mean squared distance between class means. Fitting it to the support was tried:
it gains a little likelihood where there are many clips, and loses much where there are few."""


class Space(Protocol):
    """See the module's text. ``decoding`` are the arguments of ``decode_clip`` that clips are read with."""

    kind: str
    decoding: dict[str, int]
    learns: bool  # whether its agent is worth calibrating on a support: where its likelihoods were learned

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views, in order."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What is read of a clip."""

    def new_agent(self) -> GenerativeModel:
        """An agent of its own for one classifier, in evaluation mode."""

    def encode(self, clips: Sequence[RawClip]) -> Arrays:
        """Decoded clips as arrays on the CPU."""

    def vectors(self, rows: np.ndarray) -> Arrays:
        """Vectors ``[n, width]`` in place of clips."""

    def read(self, arrays: Arrays) -> Clips:
        """What the matcher reads of clips."""

    def match(self, support: Clips, query: Clips, labels: Tensor, ways: int) -> Match:
        """Scores of queries ``[E, Q]`` against support clips ``[E, S]`` with ``labels [E, S]``; ``ways`` is the label of those left out."""


class ModelSpace:
    """The views of a trained model.

    Args:
        model: used as it is, in evaluation mode, on its own device.
        crops: squares read of each clip along the picture's longer side, 1 for the centre.
    """

    kind = "model"
    learns = True

    def __init__(self, model: AFMIR, crops: int = 1) -> None:
        self.model, self.crops = model.eval(), crops
        self.views, self.modalities = model.views, model.modalities
        self.decoding = {"frames": model.frames, "short_side": round(model.size * RESIZE_RATIO)}
        self._transforms = views_of_a_test(model.size, model.modalities, crops)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Numbers in a clip's descriptors of all views."""
        return len(self.views) * self.model.dim

    def new_agent(self) -> GenerativeModel:
        """A copy of the model's agent, as it was calibrated in training."""
        agent = self.model.generative_model
        copy = GenerativeModel(agent.num_views, agent.evidence, agent.num_bins)
        copy.load_state_dict(agent.state_dict())
        return copy.to(self.device).eval()

    def encode(self, clips: Sequence[RawClip]) -> Arrays:
        """``tokens [n, M, crops * T, D]``, ``log_weight [n, M, crops * T]``, ``descriptors [n, V, D]``, ``present [n, V]``."""
        views = [transform(clip) for clip in clips for transform in self._transforms]
        present = torch.tensor([[name in view for name in self.modalities] for view in views])
        stacked = {name: self._stack(name, views) for name in self.modalities if present[:, self.modalities.index(name)].any()}
        with torch.inference_mode():
            tokens, weight = self.model.encode(stacked, present.to(self.device))
            tokens, weight = (one_set(value, self.crops) for value in (tokens, weight))
            descriptors, there = self.model.describe(tokens, weight), self.model.views_present(weight)
        # Clones, for tensors of inference mode cannot be used by whoever wants gradients later.
        arrays = {"tokens": tokens, "log_weight": weight, "descriptors": descriptors, "present": there}
        return {name: value.cpu().clone() for name, value in arrays.items()}

    def _stack(self, name: str, views: Sequence[Mapping[str, Tensor]]) -> Tensor:
        like = next(view[name] for view in views if name in view)
        if like.shape[1] != self.model.channels[name]:
            raise DataError(f"clips of {name!r} have {like.shape[1]} channels, the model was made for {self.model.channels[name]}")
        nothing = torch.zeros_like(like)
        return torch.stack([view.get(name, nothing) for view in views]).to(self.device)

    def vectors(self, rows: np.ndarray) -> Arrays:
        """The model's own descriptors, as ``FewShotClassifier.describe`` gives them: ``[n, V * D]``."""
        if self.model.matcher.reads != "descriptors":
            raise ConfigError("this model's matcher compares frames, which descriptors do not have; give clips")
        if rows.shape[1] != self.width:
            raise DataError(
                f"descriptors have {rows.shape[1]} numbers, this model's have {len(self.views)} views x {self.model.dim} = {self.width}; "
                "take them from describe() of a classifier with the same model, or leave out model="
            )
        descriptors = torch.from_numpy(rows.astype(np.float32)).unflatten(1, (len(self.views), -1))
        return {"descriptors": descriptors, "present": descriptors.ne(0).any(-1)}

    def read(self, arrays: Arrays) -> Clips:
        """See :class:`Space`."""
        moved = {name: value.to(self.device) for name, value in arrays.items()}
        tokens = moved.get("tokens", moved["descriptors"])
        weight = moved.get("log_weight", tokens)
        return self.model.matcher.clips(tokens, weight, moved["descriptors"], moved["present"])

    def match(self, support: Clips, query: Clips, labels: Tensor, ways: int) -> Match:
        """See :class:`Space`."""
        return self.model.match_clips(support, query, labels, ways=ways)


class PlainSpace:
    """Views without training, compared by squared distance to the class means in float64.

    Of clips: how the picture changes and where it moves to, the two descriptors of :mod:`amd_fast.evaluation.baselines` that tell what
    happens rather than where ("frame differences", "flow histogram"), each of unit length. Of given vectors: one view, the vector.

    Args:
        kind: "clips" or "vectors".
    """

    learns = False
    modalities = ("rgb", "flow")
    decoding: dict[str, int] = {"frames": 8, "short_side": 128}  # noqa: RUF012 (what the baselines are measured with)

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.views = ("frame differences", "flow histogram") if kind == "clips" else ("descriptor",)

    def new_agent(self) -> GenerativeModel:
        """An agent that has learned nothing and trusts all views alike (precision 0)."""
        return GenerativeModel(len(self.views), precision=0.0).eval()

    def encode(self, clips: Sequence[RawClip]) -> Arrays:
        """``descriptors`` float64 ``[n, V, widest]``, zero beyond a view's width, and ``present [n, V]``."""
        from amd_fast.evaluation.baselines import baseline_features

        found = [baseline_features(clip) for clip in clips]
        width = max(len(vector) for vectors in found for name, vector in vectors.items() if name in self.views)
        descriptors = torch.zeros(len(clips), len(self.views), width, dtype=torch.float64)
        for row, vectors in enumerate(found):
            for place, name in enumerate(self.views):
                if name in vectors:
                    descriptors[row, place, : len(vectors[name])] = torch.from_numpy(vectors[name].astype(np.float64))
        return {"descriptors": descriptors, "present": descriptors.ne(0).any(-1)}

    def vectors(self, rows: np.ndarray) -> Arrays:
        """Given vectors ``[n, width]``."""
        descriptors = torch.from_numpy(rows.astype(np.float64))[:, None]
        return {"descriptors": descriptors, "present": torch.ones(len(rows), 1, dtype=torch.bool)}

    def read(self, arrays: Arrays) -> Clips:
        """See :class:`Space`."""
        return Clips({"descriptor": arrays["descriptors"].transpose(0, 1)[:, :, None]}, {}, arrays["present"])

    def match(self, support: Clips, query: Clips, labels: Tensor, ways: int) -> Match:
        """See :class:`Space`; ``logits = -||f - c||^2 / (SCALE s_v)``, s_v the mean squared distance between class means."""
        seen, asked = (side.rows["descriptor"].squeeze(3).permute(1, 2, 0, 3) for side in (support, query))  # [E, clips, V, D]
        classes = class_means(seen, labels, support.present, ways)
        prototypes = classes.prototypes.transpose(1, 2)  # [E, V, ways, D]
        squared = torch.cdist(asked.transpose(1, 2), prototypes, compute_mode="donot_use_mm_for_euclid_dist").square()
        between = torch.cdist(prototypes, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = max(ways * (ways - 1), 1)
        unit = between.square().sum((-1, -2)) / pairs  # [E, V]
        unit = torch.where(unit > 0, unit, 1.0)
        logits = -squared / (SCALE * unit)[..., None, None]
        present = query.present & classes.present[:, None]
        distance = squared.sqrt()
        return Match(logits.transpose(1, 2), distance.transpose(1, 2), between.sum((-1, -2)) / pairs, present)


def model_hash(model: AFMIR) -> str:
    """SHA-256 (hex) of everything that decides a model's answers: all weights, the agent, and how clips are read."""
    reading = (model.modalities, model.views, model.frames, model.size, sorted(model.channels.items()))
    return weights_hash(model.state_dict(), head=repr(reading))


def model_content(model: Any) -> bytes | None:
    """The content of the model file that a path names; None where the model was not given by path."""
    if not (isinstance(model, str) or hasattr(model, "__fspath__")):
        return None
    from amd_fast.training.checkpoint import model_file

    return read_bytes(model_file(model))


def space_of(model: Any, kind: str, crops: int) -> ModelSpace | PlainSpace:
    """The space for a classifier's ``model`` argument: an AFMIR, the path of a run folder or ``.safetensors`` file, or None.

    Raises:
        CheckpointError: the path holds no model.
        ConfigError: something else was given.
    """
    if model is None:
        return PlainSpace(kind)
    if isinstance(model, AFMIR):
        return ModelSpace(model, crops)
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        from amd_fast.training.checkpoint import load_model

        return ModelSpace(load_model(model), crops)
    raise ConfigError(f"model is {type(model).__name__}; give an AFMIR, the path of a run folder or .safetensors file, or None")
