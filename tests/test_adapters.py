"""AFMIR in training loops shaped like TRX's and HyRSM's: one step each, with the gradients of calling AFMIR itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import amd_fast
from amd_fast.adapters import HyRSMAdapter, TRXAdapter
from amd_fast.errors import DataError

WAYS, SHOTS, QUERIES, T, SIZE = 3, 2, 4, 5, 20
S = WAYS * SHOTS


def make_model(*modalities: str, matcher: str = "prototype") -> amd_fast.AFMIR:
    torch.manual_seed(0)
    options = {"width": 8, "base": 4}
    model = amd_fast.create_model("afmir_small", modalities=modalities, dim=16, heads=2, backbone_options=options, matcher=matcher)
    for module in model.modules():  # statistics of a batch would change with every call
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    return model


def make_task(channels: int, seed: int = 1) -> dict[str, Tensor]:
    """An episode as those loaders give it, batch axis of 1 included: frames in one row, shuffled labels in floating point."""
    generator = torch.Generator().manual_seed(seed)
    support_labels = torch.arange(WAYS).repeat(SHOTS)[torch.randperm(S, generator=generator)]
    target_labels = torch.tensor([2, 0, 0, 1])
    task = {
        "support_set": torch.randn(S * T, channels, SIZE, SIZE, generator=generator),
        "support_labels": support_labels.float(),
        "target_set": torch.randn(QUERIES * T, channels, SIZE, SIZE, generator=generator),
        "target_labels": target_labels.float(),
        "real_support_labels": support_labels.float() + 7,
        "real_target_labels": target_labels.float() + 7,
        "batch_class_list": torch.tensor([7.0, 8.0, 9.0]),
    }
    return {name: value[None] for name, value in task.items()}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("model."): p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def gradients_of_afmir(model: amd_fast.AFMIR, task: dict[str, Tensor], scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Task free energy by AFMIR's own call, clip by clip in one mapping."""
    model.zero_grad()
    sides = []
    for name in ("support_set", "target_set"):
        clips = task[name][0].unflatten(0, (-1, T))
        widths = [model.channels[modality] for modality in model.modalities]
        sides.append(dict(zip(model.modalities, clips.split(widths, 2), strict=True)))
    output = model(sides[0], task["support_labels"][0].long(), sides[1], task["target_labels"][0].long(), **options)
    assert output.terms is not None
    (output.terms.task.mean() * scale).backward()
    return gradients(model)


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() >= wanted.keys() and wanted
    # Before a normalisation large terms cancel: what is left of them carries the rounding (float32) of the largest.
    rounding = 1e-5 * max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=rounding, msg=lambda text, name=name: f"{name}: {text}")


def trx_loss(samples: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood averaged over the model's samples, the first axis, and summed over queries."""
    each = torch.stack([-F.cross_entropy(logits, labels, reduction="none") for logits in samples], 1)
    return -(torch.logsumexp(each, 1) - torch.log(torch.tensor(float(len(samples))))).sum()


@pytest.mark.parametrize(("modalities", "matcher"), [(("rgb",), "prototype"), (("rgb", "flow"), "prototype"), (("rgb", "flow"), "bi_mhm")])
def test_trx_loop(modalities: tuple[str, ...], matcher: str) -> None:
    model = make_model(*modalities, matcher=matcher)
    adapter, tasks_per_batch = TRXAdapter(model), 2
    task = make_task(sum(model.channels.values()))
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.01)
    context_images, context_labels = task["support_set"][0], task["support_labels"][0]
    target_images, target_labels = task["target_set"][0], task["target_labels"][0].type(torch.LongTensor)
    before = [p.detach().clone() for p in adapter.parameters()]
    answer = adapter(context_images, context_labels, target_images)
    loss = trx_loss(answer["logits"], target_labels) / tasks_per_batch
    accuracy = (torch.logsumexp(answer["logits"], 0).argmax(-1) == target_labels).float().mean()
    loss.backward(retain_graph=False)
    got = gradients(adapter)
    optimiser.step()
    optimiser.zero_grad()
    assert answer["logits"].shape == (1, QUERIES, WAYS) and answer["classes"].tolist() == [0, 1, 2] and 0 <= accuracy <= 1
    assert any(not torch.equal(old, new) for old, new in zip(before, adapter.parameters(), strict=True))
    with torch.no_grad():
        for old, new in zip(before, adapter.parameters(), strict=True):
            new.copy_(old)
    assert_equal(got, gradients_of_afmir(model, task, QUERIES / tasks_per_batch))


def test_hyrsm_loop_with_classification() -> None:
    model = make_model("rgb", "flow")
    adapter = HyRSMAdapter(model, base_classes=12)
    task = make_task(5)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.01)
    episode = {name: value[0] for name, value in task.items()}
    answer = adapter(episode)
    few_shot = F.cross_entropy(answer["logits"], episode["target_labels"].long())
    real = torch.cat([episode["real_support_labels"], episode["real_target_labels"]], 0).long()
    assert answer["logits"].shape == (QUERIES, WAYS) and answer["class_logits"].shape == (S + QUERIES, 12)
    few_shot.backward(retain_graph=True)
    got = gradients(adapter)
    F.cross_entropy(answer["class_logits"], real).backward()
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), 5.0)
    weight = adapter.classification.weight  # type: ignore[union-attr]
    before = weight.detach().clone()
    assert_equal(got, gradients_of_afmir(model, task))
    optimiser.step()
    assert not torch.equal(weight, before)


def test_hyrsm_takes_modalities_under_keys_of_their_own() -> None:
    model = make_model("rgb", "flow").eval()
    adapter = HyRSMAdapter(model)
    episode = {name: value[0] for name, value in make_task(5).items()}
    apart = dict(episode)
    for side in ("support_set", "target_set"):
        apart[side], apart[f"{side}_flow"] = episode[side][:, :3], episode[side][:, 3:]
    torch.testing.assert_close(adapter(apart)["logits"], adapter(episode)["logits"])
    direct = model(
        {"rgb": apart["support_set"].unflatten(0, (-1, T)), "flow": apart["support_set_flow"].unflatten(0, (-1, T))},
        episode["support_labels"].long(),
        {"rgb": apart["target_set"].unflatten(0, (-1, T)), "flow": apart["target_set_flow"].unflatten(0, (-1, T))},
        episode["target_labels"].long(),
    )
    torch.testing.assert_close(adapter(apart)["loss"], direct.loss)


def test_trx_takes_modalities_by_name_and_misses_one() -> None:
    model = make_model("rgb", "flow").eval()
    adapter = TRXAdapter(model, sample_axis=False)
    task = make_task(5)
    images = {side: {"rgb": task[side][0][:, :3], "flow": task[side][0][:, 3:]} for side in ("support_set", "target_set")}
    labels = task["support_labels"][0]
    named = adapter(images["support_set"], labels, images["target_set"], task["target_labels"][0])
    stacked = adapter(task["support_set"][0], labels, task["target_set"][0])
    assert named["logits"].shape == (QUERIES, WAYS) and named["loss"].dim() == 0 and "loss" not in stacked
    torch.testing.assert_close(named["logits"], stacked["logits"])
    without = adapter({"rgb": images["support_set"]["rgb"]}, labels, {"rgb": images["target_set"]["rgb"]})
    assert (without["policy"][:, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float32, torch.float64])
def test_labels_of_any_dtype_order_and_value(dtype: torch.dtype) -> None:
    adapter = TRXAdapter(make_model("rgb").eval())
    task = {name: value[0] for name, value in make_task(3).items()}
    labels = task["support_labels"]
    plain = adapter(task["support_set"], labels.long(), task["target_set"], task["target_labels"].long())
    other = adapter(task["support_set"], (labels * 10 - 3).to(dtype), task["target_set"], task["target_labels"] * 10 - 3)
    assert other["classes"].tolist() == [-3, 7, 17]
    torch.testing.assert_close(other["logits"], plain["logits"])
    torch.testing.assert_close(other["loss"], plain["loss"])
    order = torch.randperm(S, generator=torch.Generator().manual_seed(3))
    shuffled = task["support_set"].unflatten(0, (S, T))[order].flatten(0, 1)
    torch.testing.assert_close(adapter(shuffled, labels[order], task["target_set"])["logits"], plain["logits"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support_set": torch.zeros(S * T, 4, SIZE, SIZE)}, r"3 \(rgb\)"),
        ({"support_set": torch.zeros(S * T + 1, 3, SIZE, SIZE)}, "same number of frames"),
        ({"target_set": torch.zeros(T + 1, 3, SIZE, SIZE)}, "query images of 'rgb'"),
        ({"support_labels": torch.zeros(1, S)}, r"labels\[0\]"),
        ({"target_labels": torch.tensor([0.0, 1.0, 2.0, 5.0])}, "query label 5"),
        ({"target_set": None}, "no 'target_set'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], message: str) -> None:
    episode = {name: value[0] for name, value in make_task(3).items()} | change
    with pytest.raises(DataError, match=message):
        HyRSMAdapter(make_model("rgb"))({name: value for name, value in episode.items() if value is not None})
