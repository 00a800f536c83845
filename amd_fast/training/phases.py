"""Names for the parts of a training step, which a profiler sees and nothing else pays for."""

from __future__ import annotations

from torch.profiler import record_function

PREFIX = "amd_fast: "
STEP, WAIT_FOR_DATA, COPY, FORWARD, BACKWARD, OPTIMISER, COMMUNICATION, WAIT_FOR_DEVICE = (
    "step",
    "wait for data",
    "copy",
    "forward",
    "backward",
    "optimiser",
    "communication",
    "wait for the device",
)


def phase(name: str) -> record_function:
    """Everything done while this context manager is open belongs to the part ``name`` of the step."""
    return record_function(PREFIX + name)
