"""Feature bank: every clip encoded once; episodes are then rows of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.errors import DataError
from amd_fast.files import written_folder
from amd_fast.models.afmir import AFMIR
from amd_fast.progress import track

_VERSION = 1


@dataclass
class FeatureBank:
    """Tokens of all clips of a manifest.

    Attributes:
        tokens: float32 ``[clips, M, T, D]``, memory-mapped when the bank was opened from disk.
        log_weight: float32 ``[clips, M, T]``.
        table: the manifest's rows, one per clip, in the same order.
        meta: manifest hash, modalities, number of clips that could not be decoded.
    """

    tokens: np.ndarray
    log_weight: np.ndarray
    table: pd.DataFrame
    meta: dict[str, object]

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

    @classmethod
    def build(
        cls,
        model: AFMIR,
        manifest: Manifest,
        path: str | Path | None = None,
        *,
        crops: int = 1,
        batch: int = 32,
        workers: int = 0,
        loader: ClipLoader | None = None,
        progress: bool = True,
    ) -> FeatureBank:
        """Encodes every clip as in a test. The tokens of several crops are one larger set to the read-out.

        Args:
            model: used in evaluation mode on its own device.
            manifest: the clips; those that cannot be decoded are left out and counted in ``meta``.
            path: folder to keep the bank in; None keeps it in memory only.
            crops: 1 for the centre; more for that many squares along the picture's longer side (T is then ``crops`` times the frames).
            batch: clips encoded together.
            workers: decoding threads; 0: one per core.
            loader: reads the manifest's clips, e.g. one that keeps them in memory; by default one is made.
            progress: show a progress bar.
        """
        loader = loader or ClipLoader(manifest, model.modalities, frames=model.frames, size=model.size, workers=workers)
        device = next(model.parameters()).device
        model.eval()
        tokens, weights, kept = [], [], []
        for start in track(range(0, len(manifest), batch), "encoding clips", unit=batch, disable=not progress):
            positions = np.arange(start, min(start + batch, len(manifest)))
            loaded = loader.load_test(positions, crops)
            if not len(loaded.positions):
                continue
            clips = {name: clip.to(device) for name, clip in loaded.clips.items()}
            with torch.inference_mode():
                token, weight = model.encode(clips, loaded.present.to(device))
            tokens.append(_one_set(token, crops).float().cpu().numpy())
            weights.append(_one_set(weight, crops).float().cpu().numpy())
            kept.append(loaded.positions)
        if not kept:
            raise DataError(f"none of the {len(manifest)} clips could be decoded; run 'amd-fast index' to see why")
        rows = np.concatenate(kept)
        meta = {
            "version": _VERSION,
            "manifest_hash": manifest.hash(),
            "modalities": list(model.modalities),
            "clips_lost": len(manifest) - len(rows),
            "frames": model.frames,
            "crops": crops,
        }
        bank = cls(np.concatenate(tokens), np.concatenate(weights), manifest.table.iloc[rows].reset_index(drop=True), meta)
        if path is not None:
            bank.save(path)
        return bank

    def save(self, path: str | Path) -> None:
        """Writes the bank into a folder (whole or not at all; an older bank there is replaced)."""
        with written_folder(path) as folder:
            np.save(folder / "tokens.npy", self.tokens)
            np.save(folder / "log_weight.npy", self.log_weight)
            Manifest(self.table, folder).to_csv(folder / "clips.csv")
            (folder / "meta.json").write_text(json.dumps(self.meta, indent=1))

    @classmethod
    def open(cls, path: str | Path) -> FeatureBank:
        """Opens a bank written by :meth:`save`; tokens stay on disk until they are read.

        Raises:
            DataError: not a bank, or one of another version.
        """
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text())
            table = Manifest.from_csv(path / "clips.csv").table
            tokens, weight = (np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("tokens", "log_weight"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a feature bank ({error}); make one with FeatureBank.build(model, manifest, path)") from error
        if meta.get("version") != _VERSION or len(table) != len(tokens):
            raise DataError(f"the feature bank {path} is of another version or incomplete; build it again")
        return cls(tokens, weight, table, meta)

    def subset(self, mask: np.ndarray) -> FeatureBank:
        """The clips where ``mask`` is true."""
        return FeatureBank(self.tokens[mask], self.log_weight[mask], self.table[mask].reset_index(drop=True), self.meta)

    def describe(self, model: AFMIR, batch: int = 1024) -> tuple[Tensor, Tensor]:
        """Descriptors ``[clips, V, D]`` and presence ``[clips, V]`` of every clip, on the model's device."""
        device = next(model.parameters()).device
        model.eval()
        parts, present = [], []
        for start in range(0, len(self), batch):
            tokens = torch.tensor(self.tokens[start : start + batch]).to(device)
            weight = torch.tensor(self.log_weight[start : start + batch]).to(device)
            with torch.inference_mode():
                parts.append(model.describe(tokens, weight))
                present.append(model.views_present(weight))
        return torch.cat(parts), torch.cat(present)


def _one_set(values: Tensor, crops: int) -> Tensor:
    """``[clips * crops, M, T, ...] -> [clips, M, crops * T, ...]``."""
    return values.unflatten(0, (-1, crops)).transpose(1, 2).flatten(2, 3)
