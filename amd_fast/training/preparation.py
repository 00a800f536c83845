"""What a run is made of before its first step: clips and their readers, the network with its losses, and how ranks share them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amd_fast.data.loader import ClipLoader, further_modalities
from amd_fast.data.manifest import Manifest
from amd_fast.errors import ConfigError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.models.afmir import AFMIR
from amd_fast.models.registry import create_model
from amd_fast.training.batches import EpisodeBatches
from amd_fast.training.blocks import normalise_batches, prepare_blocks, shard
from amd_fast.training.checkpoint import load_model
from amd_fast.training.config import TrainConfig
from amd_fast.training.distributed import World
from amd_fast.training.heads import MultiTaskHeads
from amd_fast.training.objective import Objective
from amd_fast.training.token_batches import TokenBatches, freeze_encoder, open_bank, without_key
from amd_fast.training.validation import clips_of_rank

logger = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """The clips of a run.

    Attributes:
        manifest: clips trained on.
        batches: this rank's episodes of them.
        validation: this rank's share of the validation clips, None without validation classes.
        validation_loader: reads that share.
        validation_bank: all validation clips, where the run trains on a feature bank.
    """

    manifest: Manifest
    batches: EpisodeBatches | TokenBatches
    validation: Manifest | None
    validation_loader: ClipLoader | None
    validation_bank: FeatureBank | None = None

    def close(self) -> None:
        """Ends the readers."""
        self.batches.loader.close()
        if self.validation_loader is not None:
            self.validation_loader.close()


def open_data(config: TrainConfig, world: World, device: torch.device) -> TrainingData:
    """Reads the manifest and makes what reads its clips.

    Raises:
        ConfigError, DataError: the settings do not fit the manifest.
    """
    options = config.data
    if options.bank:
        return _open_bank_data(config, world)
    if not options.manifest:
        raise ConfigError("data.manifest is not set; make a manifest with 'amd-fast index FOLDER' or 'amd-fast synth FOLDER'")
    whole = Manifest.from_csv(options.manifest, group=options.group or None)
    manifest = whole.subset(split=options.train_split) if options.train_split else whole
    wanted = config.model.modalities
    absent = set(further_modalities(wanted)) - set(further_modalities(wanted, whole))
    if absent:
        raise ConfigError(f"{options.manifest} has no column for the modalities {sorted(absent)}; columns hold the paths of .npy files")
    validation = None
    if options.val_split and options.val_split in set(whole.table["split"]):
        validation = whole.subset(split=options.val_split)
        _check_apart(manifest, validation)
        validation = clips_of_rank(validation, world)
    batches = EpisodeBatches(
        manifest,
        _loader(config, manifest, world, options.cache_frames, device),
        config.episode,
        config.seed,
        rank=world.rank,
        world_size=world.size,
        prefetch=options.prefetch,
        replay=options.replay,
        pinned=device.type == "cuda",
    )
    return TrainingData(manifest, batches, validation, None if validation is None else _loader(config, validation, world, 1, device))


def _open_bank_data(config: TrainConfig, world: World) -> TrainingData:
    bank, validation = open_bank(config.data)
    held = None if validation is None else validation.manifest
    if held is not None:
        _check_apart(bank.manifest, held)
    batches = TokenBatches(bank, config.episode, config.seed, rank=world.rank, world_size=world.size, replay=config.data.replay)
    return TrainingData(bank.manifest, batches, held, None, None if validation is None else without_key(validation))


def _check_apart(manifest: Manifest, validation: Manifest) -> None:
    if shared := sorted(set(validation.classes) & set(manifest.classes)):
        raise ConfigError(f"classes {shared[:5]} are in both the training and the validation split; validation needs classes of its own")


def _loader(config: TrainConfig, manifest: Manifest, world: World, cache_frames: int, device: torch.device) -> ClipLoader:
    options = config.data
    return ClipLoader(
        manifest,
        config.model.modalities,
        frames=options.frames,
        size=options.size,
        flip=options.flip,
        scale=(options.smallest_crop, 1.0),
        colour=options.colour_jitter,
        speed=options.speed_jitter,
        cache=options.cache,
        cache_frames=cache_frames,
        workers=options.workers,
        decoder=options.decoder,
        device=device,
        worker_kind=options.worker_kind,
        timeout=options.timeout,
        max_lost=options.max_lost,
    )


def build_objective(
    config: TrainConfig, classes: int, device: torch.device, precision: torch.dtype | None, world: World
) -> tuple[Objective, dict[str, Any]]:
    """The network with its losses on its device, the same on every rank, and the recipe that makes its model again.

    Args:
        classes: number of classes trained on.
    """
    torch.manual_seed(config.seed)
    modalities = config.model.modalities
    recipe = {
        "name": config.model.name,
        "modalities": list(modalities),
        "frames": config.data.frames,
        "size": config.data.size,
        **config.model.options,
    }
    model = create_model(**{**recipe, "modalities": tuple(modalities)}, pretrained=config.model.pretrained, loss=config.loss)
    recipe |= getattr(next(iter(model.backbones.values())), "recipe", {})  # a model of the hub is made again without the hub
    recipe["loss"] = config.to_dict()["loss"]
    if config.model.weights:
        start_from(model, load_model(config.model.weights), config.model.weights)
    model.backbones.requires_grad_(not config.model.freeze_backbones)
    if config.data.bank:
        freeze_encoder(model, FeatureBank.open(config.data.bank))
    heads = MultiTaskHeads(len(model.views), len(modalities), model.dim, classes)
    objective = Objective(model, heads, config.tasks, config.episode, precision).to(device)
    normalise_batches(objective, config.batch_norm, device, world.size)
    for backbone in model.backbones.values():
        prepare_blocks(backbone, compiled=config.compile, checkpointed=config.checkpoint_activations)
    return objective, recipe


def spread(objective: Objective, config: TrainConfig, world: World, device: torch.device) -> nn.Module:
    """Makes the ranks' gradients one; returns the module to call in training."""
    if world.size == 1:
        return objective
    if config.parallel == "fsdp":
        shard(objective, objective.model.backbones)
        return objective
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 for mixed precision, or None; ``auto`` asks whether the processor has instructions for it."""
    if name == "auto":
        has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if has else None
    return torch.bfloat16 if name == "bf16" else None


def start_from(model: AFMIR, other: AFMIR, source: str) -> None:
    """Takes over what another model has under the same name in the same shape.

    Not what its agent learned, nor the weights of another kind of matcher, whose temperatures are on the scale of other distances.
    """
    own = model.state_dict()
    left = ("generative_model.",) if type(other.matcher) is type(model.matcher) else ("generative_model.", "matcher.")
    shared = {
        name: value
        for name, value in other.state_dict().items()
        if name in own and value.shape == own[name].shape and not name.startswith(left)
    }
    if not any(name.startswith("backbones.") for name in shared):
        raise ConfigError(f"nothing in {source} fits this model; model.name, modalities or options differ")
    model.load_state_dict(shared, strict=False)
    logger.info("took over %d of %d arrays from %s", len(shared), len(own), source)
