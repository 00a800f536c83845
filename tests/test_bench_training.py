"""The benchmark of the training step: what is checked before the clock, what is written, and that it needs no more than it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amd_fast import bench
from amd_fast.training.engine import Trainer

run = bench.load("training.run")
contenders = bench.load("training.contenders")
gate = bench.load("training.gate")
TINY = bench.load("recipe").Recipe("afmir_small", frames=2, size=32, ways=3, queries=1)
CPU = torch.device("cpu")
OPTIONS = {"model": "afmir_small", "frames": "2", "size": "32", "ways": "3", "queries": "1", "seconds": "0.05", "length": "1"}


def measure(*names: str, **options: Any) -> Any:
    return run.measure(TINY, CPU, names=names, seconds=0.05, **options)


def changed(monkeypatch: pytest.MonkeyPatch, how: Callable[[Trainer, torch.Tensor], torch.Tensor]) -> None:
    """Ours, with other shares of the loss or other gradients after the backward pass."""
    honest = Trainer.accumulate
    monkeypatch.setattr(Trainer, "accumulate", lambda self, batch: how(self, honest(self, batch)))


def test_ours_agrees_with_the_peer_in_either_precision_and_all_take_turns() -> None:
    report = measure("amd_fast", "amd_fast, precision=fp32", "amd_fast, impl=reference")
    peer, *ours = report.results
    assert peer.name == "eager float32" and peer.ratio == 1 and peer.precision == "float32"
    assert [result.name for result in ours] == list(contenders.SETTINGS)[:3]
    for result in ours:
        assert (result.status, result.peak_memory) == ("ok", None)
        assert result.ratio == pytest.approx(peer.time.p50 / result.time.p50)
        assert result.clips_per_second == pytest.approx(TINY.clips / result.time.p50)
    fp32 = ours[1]
    assert fp32.precision == "float32" and fp32.allowed.loss < 1e-4 * fp32.expected.loss
    assert report.good and not report.left_out


@pytest.mark.slow
def test_the_compiled_step_agrees_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # As the library compiles, but for the code generator, which takes minutes where it has to start anew.
    compiled: list[object] = []
    compile_ = torch.compile

    def traced(forward: Any, **options: Any) -> Any:
        compiled.append(forward)
        return compile_(forward, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    (_, result) = measure(contenders.COMPILED).results
    assert result.status == "ok" and result.time and compiled


def test_bfloat16_is_let_through_by_what_bfloat16_does() -> None:
    with contenders.unread_manifest(TINY) as manifest:
        bar = run._Bar(TINY, manifest, CPU, contenders.fixed_batch(TINY, manifest, CPU))
        ours = contenders.Ours(contenders.configure(TINY, manifest, CPU, precision="bf16"))
        result = run.Result("ours")
        bar.judge(result, ours)
        ours.close()
    assert result.precision == "bfloat16" and result.found != result.expected
    assert result.allowed.loss < 0.1 * result.expected.loss, "it would let anything through"


@pytest.mark.parametrize(("what", "share"), [("loss", 1.001), ("loss", float("nan")), ("gradient", 1.001)])
def test_a_step_that_is_not_the_peers_is_not_timed(what: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def falsified(trainer: Trainer, shares: torch.Tensor) -> torch.Tensor:
        if what == "loss":
            return shares * share
        for parameter in trainer.objective.parameters():
            if parameter.grad is not None:
                parameter.grad *= share
        return shares

    changed(monkeypatch, falsified)
    report = measure("amd_fast, precision=fp32")
    peer, wrong = report.results
    assert (peer.status, wrong.status, report.good) == ("ok", "wrong", False)
    assert what in wrong.reason and "is allowed" in wrong.reason
    assert wrong.time is None and wrong.ratio is None


def test_a_failure_and_a_lack_of_memory_are_lines_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"fp32": RuntimeError("no such kernel\nand more"), "auto": torch.OutOfMemoryError("too much")}
    honest = Trainer.accumulate

    def failing(self: Trainer, batch: Any) -> torch.Tensor:
        if self.config.model.options:
            return honest(self, batch)
        raise errors[self.config.precision]

    monkeypatch.setattr(Trainer, "accumulate", failing)
    report = measure("amd_fast", "amd_fast, precision=fp32", "amd_fast, impl=reference")
    assert [result.status for result in report.results] == ["ok", "skipped", "failed", "ok"]
    assert [result.reason for result in report.results[1:3]] == ["out of memory", "RuntimeError: no such kernel"]
    assert not report.good and report.results[3].time


def test_what_the_budget_does_not_reach_is_listed() -> None:
    report = measure("amd_fast", "amd_fast, precision=fp32", budget=0.0)
    assert [result.name for result in report.results] == ["eager float32"]
    assert [line.partition(":")[0] for line in report.left_out] == ["amd_fast", "amd_fast, precision=fp32"]
    assert all("budget of 0 s" in line for line in report.left_out)


def test_a_peer_that_does_not_fit_leaves_nothing_to_check_against(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(contenders.Peer, "gradients", full)
    report = measure("amd_fast")
    assert not report.results and "does not fit" in report.left_out[0]


def test_the_peers_weights_are_as_they_were_after_the_tolerance_was_measured() -> None:
    with contenders.unread_manifest(TINY) as manifest:
        peer = contenders.Peer(contenders.configure(TINY, manifest, CPU, impl="reference"), CPU)
        before = [parameter.detach().clone() for parameter in peer.objective.parameters()]
        batch = contenders.fixed_batch(TINY, manifest, CPU)
        small, large = (gate.allowed_error(peer, batch, unit) for unit in (2.0**-24, 2.0**-8))
    assert all(torch.equal(*pair) for pair in zip(before, peer.objective.parameters(), strict=True))
    assert small.loss < large.loss and small.gradient_norm < large.gradient_norm


def test_the_peer_is_what_it_is_called() -> None:
    with contenders.unread_manifest(TINY) as manifest:
        peer = contenders.Peer(contenders.configure(TINY, manifest, CPU, impl="reference"), CPU)
        ours = contenders.Ours(contenders.configure(TINY, manifest, CPU))
    kernels = [parameter for parameter in peer.objective.parameters() if parameter.dim() == 4]
    assert kernels and all(kernel.is_contiguous() and kernel.dtype == torch.float32 for kernel in kernels)
    assert peer.objective.model.impl == "reference" and not peer.optimiser.defaults["fused"]
    assert ours.trainer.model.impl == "auto" and ours.trainer.optimiser.defaults["fused"]
    ours.close()


@pytest.mark.slow
def test_the_command_writes_machine_method_results_and_training_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [text for name, value in OPTIONS.items() for text in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["training", "--only", "amd_fast", "--output", str(tmp_path), *arguments])
    monkeypatch.setattr(bench.load("training.fed"), "available_cores", lambda: 1)
    assert bench.load("training.__main__").main() == 0
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert path.name.startswith("training-cpu-") and report["machine"]["torch"] == torch.__version__
    assert "roundoff" in report["method"] and report["recipe"]["model"] == "afmir_small"
    peer, ours = report["results"]
    assert ours["found"].keys() == ours["allowed"].keys() == {"loss", "gradient_norm"} and ours["time"]["p20"] <= ours["time"]["p80"]
    assert ours["ratio"] == pytest.approx(peer["time"]["p50"] / ours["time"]["p50"])
    fed = {row["name"]: row for row in report["fed"]}
    assert fed["eager float32"]["reads"].startswith("DataLoader") and fed["amd_fast"]["reads"] == "ClipLoader, pyav"
    assert fed["amd_fast"]["ratio"] == pytest.approx(fed["amd_fast"]["clips_per_second"] / fed["eager float32"]["clips_per_second"])
    shown = capsys.readouterr().out
    assert "a training step" in shown and "training from video files" in shown and str(path) in shown.replace("\n", "")


def test_the_plain_loader_gives_the_frames_that_ours_gives(tmp_path: Path) -> None:
    """Its centre frames, on the same videos, are those that a test of ours sees."""
    clips, plain = bench.load("feeding.clips"), bench.load("training.plain")
    from amd_fast.data.clips import ClipTransform, decode_clip

    manifest = clips.synthesise(clips.Video("h264", 96, 64, 12), tmp_path / "videos", TINY, 1.0)
    read = plain.PlainClips(manifest, TINY)
    item = read[0]
    raw = decode_clip(read.clips[0].path, TINY.frames, short_side=read.work.short_side, modalities=("rgb", "flow"))
    expected = ClipTransform(TINY.size, ("rgb", "flow"), train=False)(raw)
    assert (item["rgb"] - expected["rgb"]).abs().mean() < 0.1 and item["flow"].shape == expected["flow"].shape
    assert item["label"] == 0 and read[len(read.clips) - 1]["label"] == TINY.ways - 1


def test_a_peer_that_cannot_read_is_a_line_and_ours_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = bench.load("training.fed")

    def broken(*_: Any) -> Any:
        raise RuntimeError("worker killed by signal: Bus error\nand more")
        yield

    monkeypatch.setattr(fed.plain, "batches", broken)
    peer, ours = fed.measure(TINY, CPU, seconds=0.05, length=0.4, progress=lambda line: None)
    assert (peer.status, peer.reason, peer.ratio) == ("skipped", "RuntimeError: worker killed by signal: Bus error", None)
    assert ours.status == "ok" and ours.clips_per_second > 0 and ours.ratio is None


ABSENT = """
import sys

class Without:
    names = ("av", "nvidia", "jsonargparse", "docstring_parser")

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.names else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.mark.slow
def test_without_pyav_dali_and_the_command_lines_packages_the_step_is_measured(repository: Path, tmp_path: Path) -> None:
    arguments = [text for name, value in OPTIONS.items() for text in (f"--{name}", value)]
    code = f"""
sys.argv = ["training", "--only", "amd_fast", "--output", {str(tmp_path)!r}, *{arguments!r}]
import benchmarks.training.__main__ as command
status = command.main()
assert not set(Without.names) & set(sys.modules), set(Without.names) & set(sys.modules)
sys.exit(status)
"""
    settings = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", ABSENT + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=repository, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out: training from video files: PyAV is not installed" in done.stdout
    (path,) = tmp_path.iterdir()
    assert [result["status"] for result in json.loads(path.read_text())["results"]] == ["ok", "ok"]
