"""The feature bank on disk: what is in it, that it survives being killed, and that a stale one is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import amd_fast
from amd_fast.cli import main
from amd_fast.data.clips import ClipTransform, decode_clip
from amd_fast.data.decoders import DecoderChoice
from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import ConfigError, DataError, ImplementationError
from amd_fast.evaluation import bank as bank_module
from amd_fast.evaluation.bank import FeatureBank, Reading, clip_loader
from amd_fast.evaluation.extract import Extraction, parse_shard
from amd_fast.training.checkpoint import save_model
from amd_fast.training.config import DataOptions, TrainConfig

RECIPE = {"name": "afmir_small", "modalities": ["rgb", "flow"], "dim": 32, "size": 32, "frames": 2, "loss": {}}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return synthesize(tmp_path_factory.mktemp("made"), classes=6, clips_per_class=3, size=48, damage=False, workers=1, progress=False)


@pytest.fixture
def model() -> amd_fast.AFMIR:
    torch.manual_seed(0)
    return amd_fast.create_model("afmir_small", dim=32, size=32, frames=2).eval()


@pytest.fixture
def run(tmp_path: Path, model: amd_fast.AFMIR) -> str:
    path = tmp_path / "model.safetensors"
    save_model(model, path, dict(RECIPE))
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def broken(clips: Manifest, rows: tuple[int, ...]) -> Manifest:
    """The same clips under absolute paths, the given rows naming files that are not there."""
    table = clips.table.copy()
    table["path"] = [str(clips.file(i)) + (".gone" if i in rows else "") for i in range(len(clips))]
    return Manifest(table, clips.root)


@pytest.mark.parametrize("lost", [(), (0, 7, 17)])
def test_on_disk_equals_in_memory(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR, lost: tuple[int, ...]) -> None:
    table = broken(clips, lost)
    memory = FeatureBank.build(model, table, batch=4, progress=False)
    disk = FeatureBank.build(model, table, tmp_path / "bank", batch=4, progress=False)
    assert isinstance(disk.tokens, np.memmap)
    np.testing.assert_array_equal(disk.tokens, memory.tokens)
    np.testing.assert_array_equal(disk.log_weight, memory.log_weight)
    assert disk.table.equals(memory.table) and len(disk) == len(clips) - len(lost)
    assert disk.meta == {**memory.meta, "key": disk.meta["key"]}
    assert list(disk.meta["lost"]) == [table.table["path"][row] for row in lost]
    assert all(disk.meta["lost"].values()) and disk.meta["clips_lost"] == len(lost)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank"]
    FeatureBank(memory.tokens, memory.log_weight, memory.table, disk.meta).save(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "bank")


def test_views_are_the_clip_sampled_several_times(clips: Manifest, model: amd_fast.AFMIR) -> None:
    bank = FeatureBank.build(model, clips, views=3, crops=2, batch=5, progress=False)
    assert bank.tokens.shape == (len(clips), 2, 2 * 3 * 2, 32)
    raw = decode_clip(clips.file(4), 6, short_side=round(32 * 8 / 7), modalities=("rgb", "flow"))
    for crop, place in enumerate((0.0, 1.0)):
        whole = ClipTransform(32, ("rgb", "flow"), train=False, place=place)(raw)
        for view in range(3):
            with torch.no_grad():
                tokens, _ = model.encode({name: value[None, view::3] for name, value in whole.items()})
            start = 2 * (3 * crop + view)
            np.testing.assert_allclose(bank.tokens[4, :, start : start + 2], tokens[0].numpy(), atol=1e-5)


def test_half_precision_halves_the_file_and_rounds_to_eleven_bits(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR) -> None:
    full = FeatureBank.build(model, clips, tmp_path / "full", progress=False)
    half = FeatureBank.build(model, clips, tmp_path / "half", dtype="float16", progress=False)
    assert half.tokens.dtype == np.float16 and half.tokens.nbytes * 2 == full.tokens.nbytes
    np.testing.assert_allclose(half.tokens.astype(np.float32), full.tokens, rtol=2.0**-11, atol=2.0**-24)
    one, two = (bank.describe(model)[0] for bank in (full, half))
    assert one.dtype == two.dtype == torch.float32
    assert float((one - two).norm() / one.norm()) < 2.0**-10


def test_two_parts_make_one_bank(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR) -> None:
    reading, table = Reading(), broken(clips, (5,))
    Extraction(tmp_path / "one", model, table, reading, batch=4).run(clip_loader(model, table, reading), progress=False)
    first, second = (Extraction(tmp_path / "two", model, table, reading, shard=(n, 2), batch=4) for n in (1, 2))
    assert not first.run(clip_loader(model, table, reading), progress=False)
    assert not (tmp_path / "two").exists()
    assert second.run(clip_loader(model, table, reading), progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not (tmp_path / "two.partial").exists()


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.BaseContext:
    """Processes that start in milliseconds: forked from one that has imported everything and computed nothing."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["amd_fast.cli", "amd_fast.evaluation.extract", "amd_fast.evaluation.command", "amd_fast.training.engine"]
    )
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    process = server.Process(target=main, args=(["--version"],))
    process.start()
    process.join()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    return server


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no forkserver here")
def test_killed_ten_times_the_bank_ends_with_the_same_bytes(
    tmp_path: Path, clips: Manifest, run: str, context: multiprocessing.context.BaseContext
) -> None:
    manifest = tmp_path / "manifest.csv"
    broken(clips, (2, 11)).to_csv(manifest)

    def start(output: str, shard: str) -> multiprocessing.Process:
        arguments = ["extract", run, "--manifest", str(manifest), "--batch", "1", "--workers", "1", "--shard", shard]
        process = context.Process(target=main, args=([*arguments, "--output", str(tmp_path / output)],))  # type: ignore[attr-defined]
        process.start()
        return process

    began = time.monotonic()
    whole = start("whole", "1/1")
    whole.join()
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    draw, kills, finished = random.Random(0), 0, 0
    while kills < 10:
        both = [start("killed", f"{n}/2") for n in (1, 2)]
        time.sleep(draw.uniform(0.2, 0.7) * duration)
        for process in both:
            process.kill()
            process.join()
            kills += process.exitcode == -9
        if (tmp_path / "killed").exists():  # got through before the kill: it has to be right too, and begins anew
            finished += 1
            assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
            (tmp_path / "killed").rmdir()
    last = start("killed", "1/1")
    last.join()
    assert last.exitcode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()


def test_a_line_cut_short_counts_as_not_written(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR) -> None:
    reading = Reading()
    work = Extraction(tmp_path / "bank", model, clips, reading, shard=(1, 2), batch=4)
    work.run(clip_loader(model, clips, reading), progress=False)
    journal = work.partial / "journal-1-of-2.jsonl"
    blocks = [json.loads(line)["block"] for line in journal.read_text().splitlines()]
    assert blocks == [0, 2, 4]
    for cut in (b'{"block": 4, "lo', b'{"block": 4, "lost": {}}'):
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:2]) + cut)
        tokens = np.load(work.partial / "bank" / "tokens.npy", mmap_mode="r+")
        tokens[16:] = 7  # what a block half written might have left
        tokens.flush()
        again = Extraction(tmp_path / "bank", model, clips, reading, shard=(1, 2), batch=99)
        assert again.batch == 4
        again.run(clip_loader(model, clips, reading), progress=False)
        assert again._journal()[0] == {0, 2, 4}
    assert not (np.load(work.partial / "bank" / "tokens.npy")[16:] == 7).any()


def test_a_stale_bank_is_refused_and_says_what_differs(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR) -> None:
    path = tmp_path / "bank"
    bank = FeatureBank.build(model, clips, path, progress=False)
    bank.check(model, clips)
    with torch.no_grad():
        model.readout.seed.add_(1.0)
        model.generative_model.precision.fill_(3.0)
    bank.check(model, clips)  # what comes after the tokens does not make it stale
    before = contents(path)
    FeatureBank.build(model, clips, path, progress=False)
    assert contents(path) == before
    with pytest.raises(DataError, match=r"manifest \(bank [0-9a-f]{12}, now"):
        bank.check(model, clips.subset(classes=clips.classes[:2]))
    for change, message in (("size", r"size \(bank 32, now 48\)"), ("frames", r"frames \(bank 2, now 3\)")):
        other = amd_fast.create_model("afmir_small", dim=32, **{"size": 32, "frames": 2, change: {"size": 48, "frames": 3}[change]}).eval()
        other.load_state_dict(model.state_dict())
        with pytest.raises(DataError, match=message):
            bank.describe(other)
    with pytest.raises(DataError, match=r"crops \(bank 1, now 2\)"):
        FeatureBank.build(model, clips, path, crops=2, progress=False)
    with torch.no_grad():
        model.projections["rgb"][0].bias[0] += 1e-3
    with pytest.raises(DataError, match=r"weights \(bank"):
        bank.describe(model)
    with pytest.raises(DataError, match=r"weights \(bank.*overwrite"):
        FeatureBank.build(model, clips, path, progress=False)
    assert contents(path) == before
    FeatureBank.build(model, clips, path, overwrite=True, progress=False).check(model, clips)


def test_an_unfinished_bank_of_something_else_is_refused(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR) -> None:
    path, reading = tmp_path / "bank", Reading()
    Extraction(path, model, clips, reading, shard=(1, 2), batch=4).run(clip_loader(model, clips, reading), progress=False)
    with pytest.raises(DataError, match="not a finished one"):
        FeatureBank.open(path)
    with pytest.raises(DataError, match=r"unfinished bank made from other dtype"):
        FeatureBank.build(model, clips, path, dtype="float16", progress=False)
    assert FeatureBank.build(model, clips, path, dtype="float16", overwrite=True, progress=False).tokens.dtype == np.float16
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="is no feature bank"):
        FeatureBank.build(model, clips, tmp_path / "photos", progress=False)


def test_settings_out_of_range_are_refused(clips: Manifest, model: amd_fast.AFMIR, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"crops": 0}, {"views": 0}, {"dtype": "int8"}):
        with pytest.raises(ConfigError):
            Reading(**wrong)  # type: ignore[arg-type]
    for text in ("0/2", "3/2", "1", "a/b", "1/", "-1/2"):
        with pytest.raises(ConfigError, match="shard"):
            parse_shard(text)
    assert parse_shard("2/4") == (2, 4) and parse_shard("") == (1, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse_shard("") == (4, 8)
    with pytest.raises(ConfigError, match="views"):
        FeatureBank.build(model, clips, views=2, loader=clip_loader(model, clips, Reading()), progress=False)
    nothing = broken(clips, tuple(range(18)))
    with pytest.raises(DataError, match="none of the 18 clips"):
        FeatureBank.build(model, nothing, loader=clip_loader(model, nothing, Reading(), max_lost=1), progress=False)


def test_a_subset_of_neighbouring_rows_stays_on_disk(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR) -> None:
    bank = FeatureBank.build(model, clips, tmp_path / "bank", progress=False)
    near, far = np.arange(18) // 6 == 1, np.arange(18) % 5 == 0
    assert bank.subset(near).tokens.base is not None and isinstance(bank.subset(near).tokens, np.memmap)
    for mask in (near, far, np.zeros(18, bool)):
        part = bank.subset(mask)
        np.testing.assert_array_equal(part.tokens, bank.tokens[mask])
        assert part.labels.tolist() == bank.labels[mask].tolist()


def summary(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "results.json").read_text())["summary"]


def test_evaluating_from_a_bank_a_list_and_the_clips_gives_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = synthesize(tmp_path / "made", classes=10, clips_per_class=4, size=48, damage=False, workers=1, progress=False)
    manifest, model = tmp_path / "manifest.csv", tmp_path / "model.safetensors"
    made.with_splits({name: "val" if i < 5 else "test" for i, name in enumerate(made.classes)}).to_csv(manifest)
    torch.manual_seed(0)
    save_model(amd_fast.create_model("afmir_small", dim=32, size=32, frames=2).eval(), model, dict(RECIPE))
    bank, listed = str(tmp_path / "bank"), str(tmp_path / "list.csv.gz")
    assert main(["extract", str(model), "--manifest", str(manifest), "--output", bank, "--workers", "1"]) == 0
    shape = ["--ways", "3", "--episodes", "30"]
    assert main(["episodes", str(manifest), listed, *shape, "--seed", "2"]) == 0
    ways = {
        "clips": ["--manifest", str(manifest), *shape, "--seed", "2"],
        "bank": ["--bank", bank, "--manifest", str(manifest), *shape, "--seed", "2"],
        "listed": ["--bank", bank, "--protocol", listed],
    }
    for name, options in ways.items():
        seeds = ["--seeds", "2"] if name == "bank" else ["--shots", "1"]
        assert main(["evaluate", str(model), *options, "--shots", "1", *seeds, "--output", str(tmp_path / name)]) == 0
    assert summary(tmp_path / "bank") == summary(tmp_path / "listed") == summary(tmp_path / "clips")
    seeds = (tmp_path / "bank" / "seeds.csv").read_text().splitlines()
    assert len(seeds) == 1 + 5 and seeds[0].startswith("condition,method,seeds")
    for wrong, message in (
        (["--bank", bank, "--crops", "2"], "those of the bank"),
        (["--bank", bank, "--group", "group"], "those of the bank"),
        (["--bank", bank, "--protocol", listed, "--seeds", "2"], "--seeds"),
        (["--bank", bank, "--seeds", "0"], "--seeds"),
        (["--bank", bank, "--protocol", listed, "--split", "val", "--calibration-split", "none"], "that are not among the 20"),
    ):
        capsys.readouterr()
        assert main(["evaluate", str(model), *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    other = amd_fast.create_model("afmir_small", dim=32, size=32, frames=2).eval()
    save_model(other, model, dict(RECIPE))
    assert main(["evaluate", str(model), "--bank", bank]) == 2
    assert "stale" in capsys.readouterr().err


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decoders that banks' loaders were made with."""
    made: list[str] = []
    original = bank_module.ClipLoader

    def loader(*arguments: object, **options: object) -> object:
        made.append(str(options["decoder"]))
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bank_module, "ClipLoader", loader)
    return made


def test_a_bank_is_read_by_the_decoder_that_is_named(clips: Manifest, model: amd_fast.AFMIR, decoders: list[str]) -> None:
    for decoder in ("pyav", "auto"):
        FeatureBank.build(model, clips, decoder=decoder, progress=False)  # type: ignore[arg-type]
    FeatureBank.build(model, clips, progress=False)
    assert decoders == ["pyav", "auto", "auto"]
    codec = clips.table["codec"][0]
    with pytest.raises(ImplementationError, match=rf"NVIDIA DALI is not installed|not {codec}"):
        FeatureBank.build(model, clips, decoder="dali", progress=False)
    with pytest.raises(ConfigError, match="unknown decoder 'decord'"):
        FeatureBank.build(model, clips, decoder="decord", progress=False)  # type: ignore[arg-type]


def test_a_named_decoder_is_not_replaced_by_a_bank_that_another_one_read(
    tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_pyav = FeatureBank.build(model, clips, tmp_path / "pyav", progress=False)
    assert by_pyav.meta["key"]["transform"]["decoder"] == "pyav"  # nobody else reads on a CPU
    FeatureBank.build(model, clips, tmp_path / "pyav", decoder="pyav", progress=False)
    with monkeypatch.context() as gpu:  # as on one that decodes this codec
        gpu.setattr(bank_module, "choose_decoder", lambda codec, decoder, device: DecoderChoice("dali", "for this test"))
        FeatureBank.build(model, clips, tmp_path / "auto", progress=False)
    with pytest.raises(DataError, match=r"decoder \(bank auto, now pyav\).*overwrite"):
        FeatureBank.build(model, clips, tmp_path / "auto", decoder="pyav", progress=False)
    found = FeatureBank.build(model, clips, tmp_path / "auto", progress=False)
    found.check(model, clips)
    assert found.meta["key"]["transform"]["decoder"] == "auto"
    again = FeatureBank.build(model, clips, tmp_path / "auto", decoder="pyav", overwrite=True, progress=False)
    assert again.meta["key"] == by_pyav.meta["key"]


@pytest.mark.parametrize(
    ("trained", "options", "expected"),
    [
        ("auto", [], "auto"),
        ("pyav", [], "pyav"),
        ("dali", [], "auto"),
        ("pyav", ["--decoder", "auto"], "auto"),
        ("auto", ["--decoder", "pyav"], "pyav"),
    ],
)
def test_commands_read_with_the_decoder_asked_for_or_the_runs_own_pyav(
    trained: str, options: list[str], expected: str, tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR, decoders: list[str]
) -> None:
    manifest, run = tmp_path / "manifest.csv", tmp_path / "run"
    clips.with_splits(dict.fromkeys(clips.classes, "test")).to_csv(manifest)
    (run / "checkpoints").mkdir(parents=True)
    save_model(model, run / "checkpoints" / "best.safetensors", dict(RECIPE))
    data = DataOptions(manifest=str(manifest), decoder=trained)  # type: ignore[arg-type]
    (run / "config.yaml").write_text(TrainConfig(output=str(run), data=data).to_yaml())
    assert main(["extract", str(run), *options]) == 0
    asked = ["--ways", "2", "--shots", "1", "--episodes", "5", "--calibration-split", "none"]
    assert main(["evaluate", str(run), *asked, *options]) == 0
    assert decoders == [expected, expected]


def test_a_model_without_a_run_is_read_with_auto(run: str, tmp_path: Path, clips: Manifest, decoders: list[str]) -> None:
    clips.to_csv(tmp_path / "manifest.csv")
    (tmp_path / "config.yaml").write_text("of: something else\n")
    assert main(["extract", run, "--manifest", str(tmp_path / "manifest.csv"), "--output", str(tmp_path / "bank")]) == 0
    assert decoders == ["auto"]


def test_the_group_that_is_named_holds_without_a_manifest_too(tmp_path: Path, clips: Manifest, model: amd_fast.AFMIR) -> None:
    """All clips of a class being one recording, no episode can be made."""
    manifest, run = tmp_path / "manifest.csv", tmp_path / "run"
    table = clips.with_splits(dict.fromkeys(clips.classes, "test")).table
    Manifest(table.assign(camera=table["label"]), clips.root).to_csv(manifest)
    (run / "checkpoints").mkdir(parents=True)
    save_model(model, run / "checkpoints" / "best.safetensors", dict(RECIPE))
    (run / "config.yaml").write_text(TrainConfig(output=str(run), data=DataOptions(manifest=str(manifest))).to_yaml())
    assert main(["extract", str(run), "--group", "camera"]) == 0
    bank = FeatureBank.open(run / "bank")
    assert bank.groups.tolist() == bank.labels.tolist()
    asked = ["--ways", "2", "--shots", "1", "--episodes", "5", "--calibration-split", "none"]
    assert main(["evaluate", str(run), *asked]) == 0
    assert main(["evaluate", str(run), *asked, "--group", "camera"]) == 2
