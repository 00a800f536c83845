"""cross_modal_attention: the definition against independent oracles, its invariances, its gradients, its contract with PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from amd_fast.kernels.cross_modal_attention import reference, sdpa
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from amd_fast.errors import ImplementationError
from amd_fast.ops import cross_modal_attention, explain
from amd_fast.ops.attention import _Attention

INF = math.inf


def make_inputs(
    batch: int = 3, rows: int = 3, tokens: int = 10, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and log-weights [B, N], all random and finite."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, rows, heads, width), (batch, tokens, heads, width), (batch, tokens, heads, width), (batch, tokens))
    query, key, value, log_weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query.to(dtype), key.to(dtype), value.to(dtype), log_weight.to(torch.promote_types(dtype, torch.float32))


def loop_oracle(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The formula, one query and one token at a time, in Python floats."""
    (batch, rows, heads, width), tokens = query.shape, key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    weights = torch.zeros(batch, rows, tokens) if log_weight is None else log_weight
    weights = (weights.unsqueeze(1) if weights.dim() == 2 else weights).expand(batch, rows, tokens)
    output, evidence = torch.zeros(query.shape, dtype=torch.float64), torch.full((batch, rows, heads), -INF, dtype=torch.float64)
    for b in range(batch):
        for r in range(rows):
            for h in range(heads):
                scores = [
                    scale * sum(x * y for x, y in zip(query[b, r, h].tolist(), key[b, n, h].tolist(), strict=True))
                    + weights[b, r, n].item()
                    for n in range(tokens)
                ]
                peak = max(scores, default=-INF)
                if peak == -INF:
                    continue
                masses = [math.exp(score - peak) for score in scores]
                evidence[b, r, h] = peak + math.log(sum(masses))
                for n, mass in enumerate(masses):
                    output[b, r, h] += mass / sum(masses) * value[b, n, h].double()
    return output, evidence


def gradients(function, inputs, output_grads) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Gradients of function's two results, contracted with output_grads, with respect to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output, evidence = function(*leaves)
    torch.autograd.backward((output, evidence), output_grads)
    return [leaf.grad for leaf in leaves]


def through_the_op(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference with its closed-form backward pass, as an exported program runs it."""
    weight = log_weight.unsqueeze(1) if log_weight is not None and log_weight.dim() == 2 else log_weight
    return _Attention.apply(query, key, value, weight, None, "reference")


def random_grads(query: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    evidence_dtype = reference.accumulation_dtype(query.dtype)
    output = torch.randn(query.shape, generator=generator, dtype=torch.float64).to(query.dtype)
    return output, torch.randn(query.shape[:3], generator=generator, dtype=torch.float64).to(evidence_dtype)


# --- the values -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 2, 7, 16]),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 3, 8]),
    mask=st.sampled_from(["none", "some", "all"]),
    per_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_formula_written_as_loops(
    batch: int, rows: int, tokens: int, heads: int, width: int, mask: str, per_row: bool, seed: int
) -> None:
    query, key, value, log_weight = make_inputs(batch, rows, tokens, heads, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if per_row:
        log_weight = torch.randn(batch, rows, tokens, generator=generator, dtype=torch.float64)
    if mask != "none":
        removed = torch.rand(log_weight.shape, generator=generator) < (0.5 if mask == "some" else 2.0)
        log_weight = log_weight.masked_fill(removed, -INF)
    output, evidence = cross_modal_attention(query, key, value, log_weight)
    expected_output, expected_evidence = loop_oracle(query, key, value, log_weight)
    torch.testing.assert_close(output, expected_output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(evidence, expected_evidence, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_scaled_dot_product_attention_in_float64(scale: float | None) -> None:
    query, key, value, log_weight = make_inputs(batch=5, tokens=23, heads=4, width=16)
    log_weight[:, ::3] = -INF
    inputs = (query, key, value, log_weight)

    def library(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        bias = log_weight[:, None, None, :].expand(-1, query.shape[2], query.shape[1], -1)
        heads_first = [x.transpose(1, 2) for x in (query, key, value)]
        output = scaled_dot_product_attention(*heads_first, attn_mask=bias, scale=scale).transpose(1, 2)
        scores = torch.einsum("brhd,bnhd->brhn", query, key) * (scale or 1 / math.sqrt(query.shape[-1])) + log_weight[:, None, None, :]
        return output, torch.logsumexp(scores, -1)

    for ours, theirs in zip(cross_modal_attention(*inputs, scale=scale), library(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = random_grads(query)
    ours = gradients(lambda *x: cross_modal_attention(*x, scale=scale), inputs, grads)
    for mine, theirs in zip(ours, gradients(library, inputs, grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_lose_only_their_own_rounding(dtype: torch.dtype) -> None:
    query, key, value, log_weight = make_inputs(batch=8, tokens=40, width=32, dtype=dtype)
    output, evidence = cross_modal_attention(query, key, value, log_weight)
    exact_output, exact_evidence = cross_modal_attention(query.double(), key.double(), value.double(), log_weight.double())
    assert output.dtype == dtype and evidence.dtype == torch.float32
    # One rounding of the result, plus float32 sums of 32 products and 40 exponentials.
    rounding = torch.finfo(dtype).eps / 2 * exact_output.abs() + 64 * torch.finfo(torch.float32).eps * (1 + value.double().abs().amax())
    assert ((output.double() - exact_output).abs() <= rounding).all()
    assert ((evidence.double() - exact_evidence).abs() <= 64 * torch.finfo(torch.float32).eps * (1 + exact_evidence.abs())).all()


def test_extreme_scores_stay_finite() -> None:
    query, key, value, log_weight = make_inputs(dtype=torch.float32)
    inputs = (query * 1e4, key * 1e4, value, log_weight * 1e4)
    output, evidence = cross_modal_attention(*inputs)
    assert output.isfinite().all() and evidence.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(cross_modal_attention, inputs, random_grads(query)))


def test_log_weights_broadcast() -> None:
    query, key, value, _ = make_inputs(batch=4, rows=3, tokens=5)
    for shape in [(5,), (1, 5), (4, 1), (4, 1, 5), (1, 3, 5), (4, 3, 1), (1, 1, 1), ()]:
        weight = torch.randn(shape, dtype=torch.float64)
        full = (weight.unsqueeze(1) if len(shape) == 2 else weight).expand(4, 3, 5)
        small, large = (cross_modal_attention(query, key, value, w) for w in (weight, full))
        torch.testing.assert_close(small, large)
        grad = gradients(cross_modal_attention, (query, key, value, weight), random_grads(query))[3]
        full_grad = gradients(cross_modal_attention, (query, key, value, full), random_grads(query))[3]
        assert grad.shape == weight.shape
        torch.testing.assert_close(grad, full_grad.sum(1).sum_to_size(shape) if len(shape) == 2 else full_grad.sum_to_size(shape))


# --- invariances ------------------------------------------------------------------------------------------------------------


def test_order_of_the_tokens_has_no_influence() -> None:
    query, key, value, log_weight = make_inputs(tokens=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    permuted = cross_modal_attention(query, key[:, order], value[:, order], log_weight[:, order])
    torch.testing.assert_close(permuted, cross_modal_attention(query, key, value, log_weight), rtol=1e-13, atol=1e-13)


def own_and_joint(modalities: int, frames: int) -> Tensor:
    """Log-weights [1, M + 1, M T]: modality m sees its own tokens, the joint view all."""
    own = torch.full((modalities + 1, modalities * frames), -INF, dtype=torch.float64)
    for m in range(modalities):
        own[m, m * frames : (m + 1) * frames] = 0.0
    own[-1] = 0.0
    return own[None]


def test_permuting_modalities_permutes_their_read_outs_and_leaves_the_joint_one() -> None:
    query, key, value, log_weight = make_inputs(rows=4, tokens=12)  # three modalities of four frames, and the joint view
    weight = own_and_joint(3, 4) + log_weight[:, None]
    output, evidence = cross_modal_attention(query, key, value, weight)
    views, tokens = [2, 0, 1, 3], torch.arange(12).view(3, 4)[[2, 0, 1]].flatten()
    permuted_weight = own_and_joint(3, 4) + log_weight[:, None, tokens]
    permuted = cross_modal_attention(query[:, views], key[:, tokens], value[:, tokens], permuted_weight)
    torch.testing.assert_close(permuted, (output[:, views], evidence[:, views]), rtol=1e-13, atol=1e-13)


def test_a_read_out_does_not_depend_on_tokens_it_cannot_see() -> None:
    query, key, value, log_weight = make_inputs(rows=3, tokens=8)
    weight = own_and_joint(2, 4) + log_weight[:, None]
    output, evidence = cross_modal_attention(query, key, value, weight)
    key, value = key.clone(), value.clone()
    key[:, 4:], value[:, 4:] = 1e6 * torch.randn_like(key[:, 4:]), -1e6
    changed, changed_evidence = cross_modal_attention(query, key, value, weight)
    assert torch.equal(changed[:, 0], output[:, 0]) and torch.equal(changed_evidence[:, 0], evidence[:, 0])
    assert not torch.equal(changed[:, 1], output[:, 1])
    alone = cross_modal_attention(query[:, :1], key[:, :4], value[:, :4], log_weight[:, :4])
    torch.testing.assert_close(alone, (output[:, :1], evidence[:, :1]), rtol=1e-13, atol=1e-13)


def test_a_removed_token_has_exactly_no_influence_and_exactly_no_gradient() -> None:
    query, key, value, log_weight = make_inputs(tokens=9, dtype=torch.float32)
    log_weight[0, 2] = log_weight[1, :4] = -INF  # missing from single videos of the batch
    results = cross_modal_attention(query, key, value, log_weight)
    grads = gradients(cross_modal_attention, (query, key, value, log_weight), random_grads(query))
    removed = log_weight == -INF
    other_key, other_value = key.clone(), value.clone()
    other_key[removed], other_value[removed] = 1e9, -1e9
    for before, after in zip(results, cross_modal_attention(query, other_key, other_value, log_weight), strict=True):
        assert torch.equal(before, after)
    assert not grads[1][removed].any() and not grads[2][removed].any() and not grads[3][removed].any()
    assert all(grads[i][~removed].any() for i in (1, 2, 3))


@pytest.mark.parametrize("function", [reference.cross_modal_attention, cross_modal_attention, through_the_op])
def test_rows_without_tokens_give_zero_and_finite_gradients(function) -> None:  # type: ignore[no-untyped-def]
    query, key, value, log_weight = make_inputs(tokens=6)
    log_weight[1] = -INF
    output, evidence = function(query, key, value, log_weight)
    assert not output[1].any() and (evidence[1] == -INF).all() and evidence[[0, 2]].isfinite().all()
    for evidence_grad in (1.0, INF):  # even a gradient that is not finite must not come through a constant
        output_grad, grads = torch.ones_like(output), torch.ones_like(evidence)
        grads[1] = evidence_grad
        result = gradients(function, (query, key, value, log_weight), (output_grad, grads))
        assert all(grad.isfinite().all() and not grad[1].any() for grad in result)
    no_tokens = function(query, key[:, :0], value[:, :0], log_weight[:, :0])
    assert not no_tokens[0].any() and (no_tokens[1] == -INF).all()


# --- gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["shared", "per row", "absent"])
def test_gradients_equal_finite_differences(shape: str) -> None:
    query, key, value, log_weight = make_inputs(batch=2, rows=2, tokens=5, heads=2, width=3)
    weights = {"shared": [log_weight], "per row": [torch.randn(2, 2, 5, dtype=torch.float64)], "absent": []}[shape]
    inputs = [x.requires_grad_() for x in (query, key, value, *weights)]
    assert torch.autograd.gradcheck(cross_modal_attention, inputs)
    assert torch.autograd.gradcheck(through_the_op, inputs)
    assert torch.autograd.gradcheck(reference.cross_modal_attention, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("weight", ["shared", "per row", "some removed", "all removed", "absent"])
def test_closed_form_equals_autograd_of_the_definition(dtype: torch.dtype, weight: str) -> None:
    query, key, value, log_weight = make_inputs(dtype=dtype)
    if weight == "per row":
        log_weight = log_weight[:, None] * torch.tensor([1.0, -1.0, 0.5])[:, None].to(log_weight.dtype)
    elif weight == "some removed":
        log_weight[:, ::2] = -INF
        log_weight[0] = -INF
    elif weight == "all removed":
        log_weight[:] = -INF
    inputs = (query, key, value) if weight == "absent" else (query, key, value, log_weight)
    grads = random_grads(query)
    closed = gradients(through_the_op, inputs, grads)
    by_autograd = gradients(reference.cross_modal_attention, inputs, grads)
    exact = gradients(reference.cross_modal_attention, [x.double() for x in inputs], [x.double() for x in grads])
    for mine, theirs, truth in zip(closed, by_autograd, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        budget = 2 * ((theirs.double() - truth).abs().max() + torch.finfo(mine.dtype).eps * (1 + truth.abs().max()))
        assert (mine.double() - truth).abs().max() <= budget


def test_strided_inputs_and_expanded_gradients_change_nothing() -> None:
    query, key, value, log_weight = make_inputs()
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    strided[0] = torch.stack([strided[0], strided[0]], dim=-1)[..., 0]
    weight = log_weight.t().contiguous().t()
    assert not any(x.is_contiguous() for x in (*strided, weight))
    ones = torch.ones(()).double()
    expanded = (ones.expand(query.shape), ones.expand(query.shape[:3]))
    dense = (torch.ones_like(query), torch.ones_like(query[..., 0]))
    for mine, theirs in zip(
        gradients(cross_modal_attention, (*strided, weight), expanded),
        gradients(cross_modal_attention, (query, key, value, log_weight), dense),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("function", [cross_modal_attention, through_the_op])
def test_one_result_may_go_unused(function) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs()
    for used in (0, 1):
        parts = []
        for each in (function, reference.cross_modal_attention):
            leaves = [x.clone().requires_grad_() for x in inputs]
            parts.append(torch.autograd.grad(each(*leaves)[used].sum(), leaves, materialize_grads=True))
        torch.testing.assert_close(*parts, rtol=1e-12, atol=1e-12)


# --- torch's own fused attention, which serves large sets and calls without gradients on the CPU ---------------------------------


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 4),
    tokens=st.sampled_from([1, 2, 16, 65, 600, 1100]),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 3, 16, 33]),
    mask=st.sampled_from([None, "none", "some", "all", "first"]),
    per_row=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_fused_attention_equals_the_definition(
    batch: int,
    rows: int,
    tokens: int,
    heads: int,
    width: int,
    mask: str | None,
    per_row: bool,
    strided: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    query, key, value, log_weight = make_inputs(batch, rows, tokens, heads, width, dtype, seed)
    weight = log_weight[:, None].expand(batch, rows if per_row else 1, tokens).clone()
    if mask == "some":
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = -INF
    elif mask == "all":
        weight[0] = -INF
    elif mask == "first":  # whole blocks of the kernel see nothing
        weight[:, :, : tokens // 2 + 1] = -INF
    given_weight = None if mask is None else weight
    if strided:
        query, key, value = (x.transpose(0, 3).contiguous().transpose(0, 3) for x in (query, key, value))
        given_weight = None if given_weight is None else given_weight.transpose(0, 2).contiguous().transpose(0, 2)
    assert sdpa.serves(query, key)
    output, evidence = sdpa.cross_modal_attention(query, key, value, given_weight, 0.3)
    doubled = [None if x is None else x.double() for x in (query, key, value, given_weight)]
    expected = reference.cross_modal_attention(*doubled, 0.3)
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close((output.double(), evidence.double()), expected, rtol=bound, atol=bound)
    grad_output, _ = random_grads(query)
    grads = sdpa.cross_modal_attention_backward(grad_output, query, key, value, given_weight, output, evidence, 0.3)
    nothing = torch.zeros_like(expected[1])
    exact = reference.cross_modal_attention_backward(grad_output.double(), nothing, *doubled, expected[1], 0.3)
    for mine, theirs in zip(grads, exact, strict=False):
        assert mine.is_contiguous() and mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=bound, atol=bound)


def test_the_fastest_on_the_cpu_is_chosen_explained_and_right() -> None:
    small, large = make_inputs(dtype=torch.float32), make_inputs(tokens=300, dtype=torch.float32)  # 2400 numbers in the keys of a head
    named = "cross_modal_attention"
    assert "runs as sdpa because" in explain(named, *small)
    assert "runs as reference because" in explain(named, *small, impl="reference")
    assert "runs as reference because" in explain(named, *(x.half() for x in small[:3]), small[3])
    query, key, value, log_weight = (x.clone().requires_grad_() for x in small)
    assert "runs as reference because" in explain(named, query, key, value, log_weight.detach())
    with torch.no_grad():
        assert "runs as sdpa because" in explain(named, query, key, value, log_weight)
    query, key, value, log_weight = (x.clone().requires_grad_() for x in large)
    assert "runs as sdpa because" in explain(named, query, key, value, log_weight.detach())
    assert "runs as reference because" in explain(named, query, key, value, log_weight)  # it has no gradient of log-weights
    for loss in (lambda out, _: out.sin().sum(), lambda out, evidence: out.sin().sum() + evidence.cos().sum()):
        leaves = (query, key, value)
        ours = torch.autograd.grad(loss(*cross_modal_attention(*leaves, log_weight.detach())), leaves)
        theirs = torch.autograd.grad(loss(*cross_modal_attention(*leaves, log_weight.detach(), impl="reference")), leaves)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_right_where_the_reference_runs() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(batch=1, rows=2, tokens=3, heads=1, width=2)]
    assert torch.autograd.gradgradcheck(cross_modal_attention, inputs)


def test_inputs_are_not_modified_and_a_second_derivative_of_the_op_is_refused() -> None:
    inputs = [x.requires_grad_() for x in make_inputs()]
    versions = [x._version for x in inputs]
    output, evidence = through_the_op(*inputs)
    (grad,) = torch.autograd.grad((output.square().sum() + evidence.sum()), inputs[0], create_graph=True)
    assert [x._version for x in inputs] == versions
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_leaves_the_precision_alone() -> None:
    inputs = make_inputs(dtype=torch.float32)
    plain = cross_modal_attention(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = cross_modal_attention(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(plain, under_autocast, strict=True))


# --- the contract with PyTorch ----------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    query, key, value, log_weight = make_inputs()
    weight = log_weight[:, None]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    forward, backward = torch.ops.amd_fast.cross_modal_attention.default, torch.ops.amd_fast.cross_modal_attention_backward.default
    for tensors in ([query, key, value], swapped):
        for log_weights in (weight, weight.expand(-1, 3, -1), None):
            torch.library.opcheck(forward, (*tensors, log_weights, None, "auto"))
            output, evidence = forward(*tensors, log_weights, 0.5, "reference")
            grads = random_grads(query)
            for impl, weighted in (("reference", log_weights is not None), ("auto", False)):
                torch.library.opcheck(backward, (grads[0], None, *tensors, log_weights, output, evidence, 0.5, impl, weighted))
                torch.library.opcheck(backward, (*grads, *tensors, log_weights, output, evidence, 0.5, impl, weighted))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_a_full_graph_equals_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    counters.clear()

    def loss(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        output, evidence = cross_modal_attention(query, key, value, log_weight)
        return output.sin(), evidence.cos()

    # One of the two with the default compiler, which is slow to warm up; the other shows the graphs alone.
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="inductor" if dynamic else "aot_eager")
    # In the first sizes no two are equal, which torch would take for one and the same.
    for batch, tokens in ((4, 10), (5, 7)) if dynamic else ((3, 10),):
        inputs = make_inputs(batch=batch, tokens=tokens)
        inputs[3][0, :3] = -INF
        grads = random_grads(inputs[0])
        torch.testing.assert_close(compiled(*inputs), loss(*inputs), rtol=1e-13, atol=1e-13)
        for mine, theirs in zip(gradients(compiled, inputs, grads), gradients(loss, inputs, grads), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 2, "one with gradients and one without, for all sizes"


class Head(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        return cross_modal_attention(query, key, value, log_weight)


def test_export_keeps_the_op_and_takes_other_batch_sizes() -> None:
    batch, tokens = torch.export.Dim("batch", min=2), torch.export.Dim("tokens", min=2)
    sizes = [{0: batch}, {0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 1: tokens}]
    program = torch.export.export(Head(), make_inputs(), dynamic_shapes=sizes)
    assert "amd_fast.cross_modal_attention.default" in str(program.graph)
    inputs = make_inputs(batch=7, tokens=5)
    torch.testing.assert_close(program.module()(*inputs), cross_modal_attention(*inputs))


# --- bad input --------------------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE, LOG_WEIGHT = make_inputs(batch=2, rows=3, tokens=4, heads=2, width=8, dtype=torch.float32)
BAD = {
    "rank": ((QUERY[0], KEY, VALUE), r"query: got 3 dimensions \(3, 2, 8\), expected 4 dimensions \[B, R, H, d\]; split"),
    "key rank": ((QUERY, KEY[0], VALUE), r"key: got 3 dimensions .* \[B, N, H, d\]"),
    "integers": ((QUERY.long(), KEY, VALUE), r"query: got torch.int64, expected float16, .*; convert it"),
    "mixed dtypes": ((QUERY, KEY.half(), VALUE), r"key: got torch.float16, expected torch.float32 as in query; convert it"),
    "device": ((QUERY, KEY, VALUE.to("meta")), r"value: got device meta, expected cpu as in query; move it"),
    "heads": ((QUERY, KEY[:, :, :1], VALUE), r"key: got \(2, 4, 1, 8\), expected \[B=2, N, H=2, d=8\] as in query; give"),
    "tokens": ((QUERY, KEY, VALUE[:, :3]), r"value: got \(2, 3, 2, 8\), expected \(2, 4, 2, 8\) as in key; give"),
    "width": ((QUERY[..., :0], KEY[..., :0], VALUE[..., :0]), r"query: got head width 0 .*, expected at least 1; check"),
    "mask": ((QUERY, KEY, VALUE, LOG_WEIGHT > 0), r"log_weight: got torch.bool, expected a floating dtype; turn .*masked_fill"),
    "weights": ((QUERY, KEY, VALUE, LOG_WEIGHT[:, :3]), r"log_weight: got \(2, 3\), expected \[B=2, N=4\], or .* \[B=2, R=3, N=4\]; give"),
    "weight device": ((QUERY, KEY, VALUE, LOG_WEIGHT.to("meta")), r"log_weight: got device meta, expected cpu as in query; move it"),
    "weight rank": ((QUERY, KEY, VALUE, LOG_WEIGHT[None, None]), r"log_weight: got \(1, 1, 2, 4\), expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_what_was_expected_and_the_remedy(case: str) -> None:
    inputs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        cross_modal_attention(*inputs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_the_same_under_compile(case: str, dynamic: bool) -> None:
    """The compiler wraps the error in its own, whose message holds ours."""
    inputs, message = BAD[case]
    torch._dynamo.reset()
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.compile(cross_modal_attention, fullgraph=True, dynamic=dynamic, backend="eager")(*inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_by_name_is_refused_on_the_cpu(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch._dynamo.reset()
    function = torch.compile(cross_modal_attention, fullgraph=True, backend="aot_eager") if compiled else cross_modal_attention
    with pytest.raises(ImplementationError, match=r"impl='triton' cannot run here.*GPU"):
        function(QUERY, KEY, VALUE, LOG_WEIGHT, impl="triton")
