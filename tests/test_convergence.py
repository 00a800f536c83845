"""A small head trained with the Triton kernels follows the loss curve of the reference (kernels run in Triton's interpreter)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

STEPS = 8
SCRIPT = f"""
import json, torch, amd_fast

def curve(impl):
    torch.manual_seed(0)
    model = amd_fast.create_model("afmir_small", dim=32, heads=2, impl=impl)
    trained = [*model.readout.parameters(), *model.matcher.parameters()]
    # Not Adam: the gradient of the key's bias is zero but for rounding, and Adam makes full steps of the sign of rounding errors.
    optimiser = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    labels, targets = torch.arange(3)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    centre = torch.randn(3, 2, 1, 32, generator=generator)
    losses = []
    for _ in range({STEPS}):
        classes = torch.cat([labels[0], targets[0]])
        tokens = centre[classes] + 2.0 * torch.randn(9, 2, 4, 32, generator=generator)
        weight = torch.zeros(9, 2, 4)
        weight[4, 1] = -torch.inf
        descriptors, present = model.describe(tokens, weight)[None], model.views_present(weight)[None]
        match = model.match(descriptors[:, :3], labels, descriptors[:, 3:], present[:, :3], present[:, 3:], ways=3)
        loss = model.judge(match, targets).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in trained]).double()

(fused, fused_weights), (plain, plain_weights) = curve("triton"), curve("reference")
print(json.dumps([fused, plain, float((fused_weights - plain_weights).norm() / plain_weights.norm())]))
"""


@pytest.mark.slow
def test_kernels_and_reference_train_alike() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    fused, plain, distance = json.loads(done.stdout.splitlines()[-1])
    assert fused == pytest.approx(plain, rel=1e-4)
    assert distance < 1e-4
    assert len(set(plain)) == STEPS  # it moves
