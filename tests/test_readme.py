"""README.md and the pages of docs/ are run: every command, every Python block and every option that they show; see document_blocks.py."""

import argparse
import importlib
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed.run import get_args_parser

from amd_fast import cli

BLOCKS = runpy.run_path(str(Path(__file__).with_name("document_blocks.py")))
parse, commands, run_blocks = BLOCKS["parse"], BLOCKS["commands"], BLOCKS["run_blocks"]

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md"))]
RESULTS = {
    "README.md": ("example/evaluation/report.html", "runs/first/evaluation/report.html"),
    "docs/own-videos.md": ("runs/mine/evaluation/results.json", "gestures.manifest.csv"),
    "docs/several-gpus.md": ("runs/two/checkpoints/best.safetensors",),
}


def document(name: str) -> tuple[list[Any], str]:
    """The blocks of a document, and its prose."""
    blocks, prose = parse((REPOSITORY / name).read_text(encoding="utf-8"))
    return blocks, prose


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):
        run_blocks((REPOSITORY / name).read_text(encoding="utf-8"), tmp_path)
    for result in RESULTS.get(name, ()):
        assert (tmp_path / result).is_file()


def test_every_command_is_shown() -> None:
    shown = set()
    for name in DOCUMENTS:
        blocks, prose = document(name)
        ran = [command[1:] for block in blocks if block.language == "sh" for command in commands(block) if command[0] == "amd-fast"]
        shown |= {" ".join(words[:count]) for words in ran for count in (1, 2)}
        shown |= {span.split()[1] for span in code_spans(prose) if re.fullmatch(r"amd-fast \w+.*", span)}
    assert shown >= set(cli.COMMANDS) - {"demo"}, "README.md and the pages leave out commands"
    readme = {command[1] for block in document("README.md")[0] if block.language == "sh" for command in commands(block)}
    assert readme >= {"train", "evaluate", "enroll", "predict", "doctor"}


def code_spans(prose: str) -> list[str]:
    """Inline code; indented blocks, which hold formulas and drawings, are left out."""
    text = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def options_of(parser: Any) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def options_of_module(name: str) -> set[str]:
    """The options of `python -m name`, from the parser it builds."""
    seen: set[str] = set()

    def stop(parser: argparse.ArgumentParser, *_arguments: Any) -> None:
        seen.update(options_of(parser))
        raise SystemExit

    # pytest's own arguments are kept from a command that takes a file to write and no options
    with patch.object(sys, "argv", [name]), patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(SystemExit):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return seen


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_in_prose_exist(name: str) -> None:
    known = {name: options_of(cli.build_parser(name, command)) for name, command in cli.COMMANDS.items()}
    torchrun = options_of(get_args_parser())
    for span in code_spans(document(name)[1]):
        words = span.split()
        options = re.findall(r"(?<!\S)--[a-z][\w.-]*", span)
        command = words[1] if words[0] == "amd-fast" and len(words) > 1 else None
        if command is not None and not command.startswith(("-", "<")):
            assert command in known, f"`{span}`: there is no such command"
            allowed = known.get(" ".join(words[1:3]), known[command])  # some commands are two words
        elif options and span.startswith("python -m benchmarks"):
            allowed = options_of_module(words[2])
        else:
            allowed = set().union(*known.values(), torchrun)
        for option in options:
            assert option in allowed, f"`{span}`: there is no option {option}"


def resolve(dotted: str) -> None:
    """Import a dotted name; raises where it does not exist."""
    parts = dotted.split(".")
    value: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(".".join(parts[:number]))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_files_and_links_in_prose_exist(name: str) -> None:
    _, prose = document(name)
    for span in code_spans(prose):
        if re.fullmatch(r"amd_fast(\.\w+)+(\(\))?", span):
            resolve(span.removesuffix("()"))
        path, _, test = span.partition("::")
        if re.fullmatch(r"(amd_fast|kernels|tests|docs|benchmarks)/[\w/.]+", path):
            assert (REPOSITORY / path).exists(), f"`{span}`: there is no {path}"
            assert not test or f"def {test}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"`{span}`: there is no such test"
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (REPOSITORY / name).parent / path if path else REPOSITORY / name
            assert file.is_file(), f"a dead link to {target}"
            assert not anchor or anchor in headings(file), f"no heading for {target}"


def headings(file: Path) -> set[str]:
    """The anchors of a document's headings, as repository hosts and the site make them."""
    lines = parse(file.read_text(encoding="utf-8"))[1].splitlines()
    return {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line.startswith("#")}


def test_sections_that_the_code_cites_exist() -> None:
    text = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d+)\. ", text, re.MULTILINE))
    cited = 0
    for path in [*(REPOSITORY / "amd_fast").rglob("*.py"), *(REPOSITORY / "kernels").rglob("*.py")]:
        for number in re.findall(r"docs/method\.md`*,? sections? (\d+)", path.read_text(encoding="utf-8")):
            cited += 1
            assert number in sections, f"{path} cites section {number} of docs/method.md"
    assert cited


# The rules themselves: what must fail, fails.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nmystery\n```\n", "covered by no rule"),
        ("```bash\nls\n```\n", "covered by no rule"),
        ("```sh\nrm -rf build\n```\n", "nothing here can check 'rm'"),
        ("```sh\nmake nonsense\n```\n", "no target nonsense"),
        ("```sh\npip install -e '.[nonsense]'\n```\n", "no extra"),
        ("```sh\npip install something\n```\n", "only installing this project"),
        ("```sh\namd-fast synth --nonsense\n```\n", None),
        ("```sh\namd-fast nonsense\n```\n", "failed"),
        ("```python\nraise SystemExit(3)\n```\n", "Python block of line 1 failed"),
        ("```csv\na,b\n```\n", "needs one comment"),
        ('<!-- test: "amd-fast train" += --seed 1 -->\n```sh\nmake help\n```\n', "no command begins with"),
        ("<!-- test: guess -->\n```sh\nmake help\n```\n", "unknown test comment"),
        ("<!-- test: prepare own_videos -->\nprose\n", "no block"),
        ("```python\nopen end\n", "has no end"),
    ],
)
def test_what_is_not_covered_fails(text: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError if message else SystemExit, match=message):
        run_blocks(text, tmp_path)
