"""The read-out that projects queries and sums instead of tokens: equal to the usual form, with the same guarantees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amd_fast.models.readout import CrossModalReadout, attend_to_tokens

INF = math.inf


def make(modalities: int = 2, frames: int = 8, seeds: int = 1, **options: object) -> tuple[CrossModalReadout, Tensor, Tensor]:
    torch.manual_seed(0)
    readout = CrossModalReadout(modalities, 12, heads=3, seeds=seeds, **options).double()  # type: ignore[arg-type]
    log_weight = torch.randn(5, modalities, frames)
    log_weight[0, 0] = -INF  # a modality missing from one clip
    log_weight[1] = -INF  # a clip of which nothing is there
    log_weight[2, :, ::3] = -INF
    return readout, torch.randn(5, modalities, frames, 12, dtype=torch.float64, requires_grad=True), log_weight


def results(readout: CrossModalReadout, tokens: Tensor, log_weight: Tensor) -> list[Tensor]:
    """Descriptors, evidence, and the gradients of tokens and parameters through both."""
    descriptors, evidence = readout(tokens, log_weight)
    loss = descriptors.sin().sum() + torch.where(evidence == -INF, 0.0, evidence).cos().sum()
    return [descriptors, evidence, *torch.autograd.grad(loss, [tokens, *readout.parameters()])]


@pytest.mark.parametrize("modalities", [1, 2, 4])
@pytest.mark.parametrize("frames", [8, 50])
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_the_form_with_keys_and_values(modalities: int, frames: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    readout, tokens, log_weight = make(modalities, frames)
    skipped: list[int] = []
    monkeypatch.setattr("amd_fast.models.readout.attend_to_tokens", lambda *given: skipped.append(1) or attend_to_tokens(*given))
    torch._dynamo.reset()
    mine = results(torch.compile(readout, fullgraph=True, backend="eager") if compiled else readout, tokens, log_weight)
    assert skipped
    readout.impl, taken = "reference", len(skipped)
    theirs = results(readout, tokens, log_weight)
    assert len(skipped) == taken
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)
        assert not left.isnan().any()


def test_many_queries_project_the_tokens() -> None:
    """More queries than tokens: then the keys are the smaller side."""
    few, many = make(frames=8)[0], make(frames=8, seeds=9)[0]
    tokens = torch.zeros(1, 16, 12, dtype=torch.float64)
    assert few._skips_keys(torch.zeros(1, 3, 3, 4, dtype=torch.float64), tokens)
    assert not many._skips_keys(torch.zeros(1, 27, 3, 4, dtype=torch.float64), tokens)


def test_named_implementations_autocast_and_exported_programs_run_the_op() -> None:
    query, tokens = torch.zeros(1, 3, 3, 4), torch.zeros(1, 16, 12)
    readout = CrossModalReadout(2, 12, heads=3)
    assert readout._skips_keys(query, tokens)
    assert not CrossModalReadout(2, 12, heads=3, impl="reference")._skips_keys(query, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert not readout._skips_keys(query, tokens)
    program = torch.export.export(readout, (torch.zeros(5, 2, 8, 12), torch.zeros(5, 2, 8)))
    assert "amd_fast.cross_modal_attention" in str(program.graph)


def test_a_removed_token_has_exactly_no_influence_and_exactly_no_gradient() -> None:
    readout, tokens, log_weight = make()
    outcome = results(readout, tokens, log_weight)
    removed = log_weight == -INF
    assert not outcome[2][removed].any()
    other = torch.where(removed.unsqueeze(-1), 1e9, tokens.detach())
    for before, after in zip(outcome[:2], readout(other, log_weight), strict=True):
        assert torch.equal(before, after)
