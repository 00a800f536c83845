"""Baselines equal plain loops and scikit-learn, and their descriptors see what they are named for."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from amd_fast.data.manifest import Manifest
from amd_fast.errors import DataError
from amd_fast.evaluation import baselines
from amd_fast.evaluation.logistic import logistic_log_probs
from amd_fast.evaluation.scores import ConditionScores


def clip(seed: int, flow: tuple[float, float] = (1.0, 0.0), frames: int = 4, height: int = 40, width: int = 56) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "rgb": rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8),
        "flow": np.broadcast_to(np.asarray(flow, np.float16), (frames, height, width, 2)),
    }


def write_square(path: Path, step: int, top: int, side: int = 96, frames: int = 16) -> None:
    """A video of a textured square that moves sideways by ``step`` pixels a frame."""
    texture = np.random.default_rng(top).integers(60, 256, (24, 24, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            image = np.zeros((side, side, 3), np.uint8)
            left = 12 + step * t if step > 0 else side - 36 + step * t
            image[top : top + 24, left : left + 24] = texture
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def episodes(seed: int, count: int = 12, ways: int = 3, shots: int = 2, queries: int = 2) -> tuple[np.ndarray, ...]:
    """Features of 40 clips of 5 noisy classes, support, query and target of random episodes over them."""
    rng = np.random.default_rng(seed)
    features = np.repeat(rng.normal(size=(5, 12)), 8, axis=0) + rng.normal(size=(40, 12))
    support, query = np.empty((count, ways * shots), int), np.empty((count, ways * queries), int)
    for e in range(count):
        rows = [8 * k + rng.permutation(8) for k in rng.permutation(5)[:ways]]
        support[e] = np.concatenate([r[:shots] for r in rows])
        query[e] = np.concatenate([r[shots : shots + queries] for r in rows])
    return features.astype(np.float32), support, query, np.tile(np.repeat(np.arange(ways), queries), (count, 1))


def test_nearest_centroid_equals_a_loop() -> None:
    features, support, query, _ = episodes(0, count=300)  # more than one chunk
    got = baselines.score_baseline("nearest centroid, mean frame", features, support, query, 3, 2)
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-5)
    for e in (0, 17, 299):
        for q, row in enumerate(query[e]):
            x, cosine = features[row], []
            for k in range(3):
                c = features[support[e, 2 * k : 2 * k + 2]].mean(axis=0)
                cosine.append(x @ c / np.linalg.norm(x) / np.linalg.norm(c))
            weights = np.exp(np.array(cosine) / baselines.TEMPERATURE)
            np.testing.assert_allclose(np.exp(got[e, q]), weights / weights.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # scikit-learn takes the variance within classes of one clip
def test_one_shot_decisions_equal_scikit_learn_on_the_sphere() -> None:
    features, support, query, _ = episodes(1, shots=1)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    got = baselines.score_baseline("nearest centroid, flow histogram", features, support, query, 3, 1).argmax(-1)
    for e in range(len(query)):
        np.testing.assert_array_equal(got[e], NearestCentroid().fit(unit[support[e]], np.arange(3)).predict(unit[query[e]]))


@pytest.mark.parametrize(("ways", "shots", "width"), [(5, 1, 137), (5, 5, 600), (2, 3, 20), (3, 4, 2), (3, 2, 40)])
def test_logistic_regression_equals_scikit_learn(ways: int, shots: int, width: int) -> None:
    rng = np.random.default_rng(ways * shots)
    features = rng.normal(size=(90, width)) + np.repeat(rng.normal(size=(9, width)), 10, 0)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    features[7] = 0.0  # a clip with nothing to describe
    chosen = [np.concatenate([rng.choice(10, shots, replace=False) + 10 * c for c in rng.choice(9, ways, replace=False)]) for _ in range(8)]
    support, query = (
        np.stack([*chosen[:-1], np.repeat(chosen[-1][::shots], shots)]),
        rng.integers(0, 90, (8, 6)),
    )  # last: the same clip again
    got = logistic_log_probs(features, support, query, ways, strength=baselines.INVERSE_REGULARISATION)
    classes = np.repeat(np.arange(ways), shots)
    for e in range(len(support)):
        model = LogisticRegression(C=baselines.INVERSE_REGULARISATION, max_iter=5000, tol=1e-9)
        fresh = model.fit(features[support[e]].astype(np.float64), classes)
        np.testing.assert_allclose(np.exp(got[e]), fresh.predict_proba(features[query[e]].astype(np.float64)), atol=1e-5)
    assert np.array_equal(logistic_log_probs(features, support[3:4], query[3:4], ways), got[3:4])


def test_reduce_is_the_area_mean() -> None:
    image = np.random.default_rng(0).random((48, 32, 3)).astype(np.float32)
    want = image.reshape(16, 3, 16, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(baselines._reduce(image), want, rtol=1e-5)
    for size in (5, 16, 17, 100):
        np.testing.assert_allclose(baselines._overlap(size).sum(axis=1), 1, rtol=1e-5)


def test_flow_histogram_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    flow = rng.normal(size=(2, 10, 13, 2)).astype(np.float16) * 0.4
    oriented, speeds = np.zeros((4, 4, 8)), np.zeros(len(baselines.SPEED_EDGES) - 1)
    for t in range(2):
        for y in range(10):
            for x in range(13):
                u, v = flow[t, y, x].astype(np.float32) / 10
                speed, turn = np.hypot(u, v), np.arctan2(v, u) / (2 * np.pi) * 8
                low = int(np.floor(turn))
                oriented[y * 4 // 10, x * 4 // 13, low % 8] += speed * (1 - (turn - low))
                oriented[y * 4 // 10, x * 4 // 13, (low + 1) % 8] += speed * (turn - low)
                speeds[int(np.sum(speed >= baselines.SPEED_EDGES)) - 1] += 1
    want = np.sqrt(np.concatenate([oriented.ravel() / oriented.sum(), speeds / speeds.sum()]) / 2)
    np.testing.assert_allclose(baselines.baseline_features({**clip(0), "flow": flow})["flow histogram"], want, atol=1e-5)


def test_flow_histogram_tells_directions_apart() -> None:
    right, left, again = (baselines.baseline_features(clip(i, flow))["flow histogram"] for i, flow in enumerate([(2, 0), (-2, 0), (2, 0)]))
    assert right @ again == pytest.approx(1, abs=1e-3)
    assert right @ left == pytest.approx(0.5, abs=1e-3)  # the speeds agree, the directions do not


def test_image_descriptors_do_not_see_brightness_and_contrast() -> None:
    raw = clip(3)
    dark = {**raw, "rgb": (raw["rgb"] // 4 * 4 / 4 + 20).astype(np.uint8)}
    bright = {**raw, "rgb": raw["rgb"] // 4 * 4}
    a, b = baselines.baseline_features(dark), baselines.baseline_features(bright)
    assert a["mean frame"] @ b["mean frame"] == pytest.approx(1, abs=1e-4)
    assert a["frame differences"] @ b["frame differences"] == pytest.approx(1, abs=1e-4)


@pytest.mark.filterwarnings("error")
def test_still_black_and_single_frames_give_finite_vectors() -> None:
    for frames in (1, 3):
        raw = {"rgb": np.zeros((frames, 20, 20, 3), np.uint8), "flow": np.zeros((frames, 20, 20, 2), np.float16)}
        features = baselines.baseline_features(raw)
        assert all(np.isfinite(x).all() for x in features.values())
        assert {k: x.shape for k, x in features.items()} == {"mean frame": (768,), "frame differences": (256,), "flow histogram": (137,)}


def test_table_scores_every_baseline_that_has_its_descriptor() -> None:
    features, support, query, target = episodes(4)
    everything = dict.fromkeys(("mean frame", "frame differences", "flow histogram", "model"), features)
    arguments = {"ways": 3, "shots": 2}
    table = baselines.baseline_table(everything, support, query, target, condition="fir", **arguments)
    assert list(table["method"]) == list(baselines.BASELINES)
    assert list(table["episodes"]) == 5 * [12]
    assert table["accuracy"].between(50, 100).all()
    assert len(baselines.baseline_table({"mean frame": features}, support, query, target, **arguments)) == 1


def test_baselines_score_the_episodes_of_an_evaluation(tmp_path: Path) -> None:
    """Squares that move right or left: the flow tells them apart, whatever the mean frame says."""
    labels = [("right", "left")[i % 2] for i in range(8)]
    for i, label in enumerate(labels):
        write_square(tmp_path / f"{i}.mp4", step=3 if label == "right" else -3, top=8 + 5 * i)
    manifest = Manifest(pd.DataFrame({"path": [f"{i}.mp4" for i in range(8)], "label": labels}), tmp_path)
    rows = manifest.table.iloc[::-1].reset_index(drop=True)  # ids count the rows of this table, not the manifest's
    support, query = np.array([[0, 1], [2, 3]]), np.array([[4, 5, 6, 7], [0, 1, 4, 5]])  # rows 0, 2, ... are "left"
    uniform = np.full((2, 4, 2), -np.log(2), np.float32)
    scores = ConditionScores(
        name="clean",
        ways=2,
        shots=1,
        queries=2,
        seed=0,
        classes=["left", "right"],
        episode_classes=np.array([[0, 1], [0, 1]]),
        query_id=query,
        target=query % 2,
        log_probs={"rgb": uniform, "uniform": uniform, "ami": uniform},
        policy=np.ones((2, 4, 1), np.float32),
        views=("rgb",),
        support_id=support,
    )
    table = baselines.evaluate_baselines(manifest, [scores], rows=rows, short_side=64, progress=False).set_index("method")
    assert table.loc["nearest centroid, flow histogram", "accuracy"] == 100
    assert table.loc["logistic regression, flow histogram", "accuracy"] == 100
    assert list(table["condition"].unique()) == ["clean"]
    with pytest.raises(DataError, match="not in the manifest"):
        baselines.evaluate_baselines(manifest.subset(classes=["left"]), [scores], rows=rows, progress=False)
    with pytest.raises(DataError, match="support_id"):
        baselines.evaluate_baselines(manifest, [ConditionScores(**{**scores.__dict__, "support_id": None})])


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="need 'rgb'"):
        baselines.baseline_features({"flow": np.zeros((2, 8, 8, 2))})
    with pytest.raises(DataError, match="need 'flow'"):
        baselines.baseline_features({**clip(0), "flow": np.zeros((2, 8, 8))})
    features, support, query, _ = episodes(0)
    with pytest.raises(DataError, match="unknown baseline"):
        baselines.score_baseline("nearest neighbour", features, support, query, 3, 2)
    with pytest.raises(DataError, match="3 ways x 5 shots"):
        baselines.score_baseline("nearest centroid, mean frame", features, support, query, 3, 5)
