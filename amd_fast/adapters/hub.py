"""Models in the form of the Hugging Face hub: ``config.json`` (the recipe) and ``model.safetensors``, in a folder or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file

from amd_fast.errors import CheckpointError, ConfigError, WeightsError
from amd_fast.files import write_atomically
from amd_fast.models.afmir import AFMIR, LossOptions
from amd_fast.models.registry import model_arguments
from amd_fast.models.weights import take_weights
from amd_fast.training.checkpoint import full_weights, read_model, write_model

try:
    from huggingface_hub import ModelHubMixin, constants, hf_hub_download
except ImportError as error:
    raise ConfigError(f"HubAFMIR needs the package huggingface_hub ({error}): pip install 'amd_fast[adapters]'") from error


# Where the package is not installed, mypy takes its class for ``object``.
class HubAFMIR(AFMIR, ModelHubMixin, library_name="amd_fast", tags=["video-classification", "few-shot"]):  # type: ignore[call-arg, unused-ignore]
    """An AFMIR with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Nothing in a folder is executed: weights are safetensors, and no pickle is read. A folder works without a network, also under
    ``HF_HUB_OFFLINE=1``. ``amd_fast.load_model("folder/model.safetensors")`` reads the weights' file too.

    Args:
        config: the recipe: ``name`` and further arguments of :func:`amd_fast.create_model`, plain values; what ``config.json`` holds.

    Raises:
        ConfigError: an argument that the model does not take.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        options = dict(config)
        loss, modalities = LossOptions(**options.pop("loss", {})), tuple(options.pop("modalities", ("rgb", "flow")))
        super().__init__(modalities, loss=loss, **model_arguments(options.pop("name"), options))
        backbone = getattr(next(iter(self.backbones.values())), "recipe", {})
        self.recipe = json.loads(json.dumps({**config, **backbone}))

    @classmethod
    def from_run(cls, path: str) -> Self:
        """From the run folder of a training or a model's file; either can be a URI.

        Raises:
            CheckpointError: see :func:`amd_fast.load_model`.
        """
        recipe, tensors = read_model(path)
        model = cls(recipe)
        take_weights(model, tensors, path)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """From a folder or the hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder, or id on the hub.
            **options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` of the hub's client.

        Raises:
            WeightsError: it cannot be had.
            CheckpointError: it is no model of this library, or its weights do not fit.
        """
        try:
            model: Self = super().from_pretrained(pretrained_model_name_or_path, **options)
        except (CheckpointError, ConfigError, WeightsError):
            raise
        except Exception as error:  # the hub's client has a dozen kinds for "no network" and "no such model"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(
                f"{pretrained_model_name_or_path} cannot be had ({reason}); give a folder with config.json and model.safetensors, or "
                "check name and network (HF_HUB_OFFLINE, HF_HOME)"
            ) from error
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(full_weights(self), save_directory / constants.SAFETENSORS_SINGLE_FILE, self.recipe)
        config = json.dumps(self.recipe, indent=2, sort_keys=True) + "\n"
        write_atomically(save_directory / constants.CONFIG_NAME, config.encode(), error=CheckpointError)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, **options: Any) -> Self:
        if not config or "name" not in config:
            raise CheckpointError(f"{model_id} has no config.json of amd_fast; save_pretrained and push_to_hub write one")
        local = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
        if not local.is_file():
            local = Path(hf_hub_download(model_id, constants.SAFETENSORS_SINGLE_FILE, **options))
        model = cls(config)
        try:
            take_weights(model, load_file(local), model_id)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the weights of {model_id} are damaged ({error}); fetch them again") from error
        return model
