"""Matchers: prepared clips of support and query in, one score per view and class out, batched over episodes.

:mod:`~amd_fast.models.matchers.base` says what a matcher is, the other modules hold one kind each.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from amd_fast.errors import ConfigError
from amd_fast.models.matchers.base import Clips, Match, Matcher
from amd_fast.models.matchers.frames import BiMHMMatcher, OTAMMatcher
from amd_fast.models.matchers.prototype import CosineMatcher, PrototypeMatcher, Support, class_means
from amd_fast.models.matchers.tuples import TupleMatcher

__all__ = ["MATCHERS", "Clips", "Match", "Matcher", "Support", "class_means", "create_matcher", "list_matchers"]

MATCHERS: dict[str, type[PrototypeMatcher | BiMHMMatcher | OTAMMatcher | TupleMatcher]] = {
    "prototype": PrototypeMatcher,
    "cosine": CosineMatcher,
    "bi_mhm": BiMHMMatcher,
    "otam": OTAMMatcher,
    "trx": TupleMatcher,
}


def list_matchers(pattern: str = "*") -> list[str]:
    """Names of the matchers that match a shell pattern, sorted."""
    return sorted(name for name in MATCHERS if fnmatch(name, pattern))


def create_matcher(name: str, num_views: int, dim: int, num_modalities: int = 1, **options: Any) -> Matcher:
    """A matcher by name.

    Args:
        name: one of :func:`list_matchers`.
        num_views: V, the modalities and, where it is one more than these, the joint view.
        dim: width D of tokens and descriptors.
        num_modalities: M.
        **options: further arguments of the matcher.

    Raises:
        ConfigError: the name is unknown, or an option is.
    """
    if name not in MATCHERS:
        raise ConfigError(f"unknown matcher {name!r}; choose one of {', '.join(list_matchers())}")
    try:
        return MATCHERS[name](num_views, dim, num_modalities, **options)
    except TypeError as error:
        raise ConfigError(f"matcher {name!r} does not take the options {sorted(options)}: {error}") from error
