"""AFMIR with the call of TRX (Perrett et al., CVPR 2021) and of the code bases that grew from it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from amd_fast.adapters.episodes import by_modality, run_episode
from amd_fast.models.afmir import AFMIR


class TRXAdapter(nn.Module):
    """``model(context_images, context_labels, target_images) -> {"logits": ...}``.

    The logits are the fused log-posterior (AMI), so their cross-entropy is the task free energy of the loss. Parameters are those of
    ``model``, under ``model.``. Images are taken as the loop prepares them; a model trained by ``amd-fast train`` expects colours with
    ImageNet's mean and standard deviation taken out.

    Args:
        model: does the work.
        sample_axis: TRX's loops average over samples of the model: their logits are ``[1, queries, way]``. False: ``[queries, way]``.
    """

    def __init__(self, model: AFMIR, *, sample_axis: bool = True) -> None:
        super().__init__()
        self.model, self.sample_axis = model, sample_axis

    def forward(
        self,
        context_images: Tensor | Mapping[str, Tensor],
        context_labels: Tensor,
        target_images: Tensor | Mapping[str, Tensor],
        target_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One episode.

        Args:
            context_images: ``[S * T, channels, h, w]``, the modalities stacked along the channels in the model's order; or a mapping
                ``{modality: [S * T, its channels, h, w]}``, in which a modality may be left out as missing.
            context_labels: ``[S]``, any dtype, any order. Column c of the logits is the c-th smallest label.
            target_images: ``[Q * T, ...]``, likewise.
            target_labels: ``[Q]``; with them the result has ``"loss"``, distillation included.

        Returns:
            ``logits [1, Q, way]`` (or ``[Q, way]``), ``view_logits [Q, V, way]``, ``policy [Q, V]`` (trust in each view, without
            gradient), ``classes [way]`` (the labels), and ``loss`` where it can be computed.

        Raises:
            DataError: shapes or labels that do not fit; the message names the argument and the remedy.
        """
        support = by_modality(context_images, self.model, "context_images") if isinstance(context_images, Tensor) else context_images
        query = by_modality(target_images, self.model, "target_images") if isinstance(target_images, Tensor) else target_images
        result = run_episode(self.model, support, context_labels, query, target_labels).as_dict()
        return result | {"logits": result["logits"][None]} if self.sample_axis else result
