"""Errors raised by amd_fast. Each message names the thing that is wrong and says what to do about it."""

from __future__ import annotations


class AmdFastError(Exception):
    """Base class of all errors that amd_fast raises on purpose."""


class DataError(AmdFastError, ValueError):
    """A file, manifest or array that cannot be used as it is."""


class DecodeError(DataError):
    """A video file that cannot be decoded (the message names the file)."""


class EpisodeError(DataError):
    """The clips do not allow the episode that was asked for (too few classes, clips or groups)."""


class ConfigError(AmdFastError, ValueError):
    """A setting that is unknown, out of range, or contradicts another."""


class ArgumentError(AmdFastError, ValueError):
    """A tensor argument of an op with the wrong rank, size, dtype or device."""


class ImplementationError(AmdFastError, RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class WeightsError(AmdFastError, RuntimeError):
    """Weights that cannot be found, downloaded, or loaded into this model."""


class TrainingError(AmdFastError, RuntimeError):
    """Training stopped itself (the message gives step and episode)."""


class TrainingInterrupted(TrainingError):  # noqa: N818 (a request, not a fault)
    """Training stopped on request (SIGTERM, SIGUSR1) after saving; it goes on with ``resume``."""


class CheckpointError(AmdFastError, RuntimeError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""
