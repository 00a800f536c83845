"""Scores from a bank equal the clips matched episode by episode, whatever the chunk, the plan, the names or the order of classes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import amd_fast
from amd_fast.evaluation import scoring
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol import Condition, Features, draw, evaluate_condition, score
from amd_fast.models.matchers import Match

MATCHERS = amd_fast.list_matchers()


def bank(classes: int = 6, clips: int = 10, dim: int = 32, groups: np.ndarray | None = None, seed: int = 0) -> FeatureBank:
    """Clips around a centre of their class; some lack a modality, some single frames."""
    generator = torch.Generator().manual_seed(seed)
    number = classes * clips
    tokens = torch.randn(classes, 2, 1, dim, generator=generator).repeat_interleave(clips, 0)
    tokens = tokens + 2 * torch.randn(number, 2, 5, dim, generator=generator)
    weight = np.zeros((number, 2, 5), dtype=np.float32)
    weight[3, 0] = weight[25, 1] = weight[7, 1, 3:] = -np.inf
    group = np.arange(number) if groups is None else groups
    label = np.repeat([f"class {i:02d}" for i in range(classes)], clips)
    table = pd.DataFrame({"path": [f"{i}.mp4" for i in range(number)], "label": label, "group": group.astype(str)})
    return FeatureBank(tokens.numpy(), weight, table, {"clips_lost": 0})


def model_of(name: str) -> amd_fast.AFMIR:
    torch.manual_seed(0)
    return amd_fast.create_model("afmir_small", dim=32, matcher=name).eval()


def episodes_of(clips: FeatureBank, episodes: int, shots: int) -> tuple[Tensor, Tensor]:
    drawn = draw(clips, Condition(ways=4, shots=shots, queries=2, episodes=episodes, seed=3))
    return torch.from_numpy(drawn.support), torch.from_numpy(drawn.query)


def joined(parts: object) -> Match:
    return Match(*(torch.cat(field) for field in zip(*parts, strict=True)))  # type: ignore[call-overload]


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("shots", [1, 3])
def test_a_thousand_at_once_equal_one_by_one(name: str, shots: int) -> None:
    clips, model = bank(), model_of(name)
    features = Features.of(model, clips)
    support, query = episodes_of(clips, 60, shots)
    match = joined(scoring.matches(model.matcher, features.clips, support, query, 4))
    raw = model.read(torch.from_numpy(clips.tokens), torch.from_numpy(clips.log_weight))
    for number in range(len(support)):
        with torch.no_grad():
            alone = model.match_clips(raw.take(support[number : number + 1]), raw.take(query[number : number + 1]), ways=4)
        there = alone.present[0]
        assert torch.equal(match.present[number], there)
        for mine, theirs in ((match.logits[number], alone.logits[0]), (match.distance[number], alone.distance[0])):
            torch.testing.assert_close(mine[there], theirs[there], rtol=1e-5, atol=1e-5)
        seen = there.any(0)  # a view that a whole class lacks has no spread
        torch.testing.assert_close(match.spread[number][seen], alone.spread[0][seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MATCHERS)
def test_chunks_change_no_number(name: str) -> None:
    clips, model = bank(), model_of(name)
    features = Features.of(model, clips)
    drawn = draw(clips, Condition(ways=4, shots=2, queries=2, episodes=503, seed=3))
    results = {}
    for chunk in (1, 7, 500, len(drawn.support)):
        parts = [part.output for part in score(model, features, drawn, 4, chunk=chunk)]
        results[chunk] = torch.cat([part.log_probs for part in parts]), torch.cat([part.beliefs.policy for part in parts])
    for chunk in (1, 7, 500):
        for mine, theirs in zip(results[chunk], results[len(drawn.support)], strict=True):
            if name in ("prototype", "cosine"):
                assert torch.equal(mine, theirs)
            else:  # blocks of another size are summed in another order
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prototype", "cosine"])
def test_products_looked_up_and_gathered_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, model = bank(), model_of(name)
    features = Features.of(model, clips)
    support, query = episodes_of(clips, 40, 2)
    planned = scoring.plan(model.matcher, features.clips, 40, 8, 8, 4)
    found = []
    possible = frozenset(key for key, product in model.matcher.products.items() if product.pairs == "all")
    for looked_up in (frozenset(), possible):
        forced = planned._replace(looked_up=looked_up, chunk=11, gathered=3)
        monkeypatch.setattr(scoring, "plan", lambda *_, forced=forced, **__: forced)
        found.append(joined(scoring.matches(model.matcher, features.clips, support, query, 4)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_plan_follows_its_cost_model_and_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clips = model_of("prototype"), bank()
    wide = Features.of(model, clips).clips
    few = scoring.plan(model.matcher, wide, 10, 4, 8, 4)
    many = scoring.plan(model.matcher, wide, 10**6, 4, 8, 4)
    assert not few.looked_up or few.looked_up <= many.looked_up
    rows = wide.rows["descriptor"].expand(-1, -1, -1, 32).repeat(1, 1, 1, 64)  # D = 2048
    large = wide._replace(rows={"descriptor": rows})
    assert not scoring.plan(model.matcher, large, 10, 4, 8, 4).looked_up  # 60^2 products for ten episodes do not pay
    assert scoring.plan(model.matcher, large, 10**5, 20, 4, 4).looked_up == {"gram"}
    assert not scoring.plan(model.matcher, large, 10**5, 20, 4, 4, distinct=10**6).looked_up
    free = 1 << 20
    monkeypatch.setattr(scoring, "free_memory", lambda _: free)
    small = scoring.plan(model.matcher, large, 10**5, 20, 4, 4)
    products = 3 * 24 * 24
    assert small.chunk == free // 4 // (4 * products * model.matcher.workspace)
    assert small.gathered <= small.chunk
    assert not scoring.plan(model.matcher, large, 10**5, 20, 4, 4, distinct=200).looked_up  # 3 x 200^2 products exceed a quarter


@pytest.mark.parametrize("name", MATCHERS)
def test_names_and_numbers_of_classes_change_no_number(name: str) -> None:
    clips, model = bank(), model_of(name)
    condition = Condition(ways=4, shots=2, queries=1, episodes=30)
    renamed = FeatureBank(
        clips.tokens, clips.log_weight, clips.table.assign(label=[f"{99 - int(text[-2:])} {text}" for text in clips.labels]), clips.meta
    )
    first, second = (evaluate_condition(model, Features.of(model, which), condition) for which in (clips, renamed))
    assert np.array_equal(first.query_id, second.query_id)
    for method in first.log_probs:
        assert np.array_equal(first.log_probs[method], second.log_probs[method])
    # the classes of every episode in another order: the same posterior, in that order
    support, query = episodes_of(clips, 30, 2)
    order = torch.tensor([2, 0, 3, 1])
    features = Features.of(model, clips)
    match = joined(scoring.matches(model.matcher, features.clips, support, query, 4))
    turned = joined(scoring.matches(model.matcher, features.clips, support.unflatten(1, (4, 2))[:, order].flatten(1), query, 4))
    torch.testing.assert_close(turned.logits, match.logits[..., order], rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 1000), shots=st.integers(1, 2), queries=st.integers(1, 2), recordings=st.integers(6, 20))
@settings(max_examples=15)
def test_queries_share_neither_clip_nor_recording_with_their_support(seed: int, shots: int, queries: int, recordings: int) -> None:
    generator = np.random.default_rng(seed)
    groups = np.concatenate([generator.permutation(np.arange(10) % recordings) + 100 * c for c in range(6)])
    clips, model = bank(groups=groups, seed=seed), model_of("prototype")
    scores = evaluate_condition(model, Features.of(model, clips), Condition(3, shots, queries, 20, seed))
    assert scores.support_id is not None
    for support, query in zip(scores.support_id, scores.query_id, strict=True):
        assert not set(support) & set(query)
        assert not set(groups[support]) & set(groups[query])
