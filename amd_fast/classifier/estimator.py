"""`FewShotClassifier`: a scikit-learn estimator over clips."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data

from amd_fast.classifier.answers import Answer
from amd_fast.classifier.calibration import MOST, Calibration, calibrate
from amd_fast.classifier.gallery import MODEL, Gallery, enrolment, load_gallery, save_gallery
from amd_fast.classifier.inputs import ReadClip, clip_list, is_clips, read_clips
from amd_fast.classifier.judging import Judged, judge
from amd_fast.classifier.spaces import Arrays, ModelSpace, Space, model_content, model_hash, space_of
from amd_fast.errors import CheckpointError, ConfigError, DataError
from amd_fast.models.matchers import Clips
from amd_fast.storage import join

_NAMED = 5  # clips named in a message


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Recognises actions from a few clips of each, and says which modality it trusted.

    Clips are paths of videos (files, folders of frames, URIs), uint8 arrays ``[T, H, W, 3]``, or ``{modality: array}`` mappings such as
    :class:`~amd_fast.data.RawClip`. Each is read and encoded once, so adding one is instant and nothing is trained. A 2-D array of
    numbers is taken as one vector ("descriptor") per clip.

    Without a model, clips are compared by two views that need no training, how the picture changes and where it moves to; vectors by
    themselves. That is a baseline to start with: a model trained with ``amd-fast train`` is what the library is for.

    Args:
        model: an :class:`~amd_fast.AFMIR`, the path of a run folder or ``.safetensors`` file, or None for views without training.
        unknown: label to answer for a clip that looks like none of the enrolled classes; None to always answer a class.
        false_unknown: share of clips of enrolled classes that may be called unknown, 0 (never) to 1. Kept by asking every enrolled clip
            as if it were new, see :mod:`amd_fast.classifier.calibration`: needs 1 / false_unknown such clips, at least two per class.
        trust: "support": how sharply the model's agent decides is fitted to the enrolled clips, where there are enough; "saved": it is
            left as it was in training. (Without a model all views are trusted alike.)
        crops: squares read of each clip along the picture's longer side (with a model).
        unreadable: "raise" on a clip that cannot be read, or "skip" it: fit leaves it out with a warning, predict answers None (or
            ``unknown``) with probabilities NaN.
        batch: clips encoded together.
        workers: threads that read clips; 0: one per core.
        progress: show a progress bar.

    Attributes:
        classes_: labels, sorted.
        clips_: table of the enrolled clips: clip, label, group, digest.
        lost_: clips left out by the last fit or partial_fit, with the reason.
        n_features_in_: width of the vectors, where it was fitted with vectors.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        unknown: Any = None,
        false_unknown: float = 0.1,
        trust: Literal["support", "saved"] = "support",
        crops: int = 1,
        unreadable: Literal["raise", "skip"] = "raise",
        batch: int = 16,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.unknown = unknown
        self.false_unknown = false_unknown
        self.trust = trust
        self.crops = crops
        self.unreadable = unreadable
        self.batch = batch
        self.workers = workers
        self.progress = progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.dict = True
        return tags

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> Self:  # noqa: N803 (scikit-learn's name)
        """Enrolls clips, forgetting earlier ones.

        Args:
            X: clips or vectors, see the class.
            y: label of each.
            groups: source recording of each; clips of one recording are never used to judge each other. By default each is its own.

        Raises:
            DataError: a clip cannot be read, or is given under two labels; numbers of clips and labels differ; nothing is left.
            ConfigError: an argument of the constructor is out of range.
        """
        self._check_settings()
        return self._enroll(X, y, groups, fresh=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, *, groups: Any = None) -> Self:  # noqa: N803
        """Enrolls further clips, of classes that are there or of new ones; arguments and errors as :meth:`fit`.

        ``classes``, which scikit-learn's protocol hands over on the first call, may be left out: a class begins with its first clip.
        Labels outside it are refused where it is given. A clip that is enrolled already under the same label counts once.
        """
        self._check_settings()
        if classes is not None:
            unexpected = sorted(set(np.asarray(y).tolist()) - set(np.asarray(classes).tolist()), key=str)
            if unexpected:
                raise DataError(f"labels {unexpected[:_NAMED]} are not among classes={list(np.asarray(classes))[:20]}")
        return self._enroll(X, y, groups, fresh=not hasattr(self, "gallery_"))

    def forget(self, label: Any) -> Self:
        """Removes a class and its clips.

        Raises:
            DataError: there is no such class, or it is the only one.
        """
        check_is_fitted(self)
        keep = (self.gallery_.table["label"] != label).to_numpy(bool)
        if keep.all() or not keep.any():
            what = f"no class {label!r} is enrolled" if keep.all() else f"{label!r} is the only class"
            raise DataError(f"{what}; the classes are {self._named_classes()}")
        self._set_gallery(self.gallery_.keep(keep))
        return self

    @property
    def clips_(self) -> pd.DataFrame:
        """The enrolled clips, one row each: clip (its name), label, group, digest of its decoded frames."""
        check_is_fitted(self)
        return self.gallery_.table.copy()

    def shots(self) -> dict[Any, int]:
        """Number of enrolled clips by class."""
        check_is_fitted(self)
        counts = Counter(self.gallery_.table["label"])
        return {label: counts[label] for label in self.classes_}

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Label of each clip; ``unknown``, where that is set, for one that looks like none of the classes.

        Raises:
            DataError: a clip cannot be read (with ``unreadable="raise"``), or vectors have another width than those enrolled.
        """
        judged = list(self._judged(X))
        if all(part.known.all() for part in judged):
            return np.concatenate([self.classes_[part.probabilities.argmax(-1)] for part in judged])
        labels = [label for part in judged for label in part.labels(self.classes_, self.unknown)]
        kinds = {type(label) for label in (*labels, *self.classes_.tolist())}
        return np.array(labels, dtype=None if len(kinds) == 1 else object)  # numpy would make text of a number beside a text

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probabilities ``[n, classes]`` float64, in the order of ``classes_``; NaN for a skipped clip. Errors as :meth:`predict`."""
        return np.concatenate([part.probabilities for part in self._judged(X)])

    def explain(self, X: Any) -> list[Answer]:  # noqa: N803
        """Everything about each clip's answer: probabilities, trust in each view, each view's own opinion. Errors as :meth:`predict`."""
        return list(self.explain_each(X))

    def explain_each(self, X: Any) -> Iterator[Answer]:  # noqa: N803
        """As :meth:`explain`, each answer as soon as its batch is judged, while the next one is being read."""
        for part in self._judged(X):
            yield from part.answers(self.classes_, self.space_.views, self.unknown)

    def describe(self, X: Any) -> np.ndarray:  # noqa: N803
        """Descriptors of all views side by side, float32 ``[n, V * D]``: vectors that a classifier with the same model takes for clips.

        Raises:
            DataError: a clip cannot be read.
        """
        space = self.space_ if hasattr(self, "space_") else space_of(self.model, "clips", self.crops)
        arrays, read = self._encoded(space, X)
        _refuse([clip for clip in read if clip.error])
        return arrays["descriptors"].flatten(1).numpy().astype(np.float32)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the classifier into a folder or to a URI: safetensors and JSON with hashes, no pickle.

        A model that was given by path is kept beside the clips, so that the folder is all it takes; one that was given as an object is
        bound by its hash, and :meth:`load` needs it again.
        """
        check_is_fitted(self)
        settings = {name: value for name, value in self.get_params(deep=False).items() if name not in ("model", "progress", "workers")}
        if not (self.unknown is None or isinstance(self.unknown, (str, int, float, bool))):
            raise DataError(f"unknown={self.unknown!r} is {type(self.unknown).__name__}; only text and numbers can be saved")
        facts: dict[str, Any] = {"settings": settings, "kind": self.space_.kind, "views": list(self.space_.views)}
        content = None
        if isinstance(self.space_, ModelSpace):
            facts["model"] = model_hash(self.space_.model)
            content = self.model_file_
        save_gallery(folder, self.gallery_, facts, content)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, model: Any = None) -> Self:
        """Reads a classifier back.

        Args:
            folder: written by :meth:`save`.
            model: the model, where the folder holds none; has to be the very same one.

        Raises:
            CheckpointError: not such a folder, changed since it was written, or another model.
        """
        gallery, facts, content = load_gallery(folder)
        settings = facts["settings"]
        if "model" in facts and content is None and model is None:
            raise CheckpointError(f"the gallery {folder} holds no model; give the one it was made with, load(folder, model=...)")
        given = model if model is not None else (None if content is None else join(folder, MODEL))
        found = cls(given if "model" in facts else None, **settings)
        space = space_of(found.model, facts["kind"], found.crops)
        if isinstance(space, ModelSpace) and (now := model_hash(space.model)) != facts["model"]:
            raise CheckpointError(
                f"the gallery {folder} was made with another model (hash {facts['model'][:12]}, this one {now[:12]}); "
                "clips have to be enrolled again where the model changes"
            )
        found._start(space, content)
        found.lost_ = {}
        found._set_gallery(gallery)
        return found

    # What the public methods are made of.

    def _check_settings(self) -> None:
        choices = {"trust": ("support", "saved"), "unreadable": ("raise", "skip")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}; choose {' or '.join(map(repr, allowed))}")
        if self.false_unknown != 0 and not 1 / MOST <= self.false_unknown <= 1:
            raise ConfigError(f"false_unknown={self.false_unknown!r}; give a share from {1 / MOST} to 1, or 0 for never")
        if self.batch < 1 or self.crops < 1 or self.workers < 0:
            raise ConfigError(f"batch and crops must be at least 1 and workers at least 0, got {self.batch}, {self.crops}, {self.workers}")

    def _enroll(self, X: Any, y: Any, groups: Any, *, fresh: bool) -> Self:  # noqa: N803
        space = space_of(self.model, "clips" if is_clips(X) else "vectors", self.crops) if fresh else self.space_
        labels = _labels(y)
        arrays, read = self._encoded(space, X, fresh=fresh)
        table = enrolment(read, labels, groups)
        readable = np.array([not clip.error for clip in read], dtype=bool)
        if not readable.any():
            raise DataError(f"none of the {len(read)} clips can be read: {read[0].error}")
        if empty := set(labels.tolist()) - set(labels[readable].tolist()):
            first = min(empty, key=str)
            reason = next(clip.error for clip, label in zip(read, labels.tolist(), strict=True) if label == first)
            raise DataError(f"no clip of {str(first)!r} can be read, the first for this reason: {reason}")
        before = Gallery() if fresh else self.gallery_
        new = before.new_clips(table[readable])
        gallery = before.add({name: value[torch.from_numpy(new)] for name, value in arrays.items()}, table[readable][new])
        if fresh:
            self._start(space, model_content(self.model))
        self.lost_: dict[str, str] = {clip.name: clip.error for clip in read if clip.error}
        if self.lost_:
            lost = ", ".join(list(self.lost_)[:_NAMED])
            warnings.warn(f"{len(self.lost_)} of {len(read)} clips cannot be read and were left out: {lost}; see lost_", stacklevel=3)
        self._set_gallery(gallery)
        return self

    def _start(self, space: Space, content: bytes | None) -> None:
        self.space_, self.agent_, self.model_file_ = space, space.new_agent(), content

    def _set_gallery(self, gallery: Gallery) -> None:
        try:
            classes = np.unique(np.array(gallery.table["label"].tolist()))
        except TypeError as error:
            raise DataError(f"labels of different kinds cannot be told apart ({error}); give all as text, or all as numbers") from error
        if self.unknown is not None and self.unknown in classes.tolist():
            raise DataError(f"unknown={self.unknown!r} is also the label of enrolled clips; choose another word for it")
        self.gallery_, self.classes_ = gallery, classes

    def _batches(self, space: Space, X: Any, *, fresh: bool = False) -> Iterator[tuple[Arrays, list[ReadClip]]]:  # noqa: N803
        """Batches of clips: arrays of those that can be read, and how each was read."""
        if is_clips(X):
            if space.kind == "vectors":
                raise DataError("this classifier was fitted with vectors; give a 2-D array of numbers, not clips")
            yield from self._encoded_clips(space, clip_list(X))
            return
        if space.kind == "clips":
            raise DataError("this classifier was fitted with clips; give clips, not vectors")
        fitted = fresh or hasattr(self, "n_features_in_")
        rows = validate_data(self, X, reset=fresh, dtype=np.float64) if fitted else check_array(X, dtype=np.float64)
        yield space.vectors(rows), [ReadClip(f"row {number}", None, "") for number in range(len(rows))]

    def _encoded_clips(self, space: Space, clips: list[Any]) -> Iterator[tuple[Arrays, list[ReadClip]]]:
        if not clips:
            raise DataError("Found array with 0 sample(s) while a minimum of 1 is required: the list of clips is empty")
        for batch in read_clips(clips, space, batch=self.batch, workers=self.workers, progress=self.progress):
            if self.unreadable == "raise":
                _refuse([clip for clip in batch if clip.error])
            there = [clip.raw for clip in batch if clip.raw is not None]
            yield space.encode(there) if there else {}, [clip.without_frames() for clip in batch]

    def _encoded(self, space: Space, X: Any, *, fresh: bool = False) -> tuple[Arrays, list[ReadClip]]:  # noqa: N803
        """All batches as one."""
        batches = list(self._batches(space, X, fresh=fresh))
        filled = [arrays for arrays, _ in batches if arrays]
        arrays = {name: torch.cat([part[name] for part in filled]) for name in filled[0]} if filled else {}
        return arrays, [clip for _, read in batches for clip in read]

    def _judged(self, X: Any) -> Iterator[Judged]:  # noqa: N803
        check_is_fitted(self)
        self._check_settings()  # they may have been set since
        support, codes = self._support(), self._codes()
        calibration = self.calibration()
        share = 0.0 if self.unknown is None else self.false_unknown
        if share * (1 + len(calibration.familiarity)) < 1 and share > 0:
            warnings.warn(
                f"no clip is called {self.unknown!r} yet: {len(calibration.familiarity)} enrolled clips have one of their class from"
                f" another recording beside them, false_unknown={share:g} takes {math.ceil(1 / share) - 1}; enroll more",
                stacklevel=4,
            )
        for arrays, read in self._batches(self.space_, X):
            yield judge(self.space_, support, codes, len(self.classes_), arrays, read, calibration, share)

    def calibration(self) -> Calibration:
        """How clips are judged at present: the agent, and how familiar the enrolled clips looked when they were asked as if new."""
        check_is_fitted(self)
        cache, key = self.gallery_.cache, ("calibration", self.trust)
        if key not in cache:
            trust = self.trust == "support" and self.space_.learns
            recordings = self.gallery_.recordings()
            cache[key] = calibrate(self.space_, self.agent_, self._support(), self._codes(), recordings, trust=trust)
        found: Calibration = cache[key]
        return found

    def _support(self) -> Clips:
        cache = self.gallery_.cache
        if "support" not in cache:
            with torch.inference_mode():
                cache["support"] = self.space_.read(self.gallery_.arrays)
        found: Clips = cache["support"]
        return found

    def _codes(self) -> np.ndarray:
        """Class of every enrolled clip, int64, counted as in ``classes_``."""
        number = {label: place for place, label in enumerate(self.classes_.tolist())}
        return np.array([number[label] for label in self.gallery_.table["label"]], dtype=np.int64)

    def _named_classes(self) -> str:
        return ", ".join(map(repr, self.classes_.tolist()[:20]))


def _labels(y: Any) -> np.ndarray:
    if y is None:
        raise DataError("requires y to be passed, but the target y is None: give the label of each clip")
    labels = column_or_1d(np.asarray(y), warn=True)
    check_classification_targets(labels)
    return labels


def _refuse(lost: Sequence[ReadClip]) -> None:
    if lost:
        others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise DataError(f"{lost[0].error}{others}; unreadable='skip' goes on without such clips")
