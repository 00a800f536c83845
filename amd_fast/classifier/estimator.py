"""`FewShotClassifier`: a scikit-learn estimator over clips."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from amd_fast.classifier.answers import Answer
from amd_fast.classifier.calibration import Calibration, calibrate, confidence_of
from amd_fast.classifier.gallery import MODEL, Gallery, load_gallery, save_gallery
from amd_fast.classifier.inputs import ReadClip, clip_list, is_clips, read_clips
from amd_fast.classifier.spaces import Arrays, ModelSpace, PlainSpace, model_hash, space_of
from amd_fast.errors import CheckpointError, ConfigError, DataError
from amd_fast.models.afmir import EpisodeOutput, weigh_views
from amd_fast.models.matchers import Clips
from amd_fast.storage import join, read_bytes

_CHUNK = 256  # queries scored together
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
        unknown: label to answer where the confidence is below the threshold; None to always answer a class.
        false_unknown: share of clips of enrolled classes that may be called unknown, 0 to 1; sets the threshold by asking every
            enrolled clip as if it were new, see :mod:`amd_fast.classifier.calibration`.
        threshold: confidence below which a clip is unknown, in place of the calibrated one.
        trust: "saved": the agent as the model was calibrated with; "support": how sharply it decides is fitted to the enrolled clips.
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
        threshold: float | None = None,
        trust: Literal["saved", "support"] = "saved",
        crops: int = 1,
        unreadable: Literal["raise", "skip"] = "raise",
        batch: int = 16,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.unknown = unknown
        self.false_unknown = false_unknown
        self.threshold = threshold
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
        """Label of each clip; ``unknown`` where it is set and the confidence is below the threshold.

        Raises:
            DataError: a clip cannot be read (with ``unreadable="raise"``), or vectors have another width than those enrolled.
        """
        output, read = self._judge(X)
        best = self.classes_[output.log_probs[0].argmax(-1).cpu().numpy()]
        known, lost = self._known(output), np.array([bool(clip.error) for clip in read], dtype=bool)
        if known.all() and not lost.any():
            return best
        labels = [label if fine else self.unknown for label, fine in zip(best.tolist(), known & ~lost, strict=True)]
        texts = all(isinstance(label, str) for label in (*labels, *self.classes_.tolist()))
        return np.array(labels, dtype=str if texts else object)

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probabilities ``[n, classes]`` float64, in the order of ``classes_``; NaN for a skipped clip. Errors as :meth:`predict`."""
        output, read = self._judge(X)
        probabilities = output.log_probs[0].double().softmax(-1).cpu().numpy()
        probabilities[[bool(clip.error) for clip in read]] = np.nan
        return probabilities

    def explain(self, X: Any) -> list[Answer]:  # noqa: N803
        """Everything about each clip's answer: probabilities, trust in each view, each view's own opinion. Errors as :meth:`predict`."""
        output, read = self._judge(X)
        known = self._known(output)
        return [self._answer(output, row, clip, bool(known[row])) for row, clip in enumerate(read)]

    def describe(self, X: Any) -> np.ndarray:  # noqa: N803
        """Descriptors of all views side by side, float32 ``[n, V * D]``: vectors that a classifier with the same model takes for clips.

        Raises:
            DataError: a clip cannot be read.
        """
        space = self.space_ if hasattr(self, "space_") else space_of(self.model, "clips", self.crops)
        arrays, read = self._encode(space, X)
        self._refuse_lost(read)
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
        choices = {"trust": ("saved", "support"), "unreadable": ("raise", "skip")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}; choose {' or '.join(map(repr, allowed))}")
        if not 0 <= self.false_unknown <= 1:
            raise ConfigError(f"false_unknown={self.false_unknown!r}; give a share from 0 to 1")
        if self.batch < 1 or self.crops < 1 or self.workers < 0:
            raise ConfigError(f"batch and crops must be at least 1 and workers at least 0, got {self.batch}, {self.crops}, {self.workers}")

    def _enroll(self, X: Any, y: Any, groups: Any, *, fresh: bool) -> Self:  # noqa: N803
        space = space_of(self.model, "clips" if is_clips(X) else "vectors", self.crops) if fresh else self.space_
        labels = self._labels(X, y, space, fresh=fresh)
        arrays, read = self._encode(space, X, fresh=fresh)
        if len(labels) != len(read):
            raise DataError(f"got {len(read)} clips and {len(labels)} labels; give one label per clip")
        self._refuse_lost(read)
        names = np.array([clip.name for clip in read], dtype=object)
        table = pd.DataFrame(
            {
                "clip": pd.Series(names, dtype=object),
                "label": pd.Series(list(labels), dtype=object),
                "group": pd.Series(self._groups(groups, read), dtype=object),
                "digest": pd.Series([clip.digest for clip in read], dtype=object),
            }
        )
        readable = np.array([not clip.error for clip in read], dtype=bool)
        before = Gallery() if fresh else self.gallery_
        keep = readable & _new_clips(before.table, table, readable)
        if not readable.any():
            raise DataError(f"none of the {len(read)} clips can be read: {read[0].error}")
        rows = torch.from_numpy(np.flatnonzero(keep))
        gallery = before.add({name: value[rows] for name, value in arrays.items()}, table[keep]) if keep.any() else before
        if fresh:
            self._start(space, _content_of(self.model))
        self.lost_: dict[str, str] = {clip.name: clip.error for clip in read if clip.error}
        if self.lost_:
            warnings.warn(f"{len(self.lost_)} of {len(read)} clips were left out: {_first_error(read)}", stacklevel=3)
        self._set_gallery(gallery)
        return self

    def _start(self, space: ModelSpace | PlainSpace, content: bytes | None) -> None:
        self.space_, self.agent_, self.model_file_ = space, space.new_agent(), content

    def _set_gallery(self, gallery: Gallery) -> None:
        try:
            classes = np.unique(np.array(gallery.table["label"].tolist()))
        except TypeError as error:
            raise DataError(f"labels of different kinds cannot be told apart ({error}); give all as text, or all as numbers") from error
        if self.unknown is not None and self.unknown in classes.tolist():
            raise DataError(f"unknown={self.unknown!r} is also the label of enrolled clips; choose another word for it")
        self.gallery_, self.classes_ = gallery, classes

    def _labels(self, X: Any, y: Any, space: ModelSpace | PlainSpace, *, fresh: bool) -> np.ndarray:  # noqa: N803
        if y is None:
            raise DataError("requires y to be passed, but the target y is None: give the label of each clip")
        labels = column_or_1d(np.asarray(y), warn=True)
        check_classification_targets(labels)
        return labels

    def _groups(self, groups: Any, read: Sequence[ReadClip]) -> list[str]:
        if groups is None:
            return ["" for _ in read]
        listed = [str(group) for group in np.asarray(groups).ravel()]
        if len(listed) != len(read):
            raise DataError(f"got {len(read)} clips and {len(listed)} groups; give one group per clip, or none")
        return listed

    def _encode(self, space: ModelSpace | PlainSpace, X: Any, *, fresh: bool = False) -> tuple[Arrays, list[ReadClip]]:  # noqa: N803
        """Arrays of all clips (zeros, and no view present, for one that cannot be read), and how each was read."""
        if not is_clips(X):
            if isinstance(space, PlainSpace) and space.kind != "vectors":
                raise DataError("this classifier was fitted with clips; give clips, not vectors")
            rows = validate_data(self, X, reset=fresh, dtype=np.float64) if hasattr(self, "classes_") or fresh else np.asarray(X, float)
            return space.vectors(rows), [ReadClip(f"row {number}", None, "") for number in range(len(rows))]
        if space.kind == "vectors":
            raise DataError("this classifier was fitted with vectors; give a 2-D array of numbers, not clips")
        read: list[ReadClip] = []
        parts: list[tuple[np.ndarray, Arrays]] = []
        for batch in read_clips(clip_list(X), space, batch=self.batch, workers=self.workers, progress=self.progress):
            there = [clip.raw for clip in batch if clip.raw is not None]
            places = len(read) + np.flatnonzero([clip.raw is not None for clip in batch])
            if there:
                parts.append((places, space.encode(there)))
            read += [ReadClip(clip.name, None, clip.digest, clip.error) for clip in batch]
            if self.unreadable == "raise":
                self._refuse_lost(read)
        if not read:
            raise DataError("Found array with 0 sample(s) while a minimum of 1 is required: the list of clips is empty")
        arrays = {}
        for name, like in parts[0][1].items() if parts else ():
            arrays[name] = like.new_zeros(len(read), *like.shape[1:])
            if name == "log_weight":
                arrays[name].fill_(-torch.inf)
            for places, part in parts:
                arrays[name][torch.from_numpy(places)] = part[name]
        return arrays, read

    def _refuse_lost(self, read: Sequence[ReadClip]) -> None:
        if self.unreadable == "raise" and (lost := [clip for clip in read if clip.error]):
            others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            raise DataError(f"{lost[0].error}{others}; unreadable='skip' goes on without such clips")

    def calibration(self) -> Calibration:
        """How clips are judged at present: the agent, and the confidence below which a clip is unknown."""
        check_is_fitted(self)
        cache = self.gallery_.cache
        key = ("calibration", self.trust, self.unknown is None, self.false_unknown)
        if key not in cache:
            number = {label: place for place, label in enumerate(self.classes_.tolist())}
            codes = np.array([number[label] for label in self.gallery_.table["label"]], dtype=np.int64)
            cache[key] = calibrate(
                self.space_,
                self.agent_,
                self._support(),
                codes,
                _recordings(self.gallery_.table),
                learn_trust=self.trust == "support",
                false_unknown=None if self.unknown is None else self.false_unknown,
            )
        found: Calibration = cache[key]
        return found

    def _support(self) -> Clips:
        cache = self.gallery_.cache
        if "support" not in cache:
            with torch.inference_mode():
                cache["support"] = self.space_.read(self.gallery_.arrays)
        found: Clips = cache["support"]
        return found

    def _judge(self, X: Any) -> tuple[EpisodeOutput, list[ReadClip]]:  # noqa: N803
        """What the agent says of each clip, as one episode ``[1, n, ...]``, and how each was read."""
        check_is_fitted(self)
        arrays, read = self._encode(self.space_, X)
        calibration = self.calibration()
        outputs = []
        if not arrays:
            raise DataError(f"none of the {len(read)} clips can be read: {read[0].error}")
        with torch.inference_mode():
            support = self._support()
            number = {label: place for place, label in enumerate(self.classes_.tolist())}
            labels = torch.tensor([[number[label] for label in self.gallery_.table["label"]]], device=support.present.device)
            seen = support.take(torch.arange(len(self.gallery_), device=labels.device)[None])
            for start in range(0, len(read), _CHUNK):
                part = {name: value[start : start + _CHUNK] for name, value in arrays.items()}
                query = self.space_.read(part)
                asked = query.take(torch.arange(len(query.present), device=labels.device)[None])
                match = self.space_.match(seen, asked, labels, len(self.classes_), calibration.scale)
                outputs.append(weigh_views(match, calibration.agent))
        return _joined(outputs), read

    def _known(self, output: EpisodeOutput) -> np.ndarray:
        if self.unknown is None:
            return np.ones(output.log_probs.shape[1], dtype=bool)
        threshold = self.calibration().threshold if self.threshold is None else self.threshold
        if threshold == -np.inf:
            warnings.warn(
                f"no threshold for {self.unknown!r}: only {self.calibration().questions} enrolled clips have one of their class from"
                f" another recording beside them, too few for false_unknown={self.false_unknown}; enroll more clips, or give threshold=",
                stacklevel=4,
            )
        return confidence_of(output)[0].cpu().numpy() >= threshold

    def _answer(self, output: EpisodeOutput, row: int, clip: ReadClip, known: bool) -> Answer:
        if clip.error:
            return Answer(clip.name, self.unknown, error=clip.error)
        classes = self.classes_.tolist()
        probabilities = output.log_probs[0, row].double().softmax(-1).tolist()
        policy = output.beliefs.policy[0, row].tolist()
        views = {
            view: dict(zip(classes, output.view_log_probs[0, row, place].exp().tolist(), strict=True))
            for place, view in enumerate(self.space_.views)
            if bool(output.present[0, row, place])
        }
        best = int(np.argmax(probabilities))
        return Answer(
            clip=clip.name,
            label=classes[best] if known else self.unknown,
            confidence=probabilities[best],
            known=known,
            probabilities=dict(zip(classes, probabilities, strict=True)),
            trusted=self.space_.views[int(np.argmax(policy))],
            policy=dict(zip(self.space_.views, policy, strict=True)),
            views=views,
            free_energy=float(output.beliefs.free_energy[0, row]),
        )

    def _named_classes(self) -> str:
        return ", ".join(map(repr, self.classes_.tolist()[:20]))


def _new_clips(enrolled: pd.DataFrame, table: pd.DataFrame, readable: np.ndarray) -> np.ndarray:
    """Which rows are clips not enrolled yet; one that comes with two labels is refused, one that comes twice with the same counts once.

    Raises:
        DataError: the same content under two labels.
    """
    known = {digest: (label, clip) for digest, label, clip in enrolled[["digest", "label", "clip"]].itertuples(index=False) if digest}
    keep = np.ones(len(table), dtype=bool)
    for row, (digest, label, clip) in enumerate(table[["digest", "label", "clip"]].itertuples(index=False)):
        if not digest or not readable[row]:
            continue
        if digest in known:
            earlier, name = known[digest]
            if earlier != label:
                same = f"{clip} is" if clip == name else f"{clip} and {name} are the same clip,"
                raise DataError(f"{same} given as {earlier!r} and as {label!r}; leave out one of the two")
            keep[row] = False
        known[digest] = (label, clip)
    return keep


def _recordings(table: pd.DataFrame) -> np.ndarray:
    """A number per source recording; a clip without one is its own."""
    names = [f"group {group}" if group else f"clip {row}" for row, group in enumerate(table["group"])]
    return np.unique(names, return_inverse=True)[1]


def _first_error(read: Sequence[ReadClip]) -> str:
    return next(clip.error for clip in read if clip.error)


def _content_of(model: Any) -> bytes | None:
    """The content of the model file a path names."""
    if model is None or not (isinstance(model, str) or hasattr(model, "__fspath__")):
        return None
    from amd_fast.training.checkpoint import model_file

    return read_bytes(model_file(model))


def _joined(outputs: Sequence[EpisodeOutput]) -> EpisodeOutput:
    """Chunks of queries of one episode as one."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    fields = ("log_probs", "view_log_probs", "evidence", "present")
    values = {name: torch.cat([getattr(output, name) for output in outputs], 1) for name in fields}
    beliefs = type(first.beliefs)(*(torch.cat(parts, 1) for parts in zip(*(output.beliefs for output in outputs), strict=True)))
    return EpisodeOutput(beliefs=beliefs, loss=None, terms=None, **values)
