"""Clips of a manifest by position: decoded in threads, optionally kept in memory, never stopped by one bad file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from amd_fast.data.clips import RESIZE_RATIO, ClipTransform, RawClip, decode_clip
from amd_fast.data.manifest import Manifest
from amd_fast.data.sampling import segment_indices
from amd_fast.errors import ConfigError, DataError
from amd_fast.progress import track

logger = logging.getLogger(__name__)


@dataclass
class ClipBatch:
    """Clips ready for the network.

    Attributes:
        clips: ``{modality: float32 [n, T, channels, size, size]}``; zeros where a clip lacks the modality.
        present: bool ``[n, M]``.
        positions: int64 ``[n]``, the manifest row each clip really came from.
    """

    clips: dict[str, Tensor]
    present: Tensor
    positions: np.ndarray


def further_modalities(modalities: Sequence[str], manifest: Manifest | None = None) -> list[str]:
    """The modalities that do not come from the video itself; with a manifest, only those it has a column for."""
    further = [name for name in modalities if name not in ("rgb", "flow")]
    return further if manifest is None else [name for name in further if name in manifest.table]


class ClipLoader:
    """Reads clips of a manifest.

    Args:
        manifest: the clips.
        modalities: names in order; other than rgb and flow they are manifest columns with ``.npy`` paths.
        frames, size: frames per clip T and side of the network's images, pixels.
        flip, scale, colour, speed: augmentation of training clips, see :class:`~amd_fast.data.clips.ClipTransform`.
        cache: keep decoded clips in memory: ``"ram"``, ``"none"``, or ``"auto"`` (where they fit into a quarter of the free memory).
        cache_frames: frames kept in the cache per sampled frame; with 1 the centre views are cached, for tests that are repeated.
        workers: decoding threads; 0: one per core.
        channels: channels of further modalities, needed only to fill in for clips that lack them.
    """

    def __init__(
        self,
        manifest: Manifest,
        modalities: Sequence[str],
        *,
        frames: int,
        size: int,
        flip: bool = False,
        scale: tuple[float, float] = (0.7, 1.0),
        colour: float = 0.0,
        speed: float = 1.0,
        cache: Literal["auto", "ram", "none"] = "none",
        cache_frames: int = 2,
        workers: int = 0,
        channels: Mapping[str, int] | None = None,
    ) -> None:
        self.manifest, self.modalities, self.frames, self.size = manifest, tuple(modalities), frames, size
        self.short_side = round(size * RESIZE_RATIO)
        self._extra = further_modalities(modalities, manifest)
        for name in further_modalities(modalities) if len(manifest) else ():
            if name not in self._extra:
                logger.warning(
                    "the manifest in %s has no column %r: that modality counts as missing from all its clips", manifest.root, name
                )
        self._counts = manifest.table["frames"].to_numpy(int)
        self._views: dict[int, list[ClipTransform]] = {}
        self._augment = ClipTransform(size, self.modalities, train=True, flip=flip, scale=scale, colour=colour, speed=speed)
        self._channels = {"rgb": 3, "flow": 2, **(channels or {})}
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="decode")
        self._cache: dict[int, RawClip] | None = {} if cache == "ram" or (cache == "auto" and self._fits(cache_frames)) else None
        self._cache_frames = cache_frames
        self.lost: dict[int, str] = {}
        """Clips that could not be decoded, with the reason."""

    def _fits(self, cache_frames: int) -> bool:
        table = self.manifest.table
        ratio = np.maximum(table["width"], table["height"]) / np.maximum(np.minimum(table["width"], table["height"]), 1)
        needed = float(ratio.sum()) * self.short_side**2 * self.frames * cache_frames * 7  # 3 bytes of colour, 4 of flow
        return needed < 0.25 * _free_memory()

    def _decode(self, position: int, frames: int, rng: np.random.Generator | None) -> RawClip:
        return decode_clip(
            self.manifest.file(position),
            frames,
            short_side=self.short_side,
            modalities=self.modalities,
            extra=self.manifest.extra(position, self._extra),
            rng=rng,
            frame_count=int(self._counts[position]),
        )

    def fill_cache(self, *, progress: bool = True) -> None:
        """Decodes every clip into the cache (nothing to do without one)."""
        if self._cache is None:
            return
        todo = [position for position in range(len(self.manifest)) if position not in self._cache]
        frames = self.frames * self._cache_frames

        def one(position: int) -> tuple[int, RawClip | None]:
            return position, self._try(position, frames, None)

        for position, raw in track(self._pool.map(one, todo), "decoding clips", total=len(todo), disable=not progress):
            if raw is not None:
                self._cache[position] = raw

    def _try(self, position: int, frames: int, rng: np.random.Generator | None) -> RawClip | None:
        try:
            return self._decode(position, frames, rng)
        except (DataError, OSError) as error:
            if position not in self.lost:
                self.lost[position] = str(error)
                logger.warning("clip %s lost: %s", self.manifest.file(position), error)
            return None

    def _augmented(self, position: int, seed: tuple[int, ...]) -> tuple[int, dict[str, Tensor]]:
        """One training clip; a clip that cannot be decoded is replaced by another of its class, the same one every time."""
        rng = np.random.default_rng(seed)
        for candidate in self._same_class(position):
            if self._cache is not None and candidate in self._cache:
                raw: RawClip | None = self._cache[candidate]
                index: np.ndarray | None = segment_indices(self.frames * self._cache_frames, self.frames, rng)
            else:
                index = None  # the frames were drawn while decoding
                raw = None if candidate in self.lost else self._try(candidate, self.frames, rng)
            if raw is not None:
                return candidate, self._augment(raw, rng, index=index)
        label = self.manifest.labels[position]
        raise DataError(f"no clip of class {label!r} could be decoded; run 'amd-fast index' again to leave bad files out")

    def _same_class(self, position: int) -> Iterator[int]:
        """The clip itself, then the others of its class."""
        yield position
        same = np.flatnonzero(self.manifest.labels == self.manifest.labels[position])
        yield from (int(item) for item in np.roll(same, -int(np.searchsorted(same, position)))[1:])

    def load(self, positions: np.ndarray, seed: tuple[int, ...]) -> ClipBatch:
        """Augmented training clips; every clip's randomness comes from ``(*seed, place in the batch)`` alone."""
        jobs = [(int(position), (*seed, place)) for place, position in enumerate(positions)]
        return self._batch(list(self._pool.map(lambda job: self._augmented(*job), jobs)))

    def load_test(self, positions: np.ndarray, crops: int = 1) -> ClipBatch:
        """Clips as in a test; those that cannot be decoded are left out (see ``positions`` of the result and :attr:`lost`).

        Args:
            positions: manifest rows.
            crops: 1 for the centre; more for that many largest squares, evenly along the picture's longer side.

        Returns:
            ``crops`` rows per clip in ``clips`` and ``present``, one clip after the other; ``positions`` has one entry per clip.
        """
        views = self._views.setdefault(crops, _test_views(self.size, self.modalities, crops))

        def one(position: int) -> list[tuple[int, dict[str, Tensor]]]:
            raw = self._centre_frames(position)
            return [] if raw is None else [(position, view(raw)) for view in views]

        batch = self._batch([item for clip in self._pool.map(one, [int(position) for position in positions]) for item in clip])
        return replace(batch, positions=batch.positions[::crops])

    def _centre_frames(self, position: int) -> RawClip | None:
        if self._cache is None or self._cache_frames > 1:
            return self._try(position, self.frames, None)
        if position not in self._cache:
            raw = self._try(position, self.frames, None)
            if raw is None:
                return None
            self._cache[position] = raw
        return self._cache[position]

    def _batch(self, items: Sequence[tuple[int, Mapping[str, Tensor]]]) -> ClipBatch:
        present = torch.tensor([[name in clip for name in self.modalities] for _, clip in items], dtype=torch.bool)
        clips = {}
        for name in self.modalities:
            some = next((clip[name] for _, clip in items if name in clip), None)
            empty = torch.zeros(self.frames, self._channels.get(name, 1), self.size, self.size) if some is None else torch.zeros_like(some)
            clips[name] = torch.stack([clip.get(name, empty) for _, clip in items]) if items else empty[None][:0]
        return ClipBatch(clips, present, np.array([position for position, _ in items], dtype=np.int64))


def _test_views(size: int, modalities: Sequence[str], crops: int) -> list[ClipTransform]:
    if crops < 1:
        raise ConfigError(f"the number of test crops must be at least 1, got {crops}")
    if crops == 1:
        return [ClipTransform(size, modalities, train=False)]
    return [ClipTransform(size, modalities, train=False, place=float(place)) for place in np.linspace(0, 1, crops)]


def _free_memory() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return 4e9
