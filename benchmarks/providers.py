"""Everything that can compute an op, or a stated part of it: ours, the reference, compiled, and the peers people would use instead.

A provider's ``build`` takes a case and returns the function that computes its results; whatever can be prepared once (masks,
views, compilation) is prepared there and not timed, which favours the peers. It raises :class:`UnavailableError` with the reason where
it cannot run.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from amd_fast.kernels.cross_modal_attention import reference as attention_reference
from amd_fast.kernels.free_energy import reference as loss_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from amd_fast import ops
from amd_fast.errors import ImplementationError

from .workloads import MARGIN, TEMPERATURE, Case, Forward, model_arrays, named_terms, reference

OURS = "amd_fast"


class UnavailableError(Exception):
    """A provider cannot run a case here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: Its name in tables.
        op: The op.
        build: From a case to the function that computes the results, by name.
        part: Which part of the op it computes; empty where it is all of it.
        whole: It computes what ours does, or nearly: its results are checked, and ours is measured against it. One that does not
            checks itself and returns a scalar, ``divergence``.
    """

    name: str
    op: str
    build: Callable[[Case], Forward]
    part: str = ""
    whole: bool = True

    @property
    def peer(self) -> bool:
        """Whether ours is measured against it."""
        return self.whole and not self.name.startswith(OURS)


def ours(case: Case, impl: str = "auto") -> Forward:
    """The public op, with the implementation that it takes by itself or one by name."""
    inputs = case.inputs
    if case.model is None:
        arguments = (inputs["query"], inputs["key"], inputs["value"], inputs["log_weight"])
        return lambda: dict(zip(("output", "log_evidence"), ops.cross_modal_attention(*arguments, impl=impl), strict=True))
    model, logits, target = case.model, inputs["view_logits"], inputs["target"]
    optional = {"context_evidence": inputs["context_evidence"], "present": inputs["present"]}
    return lambda: named_terms(ops.free_energy_loss(logits, target, model, **optional, temperature=TEMPERATURE, margin=MARGIN, impl=impl))


def _ours_triton(case: Case) -> Forward:
    """The kernel where ``auto`` takes something else."""
    module = importlib.import_module("amd_fast.ops.attention" if case.model is None else "amd_fast.ops.free_energy")
    tensors = list(case.inputs.values()) if case.model is None else [case.inputs["view_logits"]]
    if module.choose(*tensors).implementation == "triton":
        raise UnavailableError("amd_fast takes the kernel by itself")
    try:
        forward = ours(case, "triton")
        forward()
    except ImplementationError as error:
        raise UnavailableError(str(error).split(". ")[0]) from error
    return forward


def _reference(case: Case) -> Forward:
    return lambda: reference(case)


def _compiled(case: Case) -> Forward:
    # The backward pass is timed again and again over one graph, whose buffers must then not be given away.
    importlib.import_module("torch._functorch.config").donated_buffer = False  # type: ignore[attr-defined]
    attention = torch.compile(attention_reference.cross_modal_attention, dynamic=False)
    loss = torch.compile(loss_reference.free_energy_loss, dynamic=False)
    return lambda: reference(case, attention, loss)


def _attention_loop(case: Case) -> Forward:
    """A video after the other, the way such code is often written."""
    _only_on_the_cpu(case)
    query, key, value, log_weight = (case.inputs[name] for name in ("query", "key", "value", "log_weight"))
    scale = query.shape[-1] ** -0.5

    def forward() -> dict[str, Tensor]:
        outputs, evidences = [], []
        for q, k, v, w in zip(query, key, value, log_weight, strict=True):
            scores = torch.einsum("rhd,nhd->rhn", q * scale, k) + w[:, None, :]
            evidences.append(torch.logsumexp(scores, -1))
            outputs.append(torch.einsum("rhn,nhd->rhd", torch.softmax(scores, -1), v))
        return {"output": torch.stack(outputs), "log_evidence": torch.stack(evidences)}

    return forward


def _loss_loop(case: Case) -> Forward:
    """A query after the other."""
    _only_on_the_cpu(case)
    if case.shape.batch > 512:
        raise UnavailableError("a loop over this many queries takes too long to time")
    arrays = model_arrays(case)

    def forward() -> dict[str, Tensor]:
        inputs = [case.inputs[name] for name in ("view_logits", "target", "context_evidence", "present")]
        rows = [
            loss_reference.free_energy_loss(z, y, e, present=p, **arrays, temperature=TEMPERATURE, margin=MARGIN)
            for z, y, e, p in zip(*inputs, strict=True)
        ]
        return named_terms([torch.stack(terms) for terms in zip(*rows, strict=True)])

    return forward


def _only_on_the_cpu(case: Case) -> None:
    if case.device.type != "cpu":
        raise UnavailableError("a loop is a peer on the CPU only")


def _sdpa(backend: SDPBackend) -> Callable[[Case], Forward]:
    def build(case: Case) -> Forward:
        query, key, value = (case.inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
        mask = case.inputs["log_weight"].to(case.dtype)[:, None]

        def forward() -> dict[str, Tensor]:
            with sdpa_kernel(backend):
                return {"output": F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)}

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why each backend refuses; the case is given up below
                forward()
        except RuntimeError as error:
            raise UnavailableError(f"not with these inputs: {str(error).splitlines()[0]}") from error
        return forward

    return build


def _flex(case: Case) -> Forward:
    """flex_attention, its masked blocks skipped, the log-weights added to the scores."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    if case.device.type != "cuda":
        raise UnavailableError("its backward pass needs a GPU")
    query, key, value = (case.inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    weight = case.inputs["log_weight"]
    seen = torch.isfinite(weight)
    batch, rows, tokens = weight.shape
    block_mask = create_block_mask(lambda b, h, r, n: seen[b, r, n], batch, None, rows, tokens, device=str(case.device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def weighted(score: Tensor, b: Tensor, h: Tensor, r: Tensor, n: Tensor) -> Tensor:
        return score + weight[b, r, n]

    def forward() -> dict[str, Tensor]:
        output, extra = compiled(query, key, value, score_mod=weighted, block_mask=block_mask, return_aux=AuxRequest(lse=True))
        return {"output": output.transpose(1, 2), "log_evidence": extra.lse.transpose(1, 2)}

    return forward


def _xformers(case: Case) -> Forward:
    attention = _imported("xformers.ops", case).memory_efficient_attention
    query, key, value, weight = (case.inputs[name] for name in ("query", "key", "value", "log_weight"))
    # Its kernels want rows of the bias to start at multiples of 8 elements.
    room = weight.new_empty((*weight.shape[:2], -(-weight.shape[2] // 8) * 8), dtype=case.dtype)
    room[..., : weight.shape[2]] = weight
    bias = room[..., : weight.shape[2]][:, None].expand(-1, query.shape[2], -1, -1)

    def forward() -> dict[str, Tensor]:
        return {"output": attention(query, key, value, attn_bias=bias)}

    try:
        forward()
    except NotImplementedError as error:  # as where its extensions were built for another torch
        raise UnavailableError(f"not with these inputs here: {str(error).splitlines()[0]}") from error
    return forward


def _liger(case: Case) -> Forward:
    """One divergence between two views, which is the distillation where view 0 teaches view 1 in every query."""
    divergence = _imported("liger_kernel.transformers.functional", case).liger_jsd
    logits = case.inputs["view_logits"]
    if logits.shape[1] != 2:
        raise UnavailableError("it compares two distributions; see the shape two-views")

    def forward() -> dict[str, Tensor]:
        student = torch.log_softmax(logits[:, 1].float() / TEMPERATURE, -1)
        teacher = torch.log_softmax(logits[:, 0].detach().float() / TEMPERATURE, -1)
        return {"divergence": divergence(student, teacher, beta=0.0)}

    _check_divergence(forward()["divergence"], logits)
    return forward


def _check_divergence(got: Tensor, logits: Tensor) -> None:
    teacher, student = torch.log_softmax(logits.detach().double() / TEMPERATURE, -1).unbind(1)
    expected = float(F.kl_div(student, teacher, log_target=True, reduction="batchmean"))
    if not abs(float(got) - expected) <= 1e-5 * abs(expected):
        raise UnavailableError(f"wrong: its divergence is {float(got):.6g}, in float64 {expected:.6g}")


def _imported(name: str, case: Case) -> Any:
    if case.device.type != "cuda":
        raise UnavailableError("it needs a GPU")
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"the package {package} is not installed")
    return importlib.import_module(name)


_ATTENTION, _LOSS = "cross_modal_attention", "free_energy_loss"
_NO_EVIDENCE = "without the evidence"

PROVIDERS: tuple[Provider, ...] = (
    *(Provider(OURS, op, ours) for op in (_ATTENTION, _LOSS)),
    *(Provider(f"{OURS} (triton)", op, _ours_triton) for op in (_ATTENTION, _LOSS)),
    *(Provider("reference", op, _reference) for op in (_ATTENTION, _LOSS)),
    Provider("loop", _ATTENTION, _attention_loop),
    Provider("loop", _LOSS, _loss_loop),
    Provider("sdpa-flash", _ATTENTION, _sdpa(SDPBackend.FLASH_ATTENTION), _NO_EVIDENCE),
    Provider("sdpa-efficient", _ATTENTION, _sdpa(SDPBackend.EFFICIENT_ATTENTION), _NO_EVIDENCE),
    Provider("sdpa-cudnn", _ATTENTION, _sdpa(SDPBackend.CUDNN_ATTENTION), _NO_EVIDENCE),
    Provider("sdpa-math", _ATTENTION, _sdpa(SDPBackend.MATH), _NO_EVIDENCE),
    Provider("xformers", _ATTENTION, _xformers, _NO_EVIDENCE),
    Provider("liger-jsd", _LOSS, _liger, "one divergence between two views", whole=False),
    # Last, for they compile for long, and what a shape has no time left for is not begun.
    *(Provider("torch.compile", op, _compiled) for op in (_ATTENTION, _LOSS)),
    Provider("flex_attention", _ATTENTION, _flex),
)


def providers(op: str) -> list[Provider]:
    """The providers of an op, ours first."""
    return [provider for provider in PROVIDERS if provider.op == op]
