"""``amd-fast bench``: the kernels against named peers. What measures lies in the folder ``benchmarks/`` of the source tree."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from amd_fast.errors import ConfigError, ImplementationError

_REPOSITORY = Path(__file__).resolve().parent.parent
_DTYPES = ("bfloat16", "float16", "float32")
EXIT_LOST = 3  # the GPU stopped answering


def load(name: str) -> ModuleType:
    """Import a module of the source tree's ``benchmarks`` folder, which no installation holds.

    Raises:
        ImplementationError: There is no such folder beside the package.
    """
    if not (_REPOSITORY / "benchmarks" / "shapes.py").is_file():
        raise ImplementationError(
            f"benchmarks are run from the source tree, and {_REPOSITORY} is not one; "
            "clone the repository and run there: PYTHONPATH=. python -m benchmarks"
        )
    loaded = sys.modules.get("benchmarks")
    ours = loaded is not None and str(_REPOSITORY / "benchmarks") in list(getattr(loaded, "__path__", []))
    if not ours:  # `benchmarks` is a name that other packages use too
        sys.modules.pop("benchmarks", None)
        sys.path.insert(0, str(_REPOSITORY))
        try:
            importlib.import_module("benchmarks")
        finally:
            sys.path.remove(str(_REPOSITORY))
    return importlib.import_module(f"benchmarks.{name}")


def bench_command(
    op: list[str] | None = None,
    shapes: list[str] | None = None,
    dtypes: list[str] | None = None,
    directions: list[str] | None = None,
    base: str | None = None,
    output: str | None = None,
    device: str | None = None,
    budget: float = 600.0,
    max_elements: int = 0,
    resume: bool = False,
) -> int:
    """Measure the kernels against PyTorch, torch.compile and the libraries that are installed.

    Every provider must first agree with a float64 reference; one that does not is reported as wrong and not timed. The exit status is 1
    where amd_fast itself failed or was wrong, and 3 where the GPU stopped answering: --resume then measures the rest.

    Args:
        op: Ops to measure, cross_modal_attention and free_energy_loss; both by default.
        shapes: Names of shapes, such as episode and feature-bank; all by default.
        dtypes: Of bfloat16, float16 and float32; by default bfloat16 and float32 on a GPU, float32 on a CPU.
        directions: Of forward, backward and both; all by default.
        base: Git revision to compare this source tree with, instead of comparing providers; both take turns.
        output: Folder to write the numbers (JSON, after every shape) and a plot (SVG) to, named after the device; nothing by default.
        device: Where to run, such as cpu or cuda:0; the GPU where there is one by default.
        budget: Seconds of wall time; the shapes that matter most come first, those not reached are listed.
        max_elements: Cut batches down to this many elements of the largest input; 0 means a million on a CPU, no limit on a GPU.
        resume: Go on with the numbers that an earlier run of the same code left in output, and measure what is not among them.
    """
    import torch

    machine, run, shape_module = load("machine"), load("run"), load("shapes")
    place = machine.default_device() if device is None else torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ImplementationError(f"device: got {device!r} and torch sees no GPU here; leave it out to measure on the CPU")
    on_cpu = place.type != "cuda"
    types = [getattr(torch, name) for name in _known("dtypes", dtypes, _DTYPES, ("float32",) if on_cpu else ("bfloat16", "float32"))]
    passes = _known("directions", directions, shape_module.DIRECTIONS, shape_module.DIRECTIONS)
    limit = max_elements or (run.CPU_ELEMENTS if on_cpu else sys.maxsize)
    capped = [shape.capped(limit) for shape in shape_module.select(op, shapes)]
    different: dict[tuple[str, str], Any] = {}  # cut down, some shapes are the same
    for shape in capped:
        different.setdefault((shape.op, shape.sizes), shape)
    selected = list(different.values())
    console = load("console").wide_console()
    stem = machine.file_stem(place)
    if base is not None:
        module = load("compare")
        report = module.compare(base, selected, types, place, passes, budget, console.print)
    else:
        module = load("report")
        keep: dict[str, Any] = {} if output is None else {"save": lambda report: module.write_numbers(report, Path(output), stem)}
        earlier = module.read(Path(output), stem) if resume and output is not None else None
        report = run.run(selected, types, place, directions=passes, budget=budget, progress=console.print, earlier=earlier, **keep)
    module.show(report, console)
    if output is not None:
        for path in module.write(report, Path(output), stem):
            console.print(f"wrote {path}", soft_wrap=True)
    if base is not None:
        return 0
    return EXIT_LOST if report.lost else int(report.faults > 0)


def _known(name: str, given: list[str] | None, known: tuple[str, ...], default: tuple[str, ...]) -> list[str]:
    for item in given or ():
        if item not in known:
            raise ConfigError(f"{name}: got {item!r}, expected any of {', '.join(known)}; leave it out for the usual ones")
    return list(given or default)


def data_command(
    source: str,
    clips: int = 24,
    rounds: int = 5,
    threads: int = 2,
    frames: int = 8,
    size: int = 224,
    flow: bool = True,
    frame_folders: bool = True,
    trial: bool = True,
    output: str | None = None,
) -> None:
    """Measure how many clips per second this library and others read from your own videos, and say what would help.

    Everyone must first return the frames of a full decode; who does not is named, with the clip. Then all take turns. The peers are those
    that are installed: pip install 'amd_fast[peers]' brings all of them. DALI takes part where it decodes some of the clips.

    Args:
        source: A manifest (CSV), or a folder of videos at any depth; or the URI of either, whose clips are fetched first.
        clips: Clips to read, evenly chosen where there are more.
        rounds: Times that everyone reads all clips.
        threads: Threads to read with, one clip in each.
        frames: Frames per clip.
        size: Side of the square pictures, pixels.
        flow: Also measure reading with optical flow, against OpenCV's capture and Farneback's method.
        frame_folders: Also extract the frames to JPEG files, in a temporary folder, and measure reading those.
        trial: Also re-encode a few clips with more keyframes, in a temporary folder, to see what that would bring.
        output: Folder to write the numbers (JSON) and a plot (SVG) to, named after the GPU where one decodes, else after the processor;
            nothing is written by default.
    """
    for name, value in (("clips", clips), ("rounds", rounds), ("threads", threads), ("frames", frames), ("size", size)):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, expected at least 1")
    from amd_fast.data.views import RESIZE_RATIO

    work = load("data.work").Work(frames, size, round(size * RESIZE_RATIO))
    load("data.command").bench_data(
        source, work=work, clips=clips, rounds=rounds, threads=threads, flow=flow, frame_folders=frame_folders, trial=trial, output=output
    )
