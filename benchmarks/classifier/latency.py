"""What one clip costs: to enroll it, to answer for it, stage by stage, and in plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import amd_fast
from amd_fast.classifier.spaces import ModelSpace
from amd_fast.data import read_clip
from amd_fast.data.clips import RESIZE_RATIO, RawClip
from amd_fast.data.flow import dis_flow
from amd_fast.data.readers import open_clip
from amd_fast.data.reading import views_of_a_test
from amd_fast.data.sampling import segment_indices
from amd_fast.models.afmir import weigh_views

STAGES = ("open and demux", "decode", "colours and size", "flow", "transform", "encode", "read out", "match and weigh")
TOLERANCE = 0.02


def stages(model: amd_fast.AFMIR, classifier: amd_fast.FewShotClassifier, path: str) -> tuple[dict[str, float], np.ndarray]:
    """Seconds of every stage of one answer, taken one after the other in a single thread, and the probabilities."""
    clock = [time.perf_counter()]

    def lap() -> None:
        clock.append(time.perf_counter())

    side = round(model.size * RESIZE_RATIO)
    with open_clip(path) as reader:
        index = segment_indices(reader.frame_count, model.frames)
        lap()
        first = np.clip(index, 0, max(reader.frame_count - 2, 0))
        frames = reader.frames(np.concatenate([index, first, first + 1]))
        lap()
        rgb = reader.pixels(frames[: len(index)], short_side=side)
        grey = reader.pixels(frames[len(index) :], short_side=side, pixel_format="gray")
    lap()
    flow = np.stack([dis_flow(grey[t], grey[len(index) + t]) for t in range(len(index))]).astype(np.float16)
    lap()
    [transform] = views_of_a_test(model.size, model.modalities, 1)
    clip = {name: value[None] for name, value in transform(RawClip(rgb=rgb, flow=flow)).items()}
    lap()
    space = classifier.space_
    assert isinstance(space, ModelSpace)
    with torch.inference_mode():
        tokens, weight = model.encode(clip)
        lap()
        descriptors, present = model.describe(tokens, weight), model.views_present(weight)
        lap()
        query = space.read({"tokens": tokens, "log_weight": weight, "descriptors": descriptors, "present": present})
        support, zero = classifier._support(), torch.zeros(1, 1, dtype=torch.int64)
        seen = support.take(torch.arange(len(support.present))[None])
        labels = torch.from_numpy(classifier._codes())[None]
        match = space.match(seen, query.take(zero), labels, len(classifier.classes_))
        output = weigh_views(match, classifier.calibration().agent)
    lap()
    return dict(zip(STAGES, np.diff(clock).tolist(), strict=True)), output.log_probs[0, 0].exp().numpy()


def plain(model: amd_fast.AFMIR, support: dict[str, torch.Tensor], labels: torch.Tensor, path: str) -> torch.Tensor:
    """The same answer without the classifier: read the clip, run the model's forward on the support's pixels and on it."""
    clip = read_clip(path, model.frames, model.size, model.modalities)
    with torch.inference_mode():
        return model(support, labels, {name: value[None] for name, value in clip.items()}).log_probs[0]


def timed(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of each call, in order."""
    found = []
    for call in calls:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds."""
    return {"median_ms": 1e3 * float(np.median(seconds)), "p95_ms": 1e3 * float(np.percentile(seconds, 95)), "calls": len(seconds)}


def measure(run: str, paths: Sequence[str], labels: Sequence[str], *, asked: int) -> dict[str, Any]:
    """Latencies of single clips, a classifier of all but ``asked`` of them.

    Raises:
        RuntimeError: the ways of computing an answer disagree.
    """
    model = amd_fast.load_model(run)
    queries, known, target = paths[-asked:], paths[:-asked], labels[:-asked]
    classifier = amd_fast.FewShotClassifier(model, trust="saved").fit(known, target)
    codes = torch.from_numpy(classifier._codes())
    each = [read_clip(path, model.frames, model.size, model.modalities) for path in known]
    support = {name: torch.stack([clip[name] for clip in each]) for name in model.modalities}
    for path in queries[:3]:  # also warms up
        ours = classifier.predict_proba([path])[0]
        others = stages(model, classifier, path)[1], plain(model, support, codes, path).exp().numpy()
        if any(np.abs(ours - other).max() > TOLERANCE for other in others):
            raise RuntimeError(f"{path}: the classifier says {ours}, stage by stage and plain PyTorch say {others}")
    parts = [stages(model, classifier, path)[0] for path in queries]
    growing = amd_fast.FewShotClassifier(model, trust="saved").fit(known[:1], target[:1])
    rest = list(zip(queries, labels[-asked:], strict=True))
    return {
        "clips enrolled": len(known),
        "classes": len(classifier.classes_),
        "enroll one": summary(timed([lambda p=path, y=label: growing.partial_fit([p], [y]) for path, label in rest])),  # type: ignore[misc]
        "predict one": summary(timed([lambda p=path: classifier.predict([p]) for path in queries])),  # type: ignore[misc]
        "stages": {name: summary([part[name] for part in parts]) for name in STAGES},
        "sum of stages": summary([sum(part.values()) for part in parts]),
        "plain PyTorch": summary(timed([lambda p=path: plain(model, support, codes, p) for path in queries[: max(5, asked // 4)]])),  # type: ignore[misc]
    }
