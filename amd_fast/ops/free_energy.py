"""The op ``amd_fast::free_energy_loss``: its contract towards PyTorch (schema, fake, autograd) and its public function.

The operation is defined in ``kernels/free_energy/reference.py``. The op is opaque to the compiler: one node in the graph, the
same in eager mode, under ``torch.compile(fullgraph=True)``, in ``torch.export`` and in AOTInductor. The implementation is chosen
inside the op, and the Triton one imported only when it runs. A compiler for the CPU is shown the reference and the closed form of
its gradient instead, which it fuses.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amd_fast.kernels.free_energy import reference
from amd_fast.kernels.free_energy.config import MAX_CLASSES, MAX_VIEWS
from amd_fast.kernels.free_energy.reference import FreeEnergyLoss
from amd_fast.ops.dispatch import Choice, argument_error, inlines, interpreting, prepare_interpreter, select, shape_text

__all__ = ["FreeEnergyLoss", "choose", "free_energy_loss"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAME = "free_energy_loss"

_library = torch.library.Library("amd_fast", "FRAGMENT")
_library.define(
    "free_energy_loss(Tensor view_logits, Tensor target, Tensor? context_evidence, Tensor? present, Tensor likelihood, "
    "Tensor outcome_likelihood, Tensor log_preference, Tensor state_prior, Tensor habit, Tensor precision, float temperature, "
    "float margin, float distillation_weight, float cross_entropy_weight, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "free_energy_loss_backward(Tensor? grad_total, Tensor? grad_task, Tensor? grad_distillation, Tensor? grad_cross_entropy, "
    "Tensor view_logits, Tensor target, Tensor? present, Tensor responsibility, Tensor teacher_policy, Tensor group, "
    "float temperature, float distillation_weight, float cross_entropy_weight, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("class_in_range(Tensor target, SymInt classes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class Model(Protocol):
    """What the loss needs of a generative model; :class:`amd_fast.GenerativeModel` has it."""

    likelihood: Tensor
    outcome_likelihood: Tensor
    log_preference: Tensor
    state_prior: Tensor
    habit: Tensor
    precision: Tensor


def free_energy_loss(
    view_logits: Tensor,
    target: Tensor,
    generative_model: Model,
    *,
    context_evidence: Tensor | None = None,
    temperature: float = 1.0,
    margin: float = 0.1,
    distillation_weight: float = 1.0,
    cross_entropy_weight: float = 1.0,
    present: Tensor | None = None,
    impl: str = "auto",
) -> FreeEnergyLoss:
    """Infer which view to trust, and the loss that teaches the views: active inference and all loss terms in one op.

    The formulas stand in :func:`amd_fast.kernels.free_energy.reference.free_energy_loss`. Beliefs and teacher are held fixed:
    gradients flow to ``view_logits`` alone, once, through each of the four terms. All sums are taken in log space and in float32
    (float64 for float64 logits): finite at logits of +-1e4, at -inf entries and at temperatures near 0. Works under
    ``torch.compile(fullgraph=True)`` and ``torch.export``.

    Args:
        view_logits: ``[..., V, C]`` float16, bfloat16, float32 or float64; -inf marks a class absent from the episode. A view
            whose logits are all -inf counts as missing.
        target: ``[...]`` int64, the right class, 0..C-1. On the CPU a value outside is an error; on a GPU, where asking would make
            the host wait, its row becomes NaN.
        generative_model: The agent, usually a :class:`amd_fast.GenerativeModel` of V views and K channels.
        context_evidence: ``[..., V, K-1]`` floating point in [0, 1]: channels 1..K-1. Channel 0, certainty, comes from the logits.
            Left out where K = 1.
        temperature: tau of the distillation, at least 1e-30.
        margin: delta; a view teaches where its policy exceeds every other by more than this, at least 0.
        distillation_weight: Weight of the distillation in the total, at least 0.
        cross_entropy_weight: Weight of the views' own cross-entropies in the total, at least 0.
        present: ``[..., V]`` bool, None where every view is there.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``, see :func:`amd_fast.explain`.

    Returns:
        FreeEnergyLoss with one row per query: total, task, distillation, cross_entropy ``[...]``, state and policy ``[..., V]``
        (float32, or float64 for float64 logits), group ``[...]`` int64, the teacher or -1.

    Raises:
        ArgumentError: (a ValueError) wrong rank, sizes, dtype, device or range; the message names the argument and the remedy.
        ImplementationError: ``impl="triton"`` and the kernel cannot run here.
    """
    _check_tensors(view_logits, target, context_evidence, present)
    _check_model(generative_model, view_logits, context_evidence)
    _check_numbers(temperature, margin, distillation_weight, cross_entropy_weight)
    rows, (views, classes) = target.shape, view_logits.shape[-2:]
    channels = generative_model.likelihood.shape[1]

    def flat(tensor: Tensor, *sizes: int) -> Tensor:  # a view of what is flat already would only cost autograd another step
        return tensor if len(rows) == 1 else tensor.reshape(-1, *sizes)

    outputs = _FreeEnergy.apply(
        flat(view_logits, views, classes),
        flat(target),
        None if context_evidence is None or channels == 1 else flat(context_evidence, views, channels - 1),
        None if present is None else flat(present, views),
        generative_model.likelihood,
        generative_model.outcome_likelihood,
        generative_model.log_preference,
        generative_model.state_prior,
        generative_model.habit,
        generative_model.precision,
        float(temperature),
        float(margin),
        float(distillation_weight),
        float(cross_entropy_weight),
        impl,
    )
    return FreeEnergyLoss(*(output if len(rows) == 1 else output.reshape((*rows, *output.shape[1:])) for output in outputs[:7]))


def choose(view_logits: Tensor, target: Tensor | None = None, generative_model: Any = None, *, impl: str = "auto", **_: Any) -> Choice:
    """The implementation that a call with these arguments runs, and why. Looks at devices, dtypes and sizes only."""
    return select(_NAME, impl, view_logits.device, obstacle=_obstacle(view_logits))


def _obstacle(view_logits: Tensor) -> str | None:
    for what, size, limit in (("views", view_logits.shape[-2], MAX_VIEWS), ("classes", view_logits.shape[-1], MAX_CLASSES)):
        if size > limit:
            return f"view_logits has {size} {what} and the kernel takes up to {limit}"
    return None


def _check_tensors(view_logits: Tensor, target: Tensor, context_evidence: Tensor | None, present: Tensor | None) -> None:
    if view_logits.dim() < 2:
        raise argument_error(
            "view_logits",
            f"shape {shape_text(view_logits)}",
            "[..., V views, C classes]",
            "add a dimension of views: logits.unsqueeze(-2)",
        )
    if view_logits.dtype not in _DTYPES:
        raise argument_error("view_logits", view_logits.dtype, "float16, bfloat16, float32 or float64", "convert it: view_logits.float()")
    if view_logits.shape[-1] == 0 or view_logits.shape[-2] == 0:
        raise argument_error("view_logits", f"shape {shape_text(view_logits)}", "at least one view and one class", "check the episode")
    lead = tuple(view_logits.shape[:-2])
    views = view_logits.shape[-2]
    if tuple(target.shape) != lead:
        raise argument_error(
            "target", f"shape {shape_text(target)}", f"{shape_text(lead)} as in view_logits", "give one class per query, not per view"
        )
    if target.dtype != torch.int64:
        raise argument_error("target", target.dtype, "torch.int64", "convert it: target.long()")
    if present is not None and (present.dtype != torch.bool or tuple(present.shape) != (*lead, views)):
        raise argument_error(
            "present",
            f"{present.dtype} of shape {shape_text(present)}",
            f"torch.bool of shape {shape_text((*lead, views))}",
            "say for every query and view whether it is there, or leave it out",
        )
    if context_evidence is not None and not context_evidence.dtype.is_floating_point:
        raise argument_error("context_evidence", context_evidence.dtype, "a floating dtype", "scale every channel to [0, 1]")
    for name, tensor in (("target", target), ("context_evidence", context_evidence), ("present", present)):
        if tensor is not None and tensor.device != view_logits.device:
            raise argument_error(
                name, f"device {tensor.device}", f"{view_logits.device} as in view_logits", f"move it: {name}.to(view_logits.device)"
            )


def _check_model(model: Model, view_logits: Tensor, context_evidence: Tensor | None) -> None:
    lead, views = tuple(view_logits.shape[:-2]), view_logits.shape[-2]
    shape = tuple(model.likelihood.shape)
    if len(shape) != 4 or shape[0] != views or shape[3] != views:
        raise argument_error(
            "generative_model",
            f"likelihood of shape {shape_text(shape)}",
            f"[{int(views)}, K, O, {int(views)}] for the {int(views)} views of view_logits",
            f"use a GenerativeModel with num_views={int(views)}",
        )
    context = 0 if context_evidence is None else context_evidence.shape[-1] if context_evidence.dim() else -1
    expected = (*lead, views, shape[1] - 1)
    if context != shape[1] - 1 or (context_evidence is not None and tuple(context_evidence.shape) != expected):
        raise argument_error(
            "context_evidence",
            "None" if context_evidence is None else f"shape {shape_text(context_evidence)}",
            f"shape {shape_text(expected)}" if shape[1] > 1 else "None or no channels",
            f"give the model's {int(shape[1])} channels but the first, which the op computes itself",
        )
    sizes = {"outcome_likelihood": (2, views, views), "log_preference": (2,), "state_prior": (views,), "habit": (views,), "precision": ()}
    for name, size in {"likelihood": shape, **sizes}.items():
        array = getattr(model, name)
        if tuple(array.shape) != size:
            raise argument_error(
                f"generative_model.{name}", f"shape {shape_text(array)}", shape_text(size), "use the arrays of one GenerativeModel"
            )
        if array.device != view_logits.device:
            raise argument_error(
                f"generative_model.{name}",
                f"device {array.device}",
                f"{view_logits.device} as in view_logits",
                "move the model: model.to(device)",
            )


def _check_numbers(temperature: float, margin: float, distillation_weight: float, cross_entropy_weight: float) -> None:
    for name, value, least in (
        # Where tau is smaller, the quotient of a tiny difference by it could not be told from that of zero in float32.
        ("temperature", temperature, 1e-30),
        ("margin", margin, 0.0),
        ("distillation_weight", distillation_weight, 0.0),
        ("cross_entropy_weight", cross_entropy_weight, 0.0),
    ):
        if not (least <= value < math.inf):
            raise argument_error(name, f"{float(value)}", f"a finite number, at least {least:g}", "change it in the configuration")


class _FreeEnergy(torch.autograd.Function):
    """Ties the two ops together for autograd. Saves the logits, labels and V + 2 numbers a row: nothing else of size V x C."""

    @staticmethod
    def forward(
        ctx: Any,
        view_logits: Tensor,
        target: Tensor,
        context_evidence: Tensor | None,
        present: Tensor | None,
        likelihood: Tensor,
        outcome_likelihood: Tensor,
        log_preference: Tensor,
        state_prior: Tensor,
        habit: Tensor,
        precision: Tensor,
        temperature: float,
        margin: float,
        distillation_weight: float,
        cross_entropy_weight: float,
        impl: str,
    ) -> tuple[Tensor, ...]:
        inputs = (
            context_evidence,
            present,
            likelihood,
            outcome_likelihood,
            log_preference,
            state_prior,
            habit,
            precision,
            temperature,
            margin,
            distillation_weight,
            cross_entropy_weight,
        )
        if inlines(view_logits.device, impl):
            target = _class_in_range_op(target, view_logits.shape[-1])
            outputs = _by_reference(view_logits, target, *inputs)
        else:
            outputs = _forward_op(view_logits, target, *inputs, impl)
        group, responsibility, teacher_policy = outputs[6:]
        ctx.save_for_backward(view_logits, target, present, responsibility, teacher_policy, group)
        ctx.numbers = (temperature, distillation_weight, cross_entropy_weight, impl)
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Incoming gradients may be expanded (stride 0 after .sum()); a kernel reads them as they would be stored.
        stored = [None if grad is None else grad.contiguous() for grad in grads[:4]]
        if all(grad is None for grad in stored):
            return (None,) * 15
        *numbers, impl = ctx.numbers
        if inlines(ctx.saved_tensors[0].device, impl):
            return (_gradient_by_reference(*stored, *ctx.saved_tensors, *numbers), *(None,) * 14)
        return (_backward_op(*stored, *ctx.saved_tensors, *numbers, impl), *(None,) * 14)


def _forward(
    view_logits: Tensor,
    target: Tensor,
    context_evidence: Tensor | None,
    present: Tensor | None,
    likelihood: Tensor,
    outcome_likelihood: Tensor,
    log_preference: Tensor,
    state_prior: Tensor,
    habit: Tensor,
    precision: Tensor,
    temperature: float,
    margin: float,
    distillation_weight: float,
    cross_entropy_weight: float,
    impl: str,
) -> tuple[Tensor, ...]:
    choice = choose(view_logits, impl=impl)
    if target.device.type == "cpu":
        _check_classes(target, view_logits.shape[-1])
    inputs = (
        view_logits,
        target,
        context_evidence,
        present,
        likelihood,
        outcome_likelihood,
        log_preference,
        state_prior,
        habit,
        precision,
        temperature,
        margin,
        distillation_weight,
        cross_entropy_weight,
    )
    if choice.implementation == "triton":
        return _kernels().free_energy_loss_with_factors(*_in_order(*inputs))
    return _by_reference(*inputs)


def _in_order(
    view_logits: Tensor, target: Tensor, context_evidence: Tensor | None, present: Tensor | None, *others: Any
) -> tuple[Any, ...]:
    """The op's arguments as the implementations take them."""
    return view_logits, target, context_evidence, *others, present


def _by_reference(view_logits: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    # Autocast would take the products of the reference in half precision; the op's sums are float32 by contract.
    with torch.autocast(view_logits.device.type, enabled=False):
        terms, responsibility, teacher_policy = reference.free_energy_loss_with_factors(*_in_order(view_logits, *inputs))
    # With both weights 0 the total is the task term; an op's results must not share memory.
    total = terms.total.clone() if terms.total is terms.task else terms.total
    return total, *terms[1:], responsibility, teacher_policy


def _check_classes(target: Tensor, classes: int) -> None:
    if target.numel():
        least, most = target.aminmax()
        if least < 0 or most >= classes:
            raise argument_error(
                "target", f"values {int(least)} to {int(most)}", f"0 to {classes - 1}", "number an episode's classes from 0"
            )


def _class_in_range(target: Tensor, classes: int) -> Tensor:
    """The target, once its values have been looked at: an op of its own for graphs, in which no value is known."""
    _check_classes(target, classes)
    return target.clone()


@functools.cache
def _kernels() -> Any:
    """The module of the Triton kernels, imported when they run: the package works without Triton."""
    if interpreting():
        prepare_interpreter()
    return importlib.import_module("amd_fast.kernels.free_energy.triton")


def _forward_fake(view_logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows, views, _classes = view_logits.shape
    dtype = reference.accumulation_dtype(view_logits.dtype)
    terms = [view_logits.new_empty(rows, dtype=dtype) for _term in range(4)]
    beliefs = [view_logits.new_empty(rows, views, dtype=dtype) for _belief in range(2)]
    group = torch.empty_like(target, memory_format=torch.contiguous_format)
    return *terms, *beliefs, group, view_logits.new_empty(rows, views, dtype=dtype), view_logits.new_empty(rows, dtype=dtype)


def _backward(
    grad_total: Tensor | None,
    grad_task: Tensor | None,
    grad_distillation: Tensor | None,
    grad_cross_entropy: Tensor | None,
    view_logits: Tensor,
    target: Tensor,
    present: Tensor | None,
    responsibility: Tensor,
    teacher_policy: Tensor,
    group: Tensor,
    temperature: float,
    distillation_weight: float,
    cross_entropy_weight: float,
    impl: str,
) -> Tensor:
    arguments = (
        grad_total,
        grad_task,
        grad_distillation,
        grad_cross_entropy,
        view_logits,
        target,
        present,
        responsibility,
        teacher_policy,
        group,
        temperature,
        distillation_weight,
        cross_entropy_weight,
    )
    if choose(view_logits, impl=impl).implementation == "triton":
        return _kernels().free_energy_loss_backward(*arguments)
    return _gradient_by_reference(*arguments)


def _gradient_by_reference(*arguments: Any) -> Tensor:
    with torch.autocast(arguments[4].device.type, enabled=False):
        return reference.free_energy_loss_backward(*arguments)


def _backward_fake(
    grad_total: Tensor | None,
    grad_task: Tensor | None,
    grad_distillation: Tensor | None,
    grad_cross_entropy: Tensor | None,
    view_logits: Tensor,
    *_: Any,
) -> Tensor:
    return view_logits.new_empty(view_logits.shape)


_library.impl("free_energy_loss", _forward, "CompositeExplicitAutograd")
_library.impl("free_energy_loss_backward", _backward, "CompositeExplicitAutograd")
_library.impl("class_in_range", _class_in_range, "CompositeExplicitAutograd")
torch.library.register_fake("amd_fast::class_in_range", lambda target, classes: torch.empty_like(target), lib=_library)
torch.library.register_fake("amd_fast::free_energy_loss", _forward_fake, lib=_library)
torch.library.register_fake("amd_fast::free_energy_loss_backward", _backward_fake, lib=_library)
_forward_op = torch.ops.amd_fast.free_energy_loss.default
_backward_op = torch.ops.amd_fast.free_energy_loss_backward.default
_class_in_range_op = torch.ops.amd_fast.class_in_range.default
