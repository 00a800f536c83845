"""The Triton kernels of cross-modal attention, run on the CPU by Triton's interpreter and on a GPU, and their configurations.

The interpreter must be chosen before triton is imported, for a whole process. So the checks live in one module that runs in a
process of its own, started once (``python test_attention_kernels.py``), and each test reads what became of its check. Where there is
a GPU the same checks run on it, in the process of the tests, in the precisions that GPUs are served in.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("triton")
import torch
from torch import Tensor
from torch.autograd import forward_ad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXACT = torch.float32 if DEVICE == "cuda" else torch.float64
DTYPES = (EXACT, torch.float16, torch.bfloat16 if DEVICE == "cuda" else torch.float32)  # the interpreter is wrong in bfloat16
ROUTES = {  # shapes B, R, N, H, d
    "rows": (2, 3, 6, 2, 20),
    "set": (3, 9, 11, 2, 16),
    "stream": (2, 6, 70, 2, 16),
    "tiles": (2, 18, 70, 1, 16),
}
TIGHT = {"rtol": 1e-12, "atol": 1e-12} if DEVICE == "cpu" else {"rtol": 1e-5, "atol": 1e-5}
INF = math.inf


CHECKS = (
    "values_and_gradients",
    "irregular_sizes",
    "random_shapes",
    "invariances",
    "empty_and_masked",
    "finite_differences",
    "contract",
    "same_curve",
)
ON_A_GPU = [check for check in CHECKS if check not in ("random_shapes", "finite_differences")]  # hypothesis, and float64


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    """What became of each check, ``"passed"`` or a traceback, from one process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(check: str, reports: dict[str, str]) -> None:
    assert reports[check] == "passed", reports[check]


@pytest.mark.gpu
@pytest.mark.parametrize("check", ON_A_GPU)
def test_on_a_gpu(check: str) -> None:
    globals()[f"check_{check}"]()


# --- configurations ----------------------------------------------------------------------------------------------------------


def test_tokens_that_are_read_element_by_element_come_in_smaller_blocks() -> None:
    from amd_fast.kernels.cross_modal_attention import config
    from amd_fast.kernels.cross_modal_attention.triton import _shape

    table = config.load_table("a GPU nobody has measured", "sm_1")
    tokens = torch.zeros(2, 784, 2, 64, dtype=torch.bfloat16)
    sliced = torch.zeros(2, 784, 2, 65, dtype=torch.bfloat16)[..., :64]
    query = torch.zeros(2, 3, 2, 64, dtype=torch.bfloat16)
    shapes = [_shape(query, key, value) for key, value in ((tokens, tokens), (sliced, tokens), (tokens, sliced))]
    assert [shape.aligned for shape in shapes] == [True, False, False]
    whole, half, _ = (config.choose("stream_forward", shape, table, 227 << 10) for shape in shapes)
    assert half.block_tokens == whole.block_tokens // 2
    sets = [config.choose("set_forward", config.Shape.of(2, 256, 3, 16, aligned), table, 227 << 10) for aligned in (True, False)]
    assert [launch.block_rows for launch in sets] == [8, 16]


@pytest.mark.parametrize("item_size", [2, 4])
def test_every_shape_gets_a_configuration_that_fits_the_device(item_size: int) -> None:
    from amd_fast.kernels.cross_modal_attention import config

    table = config.load_table("a GPU nobody has measured", "sm_1")
    for shared_memory in (64 << 10, 227 << 10):  # AMD and older NVIDIA GPUs have the least
        for width, rows, tokens in itertools.product((1, 16, 33, 64, 128, 200, 256), (1, 3, 9, 100), (0, 1, 5, 16, 40, 64, 100, 1000)):
            shape = config.Shape.of(item_size, width, rows, tokens)
            assert config.obstacle(shape.width) is None
            for kernel in kernels_of(shape):
                chosen = config.choose(kernel, shape, table, shared_memory)
                assert config.shared_memory_bound(kernel, chosen, shape, shared_memory > 64 << 10) <= shared_memory
                assert chosen.pairs * chosen.block_tokens * shape.width <= 8192
                if kernel.startswith(("rows", "set")):
                    assert chosen.block_tokens >= tokens
                if kernel.startswith("set") or kernel == "stream_backward":
                    assert chosen.block_rows >= rows


def kernels_of(shape) -> list[str]:  # type: ignore[no-untyped-def]
    """The kernels that run a shape, forward and backward."""
    from amd_fast.kernels.cross_modal_attention import config

    return [name for way in ("forward", "backward") for name in config.KERNELS if name.startswith(f"{config.route(shape, way)}_{way}")]


def test_tables_are_found_by_name_then_architecture_then_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amd_fast.kernels.cross_modal_attention import config

    (tmp_path / "configs").mkdir()
    for name, device, architecture in (("default", "default", "any"), ("h100", "NVIDIA H100", "sm_90"), ("l4", "NVIDIA L4", "sm_89")):
        table = {"device": device, "architecture": architecture, "kernels": {"rows_forward": [{"tokens": 8, "from": name}]}}
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(table))
    monkeypatch.setattr(config, "files", lambda _: tmp_path)
    monkeypatch.setattr(config, "load_table", config.load_table.__wrapped__)
    gpus = (("NVIDIA L4", "sm_89"), ("NVIDIA H200", "sm_90"), ("AMD", "gfx942"))
    found = [config.load_table(*gpu)["rows_forward"][0]["from"] for gpu in gpus]
    assert found == ["l4", "h100", "default"]


def test_a_nearest_entry_keeps_the_volume_of_a_program() -> None:
    from amd_fast.kernels.cross_modal_attention import config

    table = {"rows_forward": [{"item_size": 2, "width": 64, "tokens": 16, "pairs": 8, "warps": 4}]}
    for tokens, pairs in ((16, 8), (4, 32), (64, 2), (128, 1)):
        assert config.choose("rows_forward", config.Shape.of(2, 64, 3, tokens), table, 1 << 20).pairs == pairs


def test_no_float32_product_of_64_rows_has_eight_warps() -> None:
    from amd_fast.kernels.cross_modal_attention import config

    table = {"stream_backward": [{"item_size": 4, "width": 64, "tokens": 512, "block_tokens": 64, "warps": 8, "stages": 1}]}
    for item_size, warps in ((4, 4), (2, 8)):
        assert config.choose("stream_backward", config.Shape.of(item_size, 64, 3, 1000), table, 1 << 20).warps == warps


def test_shared_memory_cuts_stages_then_tokens_and_pairs() -> None:
    from amd_fast.kernels.cross_modal_attention import config

    shape = config.Shape.of(4, 128, 16, 1000)
    launch = config.LaunchConfig(pairs=1, block_rows=16, block_tokens=64, warps=4, stages=2)
    cuts = []
    for _ in range(3):  # each time a byte less than what it needs
        launch = config.fit("stream_forward", launch, shape, config.shared_memory_bound("stream_forward", launch, shape) - 1)
        cuts.append((launch.stages, launch.block_tokens, launch.block_rows))
    assert cuts == [(1, 64, 16), (1, 32, 16), (1, 16, 16)]
    launch, shape = config.LaunchConfig(pairs=4, block_rows=1, block_tokens=16, warps=4), config.Shape.of(4, 64, 3, 16)
    assert config.fit("rows_forward", launch, shape, config.shared_memory_bound("rows_forward", launch, shape) - 1).pairs == 2


# --- what runs in the interpreter -------------------------------------------------------------------------------------------


@contextmanager
def route(name: str | None) -> Iterator[None]:
    """Make every shape take one route; the choice between them is about speed."""
    from amd_fast.kernels.cross_modal_attention import config

    original = config.route
    if name is not None:
        config.route = lambda shape, direction, weight_gradient=False: "tiles" if name == "stream" and weight_gradient else name
    try:
        yield
    finally:
        config.route = original


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that a result nobody wrote shows."""
    plain_empty, plain_new_empty = torch.empty_like, Tensor.new_empty
    torch.empty_like = lambda *args, **kwargs: plain_empty(*args, **kwargs).fill_(math.nan)
    Tensor.new_empty = lambda *args, **kwargs: plain_new_empty(*args, **kwargs).fill_(math.nan)
    try:
        yield
    finally:
        torch.empty_like, Tensor.new_empty = plain_empty, plain_new_empty


def kernels() -> tuple:
    from amd_fast.ops.dispatch import prepare_interpreter

    prepare_interpreter()
    from amd_fast.kernels.cross_modal_attention import triton

    return triton.cross_modal_attention, triton.cross_modal_attention_backward


def make(shape: tuple[int, ...], dtype: torch.dtype, weight: str | None, seed: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """Inputs query, key, value, log_weight and the gradients of output and evidence."""
    batch, rows, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    query, key, value = random(batch, rows, heads, width), random(batch, tokens, heads, width), random(batch, tokens, heads, width)
    log_weight = None
    if weight is not None:
        log_weight = random(batch, rows if weight.startswith("row") else 1, tokens).to(wide)
        if weight.endswith("some"):
            log_weight[torch.rand(log_weight.shape, generator=generator) < 0.4] = -INF
            log_weight[:1] = -INF
        if weight.endswith("all"):
            log_weight[:] = -INF
    grads = [random(batch, rows, heads, width).to(dtype), random(batch, rows, heads).to(wide)]
    inputs = [query.to(dtype), key.to(dtype), value.to(dtype), log_weight]
    return [x if x is None else x.to(DEVICE) for x in inputs], [grad.to(DEVICE) for grad in grads]


def double(tensors: list) -> list:
    return [None if x is None else x.double() for x in tensors]


def run(forward, backward, inputs: list, grads: list, **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Output, evidence and all gradients."""
    output, evidence = forward(*inputs)
    wants_output = "output" in inspect.signature(backward).parameters
    saved = (*inputs, output, evidence) if wants_output else (*inputs, evidence)
    return [x for x in (output, evidence, *backward(*grads, *saved, **options)) if x is not None]


def native(inputs: list, grads: list) -> list[Tensor]:
    """The operation as PyTorch computes it when everything stays in the dtype of the inputs."""
    from amd_fast.kernels.cross_modal_attention import reference

    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    query, key, value, log_weight = leaves
    scores = torch.einsum("brhd,bnhd->brhn", query, key) / math.sqrt(query.shape[-1])
    if log_weight is not None:
        scores = scores + log_weight.unsqueeze(2).to(scores.dtype)
    empty = (scores == -INF).all(-1, keepdim=True)
    probability = torch.softmax(torch.where(empty, 0.0, scores), -1) * ~empty
    evidence = torch.where(empty.squeeze(-1), -INF, torch.logsumexp(torch.where(empty, 0.0, scores), -1))
    output = torch.einsum("brhn,bnhd->brhd", probability, value)
    wide = reference.accumulation_dtype(query.dtype)
    torch.autograd.backward((output, evidence.to(wide)), grads)
    return [x.detach() for x in (output, evidence)] + [x.grad for x in leaves if x is not None]


def assert_close(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], subtracted: float, note: str) -> None:
    """Not more than twice the error that PyTorch makes in the same precision, plus the rounding of what is stored.

    Gradients are made of differences of inner products of this size at most. Where a set has a token or two, PyTorch subtracts one and
    the same number from itself, and has no error at all; a kernel that takes the second one from the output has its rounding.
    """
    for position, (mine, native_result, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        finite = exact.isfinite()
        assert torch.equal(mine.isfinite(), finite), f"{note}: result {position} is finite in other places"
        assert torch.equal(mine[~finite].double(), exact[~finite]), f"{note}: result {position}"
        if not exact[finite].numel():
            continue
        error = (mine.double() - exact)[finite].abs().max()
        native_error = (native_result.double() - exact)[finite].abs().max()
        units = 4 if mine.is_cuda and mine.dtype == torch.float32 else 1  # what the elementary functions of a GPU add
        rounding = units * torch.finfo(mine.dtype).eps * (1 + exact[finite].abs().max())
        if position >= 2:
            rounding += units * torch.finfo(ours[1].dtype).eps * subtracted
        assert error <= 2 * (native_error + rounding), f"{note}: result {position} off by {error:.1e}, PyTorch by {native_error:.1e}"


def compare(  # type: ignore[no-untyped-def]
    shape: tuple[int, ...], dtype: torch.dtype, weight: str | None, seed: int = 0, change=None, **options
) -> None:
    from amd_fast.kernels.cross_modal_attention import reference

    inputs, grads = make(shape, dtype, weight, seed)
    if change is not None:
        inputs = change(inputs)
    forward, backward = kernels()
    with poisoned_memory():
        ours = run(forward, backward, inputs, grads, **options)
    truth = run(reference.cross_modal_attention, reference.cross_modal_attention_backward, double(inputs), double(grads))
    inner = torch.einsum("brhd,bnhd->brhn", grads[0].double().abs(), inputs[2].double().abs())
    subtracted = float(inner.max()) if inner.numel() else 0.0
    wanted = slice(len(ours))  # the gradient of the log-weights comes last
    assert_close(ours, native(inputs, grads)[wanted], truth[wanted], subtracted, f"{shape} {dtype} {weight}")


def check_values_and_gradients() -> None:
    """Every route, precision and kind of log-weight, the batch large enough for several programs."""
    for name, shape in ROUTES.items():
        for dtype in DTYPES:
            for weight in (None, "shared some", "row some"):
                with route(name):
                    compare(shape, dtype, weight)
                    compare(shape, dtype, weight, log_weight_gradient=False)


def check_irregular_sizes() -> None:
    """No videos, no queries, no tokens, one of each, and odd numbers of them, some queries or all of them seeing nothing."""
    for *shape, by in (
        (0, 3, 5, 1, 16, None),
        (2, 0, 5, 1, 16, None),
        (2, 3, 0, 2, 16, None),
        (1, 1, 1, 1, 1, None),
        (3, 19, 33, 3, 40, None),
        (2, 5, 16, 2, 7, "set"),
        (2, 5, 33, 2, 7, "stream"),
        (2, 5, 33, 2, 7, "tiles"),
    ):
        for dtype, weight in ((torch.float32, "row some"), (DTYPES[2], "shared all"), (DTYPES[2], "row some")):
            with route(by):
                compare(tuple(shape), dtype, weight)


def check_random_shapes() -> None:
    """Irregular and degenerate sizes, as hypothesis chooses them, through the route that the shape would take and through each."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        shape=st.tuples(st.integers(0, 3), st.integers(0, 19), st.sampled_from([0, 1, 2, 5, 16, 33]), st.integers(1, 3)),
        width=st.sampled_from([1, 7, 16, 40]),
        dtype=st.sampled_from([torch.float32, torch.float16]),
        weight=st.sampled_from([None, "shared", "shared some", "shared all", "row", "row some", "row all"]),
        by=st.sampled_from([None, *ROUTES]),
        seed=st.integers(0, 99),
    )
    def check(shape: tuple, width: int, dtype: torch.dtype, weight: str | None, by: str | None, seed: int) -> None:
        with route(by):
            compare((*shape, width), dtype, weight, seed)

    check()
    compare((1, 3, 300, 1, 64), torch.float32, "row some")
    compare((1, 40, 33, 1, 256), torch.float16, "shared some")
    for dtype, weight in ((torch.float32, "row some"), (torch.float64, "shared some"), (torch.float32, None)):  # vectors in parts
        compare((2, 35, 40, 2, 200), dtype, weight)
        compare((1, 3, 70, 1, 256), dtype, weight)


def check_invariances() -> None:
    """Order of the tokens, strides, and what a read-out cannot see: none of it has influence."""
    forward, backward = kernels()
    for name, shape in ROUTES.items():
        with route(name):
            inputs, grads = make(shape, EXACT, "row some", 0)
            query, key, value, log_weight = inputs
            results = run(forward, backward, inputs, grads)
            order = torch.randperm(shape[2], generator=torch.Generator().manual_seed(1)).to(DEVICE)
            permuted = run(forward, backward, [query, key[:, order], value[:, order], log_weight[:, :, order]], grads)
            for position, index in ((3, 1), (4, 1), (5, 2)):
                permuted[position] = permuted[position].index_select(index, order.argsort())
            torch.testing.assert_close(permuted, results, **TIGHT)

            strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (query, key, value)]
            strided[0] = torch.stack([query, query], -1)[..., 0]
            again = run(forward, backward, [*strided, log_weight.transpose(1, 2).contiguous().transpose(1, 2)], grads)
            if INTERPRETED:
                assert all(torch.equal(x, y) for x, y in zip(again, results, strict=True))
            else:  # other strides are laid out over the threads in another way, and sums take another order
                torch.testing.assert_close(again, results, **TIGHT)
            assert all(torch.equal(x, y) for x, y in zip(run(forward, backward, inputs, grads), results, strict=True))

            removed = log_weight.amax(1) == -INF
            assert removed.any() and not any(results[i][removed].any() for i in (3, 4))
            key, value = key.masked_fill(removed[:, :, None, None], 1e9), value.masked_fill(removed[:, :, None, None], -1e9)
            other = run(forward, backward, [query, key, value, log_weight], grads)
            assert all(torch.equal(x, y) for x, y in zip(other, results, strict=True))

            without = run(forward, backward, inputs, grads, log_weight_gradient=False)
            assert len(without) == 5
            if name == "stream":  # other kernels, where the gradient of the log-weights is wanted
                torch.testing.assert_close(without, results[:5], **TIGHT)
            else:
                assert all(torch.equal(x, y) for x, y in zip(without, results[:5], strict=True))


def check_empty_and_masked() -> None:
    """A query that sees nothing gives 0 and -inf, whatever gradient comes back; extreme scores stay finite."""
    forward, backward = kernels()
    for name, shape in ROUTES.items():
        with route(name):
            inputs, (grad_output, grad_evidence) = make(shape, torch.float32, "shared", 0)
            inputs[3][1] = -INF
            grad_evidence[1] = INF
            output, evidence, *grads = run(forward, backward, inputs, [grad_output, grad_evidence])
            assert not output[1].any() and (evidence[1] == -INF).all() and evidence[0].isfinite().all()
            assert all(grad.isfinite().all() and not grad[1].any() for grad in grads)
            inputs, grads = make(shape, torch.float32, "row", 0)
            extreme = [inputs[0] * 1e4, inputs[1] * 1e4, inputs[2], inputs[3] * 1e4]
            assert all(result.isfinite().all() for result in run(forward, backward, extreme, grads))


def check_finite_differences() -> None:
    """gradcheck in float64 of every input, through both results, with the kernel behind the public function."""
    from amd_fast.ops import cross_modal_attention

    for name, shape in {"rows": (1, 2, 3, 2, 3), "set": (1, 2, 3, 1, 3), "stream": (1, 2, 18, 1, 2), "tiles": (1, 2, 18, 1, 2)}.items():
        for weight in ("shared", "row"):
            inputs = [x.requires_grad_() for x in make(shape, torch.float64, weight, 0)[0]]
            with route(name):
                assert torch.autograd.gradcheck(functools.partial(cross_modal_attention, impl="triton"), inputs, fast_mode=True)


def check_contract() -> None:
    """opcheck, a compiled graph with the kernel inside, expanded gradients, and what is refused."""
    from amd_fast.errors import ImplementationError
    from amd_fast.ops import cross_modal_attention

    (query, key, value, log_weight), _ = make(ROUTES["rows"], EXACT, "row some", 0)
    forward = torch.ops.amd_fast.cross_modal_attention.default
    torch.library.opcheck(forward, (query, key, value, log_weight, None, "triton"))
    output, evidence = forward(query, key, value, log_weight, None, "triton")
    backward = torch.ops.amd_fast.cross_modal_attention_backward.default
    torch.library.opcheck(backward, (output, evidence, query, key, value, log_weight, output, evidence, None, "triton", True))

    def total(impl: str, *inputs: Tensor) -> Tensor:
        output, evidence = cross_modal_attention(*inputs, impl=impl)
        return output.sum() + torch.where(evidence == -INF, 0.0, evidence).sum()

    gradients = []
    for function in (
        functools.partial(total, "reference"),
        functools.partial(total, "triton"),
        torch.compile(functools.partial(total, "triton"), fullgraph=True, backend="aot_eager"),
    ):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, log_weight)]
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[1], gradients[0], **TIGHT)
    torch.testing.assert_close(gradients[2], gradients[1], rtol=0, atol=0)

    refused = [(tuple(torch.zeros(1, 1, 1, 300, device=DEVICE) for _ in range(3)), "heads up to 256 wide")]
    if INTERPRETED:
        refused.append(((query.bfloat16(), key.bfloat16(), value.bfloat16()), "bfloat16 wrongly"))
    for inputs, reason in refused:
        with pytest.raises(ImplementationError, match=reason):
            cross_modal_attention(*inputs, impl="triton")
    assert forward(query, key, value, None, None, "auto")[0].isfinite().all()
    # The op itself would drop a tangent without a word.
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        cross_modal_attention(forward_ad.make_dual(query, torch.ones_like(query)), key, value, impl="triton")


def check_same_curve() -> None:
    """A small model trained with the kernels and with the reference follows the same loss curve."""
    from amd_fast.ops import cross_modal_attention

    curves = {}
    for impl in ("reference", "triton"):
        torch.manual_seed(0)
        tokens, labels = torch.randn(16, 6, 8).to(DEVICE), torch.randint(3, (16,)).to(DEVICE)
        seeds = torch.nn.Parameter(torch.randn(3, 8).to(DEVICE))
        layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)]).to(DEVICE)
        weigh = torch.nn.Linear(8, 1).to(DEVICE)
        optimiser = torch.optim.Adam([seeds, *layers.parameters(), *weigh.parameters()], lr=0.02)
        losses = []
        for _ in range(12):
            query, key, value = (layer(x) for layer, x in zip(layers, (seeds.expand(16, 3, 8), tokens, tokens), strict=True))
            split = [x.unflatten(-1, (2, 4)) for x in (query, key, value)]
            _, evidence = results = cross_modal_attention(*split, weigh(tokens).squeeze(-1), impl=impl)
            logits = results[0].flatten(2).mean(-1) + evidence.mean(-1)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        curves[impl] = torch.tensor(losses)
    torch.testing.assert_close(curves["triton"], curves["reference"], rtol=1e-3, atol=1e-4)
    assert curves["triton"][-1] < curves["triton"][0]


def run_checks() -> dict[str, str]:
    reports = {}
    for check in CHECKS:
        try:
            globals()[f"check_{check}"]()
            reports[check] = "passed"
        except Exception:
            reports[check] = traceback.format_exc()
    return reports


if __name__ == "__main__":
    print(json.dumps(run_checks()))
