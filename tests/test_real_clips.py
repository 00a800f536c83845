"""The main job on real clips with three modalities, one of them missing from half of the clips. Skipped where the clips are absent."""

from pathlib import Path

import numpy as np
import pytest

from amd_fast.data.index import index
from amd_fast.data.manifest import Manifest
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.baselines import evaluate_baselines
from amd_fast.evaluation.protocol import evaluate
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, OptimiserOptions, TrainConfig, ValidationOptions
from amd_fast.training.engine import train

TRAINED, TESTED = ("active", "falled", "walk"), ("falling", "sitdown", "standup")


@pytest.fixture(scope="module")
def manifest(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some clips of the bed-side set: RGB with flow, thermal for some of them, grouped by recording."""
    found = index(shared_data / "fir" / "manifest.csv", "csv", group="source_video", modalities=("thermal",), progress=False)
    assert len(found) == 163 and not len(found.rejected) and tuple(found.modalities) == ("thermal",)
    assert int((found.table["thermal"] != "").sum()) == 86
    rows = found.table[found.table["label"].isin(TRAINED + TESTED)].groupby("label").head(12)
    splits = dict.fromkeys(TRAINED, "train") | dict.fromkeys(TESTED, "test")
    path = tmp_path_factory.mktemp("fir") / "manifest.csv"
    rows = rows.assign(path=[str(found.root / name) for name in rows["path"]], split=rows["label"].map(splits))
    rows["thermal"] = [str(found.root / name) if name else "" for name in rows["thermal"]]
    Manifest(rows, path.parent).to_csv(path)
    return Manifest.from_csv(path)


def test_train_on_some_classes_and_test_on_the_others(manifest: Manifest, tmp_path: Path) -> None:
    config = TrainConfig(
        output=str(tmp_path / "run"),
        threads=1,
        tensorboard=False,
        model=ModelOptions(modalities=["rgb", "flow", "thermal"], options={"dim": 32}),
        data=DataOptions(manifest=str(manifest.root / "manifest.csv"), size=32, frames=4, cache="none", workers=1),
        episode=EpisodeOptions(ways=2, queries=1),
        optimiser=OptimiserOptions(steps=4, warmup_steps=1),
        validation=ValidationOptions(episodes=10),
    )
    model = train(config, progress=False).model()
    tested = manifest.subset(split="test")
    bank = FeatureBank.build(model, tested, workers=1, progress=False)
    missing = ~np.isfinite(bank.log_weight[:, 2, 0])
    assert np.array_equal(missing, (tested.table["thermal"] == "").to_numpy()) and 0 < missing.sum() < len(missing)
    result = evaluate(model, bank, ways=3, shots=(1, 2), episodes=40)
    for scores in result.conditions:
        groups = bank.groups
        for support, query in zip(scores.support_id, scores.query_id, strict=True):
            assert not set(groups[support]) & set(groups[query])
        absent = missing[scores.query_id]
        assert (scores.policy[absent, 2] == 0).all()
        np.testing.assert_allclose(scores.log_probs["thermal"][absent], -np.log(3), atol=1e-5)
    table = evaluate_baselines(tested, result.conditions, rows=bank.table, frames=4, short_side=64, progress=False)
    assert set(table["condition"]) == {"1-shot", "2-shot"} and table["accuracy"].between(0, 100).all()
