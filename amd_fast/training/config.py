"""The training configuration: typed dataclasses, read from YAML, overridden from the command line, written into the run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from amd_fast.errors import ConfigError
from amd_fast.models.afmir import LossOptions
from amd_fast.storage import read_bytes

_WHERE_AND_HOW = {
    "output",
    "tensorboard",
    "checkpoint_every",
    "keep_checkpoints",
    "device",
    "threads",
    "compile",
    "checkpoint_activations",
    "parallel",
    "timeout",
    "optimiser.accumulate",
    "data.workers",
    "data.worker_kind",
    "data.timeout",
    "data.max_lost",
    "data.prefetch",
}
"""Settings that say where and how a run is computed, not what comes out: a checkpoint goes on under other ones."""


@dataclass
class ModelOptions:
    """Which model is trained."""

    name: str = "afmir_small"
    """One of ``amd_fast.list_models()``."""
    modalities: list[str] = field(default_factory=lambda: ["rgb", "flow"])
    """Modalities in order; other than rgb and flow they are columns of the manifest."""
    pretrained: bool = False
    """Start the backbones from ImageNet weights."""
    weights: str = ""
    """Start from this model of amd_fast (run folder or .safetensors): all weights whose name and shape it shares."""
    freeze_backbones: bool = False
    """Train what is behind the backbones alone."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model, e.g. ``matcher: cosine``."""


@dataclass
class DataOptions:
    """Where the clips come from and how they are read."""

    manifest: str = ""
    """CSV made by ``amd-fast index`` or ``amd-fast synth``."""
    bank: str = ""
    """Train on a bank of ``amd-fast extract`` instead: ``model.weights`` made it, and its backbones and projections stay as they are."""
    group: str = ""
    """Manifest column that names the source recording, where it is not "group"."""
    frames: int = 8
    """Frames sampled per clip and modality (T)."""
    size: int = 224
    """Height and width of the network's input, pixels."""
    flip: bool = False
    """Mirror clips at random. Leave off where left and right tell classes apart."""
    smallest_crop: float = 0.7
    """Side of the smallest random crop, as a share of the picture's shorter side."""
    colour_jitter: float = 0.0
    """Strength of the random changes of contrast, brightness and colour; 0: none. 0.3 helps on cameras not trained on."""
    speed_jitter: float = 1.0
    """Flow is multiplied by a random factor in [1 / this, this]; 1: none."""
    cache: Literal["auto", "ram", "none"] = "auto"
    """Keep decoded training clips in memory; auto: where they fit into a quarter of the free memory."""
    cache_frames: int = 2
    """Frames kept per sampled frame in the cache, to choose from at random."""
    workers: int = 0
    """Decoding threads or processes; 0: one per core, shared out among the processes that train on this machine."""
    decoder: Literal["auto", "dali", "pyav"] = "auto"
    """NVIDIA DALI decodes on a GPU, PyAV on the CPU; auto: DALI where the GPU takes the clips' codec. A name is never replaced."""
    worker_kind: Literal["auto", "thread", "process"] = "auto"
    """Processes survive a decoder that crashes, and a read that hangs can be ended; threads start at once. auto: threads."""
    timeout: float = 60.0
    """Seconds to read a clip in, before it counts as lost."""
    max_lost: float = 0.1
    """Largest share of the clips read so far that may be lost; training stops beyond it, from ten lost clips on."""
    prefetch: int = 2
    """Batches read ahead; what that takes in memory is written at EpisodeBatches."""
    replay: int = 0
    """Feed the first so many batches over and over, from memory, to measure training without reading: accuracies then mean nothing."""
    train_split: str = "train"
    """Split trained on; empty: all clips of the manifest."""
    val_split: str = "val"
    """Split of the classes used for validation and calibration; empty: none."""


@dataclass
class EpisodeOptions:
    """Shape of the episodes."""

    ways: int = 5
    """Classes per episode."""
    shots: int = 1
    """Support clips per class."""
    queries: int = 3
    """Query clips per class."""
    per_step: int = 1
    """Episodes per optimisation step (E), over all processes and micro-batches together."""


@dataclass
class TaskOptions:
    """Weights of the tasks learned beside the episodic loss; 0 switches one off."""

    episodic: float = 1.0
    """Free-energy distillation loss on episodes."""
    classification: float = 1.0
    """Classification over the base classes, from every view's descriptor."""
    regression: float = 0.1
    """Prediction of the other modalities' descriptors from the first one's."""
    distillation_start: float = 0.3
    """Share of the training steps before distillation begins."""


@dataclass
class OptimiserOptions:
    """AdamW with linear warm-up and cosine decay."""

    steps: int = 1000
    """Optimisation steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled weight decay (not applied to biases, norms and temperatures)."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    clip_norm: float = 5.0
    """Largest gradient norm; 0: no limit."""
    accumulate: int = 1
    """Parts that a process's episodes of a step are computed in, one after the other: less memory, the same gradient (up to
    batch_norm=per_rank, whose statistics are then those of a part)."""


@dataclass
class ValidationOptions:
    """Validation on the validation classes, which also calibrates the generative model."""

    every: int = 250
    """Steps between validations; 0: only at the end."""
    episodes: int = 300
    """Episodes a validation scores (and as many others that it calibrates on)."""


@dataclass
class TrainConfig:
    """Everything that determines a training run."""

    output: str = "runs/train"
    """Run folder, or its URI."""
    seed: int = 0
    """Seed of initialisation, episodes and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Mixed precision; auto: bf16 where the processor has instructions for it."""
    compile: bool = False
    """torch.compile the blocks of the backbones."""
    checkpoint_activations: bool = False
    """Compute the backbones' activations again in the backward pass instead of keeping them: less memory, about a third more work."""
    batch_norm: Literal["per_rank", "sync", "frozen"] = "per_rank"
    """Statistics of batch normalisation: per_rank: of the clips that a process computes together, so that results depend on the
    number of processes; sync: of all processes' clips together (GPUs only); frozen: the running statistics as they are, e.g. of
    pretrained weights, so that results do not depend on the number of processes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes (torchrun): ddp: each holds the whole model; fsdp: weights and optimiser state are spread over them,
    for encoders that are too large otherwise."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it reports them as lost and stops."""
    threads: int = 0
    """CPU threads for the network; 0: PyTorch's choice."""
    checkpoint_every: int = 250
    """Steps between checkpoints (one is always written at the end)."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best model is kept besides."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    episode: EpisodeOptions = field(default_factory=EpisodeOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)
    optimiser: OptimiserOptions = field(default_factory=OptimiserOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("optimiser.steps", self.optimiser.steps, 1),
            ("episode.ways", self.episode.ways, 2),
            ("episode.shots", self.episode.shots, 1),
            ("episode.queries", self.episode.queries, 1),
            ("episode.per_step", self.episode.per_step, 1),
            ("data.frames", self.data.frames, 1),
            ("data.size", self.data.size, 16),
            ("data.cache_frames", self.data.cache_frames, 1),
            ("validation.episodes", self.validation.episodes, 2),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("keep_checkpoints", self.keep_checkpoints, 1),
            ("optimiser.accumulate", self.optimiser.accumulate, 1),
            ("timeout", self.timeout, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.model.freeze_backbones and self.batch_norm != "frozen":
            raise ConfigError(f"model.freeze_backbones needs batch_norm=frozen, got {self.batch_norm}: statistics would change otherwise")

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of plain values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """As YAML, in the order of the fields."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def hash(self) -> str:
        """Twelve hexadecimal digits over everything that changes the result: all but where it runs and what it writes besides."""
        return hashlib.sha256(json.dumps(self.essence(), sort_keys=True).encode()).hexdigest()[:12]

    def essence(self) -> dict[str, Any]:
        """Everything that changes the result beyond rounding, as ``{"optimiser.steps": value}``."""
        content: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            nested = isinstance(value, dict)
            content |= {f"{name}.{key}": item for key, item in value.items()} if nested else {name: value}
        return {name: value for name, value in content.items() if name not in _WHERE_AND_HOW}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TrainConfig:
        """From nested dictionaries.

        Raises:
            ConfigError: a key that is no field.
        """
        return _build(cls, content, "")

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """From a YAML file such as a run folder's ``config.yaml``."""
        try:
            content = yaml.safe_load(read_bytes(path))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        return cls.from_dict(content or {})


def _build(kind: Any, content: dict[str, Any], prefix: str) -> Any:
    fields = {item.name: item for item in dataclasses.fields(kind)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise ConfigError(f"unknown setting {prefix}{key}; known here: {', '.join(fields)}")
        default = fields[key].default_factory
        nested = default if dataclasses.is_dataclass(default) else None
        values[key] = _build(nested, value or {}, f"{prefix}{key}.") if nested else value
    return kind(**values)
