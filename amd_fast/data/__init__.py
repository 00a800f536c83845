"""Clips, where they lie, and which of them form an episode. Names are imported on first use (decoding needs PyAV and torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Not lazy: importing the module amd_fast.data.index would otherwise put the module where the function index() is expected.
from amd_fast.data.index import index
from amd_fast.lazy import attach

if TYPE_CHECKING:
    from amd_fast.data.clips import RawClip, read_clip, segment_indices
    from amd_fast.data.decoders import explain_decoder
    from amd_fast.data.episodes import Episode, EpisodeSampler, eligible_classes, episode
    from amd_fast.data.manifest import Manifest
    from amd_fast.data.splits import read_split_list, split_names, split_table

_PUBLIC = {
    "Manifest": "amd_fast.data.manifest",
    "Episode": "amd_fast.data.episodes",
    "EpisodeSampler": "amd_fast.data.episodes",
    "eligible_classes": "amd_fast.data.episodes",
    "episode": "amd_fast.data.episodes",
    "explain_decoder": "amd_fast.data.decoders",
    "RawClip": "amd_fast.data.clips",
    "read_clip": "amd_fast.data.clips",
    "segment_indices": "amd_fast.data.clips",
    "read_split_list": "amd_fast.data.splits",
    "split_names": "amd_fast.data.splits",
    "split_table": "amd_fast.data.splits",
}

__all__ = [
    "Episode",
    "EpisodeSampler",
    "Manifest",
    "RawClip",
    "eligible_classes",
    "episode",
    "explain_decoder",
    "index",
    "read_clip",
    "read_split_list",
    "segment_indices",
    "split_names",
    "split_table",
]

__getattr__, __dir__ = attach(__name__, _PUBLIC)
