"""A run folder in a store: training works in a folder of this machine, and what it saves is copied there."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from amd_fast import storage
from amd_fast.errors import CheckpointError
from amd_fast.files import write_atomically

logger = logging.getLogger(__name__)

_POINTER = "checkpoints/last"
_STEP = re.compile(r"step-(\d+)\.safetensors")
# What a run goes on from. The rest (events of TensorBoard, evaluations) is uploaded, never fetched.
_NEEDED = re.compile(r"config\.yaml|metrics\.jsonl|checkpoints/(best|step-\d+)\.safetensors")


class RunMirror:
    """Keeps a run folder in a store equal to the local one; for a run folder of this machine it does nothing.

    The file that names the newest checkpoint is uploaded after all others: whoever reads it finds the checkpoint complete.

    Args:
        output: run folder as configured, a path or a URI.
    """

    def __init__(self, output: str) -> None:
        self.output, self.folder = output, storage.working_folder(output)
        self._remote = storage.is_remote(output)
        self._there: dict[str, tuple[int, int]] = {}

    def pull(self, *, resume: bool) -> None:
        """Fetches the run where the store is ahead of this machine.

        Raises:
            CheckpointError: there is a run, here or in the store, that is not to be continued; or it cannot be fetched.
        """
        if not self._remote:
            return
        there, here = self._step_there(), _step((self.folder / _POINTER).read_text()) if (self.folder / _POINTER).exists() else -1
        if not resume and max(there, here) >= 0:
            where = self.output if there >= 0 else f"{self.folder}, where {self.output} is made,"
            remedy = "pass --resume to continue it, or choose another output folder"
            raise CheckpointError(f"{where} already holds a run; {remedy}")
        if there <= here:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in [*(name for name in storage.list_below(self.output) if _NEEDED.fullmatch(name)), _POINTER]:
            with storage.lease(storage.join(self.output, name), error=CheckpointError) as file:
                write_atomically(self.folder / name, file.read_bytes(), error=CheckpointError)
            self._there[name] = self._stamp(name)

    def push(self) -> None:
        """Uploads what has changed; where that fails, a warning: the next call uploads it again."""
        try:
            self._push()
        except CheckpointError as error:
            logger.warning("%s. Training goes on; everything is in %s, and is uploaded with the next checkpoint", error, self.folder)

    def finish(self) -> str | Path:
        """Uploads what is left, and removes the local folder of a run in a store; returns where the run is.

        Raises:
            CheckpointError: the upload failed; says where the local folder is.
        """
        if not self._remote:
            return self.folder
        try:
            self._push()
        except CheckpointError as error:
            again = "the same command with --resume uploads it"
            raise CheckpointError(f"{error}. The run is complete in {self.folder}; {again}, or copy that folder") from error
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.output

    def _push(self) -> None:
        if not self._remote:
            return
        names = storage.files_below(self.folder)
        for name in sorted(names, key=lambda name: (name == _POINTER, name)):
            stamp = self._stamp(name)
            if self._there.get(name) != stamp:
                storage.upload(self.folder / name, storage.join(self.output, name), error=CheckpointError)
                self._there[name] = stamp
        for name in self._there.keys() - set(names):  # checkpoints that are no longer kept
            storage.remove(storage.join(self.output, name), error=CheckpointError)
            del self._there[name]

    def _stamp(self, name: str) -> tuple[int, int]:
        status = (self.folder / name).stat()
        return status.st_mtime_ns, status.st_size

    def _step_there(self) -> int:
        """Steps of the newest checkpoint in the store, -1 where there is none."""
        pointer = storage.join(self.output, _POINTER)
        return _step(storage.read_bytes(pointer, error=CheckpointError).decode()) if storage.exists(pointer) else -1


def _step(name: str) -> int:
    found = _STEP.fullmatch(name.strip())
    return int(found[1]) if found else -1
