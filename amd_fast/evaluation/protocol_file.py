"""Lists of episodes as files, so that two systems can be compared clip by clip; ``amd-fast episodes``.

A file is a CSV table, gzipped where its name ends in ``.gz``, with one row per episode and class::

    # {"amd_fast": "episodes 1", "ways": 5, "shots": 1, "queries": 1, "seed": 0, "query_clips": "all", "sha256": "..."}
    episode,class,support_1,query_1
    0,brush_hair,brush_hair/a.avi,brush_hair/b.avi
    ...

Clips are named as in the manifest, relative to its folder. The hash covers everything below the first line
(``zcat FILE | tail -n +2 | sha256sum`` gives it). A file without that first line, from another system say, is read just as well.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from amd_fast.errors import DataError
from amd_fast.files import write_atomically
from amd_fast.progress import console

_FORMAT = "episodes 1"
_NAMED = 3  # examples in one error message
_KEY_DIGITS = 16
_REMEDY = "write it with 'amd-fast episodes', or as a CSV table with the columns episode, class, support_1, ..., query_1, ..."

Names = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class EpisodeList:
    """E episodes, clip by clip.

    Attributes:
        classes: class names ``[E, ways]``.
        support: clip names ``[E, ways, shots]``.
        query: clip names ``[E, ways, queries]``.
        seed: seed they were drawn with, kept for the record.
        query_clips: which clips the queries were drawn from, see :class:`~amd_fast.evaluation.protocol.Condition`.
    """

    classes: Names
    support: Names
    query: Names
    seed: int = 0
    query_clips: str = "all"

    @classmethod
    def of(
        cls, table: pd.DataFrame, support: np.ndarray, query: np.ndarray, ways: int, seed: int = 0, query_clips: str = "all"
    ) -> EpisodeList:
        """Names the episodes that rows of a manifest's table form: ``support [E, ways * shots]``, ``query [E, ways * queries]``."""
        paths, labels = (table[name].to_numpy(object) for name in ("path", "label"))
        first, second = (rows.reshape(len(rows), ways, -1) for rows in (support, query))
        return cls(labels[first[..., 0]], paths[first], paths[second], seed, query_clips)

    @property
    def ways(self) -> int:
        """Classes per episode."""
        return self.support.shape[1]

    @property
    def shots(self) -> int:
        """Support clips per class."""
        return self.support.shape[2]

    @property
    def queries(self) -> int:
        """Query clips per class."""
        return self.query.shape[2]

    def __len__(self) -> int:
        return len(self.support)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the table: class and clip names of every episode, in order."""
        return hashlib.sha256(self._table()).hexdigest()

    def keys(self) -> NDArray[np.str_]:
        """A hash of every episode on its own, whatever its number: ``[E]``."""
        everything = np.concatenate([self.classes[..., None], self.support, self.query], -1).reshape(len(self), -1).tolist()
        found = [hashlib.sha256("\0".join(row).encode("utf-8", "surrogateescape")).hexdigest()[:_KEY_DIGITS] for row in everything]
        return np.array(found, dtype=f"U{_KEY_DIGITS}")

    def rows(self, table: pd.DataFrame, lost: Mapping[str, str] | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of a manifest's table: support int64 ``[E, ways * shots]`` and query int64 ``[E, ways * queries]``.

        Args:
            table: has the columns path and label. Labels may be named otherwise than here, as long as they divide the clips alike.
            lost: clips that were left out of the table because they could not be decoded.

        Raises:
            DataError: clips are not in the table (says how many, and which), or their labels do not divide them as the list does.
        """
        index = {path: row for row, path in enumerate(table["path"])}
        missing = sorted({name for side in (self.support, self.query) for name in side.ravel().tolist() if name not in index})
        if missing:
            undecodable = sum(name in (lost or {}) for name in missing)
            named = ", ".join(map(repr, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
            raise DataError(
                f"the list of episodes names {len(missing)} clips that are not among the {len(table)} at hand "
                f"({undecodable} of them could not be decoded): {named}. "
                "Give the manifest and the split it was made from, or make a new list of the clips there are"
            )
        support, query = (
            np.array([index[name] for name in side.ravel().tolist()], dtype=np.int64).reshape(side.shape)
            for side in (self.support, self.query)
        )
        self._check_labels(pd.factorize(table["label"])[0], support, query)
        return support.reshape(len(self), -1), query.reshape(len(self), -1)

    def _check_labels(self, code: np.ndarray, support: np.ndarray, query: np.ndarray) -> None:
        labels = code[np.concatenate([support, query], -1)]
        among = np.sort(labels[..., 0], axis=1)
        wrong = (labels != labels[..., :1]).any((1, 2)) | (among[:, 1:] == among[:, :-1]).any(1)
        if wrong.any():
            raise DataError(
                f"episode {int(wrong.argmax())} of the list puts clips together that have different labels here, or apart that share one "
                f"({int(wrong.sum())} such episodes); give the manifest that the list was made from"
            )

    def write(self, path: str | Path) -> None:
        """Writes the file; equal lists give equal bytes.

        Raises:
            DataError: the name does not end in .csv or .csv.gz, or the folder cannot be written.
        """
        path = Path(path)
        if not path.name.endswith((".csv", ".csv.gz")):
            raise DataError(f"a list of episodes is a .csv or .csv.gz file, got {path}")
        table = self._table()
        facts = {"ways": self.ways, "shots": self.shots, "queries": self.queries, "seed": self.seed, "query_clips": self.query_clips}
        header = json.dumps({"amd_fast": _FORMAT, **facts, "sha256": hashlib.sha256(table).hexdigest()})
        content = f"# {header}\n".encode() + table
        if path.name.endswith(".gz"):
            packed = io.BytesIO()
            with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream:  # no time stamp: same input, same bytes
                stream.write(content)
            content = packed.getvalue()
        write_atomically(path, content)

    @classmethod
    def read(cls, path: str | Path) -> EpisodeList:
        """Reads a file.

        Raises:
            DataError: it cannot be read, was changed since it was written, or holds no such table.
        """
        try:
            content = Path(path).read_bytes()
            content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read the episodes in {path} ({error}); {_REMEDY}") from error
        facts: dict[str, Any] = {}
        if content.startswith(b"# {"):
            header, _, content = content.partition(b"\n")
            facts = _facts(header, path)
            found = hashlib.sha256(content).hexdigest()
            if facts.get("sha256") != found:
                raise DataError(f"{path} was changed since it was written: its table has the SHA-256 {found}, not {facts.get('sha256')}")
        try:
            return cls(*_parse(content), int(facts.get("seed", 0)), str(facts.get("query_clips", "all")))
        except (csv.Error, ValueError) as error:
            raise DataError(f"{path} holds no list of episodes: {error}; {_REMEDY}") from error

    def _table(self) -> bytes:
        columns = ["episode", "class", *(f"support_{i + 1}" for i in range(self.shots)), *(f"query_{i + 1}" for i in range(self.queries))]
        cells = np.concatenate([self.classes[..., None], self.support, self.query], -1)
        names = {name: _quoted(name) for name in set(cells.ravel().tolist())}
        lines = [",".join(columns)]
        for number, episode in enumerate(cells.tolist()):
            lines += [f"{number}," + ",".join([names[name] for name in row]) for row in episode]
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(mark in name for mark in ',"\r\n') else name


def _facts(header: bytes, path: str | Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(header[1:])
    except ValueError:
        facts = {}
    if facts.get("amd_fast") != _FORMAT:
        raise DataError(f"{path} is of another format ({facts.get('amd_fast')!r}, known is {_FORMAT!r}); {_REMEDY}")
    return facts


def _parse(content: bytes) -> tuple[Names, Names, Names]:
    """Class, support and query names of a table.

    Raises:
        ValueError: it is no list of episodes; says where.
    """
    header, *rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline=""), strict=True)) or [[]]
    shots, queries = (sum(name.startswith(f"{side}_") for name in header) for side in ("support", "query"))
    wanted = ["episode", "class", *(f"support_{i + 1}" for i in range(shots)), *(f"query_{i + 1}" for i in range(queries))]
    if header != wanted or not shots or not queries:
        raise ValueError(f"its columns are {', '.join(header[:6]) or 'missing'}")
    uneven = next((number for number, row in enumerate(rows) if len(row) != len(header)), None)
    if uneven is not None:
        raise ValueError(f"row {uneven + 1} has {len(rows[uneven])} values for {len(header)} columns")
    numbers = [row[0] for row in rows]
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1]]
    ways = len(rows) // len(starts) if starts else 0
    if ways < 1 or starts != list(range(0, len(rows), ways)):
        raise ValueError("its episodes have different numbers of classes, or there is none")
    cells = np.array([row[1:] for row in rows], dtype=object).reshape(len(starts), ways, -1)
    for number, episode in enumerate(cells):
        names = episode[:, 1:].ravel().tolist()
        if len(set(names)) < len(names) or len(set(episode[:, 0].tolist())) < ways or "" in names:
            raise ValueError(f"episode {numbers[starts[number]]} names a clip or a class twice, or none")
    return cells[..., 0], cells[..., 1 : 1 + shots], cells[..., 1 + shots :]


def episodes_command(
    manifest: str,
    output: str,
    split: str = "test",
    ways: int = 5,
    shots: int = 1,
    queries: int = 1,
    episodes: int = 10000,
    seed: int = 0,
    query_clips: str = "all",
    classes: list[str] = [],  # noqa: B006 (never changed; jsonargparse shows it as the default)
    group: str | None = None,
) -> None:
    """Write the list of episodes that a seed stands for, so that other systems can be tested on the very same clips.

    Args:
        manifest: Manifest with the clips.
        output: File to write, .csv or .csv.gz.
        split: Split whose classes are tested; "all" for the whole manifest.
        ways: Classes per episode.
        shots: Support clips per class.
        queries: Query clips per class.
        episodes: Number of episodes.
        seed: Seed of the episodes.
        query_clips: all; or, where the manifest marks damage and support is to be clean, queries that are clean, damaged or mixed.
        classes: Only these of the split's classes; by default all.
        group: Column of the manifest that names the source recording, where it is not "group".
    """
    from amd_fast.data.manifest import Manifest
    from amd_fast.evaluation.bank import FeatureBank
    from amd_fast.evaluation.protocol import QUERY_CLIPS, Condition, list_episodes

    if query_clips not in QUERY_CLIPS:
        raise DataError(f"query_clips must be one of {', '.join(QUERY_CLIPS)}, got {query_clips!r}")
    clips = Manifest.from_csv(manifest, group=group)
    clips = clips.subset(split=None if split == "all" else split, classes=classes or None)
    bank = FeatureBank(np.empty((len(clips), 0, 0, 0)), np.empty((len(clips), 0, 0)), clips.table, {})  # episodes are drawn without tokens
    listed = list_episodes(bank, Condition(ways, shots, queries, episodes, seed, query_clips))  # type: ignore[arg-type]
    listed.write(output)
    console.print(f"{len(listed)} episodes, SHA-256 {listed.hash}: {output}", soft_wrap=True)
