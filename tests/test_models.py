"""The model: invariances of the read-out, matchers against plain loops, missing modalities, any number of modalities."""

import math
from urllib.error import URLError

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import amd_fast
from amd_fast.active_inference import GenerativeModel
from amd_fast.errors import ConfigError, DataError, WeightsError
from amd_fast.models.afmir import with_deviation
from amd_fast.models.backbones import adapt_first_convolution, create_backbone
from amd_fast.models.evidence import agreement, surprise
from amd_fast.models.matchers import Match, class_means, create_matcher
from amd_fast.models.readout import CrossModalReadout, view_names

INF = float("inf")


def readout(modalities: int, dim: int = 16, seeds: int = 2, **options: object) -> CrossModalReadout:
    torch.manual_seed(modalities)
    return CrossModalReadout(modalities, dim, heads=4, seeds=seeds, **options).double()  # type: ignore[arg-type]


def tokens(batch: int, modalities: int, frames: int, dim: int = 16) -> torch.Tensor:
    return torch.randn(batch, modalities, frames, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_readout_equals_the_loop_of_its_definition(modalities: int) -> None:
    module, x = readout(modalities), tokens(3, modalities, 5)
    weight = torch.randn(3, modalities, 5)
    weight[0, 0, 2] = -INF
    weight[1, modalities - 1] = -INF
    got, evidence = module(x, weight)
    heads, width = module.heads, module.dim // module.heads
    key_value = module.key_value(x + module.embedding[:, None])
    for b in range(3):
        means, alive = [], []
        for m in range(modalities):
            share = torch.softmax(weight[b, m].double(), 0) if torch.isfinite(weight[b, m]).any() else torch.zeros(5, dtype=torch.float64)
            alive.append(bool(torch.isfinite(weight[b, m]).any()))
            means.append((share[:, None] * x[b, m]).sum(0))
        if modalities > 1:
            means.append(sum(mean for mean, there in zip(means, alive, strict=True) if there) / max(sum(alive), 1))
        for v, mean in enumerate(means):
            seen = [(m, t) for m in range(modalities) for t in range(5) if (v in (m, modalities)) and weight[b, m, t] > -INF]
            read, scores = [], []
            for i in range(module.seed.shape[1]):
                query = module.query(module.norm(module.seed[v, i] + mean)).view(heads, width)
                for h in range(heads):
                    if not seen:
                        read.append(torch.zeros(width, dtype=torch.float64))
                        continue
                    keys = torch.stack([key_value[b, m, t, : module.dim].view(heads, width)[h] for m, t in seen])
                    values = torch.stack([key_value[b, m, t, module.dim :].view(heads, width)[h] for m, t in seen])
                    logit = keys @ query[h] / math.sqrt(width) + torch.stack([weight[b, m, t].double() for m, t in seen])
                    scores.append(torch.logsumexp(logit, 0))
                    read.append(torch.softmax(logit, 0) @ values)
            joined = torch.cat(read).view(-1, module.dim).mean(0)
            torch.testing.assert_close(got[b, v], mean + module.out(joined), rtol=1e-6, atol=1e-6)
            wanted = torch.stack(scores).mean() if seen else torch.tensor(-INF)
            torch.testing.assert_close(evidence[b, v], wanted, check_dtype=False, rtol=1e-5, atol=1e-5)


@given(frames=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_order_of_frames_changes_nothing(frames: int, seed: int) -> None:
    module, x = readout(2), tokens(2, 2, frames)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(frames, generator=generator) for _ in range(2)])
    shuffled = torch.stack([x[:, m, order[m]] for m in range(2)], 1)
    weight = torch.zeros(2, 2, frames)
    torch.testing.assert_close(module(shuffled, weight)[0], module(x, weight)[0])


def test_permuting_modalities_permutes_views_and_leaves_the_joint_one() -> None:
    module, x, order = readout(3), tokens(2, 3, 4), [2, 0, 1]
    before = module(x, torch.zeros(2, 3, 4))[0]
    with torch.no_grad():
        module.seed.copy_(module.seed[[*order, 3]])
        module.embedding.copy_(module.embedding[order])
    after = module(x[:, order], torch.zeros(2, 3, 4))[0]
    torch.testing.assert_close(after, before[:, [*order, 3]])


def test_a_modalitys_own_descriptor_does_not_depend_on_the_others() -> None:
    module, x = readout(2), tokens(2, 2, 4)
    other = x.clone()
    other[:, 1] += 1.0
    weight = torch.zeros(2, 2, 4)
    first, second = module(x, weight)[0], module(other, weight)[0]
    torch.testing.assert_close(first[:, 0], second[:, 0], rtol=0, atol=0)
    assert (first[:, 1:] != second[:, 1:]).any()


def test_a_masked_token_has_no_influence_and_no_gradient() -> None:
    module, x = readout(2), tokens(2, 2, 4).requires_grad_()
    weight = torch.zeros(2, 2, 4)
    weight[0, 1] = -INF  # a modality missing from one clip
    weight[1, 0, 3] = -INF  # one frame
    out, _ = module(x, weight)
    changed = x.detach().clone()
    changed[0, 1], changed[1, 0, 3] = 77.0, -5.0
    torch.testing.assert_close(module(changed, weight)[0], out, rtol=0, atol=0)
    assert (out[0, 1] == 0).all()
    out.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert (x.grad[0, 1] == 0).all() and (x.grad[1, 0, 3] == 0).all() and (x.grad[1, 0, 0] != 0).any()


def test_everything_missing_gives_zero_and_finite_gradients() -> None:
    module, x = readout(2), tokens(1, 2, 3).requires_grad_()
    out, evidence = module(x, torch.full((1, 2, 3), -INF))
    assert (out == 0).all() and torch.isneginf(evidence).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["prototype", "cosine"])
def test_matchers_equal_a_plain_loop(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    episodes, ways, shots, queries, views, dim = 2, 3, 2, 4, 3, 6
    matcher = create_matcher(name, views, dim)
    support = torch.randn(episodes, ways * shots, views, dim, generator=generator)
    query = torch.randn(episodes, queries, views, dim, generator=generator)
    labels = torch.arange(ways).repeat(shots).expand(episodes, -1)
    support_present = torch.ones(episodes, ways * shots, views, dtype=torch.bool)
    support_present[0, 1, 1] = False  # class 1 has another clip with this view
    support_present[1, [0, 3], 2] = False  # class 0 has none left
    query_present = torch.ones(episodes, queries, views, dtype=torch.bool)
    query_present[0, 0, 0] = False
    match = matcher(matcher.prepare(query), class_means(matcher.prepare(support), labels, support_present, ways), query_present)
    unit = (lambda x: x / x.norm()) if name == "cosine" else (lambda x: x)
    for e in range(episodes):
        for v in range(views):
            prototypes = []
            for c in range(ways):
                clips = [unit(support[e, i, v]) for i in range(ways * shots) if labels[e, i] == c and support_present[e, i, v]]
                prototypes.append(unit(torch.stack(clips).mean(0)) if clips else None)
            there = all(p is not None for p in prototypes)
            assert bool(match.present[e, :, v].any()) == there
            if not there:
                continue
            gaps = [(prototypes[a] - prototypes[b]).norm() for a in range(ways) for b in range(ways) if a != b]
            torch.testing.assert_close(match.spread[e, v], torch.stack(gaps).mean(), rtol=1e-4, atol=1e-4)
            for q in range(queries):
                assert bool(match.present[e, q, v]) == bool(query_present[e, q, v])
                for c in range(ways):
                    distance = (unit(query[e, q, v]) - prototypes[c]).norm()
                    torch.testing.assert_close(match.distance[e, q, v, c], distance, rtol=1e-4, atol=1e-4)
                    logit = -(distance**2) / matcher.log_temperature[v].exp()
                    torch.testing.assert_close(match.logits[e, q, v, c], logit, rtol=1e-4, atol=1e-4)


def test_evidence_channels_equal_their_definitions() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, distance = torch.randn(1, 2, 3, 4, generator=generator), torch.rand(1, 2, 3, 4, generator=generator) + 0.1
    present = torch.tensor([[[True, True, True], [True, False, False]]])
    match = Match(logits, distance, torch.rand(1, 3, generator=generator) + 0.1, present)
    got_surprise, got_agreement = surprise(match), agreement(match)
    posterior = torch.softmax(logits, -1)
    for q in range(2):
        for v in range(3):
            ratio = math.log(float(distance[0, q, v].min()) / float(match.spread[0, v]))
            assert float(got_surprise[0, q, v]) == pytest.approx((min(max(ratio, -2), 2) + 2) / 4, abs=1e-6)
            if not present[0, q, v]:
                continue
            others = [u for u in range(3) if u != v and present[0, q, u]]
            same = sum(float((posterior[0, q, v] * posterior[0, q, u]).sum()) for u in others) / len(others) if others else 0.5
            assert float(got_agreement[0, q, v]) == pytest.approx(same, abs=1e-6)


def clips(model: amd_fast.AFMIR, episodes: int, count: int, size: int = 32, frames: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    shape = (episodes, count, frames)
    return {name: torch.randn(*shape, channels, size, size, generator=generator) for name, channels in model.channels.items()}


@pytest.mark.parametrize("modalities", [("rgb",), ("rgb", "flow"), ("rgb", "flow", "thermal")])
def test_forward_of_any_number_of_modalities(modalities: tuple[str, ...]) -> None:
    model = amd_fast.create_model("afmir_small", modalities=modalities, dim=32)
    assert model.views == view_names(modalities)
    support_labels, query_labels = torch.arange(3).expand(2, 3), torch.tensor([0, 1, 2, 1]).expand(2, 4)
    output = model(clips(model, 2, 3), support_labels, clips(model, 2, 4), query_labels)
    assert output.log_probs.shape == (2, 4, 3)
    assert output.view_log_probs.shape == (2, 4, len(model.views), 3)
    torch.testing.assert_close(output.log_probs.exp().sum(-1), torch.ones(2, 4))
    torch.testing.assert_close(output.beliefs.policy.sum(-1), torch.ones(2, 4), check_dtype=False)
    assert output.loss is not None
    output.loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not unused
    assert model(clips(model, 2, 3), support_labels, clips(model, 2, 4)).loss is None


def test_one_episode_without_the_episode_axis_is_the_same() -> None:
    model = amd_fast.create_model("afmir_small", dim=32).eval()
    support, query, labels = clips(model, 1, 3), clips(model, 1, 4), torch.arange(3)
    whole = model(support, labels[None], query, labels[None, [0, 1, 2, 1]])
    single = model({k: v[0] for k, v in support.items()}, labels, {k: v[0] for k, v in query.items()}, labels[[0, 1, 2, 1]])
    torch.testing.assert_close(single.log_probs, whole.log_probs[0])
    torch.testing.assert_close(single.beliefs.policy, whole.beliefs.policy[0])
    torch.testing.assert_close(single.loss, whole.loss)
    assert single.terms is not None and single.terms.total.shape == (4,)


def test_a_modality_missing_from_single_clips() -> None:
    model = amd_fast.create_model("afmir_small", dim=32).eval()
    support, query, labels = clips(model, 1, 3), clips(model, 1, 2), torch.arange(3)[None]
    query_present = torch.tensor([[[True, False], [True, True]]])
    with torch.no_grad():
        output = model(support, labels, query, query_present=query_present)
        query["flow"][0, 0] = 1e3
        again = model(support, labels, query, query_present=query_present)
        alone = model({"rgb": support["rgb"]}, labels, {"rgb": query["rgb"]})
    torch.testing.assert_close(again.log_probs, output.log_probs, rtol=0, atol=0)
    assert output.beliefs.policy[0, 0, 1] == 0 and (output.beliefs.policy[0, 1] > 0).all()
    assert (alone.beliefs.policy[..., 1] == 0).all()
    torch.testing.assert_close(alone.view_log_probs[..., 0, :], output.view_log_probs[..., 0, :])


@pytest.mark.parametrize("missing", [False, True])
def test_encoding_copies_nothing_to_the_device(missing: bool) -> None:
    """On a GPU such a copy makes the host wait, and a CUDA graph cannot be captured."""
    model = amd_fast.create_model("afmir_small", dim=32).eval()
    batch = {name: clip[0] for name, clip in clips(model, 1, 2).items() if not missing or name == "rgb"}
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        _, log_weight = model.encode(batch)
    assert "aten.stack.default" in seen and not [name for name in seen if "lift_fresh" in name or "_to_copy" in name]
    expected = torch.zeros(log_weight.shape)
    expected[:, 1] = -INF if missing else 0.0
    assert torch.equal(log_weight, expected)


def test_a_model_saved_in_a_state_dict_keeps_what_its_agent_learned() -> None:
    model = amd_fast.create_model("afmir_small", dim=32)
    agent = model.generative_model
    agent.learn(agent.observe(torch.rand(50, 3, 2)), torch.rand(50, 3) > 0.5)
    other = amd_fast.create_model("afmir_small", dim=32)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.generative_model.likelihood, agent.likelihood)
    assert isinstance(other.generative_model, GenerativeModel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "afmir_smal"}, "did you mean 'afmir_small'"),
        ({"name": "afmir_small", "modalities": ("rgb", "rgb")}, "different names"),
        ({"name": "afmir_small", "matcher": "nearest"}, "unknown matcher"),
        ({"name": "afmir_small", "backbone": "resnet1"}, "unknown backbone"),
        ({"name": "afmir_small", "dim": 30}, "multiple of heads"),
        ({"name": "afmir_small", "evidence": ("surprise",)}, "certainty"),
        ({"name": "afmir_small", "evidence": ("certainty", "mood")}, "mood"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        amd_fast.create_model(**arguments)  # type: ignore[arg-type]


def test_wrong_clips_are_named() -> None:
    model = amd_fast.create_model("afmir_small", dim=32)
    good = clips(model, 1, 2)
    with pytest.raises(DataError, match="depth"):
        model.encode({"depth": good["rgb"][0]})
    with pytest.raises(DataError, match=r"\[B, T, 3, height, width\]"):
        model.encode({"rgb": good["rgb"]})
    with pytest.raises(DataError, match="another modality"):
        model.encode({"rgb": good["rgb"][0], "flow": good["flow"][0, :1]})
    with pytest.raises(DataError, match="give both the same"):
        model(good, torch.arange(2)[None], {"rgb": good["rgb"]})


def test_list_models_and_none_overrides() -> None:
    assert "afmir_small" in amd_fast.list_models() and amd_fast.list_models("*resnet50") == ["afmir_resnet50"]
    assert amd_fast.create_model("afmir_small", dim=None).dim == 128


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_first_convolution_answers_alike_to_equal_channels(channels: int) -> None:
    weight = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    image = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    adapted = adapt_first_convolution(weight, channels)
    expected = torch.nn.functional.conv2d(image.repeat(1, 3, 1, 1), weight)
    torch.testing.assert_close(torch.nn.functional.conv2d(image.repeat(1, channels, 1, 1), adapted), expected)


def test_resnet_takes_the_modalitys_channels_and_says_its_width() -> None:
    network = create_backbone("resnet18", 2)
    assert network(torch.randn(1, 2, 64, 64)).shape == (1, network.width) == (1, 512)


def test_pretrained_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(WeightsError, match=r"pretrained=False"):
        create_backbone("resnet18", 3, pretrained=True)
    with pytest.raises(WeightsError, match="no published weights"):
        amd_fast.create_model("afmir_small", pretrained=True)


def test_the_whole_encoder_reads_frames_as_a_set() -> None:
    model = amd_fast.create_model("afmir_small", dim=32).eval()
    clip = {name: value[0] for name, value in clips(model, 1, 3, frames=6).items()}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        before = model.describe(*model.encode(clip))
        after = model.describe(*model.encode({name: value[:, order] for name, value in clip.items()}))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_deviation_is_the_distance_from_the_clips_mean() -> None:
    features = torch.randn(2, 5, 3)
    both = with_deviation(features)
    for b in range(2):
        for t in range(5):
            for d in range(3):
                assert float(both[b, t, d]) == float(features[b, t, d])
                assert float(both[b, t, 3 + d]) == pytest.approx(
                    abs(float(features[b, t, d]) - sum(features[b, :, d].tolist()) / 5), abs=1e-6
                )
    assert (with_deviation(features[:, :1])[..., 3:] == 0).all()
