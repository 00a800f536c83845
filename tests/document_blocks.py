"""Runs the fenced blocks of a document from top to bottom in one folder; loaded with ``runpy`` by the tests of README and of the pages.

A block may use what an earlier one made. Its language says what happens to it:

* ``python``: run as a script of its own, as it is; named by ``write``, kept as a module that later blocks import;
* ``sh``: ``amd-fast`` and ``torchrun`` commands run; ``make`` targets must exist; what ``pip install`` names must be an extra of setup.py;
* ``csv``: written to the file its comment names; ``text``: shown only. Any other block, and any other command, fails.

HTML comments before a block (invisible to readers) make it runnable in seconds, without changing what is shown:

* ``<!-- test: "amd-fast train" += --optimiser.steps 4 -->`` appends options to that command, the shown ones are parsed all the same;
* ``<!-- test: write list.csv -->`` names the file of a ``csv`` or ``python`` block;
* ``<!-- test: prepare own_videos -->`` calls the function of that name of document_files.py, for what a reader would bring along.
"""

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from amd_fast import cli

REPOSITORY = Path(__file__).resolve().parent.parent
PREPARATIONS: dict[str, Callable[[Path], None]] = runpy.run_path(str(Path(__file__).with_name("document_files.py")))["PREPARATIONS"]
RULE = re.compile(r"<!-- test: (.+?) -->")
APPEND = re.compile(r'"(.+)" \+= (.+)')


class Block(NamedTuple):
    """A fenced block: its language, its lines, the rules in the comments just before it, and where it stands."""

    language: str
    text: str
    rules: tuple[str, ...]
    line: int


def parse(text: str) -> tuple[list[Block], str]:
    """The fenced blocks of a document, and the document without them and without comments."""
    blocks: list[Block] = []
    prose: list[str] = []
    rules: list[str] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if rule := RULE.fullmatch(line):
            rules.append(rule[1])
        elif line.lstrip().startswith("```"):
            content = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                content.append(inner)
            else:
                raise AssertionError(f"the block of line {number} has no end")
            blocks.append(Block(line.strip().removeprefix("```"), "\n".join(content) + "\n", tuple(rules), number))
            rules = []
        else:
            assert not rules or not line.strip(), f"line {number}: a test comment stands before something that is no block"
            prose.append(line)
    assert not rules, f"the comments {rules} stand before no block"
    return blocks, "\n".join(prose)


def document(name: str) -> tuple[list[Block], str]:
    return parse((REPOSITORY / name).read_text(encoding="utf-8"))


def write(block: Block, folder: Path, name: str | None = None) -> Path:
    """The block as a file, named by its comment, else ``name``."""
    names = [rule.removeprefix("write ") for rule in block.rules if rule.startswith("write ")] or [name]
    assert len(names) == 1 and names[0], f"line {block.line}: this block needs one comment <!-- test: write NAME -->"
    path = folder / names[0]
    path.write_text(block.text, encoding="utf-8")
    return path


def python(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python process that finds this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, **options)


def run_python(block: Block, folder: Path) -> None:
    done = python([str(write(block, folder, f"block_{block.line}.py"))], cwd=folder)
    assert done.returncode == 0, f"the Python block of line {block.line} failed:\n{done.stdout}\n{done.stderr}"


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block with what the rules append; a rule that fits no command is out of date."""
    found = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    appended = []
    for rule in block.rules:
        if addition := APPEND.fullmatch(rule):
            assert any(line.startswith(addition[1] + " ") for line in found), f"line {block.line}: no command begins with {addition[1]!r}"
            appended.append((addition[1], addition[2]))
    return [shlex.split(" ".join([line, *(more for start, more in appended if line.startswith(start + " "))])) for line in found]


def run_amd_fast(arguments: list[str]) -> None:
    assert cli.main(arguments) == 0, f"amd-fast {shlex.join(arguments)} failed"


def check_make(arguments: list[str]) -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in arguments:
        assert re.search(rf"^{re.escape(target)}:", text, re.MULTILINE), f"the Makefile has no target {target}"
    if shutil.which("make"):
        done = subprocess.run(["make", "-n", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def extras() -> set[str]:
    for statement in ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "EXTRAS_REQUIRE":
            return set(ast.literal_eval(statement.value))
    raise AssertionError("setup.py defines no EXTRAS_REQUIRE")


def check_pip(arguments: list[str]) -> None:
    found = re.fullmatch(r"install -e \.(?:\[(.+)\])?", " ".join(arguments))
    assert found, f"pip {shlex.join(arguments)}: only installing this project is known here"
    asked = set(found[1].split(",")) if found[1] else set()
    assert asked <= extras(), f"setup.py has no extra {asked - extras()}"


def run_torchrun(arguments: list[str]) -> None:
    done = python(["-m", "torch.distributed.run", "--standalone", *arguments], timeout=300)
    assert done.returncode == 0, f"torchrun {shlex.join(arguments)} failed:\n{done.stdout}\n{done.stderr}"


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "amd-fast": run_amd_fast,
    "make": check_make,
    "pip": check_pip,
    "torchrun": run_torchrun,
}


def run_shell(block: Block, folder: Path) -> None:
    for program, *arguments in commands(block):
        assert program in PROGRAMS, f"line {block.line}: nothing here can check {program!r}"
        PROGRAMS[program](arguments)


RUNNERS: dict[str, Callable[[Block, Path], object]] = {
    "python": run_python,
    "sh": run_shell,
    "csv": write,
    "text": lambda block, folder: None,
}


def run_blocks(text: str, folder: Path) -> None:
    for block in parse(text)[0]:
        run_block(block, folder)


def run_block(block: Block, folder: Path) -> None:
    for rule in block.rules:
        kind, _, name = rule.partition(" ")
        if kind == "prepare":
            PREPARATIONS[name](folder)
        else:
            assert APPEND.fullmatch(rule) or rule.startswith("write "), f"line {block.line}: unknown test comment {rule!r}"
    assert block.language in RUNNERS, f"line {block.line}: a block of language {block.language!r} is covered by no rule"
    RUNNERS[block.language](block, folder)
