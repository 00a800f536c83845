"""Where the time of a training step goes, read from a Chrome trace of torch.profiler.

Every moment of a step is given to one part of it, so that the parts sum up to the step:

* on a GPU, to the phase that launched the kernel that runs; else to communication where one of NCCL's runs; else to the copy that
  runs; else the GPU idles, which is put down to ``wait for data`` where the host waits for data, and to ``launching`` otherwise;
* on a CPU, to the phase that the main thread is in, but to communication where it stands still in forward or backward while an exchange
  is under way: what is hidden behind computation costs nothing and counts as nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from amd_fast.training.phases import BACKWARD, COMMUNICATION, COPY, FORWARD, OPTIMISER, PREFIX, STEP, WAIT_FOR_DATA, WAIT_FOR_DEVICE

LAUNCHING, OTHER = "launching", "other"
PARTS = (WAIT_FOR_DATA, COPY, FORWARD, BACKWARD, OPTIMISER, COMMUNICATION, LAUNCHING, OTHER)

Event = Mapping[str, Any]
Key = tuple[str, str]


def break_down(events: Iterable[Event]) -> tuple[dict[str, float], int]:
    """Seconds of every part, over all steps of a trace together, and the number of steps.

    Args:
        events: ``traceEvents`` of a Chrome trace (times in microseconds), with the ranges of :mod:`amd_fast.training.phases`.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    ranges = [event for event in spans if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)]
    steps = [event for event in ranges if event["name"] == PREFIX + STEP]
    on_gpu = any(event.get("cat") == "kernel" for event in spans)
    intervals = [*_host(ranges), *(_device(spans, ranges) if on_gpu else _cpu(spans, steps))]
    boundaries = sorted((time, change, key) for key, start, stop in intervals for time, change in ((start, 1), (stop, -1)))
    active: Counter[Key] = Counter()
    total = dict.fromkeys(PARTS, 0.0)
    before = 0.0
    for time, change, key in boundaries:
        if active["host", STEP] > 0 and time > before:
            total[_part(active, on_gpu=on_gpu)] += (time - before) / 1e6
        active[key] += change
        before = time
    return total, len(steps)


def _host(ranges: list[Event]) -> Iterator[tuple[Key, float, float]]:
    for event in ranges:
        yield ("host", event["name"].removeprefix(PREFIX)), event["ts"], event["ts"] + event["dur"]


def _cpu(spans: list[Event], steps: list[Event]) -> Iterator[tuple[Key, float, float]]:
    """Exchanges by gloo, and what the main thread computes."""
    main = {event["tid"] for event in steps}
    for event in spans:
        name = event["name"]
        if name.startswith("gloo:"):
            yield ("exchange", ""), event["ts"], event["ts"] + event["dur"]
        elif event.get("cat") == "cpu_op" and event["tid"] in main and not name.startswith("c10d::"):
            yield ("computing", ""), event["ts"], event["ts"] + event["dur"]


def _device(spans: list[Event], ranges: list[Event]) -> Iterator[tuple[Key, float, float]]:
    """Kernels and copies, by the phase that the host was in when it launched them."""
    launched: dict[Any, float] = {
        event["args"]["correlation"]: event["ts"]
        for event in spans
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    phases = sorted(((event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX)) for event in ranges), reverse=True)

    def phase_at(time: float) -> str:
        # The latest range that began before and is still open; the step itself began before all of its phases.
        return next((name for start, stop, name in phases if start <= time < stop), OTHER)

    known: dict[Any, str] = {}
    for event in spans:
        kind = event.get("cat")
        if kind not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        if kind == "kernel" and "nccl" in event["name"].lower():
            key = ("exchange", "")
        elif kind == "gpu_memcpy" and "HtoD" in event["name"]:
            key = ("copying", "")
        else:
            correlation = event.get("args", {}).get("correlation")
            if correlation not in known:
                found = phase_at(launched[correlation] if correlation in launched else event["ts"])
                known[correlation] = found if found in (COPY, FORWARD, BACKWARD, OPTIMISER) else OTHER
            key = ("device", known[correlation])
        yield key, event["ts"], event["ts"] + event["dur"]


def _part(active: Counter[Key], *, on_gpu: bool) -> str:
    phases = [name for (kind, name), number in active.items() if kind == "host" and number > 0 and name != STEP]
    if not on_gpu:
        found = phases[-1] if phases else OTHER
        idle = found in (FORWARD, BACKWARD) and not active["computing", ""] and active["exchange", ""] > 0
        return COMMUNICATION if idle else found if found in PARTS else OTHER
    for part in (FORWARD, BACKWARD, OPTIMISER, COPY, OTHER):
        if active["device", part] > 0:
            return part
    if active["exchange", ""] > 0:
        return COMMUNICATION
    if active["copying", ""] > 0:
        return COPY
    return WAIT_FOR_DATA if WAIT_FOR_DATA in phases else LAUNCHING if WAIT_FOR_DEVICE not in phases else OTHER


def what_bounds(parts: Mapping[str, float]) -> str:
    """One sentence: what takes most of the step, and what would help.

    Args:
        parts: seconds by part, from :func:`break_down`.
    """
    total = sum(parts.values()) or 1.0
    groups = {
        "reading clips": (parts[WAIT_FOR_DATA], "more data.workers, a larger data.cache, decoding on a GPU or a feature bank would help"),
        "computation": (
            parts[FORWARD] + parts[BACKWARD] + parts[OPTIMISER],
            "faster with precision=bf16, compile=true, frozen backbones or more processes",
        ),
        "copying clips to the device": (parts[COPY], "fewer or smaller clips per step would help"),
        "communication": (parts[COMMUNICATION], "more episodes per step and process, or a faster connection, would help"),
        "the host, which launches work too slowly": (parts[LAUNCHING], "compile=true or more episodes at once would help"),
        "what is outside of all phases": (parts[OTHER], "the trace shows what it is"),
    }
    name, (seconds, remedy) = max(groups.items(), key=lambda item: item[1][0])
    waiting = "" if name == "reading clips" else f", and waits for data {parts[WAIT_FOR_DATA] / total:.0%}"
    return f"The step is bound by {name}: this takes {seconds / total:.0%} of it{waiting}; {remedy}."
