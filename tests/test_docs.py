"""The site: it builds without warnings and without the network, and its tables say what the source says."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import amd_fast
from amd_fast import cli
from amd_fast.training.config import TrainConfig

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", PAGES / "site_hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; warnings are errors, and nothing can be fetched."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without the heads."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("|") and set(line) <= set("|- "):
            found.pop()  # the line before it was the head
        elif line.startswith("|"):
            found.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def test_every_page_is_in_the_navigation() -> None:
    def pages(entries: Any) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        return [page for entry in (entries.values() if isinstance(entries, dict) else entries) for page in pages(entry)]

    navigation = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(navigation)) == sorted(path.name for path in PAGES.glob("*.md")), "a page of docs/ is missing in mkdocs.yml"


def test_the_command_line_is_the_parsers(hooks: ModuleType) -> None:
    sections = re.split(r"^## amd-fast ", hooks.commands_text(), flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections] == list(cli.COMMANDS)
    settings = {item.name for item in dataclasses.fields(TrainConfig)}
    for name, section in zip(cli.COMMANDS, sections, strict=True):
        parser: Any = cli.build_parser(name, cli.COMMANDS[name])
        shown = {word for cells in rows(section) for word in re.findall(r"`([^`]+)`", cells[0])}
        there = {
            word
            for action in parser._actions
            if action.dest != "help" and not (name == "train" and action.dest.split(".")[0] in settings)
            for word in [option for option in action.option_strings if option.startswith("--")] or [action.dest]
        }
        assert shown == there
        assert all(cells[2] for cells in rows(section)), f"amd-fast {name}: an argument without a meaning"


def test_the_configuration_is_the_dataclasses(hooks: ModuleType) -> None:
    shown = {cells[0].strip("`-"): cells for cells in rows(hooks.configuration_text())}
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(TrainConfig()).items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    assert shown.keys() == flat.keys()
    for name, (_, kind, default, meaning) in shown.items():
        assert kind and len(meaning) > 5, f"{name} has no text under it in its dataclass"
        expected = " ".join(flat[name]) if isinstance(flat[name], list) else str(flat[name])
        assert default == (f"`{expected}`" if expected else "empty")


def test_the_variables_are_those_that_the_source_reads() -> None:
    tables = re.split(r"(?=^\| variable )", (PAGES / "environment.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    own, scripts, others = [set(re.findall(r"`([A-Z][A-Z0-9_]+)`", "\n".join(c[0] for c in rows(table)))) for table in tables]
    read = re.compile(r"(?:environ(?:\.get\(|\[)|getenv\(|number_from_environment\()\s*[\"']([A-Z][A-Z0-9_]+)[\"']")
    sources = [*(REPOSITORY / "amd_fast").rglob("*.py"), *(REPOSITORY / "kernels").rglob("*.py")]
    assert own == {name for path in sources for name in read.findall(path.read_text(encoding="utf-8"))}
    texts = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("benchmarks/gpu.sh", "docs/examples/slurm.sbatch")]
    taken = {name for text in texts for name in re.findall(r"^(\w+)=\$\{\1:", text, re.MULTILINE)}
    taken |= set(re.findall(r"^(\w+) \?=", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert scripts == taken
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES.glob("*.md") if path.name != "environment.md")
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    unknown = {name for name in others if name not in pages + code and not name.startswith(("AWS_", "FSSPEC_"))}
    assert not unknown, f"{unknown} are mentioned nowhere else"


def test_every_public_name_is_on_the_page(site: Path) -> None:
    text = (PAGES / "api.md").read_text(encoding="utf-8")
    listed = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    modules = ("data", "evaluation", "models", "ops", "storage", "training", "adapters", "errors")
    public = set(amd_fast.__all__) - set(modules) - {"__version__"}
    for module in (amd_fast.data, amd_fast.ops, amd_fast.adapters):
        public |= set(module.__all__)
    public |= {name for name, value in vars(amd_fast.errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert listed == public
    html = (site / "api.html").read_text(encoding="utf-8")
    assert "Differentiable in query, key, value and log_weight" in html, "docstrings are missing"
    assert not re.search(r":(func|class|meth|mod):", html)


def test_generated_tables_are_built_in(site: Path) -> None:
    assert "--calibration-split" in (site / "commands.html").read_text(encoding="utf-8")
    assert "--data.colour_jitter" in (site / "configuration.html").read_text(encoding="utf-8")
    assert not any("<!-- generated" in page.read_text(encoding="utf-8") for page in site.glob("*.html"))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        for target in re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=\"?([^\"\s>]+)", html):
            assert not re.match(r"(https?:)?//", target), f"{page.name} fetches {target}"
            if not target.startswith(("data:", "mailto:")):
                file = target.partition("#")[0].partition("?")[0]
                found = site / file.lstrip("/") if file.startswith("/") else page.parent / file
                assert found.exists(), f"{page.name}: {target} is missing"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), f"{style.name} fetches something"


def test_what_is_looked_for_would_be_found(hooks: ModuleType) -> None:
    table = "| a | b |\n| --- | --- |\n| `--x\\|y` | |\n"
    assert rows(table) == [["`--x|y`", ""]]
    assert hooks.on_page_content("see :func:<code>~amd_fast.fuse</code>") == "see <code>amd_fast.fuse</code>"
    assert hooks.on_page_markdown("as it is") == "as it is"
