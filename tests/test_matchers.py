"""Every matcher against plain float64 loops written from its paper; what is missing has no influence; orders change nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import amd_fast
from amd_fast.errors import ConfigError, DataError
from amd_fast.models.matchers import Clips, Match, Matcher, create_matcher
from amd_fast.models.matchers.base import membership
from amd_fast.models.matchers.products import inner_products
from amd_fast.models.matchers.tuples import positions
from amd_fast.models.registry import create_model
from amd_fast.training.preparation import start_from

INF = math.inf
WAYS, SHOTS, QUERIES, FRAMES, DIM = 3, 2, 2, 5, 12
MODALITIES = 2
TOKENS = ("bi_mhm", "otam", "trx", "trx triples")
ALL = ("prototype", "cosine", *TOKENS)


def make(name: str, modalities: int = MODALITIES, dim: int = DIM) -> Matcher:
    torch.manual_seed(5)
    options = {"tuple_size": 3} if name == "trx triples" else {}
    matcher = create_matcher(name.split()[0], modalities + (modalities > 1), dim, modalities, **options)
    with torch.no_grad():
        matcher.log_temperature += 0.1 * torch.arange(matcher.num_views)
        for parameter in ("norm_weight", "norm_bias"):
            if hasattr(matcher, parameter):
                getattr(matcher, parameter).add_(0.3 * torch.randn_like(getattr(matcher, parameter)))
    return matcher


def tokens_of(episodes: int, clips: int, modalities: int = MODALITIES, seed: int = 0) -> Tensor:
    return torch.randn(episodes * clips, modalities, FRAMES, DIM, generator=torch.Generator().manual_seed(seed))


def read(matcher: Matcher, tokens: Tensor, log_weight: Tensor, descriptors: Tensor | None = None) -> Clips:
    """Clips with descriptors of their own and the views that the log-weights leave."""
    own = torch.isfinite(log_weight).any(-1)
    present = torch.cat([own, own.any(-1, keepdim=True)], -1) if matcher.num_views > own.shape[1] else own
    if descriptors is None:
        descriptors = torch.randn(len(tokens), matcher.num_views, DIM, generator=torch.Generator().manual_seed(9))
    return matcher.clips(tokens, log_weight, descriptors, present)


def scored(name: str, tokens: Tensor, log_weight: Tensor, shots: int = SHOTS, labels: Tensor | None = None) -> tuple[Matcher, Match]:
    matcher = make(name, tokens.shape[1])
    support, query = read(matcher, tokens, log_weight).split(len(tokens) // (WAYS * shots + QUERIES), WAYS * shots)
    with torch.no_grad():
        return matcher, matcher.match(support, query, labels, WAYS)


# ---- the papers, one pair of clips at a time; a clip is {modality: [frames there, D]} float64


def frame_distances(query: dict[int, Tensor], support: dict[int, Tensor]) -> list[list[float]]:
    """1 - cos between frames; over several modalities, of the frames' concatenation, each modality of unit length."""
    common = sorted(query.keys() & support.keys())
    cosine = [unit(query[m]) @ unit(support[m]).T for m in common]
    return (1 - torch.stack(cosine).mean(0)).tolist()


def bi_mhm(query: dict[int, Tensor], support: dict[int, Tensor]) -> float:
    """Wang et al. 2022, equation 5: mean over the frames of either clip of the distance to the nearest frame of the other."""
    distances = frame_distances(query, support)
    forward = sum(min(row) for row in distances) / len(distances)
    columns = list(zip(*distances, strict=True))
    return forward + sum(min(column) for column in columns) / len(columns)


def otam_cost(distances: list[list[float]], smoothing: float = 0.1) -> float:
    """Cao et al. 2020, equations 4 to 6."""
    padded = [[0.0, *row, 0.0] for row in distances]
    last = len(padded[0]) - 1
    gamma = [[0.0] * (last + 1) for _ in padded]
    for row, column in itertools.product(range(len(padded)), range(1, last + 1)):
        before = [gamma[row][column - 1]]
        before += [gamma[row - 1][column - 1]] if row else []
        before += [gamma[row - 1][column]] if row and column in (1, last) else []
        gamma[row][column] = padded[row][column] - smoothing * math.log(sum(math.exp(-value / smoothing) for value in before))
    return gamma[-1][-1]


def otam(query: dict[int, Tensor], support: dict[int, Tensor]) -> float:
    """Both directions, per frame, from the cost at zero distances."""
    distances = frame_distances(query, support)
    total = 0.0
    for matrix in (distances, [list(column) for column in zip(*distances, strict=True)]):
        nothing = [[0.0] * len(matrix[0]) for _ in matrix]
        total += (otam_cost(matrix) - otam_cost(nothing)) / len(matrix[0]) / 2
    return total


def trx(matcher: Matcher, query: dict[int, Tensor], support: list[dict[int, Tensor]]) -> float:
    """Perrett et al. 2021, equations 2 to 6: keys and values of concatenated frames, a prototype for every query tuple."""
    size = matcher.tuple_size
    width = matcher.width

    def tuples(clip: dict[int, Tensor]) -> dict[int, tuple[list[Tensor], list[Tensor]]]:
        found = {}
        for m, frames in clip.items():
            key_map = torch.cat(list(matcher.key[m].double()), 1)  # [width, size * D], as of a linear layer on the concatenation
            value_map = torch.cat(list(matcher.value[m].double()), 1)
            keys, values = [], []
            for chosen in itertools.combinations(range(len(frames)), size):
                joined = torch.cat([frames[t] + positions(FRAMES, DIM)[t].double() for t in chosen])
                key = key_map @ joined + matcher.key_bias[m].double()
                key = torch.nn.functional.layer_norm(key, (width,), matcher.norm_weight[m].double(), matcher.norm_bias[m].double())
                keys.append(key)
                values.append(value_map @ joined)
            found[m] = keys, values
        return found

    asked, seen = tuples(query), [tuples(clip) for clip in support]
    common = [m for m in query if all(m in clip for clip in support)]
    number = len(asked[common[0]][0])
    distances = []
    for p in range(number):
        scores = []
        for clip in seen:
            products = [sum(float(asked[m][0][p] @ clip[m][0][j]) for m in common) for j in range(number)]
            scores += [product / len(common) / math.sqrt(width) for product in products]
        weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
        for m in common:
            values = torch.stack([value for clip in seen for value in clip[m][1]])
            distances.append(float((asked[m][1][p] - weights @ values).square().sum()))
    return sum(distances) / len(distances)


def clip_of(tokens: Tensor, log_weight: Tensor, modalities: tuple[int, ...]) -> dict[int, Tensor]:
    there = torch.isfinite(log_weight)
    return {m: tokens[m][there[m]].double() for m in modalities if there[m].any()}


def expected(name: str, matcher: Matcher, clips: list[dict[int, Tensor]], query: dict[int, Tensor]) -> float:
    if name.startswith("trx"):
        with torch.no_grad():
            return trx(matcher, query, clips)
    if name == "otam":
        return sum(otam(query, clip) for clip in clips) / len(clips)
    return bi_mhm(query, {m: mean_frames([unit(clip[m]) for clip in clips]) for m in clips[0]})


def unit(frames: Tensor) -> Tensor:
    return frames / frames.norm(dim=1, keepdim=True)


def mean_frames(clips: list[Tensor]) -> Tensor:
    """Frame by frame over the clips that have it; only last frames may be missing."""
    return torch.stack([torch.stack([clip[t] for clip in clips if t < len(clip)]).mean(0) for t in range(max(map(len, clips)))])


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("modalities", [1, 2])
def test_distances_equal_the_paper_clip_by_clip(name: str, modalities: int) -> None:
    episodes, support = 2, WAYS * SHOTS
    tokens = tokens_of(episodes, support + QUERIES, modalities)
    log_weight = torch.zeros(tokens.shape[:3])
    matcher, match = scored(name, tokens, log_weight)
    views = [(m,) for m in range(modalities)] + ([(0, 1)] if modalities > 1 else [])
    for e, q, (v, view), c in itertools.product(range(episodes), range(QUERIES), enumerate(views), range(WAYS)):
        first = e * (support + QUERIES)
        clips = [clip_of(tokens[i], log_weight[i], view) for i in range(first, first + support + QUERIES)]
        want = expected(name, matcher, clips[c * SHOTS : (c + 1) * SHOTS], clips[support + q])
        assert match.logits[e, q, v, c].item() == pytest.approx(-want / matcher.log_temperature[v].exp().item(), rel=2e-5, abs=2e-6)
        reported = math.sqrt(want) if name.startswith("trx") else want
        assert match.distance[e, q, v, c].item() == pytest.approx(reported, rel=2e-5, abs=2e-6)
    assert match.present.all() and (match.spread > 0).all()


def test_otams_posterior_is_the_published_one_at_another_temperature() -> None:
    tokens = tokens_of(1, WAYS + QUERIES, 1)
    matcher, match = scored("otam", tokens, torch.zeros(tokens.shape[:3]), shots=1)
    for q in range(QUERIES):
        clips = [clip_of(clip, torch.zeros(1, FRAMES), (0,)) for clip in tokens]
        costs = []
        for c in range(WAYS):
            distances = frame_distances(clips[WAYS + q], clips[c])
            costs.append((otam_cost(distances) + otam_cost([list(column) for column in zip(*distances, strict=True)])) / 2)
        scale = 1 / (FRAMES * matcher.log_temperature[0].exp().item())
        torch.testing.assert_close(match.logits[0, q, 0].softmax(-1), torch.softmax(-scale * torch.tensor(costs), -1))


@pytest.mark.parametrize("name", TOKENS)
def test_missing_frames_and_modalities_might_as_well_not_be_there(name: str) -> None:
    """Whole modalities and single frames missing: the plain loop never sees them; spoilt, they change nothing at all."""
    support = WAYS * SHOTS
    tokens = tokens_of(1, support + QUERIES, seed=3)
    log_weight = torch.zeros(tokens.shape[:3])
    log_weight[:SHOTS, 1] = -INF  # class 0 has no second modality
    log_weight[3, 0, 4] = -INF  # the last frame of a support clip: the paper's positions stay those of the others
    log_weight[support, 0, 3:] = -INF
    log_weight[support + 1, 0] = -INF  # the second query has the second modality alone
    matcher, match = scored(name, tokens, log_weight)
    spoilt = torch.where(torch.isfinite(log_weight)[..., None], tokens, 1e3)
    for mine, theirs in zip(scored(name, spoilt, log_weight)[1], match, strict=True):
        assert torch.equal(mine, theirs)
    assert match.present.tolist() == [[[True, False, True], [False, False, False]]]
    assert all(torch.isfinite(value).all() for value in match[:3])
    clips = [clip_of(tokens[i], log_weight[i], (0,)) for i in range(support + 1)]
    if name.startswith("trx"):
        return  # tuples of clips with unlike frames: the loop above pairs them by number
    for c in range(WAYS):
        want = expected(name, matcher, clips[c * SHOTS : (c + 1) * SHOTS], clips[support])
        assert match.distance[0, 0, 0, c].item() == pytest.approx(want, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_orders_of_clips_classes_and_queries_change_no_number(name: str) -> None:
    episodes, support = 2, WAYS * SHOTS
    tokens = tokens_of(episodes, support + QUERIES)
    log_weight = torch.zeros(tokens.shape[:3])
    log_weight[1, 0] = log_weight[support + 3, 1] = -INF
    matcher = make(name)
    seen, asked = read(matcher, tokens, log_weight).split(episodes, support)
    labels = torch.arange(WAYS).repeat_interleave(SHOTS).expand(episodes, -1)
    with torch.no_grad():
        want = matcher.match(seen, asked, None, WAYS)
        order = torch.tensor([5, 0, 3, 1, 4, 2])
        each = torch.arange(len(tokens)).view(episodes, -1)
        shuffled = read(matcher, tokens, log_weight).take(each[:, :support][:, order])
        got = matcher.match(shuffled, asked, labels[:, order], WAYS)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        renamed = matcher.match(seen, asked, (labels + 1) % WAYS, WAYS)
        torch.testing.assert_close(renamed.logits.roll(-1, -1), want.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(renamed.spread, want.spread, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_classes_of_unlike_size_are_means_over_their_own_clips(name: str) -> None:
    tokens = tokens_of(1, 6 + QUERIES)
    log_weight = torch.zeros(tokens.shape[:3])
    matcher = make(name)
    clips = read(matcher, tokens, log_weight)
    seen, asked = clips.split(1, 6)
    with torch.no_grad():
        match = matcher.match(seen, asked, torch.tensor([[2, 0, 1, 2, 2, 1]]), WAYS)
        for c, members in enumerate(([1], [2, 5], [0, 3, 4])):
            alone = matcher.match(clips.take(torch.tensor([members])), asked, torch.zeros(1, len(members), dtype=torch.int64), 1)
            torch.testing.assert_close(match.logits[..., c], alone.logits[..., 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_tokens_and_parameters_and_stop_at_missing_frames(name: str) -> None:
    model = create_model("afmir_small", dim=32, matcher=name.split()[0])
    tokens = torch.randn(2 * (WAYS + QUERIES), 2, FRAMES, 32, requires_grad=True)
    log_weight = torch.zeros(tokens.shape[:3])
    log_weight[1, 0] = log_weight[6, 1, 2] = -INF
    seen, asked = model.read(tokens, log_weight).split(2, WAYS)
    output = model.judge(model.match_clips(seen, asked, ways=WAYS), torch.zeros(2, QUERIES, dtype=torch.int64))
    assert output.loss is not None
    output.loss.backward()
    assert tokens.grad is not None and torch.isfinite(tokens.grad).all() and (tokens.grad[0] != 0).any()
    assert (tokens.grad[~torch.isfinite(log_weight)] == 0).all()
    for label, parameter in model.matcher.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), label
        assert (parameter.grad != 0).any(), label


@pytest.mark.parametrize("name", TOKENS)
def test_the_order_of_frames_counts_where_it_should(name: str) -> None:
    tokens = tokens_of(1, WAYS * SHOTS + QUERIES)
    backwards = tokens.clone()
    backwards[-QUERIES:] = backwards[-QUERIES:].flip(2)
    nothing = torch.zeros(tokens.shape[:3])
    same = torch.allclose(scored(name, tokens, nothing)[1].logits, scored(name, backwards, nothing)[1].logits, atol=1e-5)
    assert same == (name == "bi_mhm")


@pytest.mark.parametrize("name", ALL)
def test_a_query_does_not_depend_on_the_other_queries_or_episodes(name: str) -> None:
    tokens = tokens_of(2, WAYS * SHOTS + QUERIES)
    nothing = torch.zeros(tokens.shape[:3])
    matcher = make(name)
    seen, asked = read(matcher, tokens, nothing).split(2, WAYS * SHOTS)
    clips = read(matcher, tokens, nothing)
    with torch.no_grad():
        both = matcher.match(seen, asked, None, WAYS)
        first = torch.arange(WAYS * SHOTS)[None] + WAYS * SHOTS + QUERIES
        alone = matcher.match(clips.take(first), clips.take(torch.tensor([[2 * (WAYS * SHOTS + QUERIES) - 1]])), None, WAYS)
    for mine, theirs in zip(alone, both, strict=True):
        torch.testing.assert_close(mine[0, -1] if mine.dim() > 2 else mine[0], theirs[1, -1] if mine.dim() > 2 else theirs[1])


def test_the_model_takes_every_matcher_by_name_and_trains_one_step() -> None:
    assert amd_fast.list_matchers() == ["bi_mhm", "cosine", "otam", "prototype", "trx"]
    for name in amd_fast.list_matchers():
        model = amd_fast.create_model("afmir_small", modalities=("rgb", "thermal"), dim=16, matcher=name)
        clips = {"rgb": torch.rand(WAYS, 3, 3, 24, 24), "thermal": torch.rand(WAYS, 3, 1, 24, 24)}
        output = model(clips, torch.arange(WAYS), clips, torch.arange(WAYS))
        assert output.log_probs.shape == (WAYS, WAYS) and output.log_probs.argmax(-1).tolist() == [0, 1, 2]
        output.loss.backward()


def test_options_reach_the_matcher_and_mistakes_are_named() -> None:
    model = amd_fast.create_model("afmir_small", matcher="trx", matcher_options={"tuple_size": 3, "width": 20})
    assert model.matcher.key.shape[1:3] == (3, 20)
    with pytest.raises(ConfigError, match=r"does not take the options \['length'\]"):
        amd_fast.create_model("afmir_small", matcher="otam", matcher_options={"length": 3})
    with pytest.raises(ConfigError, match="tuple_size must be 2 or 3, got 4"):
        create_matcher("trx", 1, 8, tuple_size=4)
    with pytest.raises(ConfigError, match="unknown matcher 'dtw'; choose one of bi_mhm"):
        create_matcher("dtw", 1, 8)
    with pytest.raises(DataError, match="tuples of 2 frames need as many"):
        read(make("trx"), torch.randn(2, 2, 1, DIM), torch.zeros(2, 2, 1))
    descriptors, present = torch.randn(1, 3, 3, 128), torch.ones(1, 3, 3, dtype=torch.bool)
    with pytest.raises(ConfigError, match="matcher compares frames"):
        model.match(descriptors, torch.arange(3)[None], descriptors, present, present, ways=3)


@pytest.mark.parametrize("name", ["prototype", "cosine"])
def test_prototypes_from_products_of_a_settled_bank_equal_float64_however_far_the_origin(name: str) -> None:
    tokens = tokens_of(2, WAYS * SHOTS + QUERIES)
    log_weight = torch.zeros(tokens.shape[:3])
    log_weight[2, 1] = -INF
    matcher = make(name)
    descriptors = (100 if name == "prototype" else 1) + torch.randn(len(tokens), 3, DIM, generator=torch.Generator().manual_seed(1))
    clips = matcher.settle(read(matcher, tokens, log_weight, descriptors))
    seen, asked = clips.split(2, WAYS * SHOTS)
    with torch.no_grad():
        got = matcher.judge(
            inner_products(matcher.products, seen.rows, asked.rows, membership(None, seen.present, WAYS)), seen, asked, None, WAYS
        )
    unit = (lambda x: x / x.norm(dim=-1, keepdim=True)) if name == "cosine" else (lambda x: x)
    exact = unit(descriptors.double()).unflatten(0, (2, -1))
    there = clips.present.unflatten(0, (2, -1))
    for e, v in itertools.product(range(2), range(3)):
        members = [[i for i in range(c * SHOTS, (c + 1) * SHOTS) if there[e, i, v]] for c in range(WAYS)]
        means = torch.stack([unit(exact[e, chosen, v].mean(0)) for chosen in members])
        distance = torch.cdist(exact[e, WAYS * SHOTS :, v], means)
        torch.testing.assert_close(got.distance[e, :, v].double(), distance, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            got.logits[e, :, v].double(), -distance.square() / matcher.log_temperature[v].exp(), rtol=1e-5, atol=1e-5
        )
        spread = torch.cdist(means, means).sum() / (WAYS * (WAYS - 1))
        assert got.spread[e, v].item() == pytest.approx(spread.item(), rel=1e-5)


def test_another_matchers_temperatures_are_not_taken_over() -> None:
    trained = create_model("afmir_small", dim=16)
    with torch.no_grad():
        trained.matcher.log_temperature.fill_(7.0)
    same, other = create_model("afmir_small", dim=16), create_model("afmir_small", dim=16, matcher="bi_mhm")
    started = other.matcher.log_temperature.clone()
    for model in (same, other):
        start_from(model, trained, "trained")
    assert torch.equal(other.matcher.log_temperature, started) and (same.matcher.log_temperature == 7.0).all()
    for name, weight in trained.backbones.named_parameters():
        assert torch.equal(other.backbones.get_parameter(name), weight)
