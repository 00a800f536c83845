"""``amd-fast tune``: measure launch configurations of the kernels on this GPU and write them to its table.

Nothing is searched when a kernel runs; it reads ``configs/<gpu>.json`` of its op, or the nearest table there is. This command
writes that file, with what it measured and nothing else. For every shape of the benchmarks' registry it varies the configuration
that would be used now, drops what does not fit the shared memory, does not compile, or does not agree with the float64 reference,
times the rest, and lets the fastest few take turns with the present one. Whatever the budget of time does not reach stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from amd_fast.bench import load
from amd_fast.errors import ConfigError, ImplementationError
from amd_fast.files import write_atomically
from amd_fast.kernels.common.gpu import Gpu, gpu_of
from amd_fast.kernels.common.tables import SIZES, Table, measured_on, merged

Entry = dict[str, int]
Call = Callable[[], object]
Timer = Callable[[Mapping[str, Call]], Mapping[str, float]]

# Least and greatest value of a field, and the factors of its present value to try. The matrix units want blocks of 16.
_FIELDS: dict[str, tuple[int, int, tuple[float, ...]]] = {
    "pairs": (1, 64, (0.5, 1, 2, 4)),
    "rows": (1, 1024, (0.25, 0.5, 1, 2, 4)),
    "block_tokens": (16, 256, (0.5, 1, 2)),
    "warps": (1, 16, (0.5, 1, 2)),
    "stages": (1, 4, (0.5, 1, 1.5)),
}
_FINALISTS = 4
_WORTH_IT = 0.98  # a configuration replaces the present one if it takes less than this share of its time
_QUICK, _THOROUGH = 0.03, 0.2  # seconds of timing per candidate and per finalist


@dataclasses.dataclass
class Tuned:
    """The outcome for one kernel at one shape.

    Attributes:
        op, kernel, shape: What was tuned.
        entry: The fastest configuration, as a table holds it.
        before: Seconds per call with the configuration that was in use.
        after: Seconds per call with ``entry``.
        tried: How many configurations were timed.
        refused: How many did not compile or were wrong.
    """

    op: str
    kernel: str
    shape: str
    entry: Entry
    before: float
    after: float
    tried: int
    refused: int


class _Job(NamedTuple):
    """A kernel to tune: in which pass it runs, the sizes that its table goes by, and the entry in use."""

    kernel: str
    direction: str
    key: Any
    sizes: Entry
    present: Entry


def tune_command(op: list[str] | None = None, shapes: list[str] | None = None, output: str | None = None, budget: float = 600.0) -> None:
    """Measure launch configurations of the kernels on this GPU and write its table.

    Which of its kernels attention runs at a shape stays as it is: the table holds how they are launched.

    Args:
        op: Ops to tune, cross_modal_attention and free_energy_loss; both by default.
        shapes: Names of the benchmarks' shapes to tune for; all by default.
        output: Folder to write <op>.json to; by default the tables go where the kernels look for them.
        budget: Seconds of wall time for everything; the shapes that matter most come first.
    """
    if not torch.cuda.is_available():
        raise ImplementationError("tune measures on a GPU and torch sees none here; the kernels use the tables that are checked in")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_of(device)
    selected = load("shapes").select(op, shapes)
    console = load("console").wide_console()
    torch.cuda.set_stream(torch.cuda.Stream(device))

    def save(result: Tuned) -> None:
        """At once: what a run that is cut short has found is not lost."""
        write_table(path_of(result.op), result.op, gpu, [result])

    def path_of(name: str) -> Path:
        return table_path(name, gpu) if output is None else Path(output) / f"{name}.json"

    tuned = tune(selected, (torch.bfloat16, torch.float32), device, gpu, budget, progress=console.print, save=save)
    _print(tuned, console)
    for name in dict.fromkeys(entry.op for entry in tuned):
        console.print(f"wrote {path_of(name)}", soft_wrap=True)


def tune(
    shapes: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    gpu: Gpu,
    budget: float,
    *,
    quick: Timer | None = None,
    thorough: Timer | None = None,
    progress: Callable[[str], None] = lambda line: None,
    save: Callable[[Tuned], None] = lambda result: None,
) -> list[Tuned]:
    """The fastest configuration of every kernel that these shapes and dtypes run, one per entry of a table.

    Args:
        shapes: Shapes of the benchmarks' registry, most important first.
        dtypes: Dtypes; the loss computes in float32 whatever it reads, so it is tuned once, for float32 where that is among them.
        device: Where to run.
        gpu: What the table is for.
        budget: Seconds; no candidate is tried after it.
        quick: Medians of calls in seconds, by name, for a first sorting; by default the benchmarks' clocks.
        thorough: The same for the finalists.
        progress: Is told what was found.
        save: Is given every result as soon as it is there.
    """
    timing, workloads = load("timing"), load("workloads")

    def clock(seconds: float) -> Timer:
        return lambda calls: {name: result.p50 for name, result in timing.measure(calls, device, seconds).items()}

    quick, thorough = quick or clock(_QUICK), thorough or clock(_THOROUGH)
    end = time.monotonic() + budget
    found: list[Tuned] = []
    seen: set[tuple[Any, ...]] = set()
    for shape, dtype in load("run").in_order(shapes, dtypes):
        jobs = [job for job in _jobs(shape, dtype, gpu) if (shape.op, job.kernel, *job.sizes.values()) not in seen]
        if not jobs or time.monotonic() > end:
            continue
        seen.update((shape.op, job.kernel, *job.sizes.values()) for job in jobs)
        try:
            case = workloads.make(shape, dtype, device)
        except Exception as error:  # too large for this GPU; the others need not be
            progress(f"{shape.op} {shape.name} {shape.sizes}: {_first_line(error)}")
            continue
        for job in jobs:
            try:
                result = _tune_kernel(case, job, gpu, quick, thorough, end)
            except Exception as error:
                progress(_first_line(error))
                continue
            if result is not None:
                found.append(result)
                save(result)
                times = f"{result.before * 1e6:.1f} µs -> {result.after * 1e6:.1f} µs"
                progress(f"{result.op} {result.kernel} {result.shape}: {times} {result.entry}")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tune_kernel(case: Any, job: _Job, gpu: Gpu, quick: Timer, thorough: Timer, end: float) -> Tuned | None:
    """Tune one kernel; None where the budget ends before anything can be said.

    Raises:
        ImplementationError: The kernel fails in its present configuration; that is a bug, and no table mends it.
    """
    timed: dict[str, tuple[Entry, Call, float]] = {}
    refused = 0
    entries = candidates(case.shape.op, job.kernel, job.key, job.sizes, job.present, gpu)
    for number, entry in enumerate(entries):
        if time.monotonic() > end:
            break
        call = _call(case, job, entry, gpu)
        try:
            with _forced(case.shape.op, job, entry, gpu):
                case.check(_forward(case))
            call()
            timed[str(number)] = entry, call, quick({str(number): call})[str(number)]
        except Exception as error:  # it needs more than the GPU has, the compiler gives up, or it is wrong: one candidate fewer
            refused += 1
            if number == 0:
                at = f"{job.kernel} at {case.shape.sizes} fails as it is configured now, {entry}"
                raise ImplementationError(f"{at}: {_first_line(error)}") from error
    if len(timed) < 2:
        return None
    best = sorted(timed, key=lambda name: timed[name][2])[:_FINALISTS]
    final = thorough({name: timed[name][1] for name in dict.fromkeys(["0", *best])})
    fastest = min(final, key=lambda name: final[name])
    if final[fastest] > _WORTH_IT * final["0"]:
        fastest = "0"
    title = f"{case.shape.name} {case.shape.sizes} {str(case.dtype).removeprefix('torch.')}"
    return Tuned(case.shape.op, job.kernel, title, timed[fastest][0], final["0"], final[fastest], len(timed), refused)


def candidates(op: str, kernel: str, key: Any, sizes: Entry, present: Entry, gpu: Gpu) -> list[Entry]:
    """The present entry and its neighbours, each of which a lookup would really turn into another launch on this GPU."""
    config = _module(op, "config")
    names = [name for name in present if name not in sizes]
    entries = [present, *({**sizes, **dict(zip(names, values, strict=True))} for values in itertools.product(*map(_near(present), names)))]
    launches: dict[Any, Entry] = {}
    for entry in entries:
        launches.setdefault(config.choose(kernel, key, {kernel: [entry]}, gpu.shared_memory), entry)
    return list(launches.values())


def _near(present: Entry) -> Callable[[str], list[int]]:
    """From the name of a field to the values to try for it, around the present one."""

    def values(name: str) -> list[int]:
        least, most, factors = _FIELDS[name]
        return [value for factor in factors if least <= (value := int(present[name] * factor)) <= most]

    return values


def _jobs(shape: Any, dtype: torch.dtype, gpu: Gpu) -> Iterator[_Job]:
    """The kernels that a shape runs, in the order in which they run."""
    config = _module(shape.op, "config")
    table = config.load_table(gpu.name, gpu.architecture)
    if shape.op == "free_energy_loss":
        key = config.Shape.of(shape.views, shape.classes)
        sizes = {"views": shape.views, "classes": shape.classes}
        kernels = config.KERNELS
    else:
        key = config.Shape.of(dtype.itemsize, shape.width, shape.rows, shape.tokens)
        routes = tuple(f"{config.route(key, direction)}_{direction}" for direction in ("forward", "backward"))
        kernels = [name for name in config.KERNELS if name.startswith(routes)]
        sizes = dataclasses.asdict(key)
    for kernel in kernels:
        launch = dataclasses.asdict(config.choose(kernel, key, table, gpu.shared_memory))
        fields = table[kernel][0]
        known = {name: size for name, size in sizes.items() if name in fields}
        present = known | {name: launch[name] for name in fields if name in launch}
        yield _Job(kernel, "forward" if kernel.endswith("forward") else "backward", key, known, present)


def _forward(case: Any) -> Callable[[], Any]:
    providers = load("providers")
    return providers.ours(case, "triton")


def _call(case: Any, job: _Job, entry: Entry, gpu: Gpu) -> Call:
    """The pass that runs the kernel, with this entry in the place of the table's."""
    run = load("run").calls_of(case, _forward(case))[job.direction]

    def call() -> object:
        with _forced(case.shape.op, job, entry, gpu):
            return run()

    return call


@contextlib.contextmanager
def _forced(op: str, job: _Job, entry: Entry, gpu: Gpu) -> Iterator[None]:
    """Launch one kernel as an entry says; the others as usual."""
    launcher = _module(op, "triton")
    launch = _module(op, "config").choose(job.kernel, job.key, {job.kernel: [entry]}, gpu.shared_memory)
    usual = launcher._config
    launcher._config = lambda kernel, *arguments: launch if kernel == job.kernel else usual(kernel, *arguments)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        launcher._config = usual  # type: ignore[attr-defined]


def _module(op: str, name: str) -> ModuleType:
    folder = {"cross_modal_attention": "cross_modal_attention", "free_energy_loss": "free_energy"}
    if op not in folder:
        raise ConfigError(f"op: got {op!r}, expected any of {', '.join(folder)}")
    return importlib.import_module(f"amd_fast.kernels.{folder[op]}.{name}")


def table_path(op: str, gpu: Gpu) -> Path:
    """Where the kernels of an op look for the table of a GPU."""
    source = _module(op, "config").__file__
    assert source is not None
    return Path(source).parent / "configs" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"


def write_table(path: Path, op: str, gpu: Gpu, tuned: Sequence[Tuned]) -> None:
    """Write the table of a GPU: what was measured there before, with the tuned entries in the place of those for the same sizes."""
    config, machine = _module(op, "config"), load("machine")
    new: Table = {}
    for result in tuned:
        new.setdefault(result.kernel, []).append(result.entry)
    both = merged(new, _measured_before(path, config, gpu))
    table = {kernel: sorted(both[kernel], key=lambda entry: list(entry.values())) for kernel in config.KERNELS if kernel in both}
    facts = {name: machine.describe(torch.device("cpu"))[name] for name in ("torch", "triton", "commit", "date")}
    head = {"device": gpu.name, "architecture": gpu.architecture, "measured": facts}
    lines = [f"    {json.dumps(kernel)}: [\n{_lines(entries)}\n    ]" for kernel, entries in table.items()]
    text = json.dumps(head, indent=2)[:-2] + ',\n  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    write_atomically(path, text.encode())
    _forget_tables(op)


def _measured_before(path: Path, config: ModuleType, gpu: Gpu) -> Table:
    """What the file holds, else what the kernels have, of this GPU."""
    if not path.exists():
        return measured_on(config.files(config.__package__).joinpath("configs"), gpu.name)
    table = json.loads(path.read_text(encoding="utf-8"))
    return dict(table["kernels"]) if table["device"] == gpu.name else {}


def _forget_tables(op: str) -> None:
    """Have the kernels of this process look again at what they launch."""
    config = _module(op, "config")
    config.load_table.cache_clear()
    launcher = sys.modules.get(config.__name__.removesuffix("config") + "triton")
    if launcher is not None:
        launcher._config_on.cache_clear()


def _sizes(entry: Entry) -> list[str]:
    return [name for name in SIZES if name in entry]


def _lines(entries: Sequence[Entry]) -> str:
    return ",\n".join(f"      {json.dumps(entry)}" for entry in entries)


def _print(tuned: Sequence[Tuned], console: Any) -> None:
    rows = []
    for result in tuned:
        times = [f"{seconds * 1e6:.1f} µs" for seconds in (result.before, result.after)]
        entry = " ".join(f"{name}={value}" for name, value in result.entry.items() if name not in _sizes(result.entry))
        gain = f"{result.before / result.after:.2f}"
        rows.append([gain, result.op, result.kernel, result.shape, *times, entry, str(result.tried), str(result.refused)])
    columns = ["gain", "op", "kernel", "shape", "before", "after", "entry", "tried", "refused"]
    load("console").print_table(console, "launch configurations", columns, rows, right=("gain", "before", "after"))
