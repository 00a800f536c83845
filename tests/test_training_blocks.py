"""What is done to the network before it trains leaves its results alone: checkpointed activations, per-block compilation, batch norm."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError
from amd_fast.models.backbones import create_backbone
from amd_fast.training.blocks import blocks_of, normalise_batches, prepare_blocks, set_training
from amd_fast.training.heads import MultiTaskHeads

CPU = torch.device("cpu")


class Transformer(nn.Module):
    """Shaped like the encoders of other libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.stem(tokens)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.mean(1)


def test_blocks_are_the_repeated_parts() -> None:
    bottlenecks = blocks_of(create_backbone("resnet50", 3))
    assert len(bottlenecks) == 16 and {type(block).__name__ for block in bottlenecks} == {"Bottleneck"}
    transformer = Transformer()
    assert blocks_of(transformer) == list(transformer.layers)
    small = create_backbone("small", 3)
    assert blocks_of(small) == [small]


def step(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after a forward and a backward pass, with the same random numbers every time."""
    torch.manual_seed(0)
    output = network(images)
    output.square().mean().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {"output": output.detach(), **gradients, **dict(network.named_buffers())}


@pytest.mark.parametrize(("compiled", "checkpointed"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["resnet18", "small", "transformer"])
def test_compiled_and_checkpointed_blocks_compute_the_same(
    name: str, compiled: bool, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics too: what is computed a second time in the backward pass is not counted twice. Dropout repeats itself."""
    # As the library compiles, but for the code generator, which takes minutes where it has to start anew.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(1)
    network = Transformer() if name == "transformer" else create_backbone(name, 3)
    images = torch.randn(2, 5, 3) if name == "transformer" else torch.randn(4, 3, 32, 32)
    names = list(network.state_dict())
    prepared = copy.deepcopy(network)
    for module in (network, prepared):
        set_training(module, "per_rank")
    prepare_blocks(prepared, compiled=compiled, checkpointed=checkpointed)
    assert list(prepared.state_dict()) == names
    expected, got = step(network, images), step(prepared, images)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_checkpointed_blocks_keep_fewer_activations() -> None:
    kept: list[int] = []

    def count(network: nn.Module) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            network(torch.randn(2, 3, 64, 64))
        return sum(kept)

    network = create_backbone("resnet18", 3)
    plain = count(network)
    prepare_blocks(network, compiled=False, checkpointed=True)
    assert count(network) < plain / 2


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_weights() -> None:
    network = create_backbone("small", 3)
    set_training(network, "frozen")
    found = step(network, torch.randn(4, 3, 32, 32))
    assert all(
        torch.equal(found[f"features.{place}.running_mean"], torch.zeros_like(found[f"features.{place}.running_mean"])) for place in (1, 4)
    )
    assert found["gradient of features.1.weight"].abs().sum() > 0 and network.training


def test_statistics_are_synchronised_on_gpus_alone() -> None:
    network = create_backbone("small", 3)
    with pytest.raises(ConfigError, match="batch_norm=sync needs GPUs"):
        normalise_batches(network, "sync", CPU, 2)
    assert isinstance(normalise_batches(network, "sync", torch.device("cuda"), 2).features[1], nn.SyncBatchNorm)


def test_heads_are_means_over_what_is_present_however_clips_are_split_up() -> None:
    """Against loops over clips and views, in float64; NaN of a missing view counts as nothing."""
    torch.manual_seed(0)
    heads = MultiTaskHeads(num_views=4, num_modalities=3, dim=6, num_classes=5).double()
    descriptors, classes = torch.randn(9, 4, 6, dtype=torch.float64), torch.randint(5, (9,))
    present = torch.rand(9, 4) < 0.6
    log_probs = torch.log_softmax(torch.einsum("bvd,vcd->bvc", descriptors, heads.weight) + heads.bias, -1)
    errors = [-log_probs[b, v, classes[b]] for b in range(9) for v in range(4) if present[b, v]]
    squared = []
    for number, head in enumerate(heads.predict, start=1):
        both = [b for b in range(9) if present[b, 0] and present[b, number]]
        squared.append(sum((head(descriptors[b, 0]) - descriptors[b, number]).square().mean() for b in both) / len(both))
    count = heads.count(present)
    for parts in ([slice(0, 9)], [slice(0, 2), slice(2, 3), slice(3, 9)]):
        shares = [heads(descriptors[part], present[part], classes[part], count) for part in parts]
        torch.testing.assert_close(sum(share.classification.sum() for share in shares), sum(errors) / len(errors))
        torch.testing.assert_close(sum(share.regression.sum() for share in shares), sum(squared) / 2)
    nothing = heads(descriptors, torch.zeros_like(present), classes, heads.count(torch.zeros_like(present)))
    assert nothing.classification.sum() == 0 and nothing.regression.sum() == 0
