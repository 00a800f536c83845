"""What a run did, for machines (JSON lines) and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from amd_fast.errors import CheckpointError
from amd_fast.files import write_atomically
from amd_fast.storage import join, read_bytes


class History:
    """Appends records to ``metrics.jsonl`` of a run folder and, on request, to TensorBoard events beside it."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self._folder = folder
        self._records: list[dict[str, Any]] = []
        self._file = self.path.open("a")
        self._writer: Any = None
        self._tensorboard = tensorboard

    def add(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Adds one record of ``kind`` ``train`` or ``validation``.

        Raises:
            CheckpointError: the disk is full.
        """
        record = {"step": step, "kind": kind, **values}
        self._records.append(record)
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path} ({error.strerror}); free some space, then go on with --resume") from error
        if self._tensorboard:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._folder / "tensorboard", purge_step=step)
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def cut(self, step: int) -> None:
        """Forgets what a killed run recorded after its last checkpoint; a half-written last line is dropped."""
        records = []
        for line in self.path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        self._records = [record for record in records if record["step"] <= step]
        self._file.close()
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in self._records).encode(), error=CheckpointError)
        self._file = self.path.open("a")

    def table(self) -> pd.DataFrame:
        """All records."""
        return pd.DataFrame(self._records)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_history(folder: str | Path) -> pd.DataFrame:
    """The history of a run folder (a path or a URI), one row per record of ``metrics.jsonl``."""
    lines = read_bytes(join(folder, "metrics.jsonl")).decode().splitlines()
    return pd.DataFrame([json.loads(line) for line in lines])
