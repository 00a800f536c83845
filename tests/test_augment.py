"""Augmentation: what it may change, and what it must leave."""

import numpy as np
import pytest
import torch

from amd_fast.data.augment import change_colour, draw_colour, draw_speed
from amd_fast.data.clips import ClipTransform, RawClip
from amd_fast.errors import ConfigError


def test_colour_is_one_affine_map_per_channel_for_the_whole_clip() -> None:
    frames = np.random.default_rng(0).normal(size=(4, 3, 6, 7)).astype(np.float32)
    before = frames.copy()
    seen = set()
    for seed in range(40):
        result = change_colour(frames, draw_colour(0.4, np.random.default_rng(seed)))
        grey = np.allclose(result[:, 0], result[:, 1])
        seen.add(grey)
        if grey:
            continue
        for channel in range(3):
            slope, shift = np.polyfit(frames[:, channel].ravel(), result[:, channel].ravel(), 1)
            np.testing.assert_allclose(result[:, channel], slope * frames[:, channel] + shift, atol=1e-4)
            assert np.exp(-0.6) <= slope <= np.exp(0.6)
    assert seen == {True, False}
    assert np.array_equal(frames, before)


def test_strength_zero_and_speed_one_change_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    rng = np.random.default_rng(5)  # not one of the clips that lose their colours
    np.testing.assert_allclose(change_colour(values, draw_colour(0.0, rng)), values, atol=1e-6)
    assert draw_speed(1.0, rng) == 1.0


def test_speed_is_one_factor_within_its_range() -> None:
    factors = [draw_speed(2.0, np.random.default_rng(seed)) for seed in range(200)]
    assert 0.5 <= min(factors) < 0.6 and 1.7 < max(factors) <= 2.0
    assert np.mean(np.log(factors)) == pytest.approx(0.0, abs=0.1)


def test_training_clips_are_jittered_alike_for_the_same_seed_and_test_clips_never() -> None:
    rng = np.random.default_rng(0)
    raw = RawClip(rgb=rng.integers(0, 255, (4, 40, 50, 3), dtype=np.uint8), flow=rng.normal(size=(4, 40, 50, 2)).astype(np.float16))
    plain, jittered = (ClipTransform(32, ("rgb", "flow"), train=True, **o) for o in ({}, {"colour": 0.3, "speed": 2.0}))
    first, again, other = (jittered(raw, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for name in ("rgb", "flow"):
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], plain(raw, np.random.default_rng(1))[name])
        tests = [ClipTransform(32, ("rgb", "flow"), train=False, **o)(raw)[name] for o in ({}, {"colour": 0.3, "speed": 2.0})]
        assert torch.equal(*tests)
    with pytest.raises(ConfigError, match="speed >= 1"):
        ClipTransform(32, ("rgb",), train=True, speed=0.5)
