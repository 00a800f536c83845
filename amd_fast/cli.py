"""The ``amd-fast`` command: a table of functions, each with a parser built from its signature and docstring.

A command is an ordinary function with typed arguments, so it is called the same from Python and from the shell:

* an argument without a default is positional, the others are options (``max_steps`` becomes ``--max-steps``);
* ``bool`` becomes a pair of flags (``--progress``, ``--no-progress``);
* ``list[...]`` and ``Sequence[...]`` take several values (``--modalities rgb flow``);
* the help texts are those of the docstring;
* a command that returns a number gives the exit status, None is success.

Modules are imported when their command runs; ``amd-fast --help`` imports none of them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from amd_fast.errors import AmdFastError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class Command(NamedTuple):
    """One entry of the table: where the function is (``module:function``), its line in the help, and who parses.

    ``raw`` functions take the list of arguments as it is, parse it with their module's ``build_parser()``, and may return an
    exit status.
    """

    target: str
    help: str
    raw: bool = False

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, function = self.target.partition(":")
        return typing.cast(Callable[..., Any], getattr(importlib.import_module(module), function))


COMMANDS: dict[str, Command] = {
    "demo": Command("amd_fast.demo:demo_command", "synthesise clips, train, evaluate and report, in minutes and without a GPU"),
    "synth": Command("amd_fast.data.synth.command:synth_command", "write a synthetic action set of real video files"),
    "index": Command("amd_fast.data.index:index_command", "probe a folder or CSV of videos and write its manifest"),
    "join": Command("amd_fast.data.join:join_command", "join manifests into one, to train on several sets of clips together"),
    "train": Command("amd_fast.training.command:main", "train a model on a manifest", raw=True),
    "recipes": Command("amd_fast.training.recipes:recipes_command", "list ready configurations of training and the memory they take"),
    "extract": Command("amd_fast.evaluation.extract:extract_command", "encode every clip once into a feature bank, resumable and in parts"),
    "episodes": Command("amd_fast.evaluation.protocol_file:episodes_command", "write the list of episodes of a seed, clip by clip"),
    "evaluate": Command("amd_fast.evaluation.command:evaluate_command", "score a trained model on few-shot episodes and write a report"),
    "enroll": Command("amd_fast.classifier.enroll_command:enroll_command", "add clips of one's own actions to a gallery, or begin one"),
    "predict": Command("amd_fast.classifier.predict_command:predict_command", "recognise a gallery's actions in clips or a live stream"),
    "compare": Command("amd_fast.evaluation.comparison:compare_command", "compare evaluated runs on the same episodes, with tests"),
    "serve": Command("amd_fast.web.command:serve_command", "serve a web page to enrol actions and recognise clips"),
    "export": Command("amd_fast.export.command:export_command", "export a trained model as programs that need torch alone, for C++ too"),
    "compile": Command("amd_fast.compile_ahead:compile_command", "build every kernel ahead of time, without a GPU"),
    "bench": Command("amd_fast.bench:bench_command", "measure the kernels against PyTorch, torch.compile and other libraries"),
    "bench data": Command("amd_fast.bench:data_command", "measure reading your own videos, with this library and others"),
    "tune": Command("amd_fast.tune:tune_command", "measure launch configurations of the kernels on this GPU and write its table"),
    "doctor": Command("amd_fast.env_report:doctor_command", "show the machine, the versions, and what will run here and why"),
}


def build_parser(name: str, command: Command) -> ArgumentParser:
    """Parser of a command, from the signature and the Google-style docstring of its function."""
    from docstring_parser import parse
    from jsonargparse import ArgumentParser

    if command.raw:
        return typing.cast(ArgumentParser, importlib.import_module(command.target.partition(":")[0]).build_parser())
    function = command.load()
    docstring = parse(function.__doc__ or "")
    texts = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in docstring.params}
    description = "\n\n".join(part for part in (docstring.short_description, docstring.long_description) if part)
    parser = ArgumentParser(prog=f"amd-fast {name}", description=description or command.help)
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        _add_argument(parser, parameter, hints.get(parameter.name, str), texts.get(parameter.name, ""))
    return parser


def _add_argument(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    """Add one parameter of a function to the parser, in the form described at the top of this module."""
    from jsonargparse import ActionYesNo

    element = _list_element(hint)
    if parameter.default is inspect.Parameter.empty:
        many: dict[str, Any] = {} if element is None else {"nargs": "+"}
        parser.add_argument(parameter.name, type=hint if element is None else element, help=text, **many)
        return
    option = "--" + parameter.name.replace("_", "-")
    if hint is bool:
        parser.add_argument(option, action=ActionYesNo(no_prefix="no-"), default=parameter.default, help=text)
    elif element is not None:
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        parser.add_argument(option, nargs="*", type=element, default=default, help=text)
    else:
        parser.add_argument(option, type=hint, default=parameter.default, help=text)


def _list_element(hint: Any) -> Any:
    """The type of the elements where a hint is ``list[...]`` or ``Sequence[...]`` (or one of these or None), else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return _list_element(members[0]) if len(members) == 1 else None
    arguments = typing.get_args(hint)
    return arguments[0] if typing.get_origin(hint) in (list, Sequence) and arguments else None


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command of the table with its arguments; return its exit status."""
    command = COMMANDS[name]
    if command.raw:
        return int(command.load()(list(arguments)) or 0)
    values = build_parser(name, command).parse_args(list(arguments))
    return int(command.load()(**dict(values.items())) or 0)


def usage() -> str:
    """The table of commands, as ``amd-fast --help`` prints it."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: amd-fast <command> [arguments]",
            "",
            "Few-shot action recognition from video with several modalities.",
            "",
            "commands:",
            *lines,
            "",
            "`amd-fast <command> --help` shows the arguments of a command; `amd-fast --version` the version.",
            "AMD_FAST_DEBUG=1 in the environment shows the traceback of an error.",
        ]
    )


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))


def _unknown(name: str) -> int:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `amd-fast {near[0]}`?" if near else "`amd-fast --help` lists the commands."
    _print_error(f"there is no command {name!r}; {hint}")
    return EXIT_ERROR


def _silence_stdout() -> None:
    """Point stdout elsewhere once its reader has gone, or the interpreter complains when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``amd-fast``; returns the exit status (0, 2 for a wrong call or an error of ours, 130 when interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(usage())
            return 0 if given else EXIT_ERROR
        if given[0] == "--version":
            from amd_fast import __version__

            print(f"amd_fast {__version__}")
            return 0
        words = 2 if " ".join(given[:2]) in COMMANDS else 1
        name = " ".join(given[:words])
        status = run(name, given[words:]) if name in COMMANDS else _unknown(name)
        sys.stdout.flush()
        return status
    except AmdFastError as error:
        if os.environ.get("AMD_FAST_DEBUG") == "1":
            traceback.print_exc()
        _print_error(str(error))
        return EXIT_ERROR
    except KeyboardInterrupt:
        _print_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
