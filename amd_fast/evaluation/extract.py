"""``amd-fast extract``: a feature bank on disk, filled in blocks of rows by one process or several, resumable after a kill.

Beside the bank's folder lies ``<name>.partial`` while the work is under way::

    plan.json          what the bank is made from, rows per block
    journal-1-of-2.jsonl, ...   one line per finished block: {"block": 3, "lost": {"97": "reason"}}
    bank/tokens.npy, bank/log_weight.npy    all rows, allocated at the start

A block is written to the arrays and synchronised before its line is: what the journals name is on disk. A block always holds the same
rows, whoever encodes it and however often it is started again, so an interrupted bank ends with the bytes of an uninterrupted one. Whoever
finds all blocks done renames the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from amd_fast.data.decoders import DecoderName
from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.errors import ConfigError, DataError
from amd_fast.evaluation.bank import (
    FeatureBank,
    Reading,
    clip_loader,
    describe_bank,
    differences,
    encode_rows,
    kept_table,
    key_of,
    write_facts,
)
from amd_fast.files import take_place, write_atomically
from amd_fast.models.afmir import AFMIR
from amd_fast.progress import console, track
from amd_fast.storage import join, upload_folder, working_folder

_ARRAYS = ("tokens", "log_weight")
_COPIED = 64 << 20  # bytes moved at a time where lost clips are taken out


class Extraction:
    """The making of one bank on disk.

    Args:
        path: folder of the finished bank.
        model: encodes the clips, in evaluation mode on its own device.
        manifest: the clips.
        reading: crops, views and type of the tokens.
        shard: number of this process, 1..n, and n; each encodes every n-th block.
        batch: clips per block; a bank under way keeps the number it was begun with.
        overwrite: replace a bank (finished or not) that was made from something else.

    Raises:
        DataError: ``path`` holds a bank made from something else, or a folder that is no bank.
    """

    def __init__(
        self,
        path: str | Path,
        model: AFMIR,
        manifest: Manifest,
        reading: Reading,
        *,
        shard: tuple[int, int] = (1, 1),
        batch: int = 32,
        overwrite: bool = False,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        self.path, self.model, self.manifest, self.reading, self.shard, self.overwrite = (
            Path(path),
            model,
            manifest,
            reading,
            shard,
            overwrite,
        )
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.key = key_of(model, manifest, reading)
        # Any decoder's bank will do unless one is named: that one is never replaced, not by what another has read before either.
        self._wanted = {**self.key, "transform": reading.transform(model)} if reading.decoder == "auto" else self.key
        self.finished = self._already_finished()
        if not self.finished:
            self.batch = self._begin(batch)
            self.finished = self._already_finished()  # another process may have put the last block in just now
        if self.finished:
            shutil.rmtree(self.partial, ignore_errors=True)

    def run(self, loader: ClipLoader, *, progress: bool = True) -> bool:
        """Encodes what is left of this process' blocks; True where the whole bank is finished with that."""
        if self.finished:
            return True
        self.model.eval()
        done, _ = self._journal()
        todo = [block for block in range(self.shard[0] - 1, self._blocks, self.shard[1]) if block not in done]
        number, count = self.shard
        with open(self.partial / f"journal-{number}-of-{count}.jsonl", "ab+") as journal:
            _end_line(journal)
            tokens, weights = self._arrays("r+")
            for block in track(todo, "encoding clips", unit=self.batch, disable=not progress):
                rows = np.arange(block * self.batch, min((block + 1) * self.batch, len(self.manifest)))
                token, weight, kept = encode_rows(self.model, loader, rows, self.reading)
                tokens[kept], weights[kept] = token, weight
                tokens.flush()
                weights.flush()
                lost = {str(row): loader.lost.get(row, "") for row in np.setdiff1d(rows, kept).tolist()}
                journal.write(json.dumps({"block": block, "lost": lost}).encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
        return self._finish()

    @property
    def _blocks(self) -> int:
        return -(-len(self.manifest) // self.batch)

    def _already_finished(self) -> bool:
        if not self.path.exists():
            return False
        try:
            found = differences(FeatureBank.open(self.path).meta["key"], self._wanted)
        except (DataError, KeyError) as error:
            if self.overwrite:
                return False
            raise DataError(f"{self.path} is there and is no feature bank of this version; name another folder, or overwrite it") from error
        if found and not self.overwrite:
            raise DataError(f"{self.path} holds a bank made from other {'; '.join(found)}; name another folder, or overwrite it")
        return not found

    def _begin(self, batch: int) -> int:
        """Makes the folder of the work, or joins the one that is there; returns the rows per block."""
        for _ in range(2):
            if not self.partial.exists():
                self._create(batch)
            plan = self._plan()
            if not (found := differences(plan["key"], self._wanted)):
                return int(plan["batch"])
            if not self.overwrite:
                other = f"{self.partial} holds an unfinished bank made from other {'; '.join(found)}"
                raise DataError(f"{other}; delete it, name another folder, or overwrite it")
            shutil.rmtree(self.partial)
        raise DataError(f"{self.partial} changed while it was being replaced; let one process finish first")

    def _plan(self) -> dict[str, Any]:
        try:
            plan: dict[str, Any] = json.loads((self.partial / "plan.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{self.partial} cannot be continued ({error}); delete it to start again") from error
        return plan

    def _create(self, batch: int) -> None:
        """The folder with its arrays appears at once, so that of several processes exactly one makes it."""
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{self.partial.name}.", suffix=".tmp", dir=self.partial.parent))
            try:
                os.chmod(made, 0o755)
                (made / "bank").mkdir()
                shape = (len(self.manifest), len(self.model.modalities), self.reading.sets(self.model))
                _allocate(made / "bank" / "tokens.npy", self.reading.dtype, (*shape, self.model.dim))
                _allocate(made / "bank" / "log_weight.npy", "float32", shape)
                write_atomically(made / "plan.json", json.dumps({"key": self.key, "batch": batch}, indent=1).encode())
                try:
                    os.rename(made, self.partial)
                except OSError:
                    if not self.partial.is_dir():
                        raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            raise DataError(f"cannot make {self.partial} ({error.strerror}); free some space, or choose another folder") from error

    def _arrays(self, mode: Any) -> list[Any]:
        return [np.load(self.partial / "bank" / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in _ARRAYS]

    def _journal(self) -> tuple[set[int], dict[int, str]]:
        """Finished blocks of all processes, and lost rows with the reason; a line cut short by a kill counts as not written."""
        done: set[int] = set()
        lost: dict[int, str] = {}
        for file in sorted(self.partial.glob("journal-*.jsonl")):
            for line in file.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if line.endswith(b"\n"):
                    done.add(entry["block"])
                    lost.update({int(row): reason for row, reason in entry["lost"].items()})
        return done, lost

    def _finish(self) -> bool:
        """Renames the work to the bank where all blocks are done; one process at a time."""
        with _locked(self.partial / "plan.json") as held:
            if not held:  # another process has finished it in the meantime
                return True
            done, lost = self._journal()
            if len(done) < self._blocks:
                return False
            table = kept_table(self.manifest, lost)
            complete = self._without(lost) if lost else self.partial / "bank"
            write_facts(complete, table, {**describe_bank(self.manifest, lost), "key": self.key})
            take_place(complete, self.path)
            shutil.rmtree(self.partial, ignore_errors=True)
        return True

    def _without(self, lost: dict[int, str]) -> Path:
        """A copy of the arrays without the lost rows."""
        kept = np.setdiff1d(np.arange(len(self.manifest)), list(lost))
        folder = self.partial / "kept"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, array in zip(_ARRAYS, self._arrays("r"), strict=True):
            _allocate(folder / f"{name}.npy", array.dtype, (len(kept), *array.shape[1:]))
            copy = np.load(folder / f"{name}.npy", mmap_mode="r+", allow_pickle=False)
            step = max(1, _COPIED // max(array[0].nbytes, 1))
            for start in range(0, len(kept), step):
                copy[start : start + step] = array[kept[start : start + step]]
            copy.flush()
        return folder


def _allocate(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """An array of zeros on disk whose space is taken now: writing to a map of a file that the disk has no room for kills the process."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        os.fsync(file.fileno())


def _end_line(journal: Any) -> None:
    """Ends a line that a kill cut short."""
    if journal.seek(0, os.SEEK_END):
        journal.seek(-1, os.SEEK_END)
        if journal.read(1) != b"\n":
            journal.write(b"\n")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds a lock on a file, which a killed process gives back by itself; False where the file is no longer there."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        yield False
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path.exists()


def parse_shard(text: str) -> tuple[int, int]:
    """``"2/4"`` to (2, 4); an empty text to this process' place under torchrun, or (1, 1).

    Raises:
        ConfigError: not a number of 1..n and n.
    """
    if not text:
        return int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1"))
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"shard must be a process' number and their count, such as 1/4 to 4/4, got {text!r}")
    return int(number), int(count)


def extract_command(
    run: str,
    manifest: str | None = None,
    output: str | None = None,
    crops: int = 1,
    views: int = 1,
    dtype: str = "float32",
    frames: int = 0,
    shard: str = "",
    batch: int = 32,
    workers: int = 0,
    max_lost: float = 0.1,
    group: str | None = None,
    overwrite: bool = False,
    decoder: DecoderName | None = None,
    device: str = "auto",
) -> None:
    """Encode every clip of a manifest once into a feature bank, from which episodes are scored in seconds.

    Started again after a kill it goes on where it was. Several processes, with --shard 1/4 to 4/4 or as the ranks of torchrun, fill one
    bank together.

    Args:
        run: Run folder of `amd-fast train`, or a .safetensors file of a model; or the URI of one, such as s3://bucket/runs/first.
        manifest: Manifest with the clips; by default the one the run was trained on.
        output: Folder of the bank, or its URI (parts are then made on one machine); by default bank/ in the run folder.
        crops: Squares per frame along the picture's longer side; 1 for the centre alone.
        views: Times each clip is sampled, evenly shifted; the read-out takes all frames as one set.
        dtype: float32, or float16 for half the size (numbers are rounded to 11 bits).
        frames: Frames sampled per clip and view; 0 for as many as in training.
        shard: Which part this process encodes, such as 1/4; empty for all, or its rank's part under torchrun.
        batch: Clips encoded together; one that goes on keeps the number it was begun with.
        workers: Decoding threads; 0 for one per core.
        max_lost: Largest share of the clips that may turn out to be unreadable, from ten such clips on; they are left out and named.
        group: Column of the manifest that names the source recording; by default the one of training, or "group" with --manifest.
        overwrite: Replace a bank there that was made by other weights, settings or clips, or by another decoder than a named one.
        decoder: auto (DALI where the GPU decodes the clips' codec, else PyAV), dali or pyav, which is then never replaced; by default pyav
            where the run was trained with data.decoder pyav, else auto.
        device: Where to encode, and where DALI decodes: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
    """
    from amd_fast.evaluation.command import run_folder, trained_on, usual_decoder
    from amd_fast.training.checkpoint import load_model
    from amd_fast.training.engine import choose_device

    model = load_model(run).to(choose_device(device)).eval()
    model.frames = frames or model.frames
    clips = Manifest.from_csv(manifest, group=group) if manifest else trained_on(run_folder(run), group)
    reading, part = Reading(crops, views, dtype, decoder or usual_decoder(run_folder(run))), parse_shard(shard)
    target = output or join(run_folder(run), "bank")
    place = working_folder(target)
    work = Extraction(place, model, clips, reading, shard=part, batch=batch, overwrite=overwrite)
    if not work.run(clip_loader(model, clips, reading, workers, max_lost)):
        console.print(f"part {part[0]} of {part[1]} is done; the process that finishes last puts {target} in place", soft_wrap=True)
        return
    upload_folder(place, target)
    bank = FeatureBank.open(place)
    size = sum(file.stat().st_size for file in place.glob("*.npy"))
    console.print(f"{len(bank)} clips, {size / 2**20:.1f} MiB: {target}", soft_wrap=True)
    for path, reason in list(bank.meta["lost"].items())[:10]:
        console.print(f"  lost {path}: {reason}", markup=False, soft_wrap=True)
    if len(bank.meta["lost"]) > 10:
        console.print(f"  and {len(bank.meta['lost']) - 10} more; all are in {join(target, 'meta.json')}", soft_wrap=True)
