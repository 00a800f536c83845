"""The ``amd-fast`` command: its parsers, exit statuses, and its surface, which is frozen in cli_options.json.

After a change of the surface that is meant: ``PYTHONPATH=. python tests/test_cli.py`` writes that file anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from amd_fast import cli
from amd_fast.errors import DataError

FROZEN = Path(__file__).with_name("cli_options.json")

calls: list[dict[str, Any]] = []


def everything(
    source: str,
    target: str | None = None,
    max_steps: int = 10,
    kind: Literal["a", "b"] = "a",
    modalities: list[str] = [],  # noqa: B006 (what a command with a list looks like)
    shots: Sequence[int] = (1, 5),
    sizes: list[int] | None = None,
    verbose: bool = False,
    damage: bool = True,
) -> None:
    """Do everything.

    And say more about it.

    Args:
        source: Where from.
        target: Where to.
        max_steps: How many,
            on two lines.
        kind: Which.
        modalities: Which ones.
        shots: How many shots.
        sizes: Which sizes.
        verbose: Whether to talk.
        damage: Whether to break things.
    """
    calls.append({key: value for key, value in locals().items()})  # noqa: C416


def many(paths: list[Path], *, count: float = 0.5) -> None:
    """Take several paths."""
    calls.append({"paths": paths, "count": count})


def fails() -> None:
    """Raise one of our errors."""
    raise DataError("clip.mp4 is empty; delete it [or not]")


def breaks() -> None:
    """Raise an error that is a bug."""
    raise ZeroDivisionError


def interrupted() -> None:
    """Be stopped by the user."""
    raise KeyboardInterrupt


def raw(arguments: Sequence[str]) -> int:
    calls.append({"arguments": arguments})
    return 3


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    for function in (everything, many, fails, breaks, interrupted):
        monkeypatch.setitem(cli.COMMANDS, function.__name__, cli.Command(f"{__name__}:{function.__name__}", "of the test"))
    monkeypatch.setitem(cli.COMMANDS, "raw", cli.Command(f"{__name__}:raw", "of the test", raw=True))


def test_defaults_are_the_functions_own() -> None:
    assert cli.main(["everything", "here"]) == 0
    assert calls == [
        {
            "source": "here",
            "target": None,
            "max_steps": 10,
            "kind": "a",
            "modalities": [],
            "shots": [1, 5],
            "sizes": None,
            "verbose": False,
            "damage": True,
        }
    ]


def test_every_kind_of_argument() -> None:
    options = "--target there --max-steps 3 --kind b --modalities rgb flow --shots 1 --sizes 7 8 --verbose --no-damage"
    assert cli.main(["everything", "here", *options.split()]) == 0
    assert calls[0] == {
        "source": "here",
        "target": "there",
        "max_steps": 3,
        "kind": "b",
        "modalities": ["rgb", "flow"],
        "shots": [1],
        "sizes": [7, 8],
        "verbose": True,
        "damage": False,
    }


def test_several_positional_values() -> None:
    assert cli.main(["many", "a b.mp4", "c.mp4", "--count", "2"]) == 0
    assert [str(path) for path in calls[0]["paths"]] == ["a b.mp4", "c.mp4"]
    assert calls[0]["count"] == 2.0


@pytest.mark.parametrize("arguments", ["", "here --max-steps ten", "here --kind c", "here --shots x", "here --nothing"])
def test_wrong_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["everything", *arguments.split()])
    assert stopped.value.code == 2
    assert "amd-fast everything --help" in capsys.readouterr().err
    assert not calls


def test_raw_command_parses_itself() -> None:
    assert cli.main(["raw", "--anything", "x"]) == 3
    assert calls == [{"arguments": ["--anything", "x"]}]


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["everything", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    described = ("Do everything.", "And say more about it.", "How many, on two lines.")
    for part in ("amd-fast everything", *described, "--no-damage", "default: 10"):
        assert part in text


def test_our_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMD_FAST_DEBUG", raising=False)
    assert cli.main(["fails"]) == 2
    assert capsys.readouterr().err == "error: clip.mp4 is empty; delete it [or not]\n"


def test_debugging_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_DEBUG", "1")
    assert cli.main(["fails"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bugs_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["breaks"])


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["interrupted"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["everythin"]) == 2
    assert "did you mean `amd-fast everything`?" in capsys.readouterr().err
    assert cli.main(["qqq"]) == 2
    assert "amd-fast --help" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_table_of_commands(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == status
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text and command.help in text for name, command in cli.COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from amd_fast import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"amd_fast {__version__}\n"


def test_reader_that_goes_away(repository: Path) -> None:
    code = "import sys, amd_fast.cli as cli\nsys.stdin.read()\nsys.exit(cli.main(['--help']))"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=repository, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def options(name: str) -> list[str]:
    """Arguments of a command in order: names of positional ones, long options of the others."""
    names = []
    for action in cli.build_parser(name, cli.COMMANDS[name])._actions:
        names.extend([option for option in action.option_strings if option.startswith("--")] or [action.dest])
    return names


REAL_COMMANDS = list(cli.COMMANDS)


def test_frozen_surface_covers_every_command() -> None:
    assert sorted(json.loads(FROZEN.read_text(encoding="utf-8"))) == sorted(REAL_COMMANDS)


@pytest.mark.parametrize("name", REAL_COMMANDS)
def test_frozen_surface(name: str) -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    assert options(name) == frozen.get(name), "scripts depend on these names; if the change is meant, see the top of this file"


@pytest.mark.parametrize("name", [name for name in REAL_COMMANDS if not cli.COMMANDS[name].raw])
def test_every_argument_is_explained(name: str) -> None:
    parser = cli.build_parser(name, cli.COMMANDS[name])
    silent = [action.dest for action in parser._actions if not action.help]
    assert not silent, f"no text under Args: for {silent} in the docstring of {cli.COMMANDS[name].target}"


if __name__ == "__main__":
    FROZEN.write_text(json.dumps({name: options(name) for name in REAL_COMMANDS}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FROZEN}")
