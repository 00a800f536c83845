"""Inputs of an op at a named shape, its results in float64, and the check that stands before every clock."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from amd_fast.kernels.cross_modal_attention import reference as attention_reference
from amd_fast.kernels.free_energy import reference as loss_reference
from torch import Tensor

from amd_fast.active_inference import GenerativeModel

from .shapes import AttentionShape, LossShape, Shape

Forward = Callable[[], Mapping[str, Tensor]]

MARGIN, TEMPERATURE = 0.1, 2.0
_PROBED = 256  # rows at either end of a batch that are compared: rows do not depend on each other
_SMALL = 1e-3  # results below this size are compared by their absolute error over it
_MISSING = 0.05  # share of tokens and of views that are missing


class WrongError(Exception):
    """Results that are not those of the reference; the message says which and by how much."""


@dataclasses.dataclass
class Case:
    """An op's inputs at one shape, dtype and device.

    Attributes:
        shape: The shape.
        dtype: Of query, key and value, or of the logits.
        device: Where they are.
        inputs: By name; those in ``leaves`` require gradients.
        leaves: Names of the inputs whose gradients are taken.
        differentiated: Name of the result that ``incoming`` is the gradient of.
        incoming: The incoming gradient.
        model: The generative model of the loss, None for attention.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    inputs: dict[str, Tensor]
    leaves: tuple[str, ...]
    differentiated: str
    incoming: Tensor
    model: GenerativeModel | None = None

    def gradients(self, outputs: Mapping[str, Tensor], retain: bool = False) -> dict[str, Tensor]:
        """Gradients of the leaves from the results of a forward pass, by the name of the leaf."""
        leaves = [self.inputs[name] for name in self.leaves]
        grads = torch.autograd.grad(outputs[self.differentiated], leaves, self.incoming, retain_graph=retain)
        return {f"grad_{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}

    @functools.cached_property
    def probe(self) -> Tensor:
        """Positions in the batch that are compared."""
        rows = torch.arange(self.shape.batch, device=self.device)
        return rows if self.shape.batch <= 2 * _PROBED else torch.cat([rows[:_PROBED], rows[-_PROBED:]])

    def _on_probe(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Results of the reference on the probed rows, computed in ``dtype``, with the gradients."""
        inputs = {name: tensor.detach()[self.probe] for name, tensor in self.inputs.items()}
        for name in self.leaves:
            inputs[name] = inputs[name].to(dtype).requires_grad_()
        part = dataclasses.replace(self, dtype=dtype, inputs=inputs, incoming=self.incoming[self.probe])
        outputs = reference(part)
        part.incoming = part.incoming.to(outputs[self.differentiated].dtype)
        return {**{name: tensor.detach() for name, tensor in outputs.items()}, **part.gradients(outputs)}

    @functools.cached_property
    def oracle(self) -> dict[str, Tensor]:
        """The right results on the probed rows, in float64."""
        return self._on_probe(torch.float64)

    @functools.cached_property
    def bounds(self) -> dict[str, float]:
        """Largest relative error that passes: twice what PyTorch makes at the same precision, rounding of the result added."""
        plain = self._on_probe(self.dtype)
        return {name: 2.0 * (self.error(name, tensor) + _rounding(tensor.dtype)) for name, tensor in plain.items()}

    @functools.cached_property
    def _decided(self) -> Tensor:
        """Probed rows whose teacher does not hang on rounding; the others may go either way, and their terms with them."""
        if "policy" not in self.oracle:
            return torch.ones(len(self.probe), dtype=torch.bool, device=self.device)
        policy = self.oracle["policy"]
        if policy.shape[-1] == 1:
            return torch.ones(len(policy), dtype=torch.bool, device=self.device)
        best = policy.topk(2, -1).values
        return (best[:, 0] - best[:, 1] - MARGIN).abs() > 1e-4

    def error(self, name: str, tensor: Tensor) -> float:
        """Relative error (2-norm) of a result on the probed rows; infinite where NaN or an infinity is out of place."""
        expected, got = self.oracle[name][self._decided], tensor.detach()[self._decided].to(torch.float64)
        finite = expected.isfinite()
        if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite], expected[~finite]):
            return math.inf
        expected, got = expected[finite], got[finite]
        # A loss that is all but zero is as exact as the logits it was taken from.
        least = _SMALL * math.sqrt(max(1, expected.numel()))
        return float((got - expected).norm() / expected.norm().clamp_min(least))

    def check(self, forward: Forward) -> float:
        """Run a provider forward and backward; return its largest error over the allowed one.

        Raises:
            WrongError: That quotient is above 1.
        """
        outputs = forward()
        results = {**outputs, **self.gradients(outputs)}
        errors = {name: self.error(name, tensor[self.probe]) for name, tensor in results.items()}
        worst = max(errors, key=lambda name: errors[name] / self.bounds[name])
        if errors[worst] > self.bounds[worst]:
            raise WrongError(f"{worst} is off by {errors[worst]:.1e}, allowed {self.bounds[worst]:.1e}")
        return errors[worst] / self.bounds[worst]


def _rounding(dtype: torch.dtype) -> float:
    """Of one result. Narrow types round once, at the end; in float32 the elementary functions of a GPU add a few units."""
    unit = torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0
    return unit if dtype in (torch.float16, torch.bfloat16) else 8.0 * unit


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """Random inputs of a shape, the same on every call. Half of what a modality's own query does not see is -inf by contract."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    uniform = functools.partial(torch.rand, generator=generator, device=device)
    if isinstance(shape, AttentionShape):
        return _attention(shape, dtype, normal, uniform, device)
    return _loss(shape, dtype, normal, uniform, device)


def _attention(shape: AttentionShape, dtype: torch.dtype, normal: Any, uniform: Any, device: torch.device) -> Case:
    batch, tokens = shape.batch, shape.tokens
    query, key, value = (normal(batch, length, shape.heads, shape.width, dtype=dtype) for length in (shape.rows, tokens, tokens))
    # Log-weights are eighths, so that a peer that takes its mask in half precision is given the same numbers.
    weight = (uniform(batch, tokens) * -16.0).round() / 8.0
    missing = uniform(batch, tokens) < _MISSING
    missing[:, :: shape.frames] = False  # every modality keeps a token: peers give NaN for a query that sees none
    weight = weight.masked_fill(missing, -math.inf)
    own = torch.arange(tokens, device=device) // shape.frames == torch.arange(shape.rows, device=device)[:, None]
    own[-1] = True  # the joint view, or the only one, sees everything
    log_weight = weight[:, None, :].masked_fill(~own, -math.inf)
    inputs = {"query": query.requires_grad_(), "key": key.requires_grad_(), "value": value.requires_grad_(), "log_weight": log_weight}
    return Case(shape, dtype, device, inputs, ("query", "key", "value"), "output", normal(query.shape, dtype=dtype))


def _loss(shape: LossShape, dtype: torch.dtype, normal: Any, uniform: Any, device: torch.device) -> Case:
    batch, views, classes = shape.batch, shape.views, shape.classes
    present = uniform(batch, views) >= _MISSING
    present[:, -1] = True
    inputs = {
        "view_logits": (3.0 * normal(batch, views, classes)).to(dtype).requires_grad_(),
        "target": (uniform(batch) * classes).long().clamp_max(classes - 1),
        "context_evidence": uniform(batch, views, shape.channels - 1),
        "present": present,
    }
    channels = ("certainty", "surprise", "agreement", "log_evidence")[: shape.channels]
    model = GenerativeModel(views, evidence=channels, num_bins=shape.bins, precision=4.0).to(device)
    return Case(shape, dtype, device, inputs, ("view_logits",), "total", normal(batch).abs(), model)


def model_arrays(case: Case) -> dict[str, Tensor]:
    """The arrays of the generative model, named as the arguments of the reference."""
    names = ("likelihood", "outcome_likelihood", "log_preference", "state_prior", "habit", "precision")
    return {name: getattr(case.model, name) for name in names}


def named_terms(terms: Sequence[Tensor]) -> dict[str, Tensor]:
    """Results of the loss by name. The teacher is left out: where it is another one, the distillation is too."""
    return dict(zip(loss_reference.FreeEnergyLoss._fields[:-1], terms, strict=False))


def reference(case: Case, attention: Any = None, loss: Any = None) -> dict[str, Tensor]:
    """Results of the reference (or of a compiled form of it) on a case."""
    inputs = case.inputs
    if case.model is None:
        function = attention or attention_reference.cross_modal_attention
        output, evidence = function(inputs["query"], inputs["key"], inputs["value"], inputs["log_weight"])
        return {"output": output, "log_evidence": evidence}
    function = loss or loss_reference.free_energy_loss
    terms = function(**inputs, **model_arrays(case), temperature=TEMPERATURE, margin=MARGIN)
    return named_terms(terms)
