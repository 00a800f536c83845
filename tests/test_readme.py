"""The documentation is run: every command, every Python block and every option that README.md and docs/*.md show.

Fenced blocks run from top to bottom in one empty folder per document, so a block may use what an earlier one made. The language of
a block says what happens to it:

* ``python``: run as a script of its own, as it is;
* ``sh``: ``amd-fast`` and ``torchrun`` commands run; ``make`` targets must exist; what ``pip install`` names must be an extra of setup.py;
* ``csv``: written to the file its comment names; ``text``: shown only. Any other block, and any other command, fails.

HTML comments before a block (invisible to readers) make it runnable in seconds, without changing what is shown:

* ``<!-- test: "amd-fast train" += --optimiser.steps 4 -->`` appends options to that command, the shown ones are parsed all the same;
* ``<!-- test: write list.csv -->`` names the file of a ``csv`` block;
* ``<!-- test: prepare own_videos -->`` calls the function of that name below, which makes the files a reader would bring along.
"""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import cv2
import numpy as np
import pytest

from amd_fast import cli
from amd_fast.data.decode import decode_rgb

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md"))]
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


def run_python(block: Block, folder: Path) -> None:
    script = folder / f"block_{block.line}.py"
    script.write_text(block.text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False)
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
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


def write_file(block: Block, folder: Path) -> None:
    names = [rule.removeprefix("write ") for rule in block.rules if rule.startswith("write ")]
    assert len(names) == 1, f"line {block.line}: a csv block needs one comment <!-- test: write NAME -->"
    (folder / names[0]).write_text(block.text, encoding="utf-8")


RUNNERS: dict[str, Callable[[Block, Path], None]] = {
    "python": run_python,
    "sh": run_shell,
    "csv": write_file,
    "text": lambda block, folder: None,
}


def own_videos(folder: Path) -> None:
    """A reader's own clips: 16 classes, four people, one clip each and a second one of anna, thermal for some."""
    sources = sorted((folder / "clips").rglob("*.mp4"))
    labels = ["draw_circle", "push_away", *sorted({path.parent.name for path in sources})[:14]]
    rng = np.random.default_rng(0)
    for position, label in enumerate(labels):
        parent = folder / "videos" / label
        parent.mkdir(parents=True)
        for number, name in enumerate(("anna_c1", "anna_c2", "ben_c1", "cem_c1", "dana_c1")):
            shutil.copy(sources[(5 * position + number) % len(sources)], parent / f"{name}.mp4")
            if number < 2:
                np.save(parent / f"{name}.thermal.npy", rng.normal(20, 5, (10, 12, 16)).astype(np.float32))


def new_actions(folder: Path) -> None:
    """A few examples of three actions that the model was not trained on, and a clip to recognise."""
    classes = sorted((folder / "clips" / "test").iterdir())[:3]
    for number, source in enumerate(classes):
        target = folder / "actions" / f"action_{number}"
        target.mkdir(parents=True)
        for clip in sorted(source.glob("*.mp4"))[: number + 1]:
            shutil.copy(clip, target)
    shutil.copy(sorted(classes[0].glob("*.mp4"))[-1], folder / "unknown.mp4")


def benchmark_sets(folder: Path) -> None:
    """The public data sets in small: three classes of two clips each, named and listed as they are distributed."""
    sources = sorted((folder / "clips").rglob("*.mp4"))
    layouts = {
        "UCF-101": ("{0}/v_{0}_g0{1}_c01.avi", ["Archery", "ApplyLipstick", "BlowingCandles"]),
        "hmdb51_org": ("{0}/A Movie #{1}_{0}_f_cm_np1_le_med_0.avi", ["catch", "cartwheel", "fencing"]),
        "k400": ("train/{0}/{2}_00001{1}_00002{1}.mp4", ["air_drumming", "baking_cookies", "blasting_sand"]),
        "20bn-something-something-v2": ("{3}.webm", ["Opening something", "Closing something", "Tearing something"]),
        "ucf_frames": ("{0}/v_{0}_g0{1}_c01", ["Archery", "ApplyLipstick", "BlowingCandles"]),
    }
    lists = {"UCF-101": "ucf_ARN", "hmdb51_org": "hmdb_ARN", "k400": "kinetics_CMN", "20bn-something-something-v2": "ssv2_OTAM"}
    for name, (pattern, labels) in layouts.items():
        listed = folder / "splits" / lists.get(name, "")
        listed.mkdir(parents=True, exist_ok=True)
        for position, (split, label) in enumerate(zip(("train", "val", "test"), labels, strict=True)):
            paths = [pattern.format(label, number, f"{label:x<10.10}{number}", 2 * position + number) for number in (1, 2)]
            for source, path in zip(sources, paths, strict=False):
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                if Path(path).suffix:
                    shutil.copy(source, folder / name / path)
                else:
                    frames(source, folder / name / path)
            if name in lists:
                classes = f"{split}0" if name.startswith("20bn") else label.replace("_", " ") if name == "k400" else label
                (listed / f"{split}list03.txt").write_text("".join(f"{classes}/{Path(path).stem}\n" for path in paths))
            official = folder / "testTrainMulti_7030_splits"
            official.mkdir(exist_ok=True)
            if name == "hmdb51_org":
                (official / f"{label}_test_split1.txt").write_text("".join(f"{Path(path).name} 1 \n" for path in paths))
    (folder / "labels").mkdir()
    clips = [
        {"id": str(i + 1), "template": f"{verb} [something]"} for i, verb in enumerate(np.repeat(["Opening", "Closing", "Tearing"], 2))
    ]
    (folder / "labels" / "train.json").write_text(json.dumps(clips))


def frames(video: Path, folder: Path) -> None:
    """The frames of a video as a folder of JPEG files."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(decode_rgb(video, range(4)), 1):
        cv2.imwrite(str(folder / f"img_{number:05d}.jpg"), picture[..., ::-1])


def bucket(folder: Path) -> None:
    """An S3 server with a bucket that holds the reader's own videos; the environment is set for it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    server.start()
    host, port = server.get_host_and_port()
    credentials = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(credentials, AWS_ENDPOINT_URL=f"http://{host}:{port}", AMD_FAST_CACHE=str(folder / "cache"))
    store = importlib.import_module("boto3").resource("s3").create_bucket(Bucket="bucket")
    for file in (folder / "videos").rglob("*.*"):
        store.upload_file(str(file), str(file.relative_to(folder)))


PREPARATIONS: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (benchmark_sets, bucket, new_actions, own_videos)
}


def run_blocks(text: str, folder: Path) -> None:
    for block in parse(text)[0]:
        run_block(block, folder)


def run_block(block: Block, folder: Path) -> None:
    for rule in block.rules:
        name = rule.removeprefix("prepare ")
        if name != rule:
            PREPARATIONS[name](folder)
        else:
            assert APPEND.fullmatch(rule) or rule.startswith("write "), f"line {block.line}: unknown test comment {rule!r}"
    assert block.language in RUNNERS, f"line {block.line}: a block of language {block.language!r} is covered by no rule"
    RUNNERS[block.language](block, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):
        run_blocks((REPOSITORY / name).read_text(encoding="utf-8"), tmp_path)
    if name == "README.md":
        for result in (
            "runs/two/checkpoints/best.safetensors",
            "example/evaluation/report.html",
            "runs/first/evaluation/report.html",
            "runs/mine/evaluation/results.json",
        ):
            assert (tmp_path / result).is_file()


def test_readme_shows_everything() -> None:
    blocks, prose = document("README.md")
    shown = {command[1] for block in blocks if block.language == "sh" for command in commands(block) if command[0] == "amd-fast"}
    shown |= {span.split()[1] for span in code_spans(prose) if re.fullmatch(r"amd-fast \w+.*", span)}
    shown |= {" ".join(command[1:3]) for block in blocks if block.language == "sh" for command in commands(block)}
    assert shown >= set(cli.COMMANDS) - {"demo"}, "README.md leaves out commands"
    assert sum(block.language == "python" for block in blocks) >= 3


def code_spans(prose: str) -> list[str]:
    """Inline code; indented blocks, which hold formulas and drawings, are left out."""
    text = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def options_of(name: str) -> set[str]:
    parser: Any = cli.build_parser(name, cli.COMMANDS[name])
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_in_prose_exist(name: str) -> None:
    known = {command: options_of(command) for command in cli.COMMANDS}
    for span in code_spans(document(name)[1]):
        words = span.split()
        command = words[1] if words[0] == "amd-fast" and len(words) > 1 else None
        if command is not None and not command.startswith("-"):
            assert command in known, f"`{span}`: there is no such command"
            allowed = known[command]
        else:
            allowed = set().union(*known.values())
        for option in re.findall(r"(?<!\S)--[a-z][\w.-]*", span):
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
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in prose.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in headings, f"no heading for {target}"
        elif "://" not in target:
            assert (REPOSITORY / name).parent.joinpath(target).exists(), f"a dead link to {target}"


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
