"""The episodic protocol against plain loops, calibration, ablations, and the commands on real files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import amd_fast
from amd_fast.cli import main
from amd_fast.data.clips import ClipTransform, RawClip, decode_clip
from amd_fast.data.episodes import episode
from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import EpisodeError
from amd_fast.evaluation.ablations import FULL, ablate
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol import Condition, Features, calibrate, calibration_condition, draw, evaluate, evaluate_condition


def bank(seed: int, classes: int = 7, clips: int = 12, damage: bool = True, dim: int = 32, modalities: int = 2) -> FeatureBank:
    """Clips whose tokens lie around a centre of their class; one modality of the damaged ones is noise."""
    generator = torch.Generator().manual_seed(seed)
    label = np.repeat([f"class {i:02d}" for i in range(classes)], clips)
    centre = torch.randn(classes, modalities, 1, dim, generator=generator)
    tokens = centre.repeat_interleave(clips, 0) + 2.0 * torch.randn(classes * clips, modalities, 4, dim, generator=generator)
    names = np.array(["", "", "dark", "shake"] * (classes * clips // 4))
    damaged = np.array(["", "", "rgb", "flow"] * (classes * clips // 4))
    if damage:
        for number, name in enumerate(("rgb", "flow")[:modalities]):
            noise = 3.0 * torch.randn(len(label), 1, dim, generator=generator)
            tokens[damaged == name, number] = (tokens[:, number] * 0.2 + noise)[damaged == name]
    table = pd.DataFrame({"path": [f"{i}.mp4" for i in range(len(label))], "label": label, "group": [str(i) for i in range(len(label))]})
    table["damage"], table["damaged_modality"] = (names, damaged) if damage else ("", "")
    weight = np.zeros(tokens.shape[:3], dtype=np.float32)
    return FeatureBank(tokens.numpy(), weight, table, {"clips_lost": 0})


@pytest.fixture
def model() -> amd_fast.AFMIR:
    torch.manual_seed(0)
    return amd_fast.create_model("afmir_small", dim=32).eval()


def test_batched_scores_equal_the_model_called_episode_by_episode(model: amd_fast.AFMIR) -> None:
    clips, condition = bank(0), Condition(ways=4, shots=2, queries=2, episodes=5, seed=3)
    scores = evaluate_condition(model, Features.of(model, clips), condition)
    descriptors, present = clips.describe(model)
    for number in range(condition.episodes):
        drawn = episode(number, clips.labels, ways=4, shots=2, queries=2, seed=3, groups=clips.groups)
        assert scores.query_id[number].tolist() == drawn.query.tolist()
        labels = torch.arange(4).repeat_interleave(2)[None]
        support, query = torch.from_numpy(drawn.support)[None], torch.from_numpy(drawn.query)[None]
        with torch.no_grad():
            alone = model.judge(model.match(descriptors[support], labels, descriptors[query], present[support], present[query], ways=4))
        np.testing.assert_allclose(scores.log_probs["ami"][number], alone.log_probs[0].numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scores.policy[number], alone.beliefs.policy[0].numpy(), atol=1e-5)
        uniform = torch.logsumexp(alone.view_log_probs[0], 1) - np.log(3)
        np.testing.assert_allclose(scores.log_probs["uniform"][number], uniform.numpy(), rtol=1e-5, atol=1e-5)
        names = [str(name) for name in drawn.classes]
        assert [scores.classes[i] for i in scores.episode_classes[number]] == names
        assert [clips.labels[i] for i in scores.query_id[number]] == [names[t] for t in scores.target[number]]


def test_queries_are_of_the_kind_asked_for_and_supports_clean(model: amd_fast.AFMIR) -> None:
    clips = bank(1)
    clean = (clips.table["damage"] == "").to_numpy()
    for kind, allowed in (("clean", clean), ("damaged", ~clean), ("mixed", np.ones_like(clean))):
        drawn = draw(clips, Condition(5, 2, 1, 200, 0, kind))  # type: ignore[arg-type]
        assert clean[drawn.support].all() and allowed[drawn.query].all()
        assert not any(set(s) & set(q) for s, q in zip(drawn.support, drawn.query, strict=True))
    with pytest.raises(EpisodeError, match="column 'damage'"):
        draw(bank(1, damage=False), Condition(query_clips="clean"))


def test_calibration_finds_the_damaged_modality_and_evaluating_leaves_the_model_alone(model: amd_fast.AFMIR) -> None:
    before = {name: value.clone() for name, value in model.generative_model.state_dict().items()}
    result = evaluate(model, bank(2), episodes=400, shots=(1, 5), calibration=bank(3), calibration_episodes=300)
    assert all(torch.equal(value, before[name]) for name, value in model.generative_model.state_dict().items())
    assert [condition.name for condition in result.conditions] == ["clean, 1-shot", "damaged, 1-shot", "clean, 5-shot", "damaged, 5-shot"]
    summary = result.summary().set_index(["condition", "method"])["accuracy"]
    for shots in (1, 5):
        assert summary[f"damaged, {shots}-shot", "ami"] > summary[f"damaged, {shots}-shot", "uniform"] + 2
        assert summary[f"clean, {shots}-shot", "ami"] > 100 / 5
    again = evaluate(model, bank(2), episodes=400, shots=(1, 5), calibration=bank(3), calibration_episodes=300)
    pd.testing.assert_frame_equal(again.summary(), result.summary())


def test_calibration_starts_afresh(model: amd_fast.AFMIR) -> None:
    features = Features.of(model, bank(4))
    condition = calibration_condition(features.bank, Condition(episodes=100))
    assert condition.query_clips == "mixed" and calibration_condition(features.bank, Condition(ways=50)).ways == 7
    first = calibrate(model, features, condition)
    counts = model.generative_model.counts.clone()
    assert calibrate(model, features, condition) == first and torch.equal(model.generative_model.counts, counts)


def test_class_names_and_their_order_change_no_number(model: amd_fast.AFMIR) -> None:
    clips = bank(5)
    renamed = replace(clips, table=clips.table.assign(label=clips.table["label"].str.replace("class", "another name")))
    first, second = (evaluate(model, which, episodes=50) for which in (clips, renamed))
    pd.testing.assert_frame_equal(first.summary(), second.summary())


def test_one_modality_needs_no_fusion() -> None:
    model = amd_fast.create_model("afmir_small", modalities=("rgb",), dim=32).eval()
    result = evaluate(model, bank(6, modalities=1), episodes=50, calibration=bank(7, modalities=1), calibration_episodes=50)
    summary = result.summary().set_index(["condition", "method"])["accuracy"]
    assert summary["clean, 1-shot", "rgb"] == summary["clean, 1-shot", "ami"] == summary["clean, 1-shot", "uniform"]


def test_ablations_change_what_they_say_and_nothing_else(model: amd_fast.AFMIR) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = ablate(model, bank(8), bank(9), Condition(episodes=200), train=bank(10), calibration_episodes=200)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = [
        FULL,
        "gamma fixed at 1",
        "gamma fixed at 16",
        "counts learned on the training classes",
        "no joint view",
        "no surprise channel",
    ]
    for _, rows in table.groupby("condition"):
        assert rows["variant"].tolist() == names
        rows = rows.set_index("variant")
        assert np.isnan(rows.loc[FULL, "difference"])
        for name in names[1:]:
            assert rows.loc[name, "difference"] == pytest.approx(rows.loc[name, "accuracy"] - rows.loc[FULL, "accuracy"])
    damaged = table[table["condition"] == "damaged, 1-shot"].set_index("variant")["accuracy"]
    assert damaged["no surprise channel"] != damaged[FULL] != damaged["no joint view"]


def test_train_and_evaluate_on_a_folder_with_all_kinds_of_bad_files(tmp_path: Path) -> None:
    """Index finishes, says what it left out, training runs, evaluation writes its files: the whole way through the commands."""
    made = synthesize(tmp_path / "made", classes=8, clips_per_class=5, size=48, damage=False, workers=1, progress=False)
    names = ["a # b", "c & d", "e;f", "(g)", "h!", "[i", "same", "SAME"]
    folder = tmp_path / "videos"
    for label, name in zip(made.classes, names, strict=True):
        (folder / name).mkdir(parents=True)
        for position in np.flatnonzero(made.labels == label):
            file = made.file(int(position))
            file.rename(folder / name / f"clip @ {position}{file.suffix}")
    some = sorted((folder / "(g)").iterdir())
    (folder / "h!" / "empty.mp4").touch()
    (folder / "h!" / "truncated.mp4").write_bytes(some[0].read_bytes()[:700])
    (folder / "h!" / "text.mp4").write_text("not a video")
    manifest, run = tmp_path / "manifest.csv", tmp_path / "run"
    assert main(["index", str(folder), "--output", str(manifest), "--split", "4/2/2"]) == 0
    rejected = pd.read_csv(tmp_path / "manifest.rejected.csv")
    assert sorted(Path(path).name for path in rejected["path"]) == ["empty.mp4", "text.mp4", "truncated.mp4"]
    assert rejected["reason"].str.len().min() > 0 and rejected["remedy"].str.len().min() > 0
    options = ["--data.size=32", "--data.frames=4", "--episode.ways=2", "--episode.queries=1", "--validation.episodes=10", "--threads=1"]
    options += ['--model.options={"dim": 32}', "--optimiser.steps=3", "--tensorboard=false"]
    assert main(["train", "--data.manifest", str(manifest), "--output", str(run), *options]) == 0
    asked = ["--ways", "2", "--shots", "1", "3", "--episodes", "20"]
    assert main(["evaluate", str(run), *asked, "--ablations", "--baselines", "--compare", str(run), "--note", "a remark & more"]) == 0
    written = {path.name for path in (run / "evaluation").iterdir()}
    assert {"results.json", "summary.csv", "tests.csv", "episodes.csv.gz", "report.html"} <= written
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert {row["condition"] for row in results["summary"]} == {"1-shot", "3-shot"}
    page = (run / "evaluation" / "report.html").read_text()
    assert "a remark &amp; more" in page
    tested = Manifest.from_csv(manifest)
    for text in (tested.split_hash(), tested.hash()):
        assert text in page and text in results["meta"].values()
    assert results["meta"]["split"].startswith(f"{tested.split_name} (train ")
    assert "gamma fixed at 16" in page and "nearest centroid, mean frame" in page and "run: ami" in page


def test_evaluate_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "--manifest" in capsys.readouterr().err


def test_crops_are_one_larger_set_of_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = amd_fast.create_model("afmir_small", dim=32, size=32, frames=2).eval()
    made = synthesize(tmp_path / "made", classes=5, clips_per_class=2, size=48, damage=False, workers=1, progress=False)
    whole = FeatureBank.build(model, made, crops=3, batch=4, progress=False)
    assert whole.tokens.shape == (10, 2, 6, 32) and whole.log_weight.shape == (10, 2, 6)
    for number, place in enumerate((0.0, 0.5, 1.0)):
        view = ClipTransform(32, ("rgb", "flow"), train=False, place=place)
        for row in (0, 7):
            raw = decode_clip(made.file(row), 2, short_side=round(32 * 8 / 7), modalities=("rgb", "flow"))
            with torch.no_grad():
                tokens, _ = model.encode({name: value[None] for name, value in view(raw).items()})
            np.testing.assert_allclose(whole.tokens[row, :, 2 * number : 2 * number + 2], tokens[0].numpy(), atol=1e-5)
    wide = RawClip(rgb=np.arange(40 * 60, dtype=np.uint8).reshape(1, 40, 60, 1).repeat(3, 3))
    left, middle, right = (ClipTransform(40, ("rgb",), train=False, place=place)(wide)["rgb"] for place in (0.0, 0.5, 1.0))
    whole_picture = torch.cat([left, right[..., -20:]], -1)
    assert torch.equal(middle, whole_picture[..., 10:50])
