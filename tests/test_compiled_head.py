"""The whole head (read-out, matching, beliefs, loss) as one graph: compiled and exported forms equal eager."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import amd_fast

WAYS = 3


class Head(nn.Module):
    """Tokens of an episode's clips in; loss, fused posterior and policy out."""

    def __init__(self, model: amd_fast.AFMIR) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, log_weight: Tensor, support_label: Tensor, query_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        episodes, shots = support_label.shape
        descriptors = self.model.describe(tokens, log_weight).unflatten(0, (episodes, -1))
        present = self.model.views_present(log_weight).unflatten(0, (episodes, -1))
        match = self.model.match(
            descriptors[:, :shots], support_label, descriptors[:, shots:], present[:, :shots], present[:, shots:], ways=WAYS
        )
        output = self.model.judge(match, query_label)
        assert output.loss is not None
        return output.loss, output.log_probs, output.beliefs.policy


def inputs(episodes: int, queries: int, frames: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(episodes + queries)
    clips = episodes * (WAYS + queries)
    log_weight = torch.zeros(clips, 2, frames)
    log_weight[1, 1] = -torch.inf  # a modality missing from one clip
    query_label = torch.randint(WAYS, (episodes, queries), generator=generator)
    return (
        torch.randn(clips, 2, frames, 16, generator=generator),
        log_weight,
        torch.arange(WAYS).expand(episodes, -1).contiguous(),
        query_label,
    )


@pytest.fixture
def head() -> Head:
    torch.manual_seed(0)
    return Head(amd_fast.create_model("afmir_small", dim=16))


@pytest.mark.slow
def test_compiled_head_equals_eager_forward_and_backward_for_dynamic_shapes(head: Head) -> None:
    """One compilation for all sizes; in the first of them no two are equal, which torch would take for one and the same."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(head, fullgraph=True, dynamic=True)
    used = [*head.model.readout.parameters(), *head.model.matcher.parameters()]
    for shape in ((4, 5, 7), (3, 2, 5), (2, 4, 4)):
        results = []
        for function in (head, compiled):
            tokens, *rest = inputs(*shape)
            tokens.requires_grad_()
            outputs = function(tokens, *rest)
            results.append((*outputs, *torch.autograd.grad(outputs[0], [tokens, *used])))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


LOADER = """
import sys, torch
import amd_fast.ops, amd_fast.ops.attention, amd_fast.ops.free_energy
package, data = sys.argv[1:]
stored = torch.load(data, weights_only=True)
outputs = torch._inductor.aoti_load_package(package)(*stored["inputs"])
for got, expected in zip(outputs, stored["outputs"], strict=True):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_exported_head_runs_ahead_of_time_compiled_in_a_fresh_process(head: Head, tmp_path: Path) -> None:
    example = inputs(2, 4, 5)
    with torch.no_grad():
        expected = head(*example)
        program = torch.export.export(head, example)
        torch.testing.assert_close(program.module()(*example), expected)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "head.pt2"))
    torch.save({"inputs": list(example), "outputs": list(expected)}, tmp_path / "data.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, package, str(tmp_path / "data.pt")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
