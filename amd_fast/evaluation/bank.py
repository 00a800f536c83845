"""Feature bank: every clip encoded once; episodes are then rows of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from amd_fast.data.decoders import DecoderName, choose_decoder
from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.errors import ConfigError, DataError
from amd_fast.files import written_folder
from amd_fast.models.afmir import AFMIR
from amd_fast.models.readout import one_set
from amd_fast.models.weights import weights_hash
from amd_fast.progress import track
from amd_fast.storage import join, lease, read_bytes, upload_folder, working_folder

VERSION = 2
TOKEN_TYPES = ("float32", "float16")
# Parts of the model that work on tokens: they may change without the bank becoming stale.
_AFTER_TOKENS = ("readout.", "matcher.", "generative_model.")
_SHOWN = 12  # digits of a hash in messages


@dataclass(frozen=True)
class Reading:
    """How clips are read and encoded into a bank.

    Attributes:
        crops: 1 for the centre; more for that many squares along the picture's longer side.
        views: times the clip is sampled, each time ``model.frames`` frames, evenly shifted against each other.
        dtype: type tokens are kept in, "float32" or "float16". Half the size; tokens (which come out of a layer norm, so lie near 1) are
            then rounded to 11 bits, an error of at most 2^-11 of each number.
        decoder: "auto", "dali" or "pyav", as for :class:`~amd_fast.data.loader.ClipLoader`.
    """

    crops: int = 1
    views: int = 1
    dtype: str = "float32"
    decoder: DecoderName = "auto"

    def __post_init__(self) -> None:
        if self.crops < 1 or self.views < 1:
            raise ConfigError(f"crops and views must be at least 1, got crops={self.crops}, views={self.views}")
        if self.dtype not in TOKEN_TYPES:
            raise ConfigError(f"tokens are kept as {' or '.join(TOKEN_TYPES)}, got dtype={self.dtype!r}")

    def sets(self, model: AFMIR) -> int:
        """Tokens of one clip and modality."""
        return self.crops * self.views * model.frames

    def transform(self, model: AFMIR) -> dict[str, Any]:
        """What decides the tokens beside weights and clips; decoders agree within a tolerance, so theirs is kept apart."""
        return {
            "modalities": list(model.modalities), "frames": model.frames, "size": model.size,
            "crops": self.crops, "views": self.views, "dtype": self.dtype,
        }  # fmt: skip


def encoder_hash(model: AFMIR) -> str:
    """SHA-256 (hex) of everything that turns pixels into tokens; read-out, matcher and agent are not part of it."""
    return weights_hash({name: value for name, value in model.state_dict().items() if not name.startswith(_AFTER_TOKENS)})


def key_of(model: AFMIR, manifest: Manifest, reading: Reading) -> dict[str, Any]:
    """What a bank is made from: ``weights`` (hash), ``transform`` and ``manifest`` (hash), and ``sha256`` over all three.

    The transform's ``decoder`` is "pyav" where PyAV reads every clip, whatever was asked for.
    """
    device = next(model.parameters()).device
    readers = {choose_decoder(codec or None, reading.decoder, device).decoder for codec in manifest.table["codec"].unique()}
    transform = {**reading.transform(model), "decoder": "pyav" if readers == {"pyav"} else reading.decoder}
    parts = {"weights": encoder_hash(model), "transform": transform, "manifest": manifest.hash()}
    return {**parts, "sha256": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}


def differences(bank: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two keys, in words; empty where they are the same."""
    hashes = [part for part in ("weights", "manifest") if part in wanted and bank[part] != wanted[part]]
    there = {name: bank["transform"].get(name, "unknown") for name in wanted["transform"]}
    return [
        *(f"{part} (bank {bank[part][:_SHOWN]}, now {wanted[part][:_SHOWN]})" for part in hashes),
        *(f"{name} (bank {there[name]}, now {value})" for name, value in wanted["transform"].items() if there[name] != value),
    ]


def encode_rows(model: AFMIR, loader: ClipLoader, positions: np.ndarray, reading: Reading) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encodes clips as in a test.

    Args:
        model: in evaluation mode.
        loader: reads ``reading.views * model.frames`` frames per clip.
        positions: int64 ``[n]``, manifest rows.
        reading: crops, views and type of the tokens.

    Returns:
        tokens ``[k, M, crops * views * T, D]``, log_weight float32 ``[k, M, crops * views * T]`` and the ``k <= n`` positions that could
        be decoded.
    """
    loaded = loader.load_test(positions, reading.crops)
    if not len(loaded.positions):
        width = len(model.modalities), reading.sets(model)
        return np.zeros((0, *width, model.dim), reading.dtype), np.zeros((0, *width), np.float32), loaded.positions
    device = next(model.parameters()).device
    clips = {name: _temporal_views(clip.to(device), reading.views) for name, clip in loaded.clips.items()}
    present = loaded.present.to(device).repeat_interleave(reading.views, 0)
    with torch.inference_mode():
        tokens, weights = model.encode(clips, present)
    together = reading.crops * reading.views
    dtype = torch.float16 if reading.dtype == "float16" else torch.float32
    tokens, weights = one_set(tokens, together).to(dtype), one_set(weights, together).float()
    return tokens.cpu().numpy(), weights.cpu().numpy(), loaded.positions


@dataclass
class FeatureBank:
    """Tokens of all clips of a manifest.

    Attributes:
        tokens: float32 or float16 ``[clips, M, T, D]``, memory-mapped when the bank was opened from disk.
        log_weight: float32 ``[clips, M, T]``.
        table: the manifest's rows, one per clip, in the same order.
        meta: ``root`` that paths are relative to, ``lost`` (path of a clip that could not be decoded -> reason), ``clips_lost`` (their
            number); for a bank that was made on disk also ``key``, see :func:`key_of`. Banks put together by hand may leave any of it out.
    """

    tokens: np.ndarray
    log_weight: np.ndarray
    table: pd.DataFrame
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> np.ndarray:
        """Class of every clip."""
        return self.table["label"].to_numpy(str)

    @property
    def groups(self) -> np.ndarray:
        """Source recording of every clip."""
        return self.table["group"].to_numpy(str)

    @property
    def manifest(self) -> Manifest:
        """The clips of this bank as a manifest of their own."""
        return Manifest(self.table, self.meta.get("root", "."))

    @classmethod
    def build(
        cls,
        model: AFMIR,
        manifest: Manifest,
        path: str | Path | None = None,
        *,
        crops: int = 1,
        views: int = 1,
        dtype: str = "float32",
        batch: int = 32,
        workers: int = 0,
        decoder: DecoderName = "auto",
        loader: ClipLoader | None = None,
        overwrite: bool = False,
        progress: bool = True,
    ) -> FeatureBank:
        """Encodes every clip as in a test. The tokens of several crops and views are one larger set to the read-out.

        Args:
            model: used in evaluation mode on its own device.
            manifest: the clips; those that cannot be decoded are left out and listed in ``meta``.
            path: folder to keep the bank in, or its URI; None keeps it in memory only. One that was interrupted is continued, a finished
                one of the same weights, transform and manifest is opened as it is (and of the same decoder, where one is named).
            crops, views, dtype: see :class:`Reading`.
            batch: clips encoded together.
            workers: decoding threads; 0: one per core.
            decoder: "auto" (DALI where the model is on a GPU that decodes the clips' codec, else PyAV), "dali" or "pyav".
            loader: reads the manifest's clips in place of one that is made from ``workers`` and ``decoder``, e.g. one that keeps them in
                memory.
            overwrite: replace a bank in ``path`` that was made from something else.
            progress: show a progress bar.

        Raises:
            DataError: no clip can be decoded, or ``path`` holds a bank made from something else.
            ImplementationError: DALI was asked for by name and cannot decode these clips here.
        """
        reading = Reading(crops, views, dtype, decoder)
        loader = loader or clip_loader(model, manifest, reading, workers)
        if loader.frames != model.frames * views:
            raise ConfigError(
                f"the loader reads {loader.frames} frames per clip; {views} views of {model.frames} need {model.frames * views}"
            )
        if path is not None:
            from amd_fast.evaluation.extract import Extraction

            place = working_folder(path)
            Extraction(place, model, manifest, reading, batch=batch, overwrite=overwrite).run(loader, progress=progress)
            upload_folder(place, path)
            return cls.open(place)
        model.eval()
        blocks = [np.arange(start, min(start + batch, len(manifest))) for start in range(0, len(manifest), batch)]
        shown = track(blocks, "encoding clips", unit=batch, disable=not progress)
        tokens, weights, kept = zip(*(encode_rows(model, loader, block, reading) for block in shown), strict=True)
        rows = np.concatenate(kept)
        lost = {position: loader.lost.get(position, "") for position in np.setdiff1d(np.arange(len(manifest)), rows).tolist()}
        meta = describe_bank(manifest, lost)
        return cls(np.concatenate(tokens), np.concatenate(weights), kept_table(manifest, lost), meta)

    def save(self, path: str | Path) -> None:
        """Writes the bank into a folder or to a URI (whole or not at all; an older bank there is replaced)."""
        with written_folder(path) as folder:
            np.save(folder / "tokens.npy", self.tokens)
            np.save(folder / "log_weight.npy", self.log_weight)
            write_facts(folder, self.table, {"version": VERSION, **self.meta})

    @classmethod
    def open(cls, path: str | Path) -> FeatureBank:
        """Opens a bank from a folder or URI; tokens stay on disk until they are read.

        Raises:
            DataError: not a bank, not a finished one, or one of another version.
        """
        try:
            meta = json.loads(read_bytes(join(path, "meta.json")))
            table = Manifest.from_csv(join(path, "clips.csv")).table
            tokens, weight = (_mapped(join(path, f"{name}.npy")) for name in ("tokens", "log_weight"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a feature bank, or not a finished one ({error}); make one with 'amd-fast extract RUN --output {path}'"
            ) from error
        if meta.get("version") != VERSION or len(table) != len(tokens):
            raise DataError(f"the feature bank {path} is of another version or incomplete; delete it and build it again")
        return cls(tokens, weight, table, meta)

    def check(self, model: AFMIR | None = None, manifest: Manifest | None = None) -> None:
        """Refuses a bank that was made by other weights, at another size or number of frames, or from other clips.

        A bank without a key (made in memory) passes.

        Raises:
            DataError: the bank is stale; says what differs.
        """
        key = self.meta.get("key")
        if key is None:
            return
        wanted: dict[str, Any] = {"transform": {}}
        if model is not None:
            wanted["weights"] = encoder_hash(model)
            wanted["transform"] = {"modalities": list(model.modalities), "frames": model.frames, "size": model.size}
        if manifest is not None:
            wanted["manifest"] = manifest.hash()
        if found := differences(key, wanted):
            raise DataError(f"the feature bank is stale, it was made from other {'; '.join(found)}; extract it again")

    def subset(self, mask: np.ndarray) -> FeatureBank:
        """The clips where ``mask`` is true; neighbouring rows stay on disk."""
        rows = np.flatnonzero(mask)
        adjoining = len(rows) > 0 and rows[-1] - rows[0] + 1 == len(rows)
        part = slice(int(rows[0]), int(rows[-1]) + 1) if adjoining else rows
        return FeatureBank(self.tokens[part], self.log_weight[part], self.table.iloc[rows].reset_index(drop=True), self.meta)

    def token_batches(self, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens float32 ``[n, M, T, D]`` and log-weights ``[n, M, T]`` of all clips in order, ``batch`` at a time."""
        for start in range(0, len(self), batch):
            rows = slice(start, start + batch)
            yield torch.tensor(self.tokens[rows]).to(device).float(), torch.tensor(self.log_weight[rows]).to(device)

    def describe(self, model: AFMIR, batch: int = 1024) -> tuple[Tensor, Tensor]:
        """Descriptors ``[clips, V, D]`` and presence ``[clips, V]`` of every clip, on the model's device.

        Raises:
            DataError: the bank was made by another model; see :meth:`check`.
        """
        self.check(model)
        model.eval()
        parts, present = [], []
        for tokens, weight in self.token_batches(batch, next(model.parameters()).device):
            with torch.inference_mode():
                parts.append(model.describe(tokens, weight))
                present.append(model.views_present(weight))
        return torch.cat(parts), torch.cat(present)


def clip_loader(model: AFMIR, manifest: Manifest, reading: Reading, workers: int = 0, max_lost: float = 0.1) -> ClipLoader:
    """A loader that reads clips the way a bank needs them; ``max_lost`` is the share of them that may be lost."""
    device = next(model.parameters()).device
    options: dict[str, Any] = {"workers": workers, "max_lost": max_lost, "channels": model.channels}
    options |= {"decoder": reading.decoder, "device": device}
    return ClipLoader(manifest, model.modalities, frames=model.frames * reading.views, size=model.size, **options)


def kept_table(manifest: Manifest, lost: dict[int, str]) -> pd.DataFrame:
    """The manifest's rows without the lost ones.

    Raises:
        DataError: nothing is left.
    """
    if len(lost) == len(manifest):
        raise DataError(f"none of the {len(manifest)} clips could be decoded; run 'amd-fast index' to see why")
    return manifest.table.drop(index=list(lost)).reset_index(drop=True)


def describe_bank(manifest: Manifest, lost: dict[int, str]) -> dict[str, Any]:
    """The ``meta`` of a bank; ``lost`` are manifest rows with the reason."""
    paths = manifest.table["path"]
    named = {str(paths.iat[row]): reason for row, reason in sorted(lost.items())}
    return {"version": VERSION, "root": str(manifest.root), "clips_lost": len(lost), "lost": named}


def write_facts(folder: Path, table: pd.DataFrame, meta: dict[str, Any]) -> None:
    """Writes ``clips.csv`` (paths as in the manifest, relative to ``meta["root"]``) and ``meta.json``."""
    Manifest(table, folder).to_csv(folder / "clips.csv")
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _temporal_views(clip: Tensor, views: int) -> Tensor:
    """``[n, T * views, ...] -> [n * views, T, ...]``: view k takes the frames k, k + views, ..., so that each spans the whole clip."""
    if views == 1:
        return clip
    return clip.unflatten(1, (-1, views)).transpose(1, 2).flatten(0, 1)


def _mapped(path: str) -> np.ndarray:
    with lease(path) as file:  # mapped, it stays readable even where the cache drops it
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        return array
