"""Recipes: training configurations that come with the package, ``--config recipe:NAME``, and the memory each of them takes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml
from rich.table import Table

from amd_fast.errors import ConfigError
from amd_fast.progress import console
from amd_fast.training.config import TrainConfig

PREFIX = "recipe:"


def list_recipes() -> list[str]:
    """Names of all recipes, sorted; those that begin with ``with_`` change others and come after them."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def _folder() -> Path:
    return Path(str(resources.files("amd_fast") / "recipes"))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        ConfigError: there is no such recipe.
    """
    path = _folder() / f"{name}.yaml"
    if name not in list_recipes():
        raise ConfigError(f"there is no recipe {name!r}; known: {', '.join(list_recipes())}")
    return path


def recipe(*names: str) -> TrainConfig:
    """The configuration of a recipe, changed by further ones in order.

    Raises:
        ConfigError: there is no such recipe, or the result is no valid configuration.
    """
    content: dict[str, object] = {}
    for name in names:
        _merge(content, yaml.safe_load(recipe_path(name).read_text(encoding="utf-8")))
    return TrainConfig.from_dict(content)


def _merge(content: dict[str, object], changes: dict[str, object]) -> None:
    for key, value in changes.items():
        before = content.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            _merge(before, value)
        else:
            content[key] = value


def summary(name: str) -> str:
    """The first comment line of a recipe."""
    return recipe_path(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def recipes_command(show: str = "") -> None:
    """List the recipes with the GPU memory each of them takes, computed, or show one.

    Args:
        show: Print the file of this recipe, to start a configuration of your own from.
    """
    from amd_fast.training.memory import estimate

    if show:
        console.print(recipe_path(show).read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(title="recipes for amd-fast train --config recipe:NAME")
    table.add_column("name")
    table.add_column("what it trains")
    table.add_column("GB per GPU,\ncomputed", justify="right")
    names = list_recipes()
    changes = [name for name in names if name.startswith("with_")]
    for name in sorted(set(names) - set(changes)):
        table.add_row(name, summary(name), f"{estimate(recipe(name), processes=recipe(name).episode.per_step).total / 1e9:.1f}")
    table.add_section()
    for name in changes:
        table.add_row(name, summary(name), "")
    console.print(table)
