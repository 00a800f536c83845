"""AFMIR with the call of HyRSM (Wang et al., CVPR 2022) and of the code bases that grew from it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from amd_fast.adapters.episodes import by_modality, run_episode
from amd_fast.errors import DataError
from amd_fast.models.afmir import AFMIR

SUPPORT, QUERY = "support_set", "target_set"


class HyRSMAdapter(nn.Module):
    """``model({"support_set": ..., "support_labels": ..., "target_set": ..., ...}) -> {"logits": ..., ...}``.

    The logits are the fused log-posterior (AMI), so their cross-entropy is the task free energy of the loss. Images are taken as the
    loop prepares them; a model trained by ``amd-fast train`` expects colours with ImageNet's mean and standard deviation taken out.

    Args:
        model: does the work; its parameters are found under ``model.``.
        base_classes: classes of the training set, for loops that also classify (``USE_CLASSIFICATION``): adds a linear layer on the
            last view's descriptor and ``class_logits`` to the result. 0: none.
    """

    def __init__(self, model: AFMIR, *, base_classes: int = 0) -> None:
        super().__init__()
        self.model = model
        self.classification = nn.Linear(model.dim, base_classes) if base_classes else None

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One episode, the batch axis of the data loader taken away.

        Args:
            inputs: ``support_set [S * T, channels, h, w]``, ``support_labels [S]`` (any dtype and order), ``target_set [Q * T, channels,
                h, w]``. The modalities are stacked along the channels in the model's order; or the two sets hold the first modality
                and ``support_set_<modality>``, ``target_set_<modality>`` the others, of which some may be left out as missing.
                ``target_labels [Q]`` where they are known; further keys are ignored.

        Returns:
            ``logits [Q, way]`` (column c is the c-th smallest support label), ``view_logits [Q, V, way]``, ``policy [Q, V]`` (trust in
            each view, without gradient), ``classes [way]``; ``class_logits [S + Q, base_classes]`` where asked for, support first;
            ``loss``, distillation included, where ``target_labels`` are given.

        Raises:
            DataError: a key is missing, or shapes or labels do not fit; the message names it and the remedy.
        """
        for key in (SUPPORT, "support_labels", QUERY):
            if key not in inputs:
                raise DataError(f"the episode has no {key!r} (its keys: {sorted(inputs)})")
        target = inputs.get("target_labels")
        support, query = self._images(inputs, SUPPORT), self._images(inputs, QUERY)
        answer = run_episode(self.model, support, inputs["support_labels"], query, target, describe=self.classification is not None)
        result = answer.as_dict()
        if self.classification is not None:
            assert answer.descriptors is not None
            result["class_logits"] = self.classification(answer.descriptors[:, -1])
        return result

    def _images(self, inputs: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
        first, *others = self.model.modalities
        further = {name: inputs[f"{side}_{name}"] for name in others if f"{side}_{name}" in inputs}
        return {first: inputs[side]} | further if further else by_modality(inputs[side], self.model, side)
