"""The planning page: its arithmetic by hand, its tables as the script prints them, every input with a source."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from amd_fast.models.backbones import create_backbone
from benchmarks.planning import SOURCES, Inputs, clips_per_second, exchange_seconds, need, sparse, tables


def test_the_page_shows_what_the_script_prints(repository: Path) -> None:
    page = (repository / "docs" / "planning.md").read_text(encoding="utf-8")
    assert all(table in page for table in tables())
    assert "Nothing on this page is measured" in page


def test_every_input_has_a_source() -> None:
    assert list(SOURCES) == [field.name for field in fields(Inputs)]


def test_the_model_of_a_clip_is_the_real_one() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        backbone = create_backbone("resnet50", 3)
        with FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, 224, 224))
    # torchvision counts the classifier too, and rounds.
    assert counter.get_total_flops() / 2e9 == pytest.approx(Inputs.gigamacs_per_image, rel=0.01)
    assert 2 * sum(value.numel() for value in backbone.parameters()) / 1e6 == pytest.approx(Inputs.million_parameters, rel=0.01)


def test_round_numbers_by_hand() -> None:
    inputs = Inputs(
        gpus_per_node=8,
        peak_tflops=600.0,
        decoders_per_gpu=5,
        pcie_gigabytes=50.0,
        nvlink_gigabytes=400.0,
        network_gigabits_per_node=3200.0,
        gigamacs_per_image=1.0,
        images_per_clip=10,
        million_parameters=100.0,
        frames_per_clip=100.0,
        megabytes_per_clip=2.0,
        clips_per_step=20,
    )
    assert clips_per_second(inputs, 0.1) == pytest.approx(1000)  # 60 TFLOP/s / 60 GFLOP
    found = need(inputs, 8, 0.1)
    assert found.clips == pytest.approx(8000)
    assert found.decoder_frames == pytest.approx(1000 * 100 / 5)
    assert found.storage == pytest.approx(16.0)
    assert found.pcie == pytest.approx(2 / 50)
    assert exchange_seconds(inputs, 8) == pytest.approx(2 * 7 / 8 * 0.4 / 400)
    assert found.exchange == pytest.approx(exchange_seconds(inputs, 8) / 0.02)
    assert exchange_seconds(inputs, 16) == pytest.approx(2 * 15 / 16 * 0.4 / 50)  # 3200 Gbit/s for 8 GPUs: 50 GB/s each


def test_more_gpus_need_the_same_of_each_decoder_and_sparse_decoding_needs_less() -> None:
    inputs = Inputs()
    assert need(inputs, 64, 0.3).decoder_frames == pytest.approx(need(inputs, 8, 0.3).decoder_frames)
    assert need(inputs, 64, 0.3).clips == pytest.approx(8 * need(inputs, 8, 0.3).clips)
    assert need(sparse(inputs), 8, 0.3).decoder_frames / need(inputs, 8, 0.3).decoder_frames == pytest.approx(52 / 250)
    assert exchange_seconds(inputs, 1) == 0
    assert need(replace(inputs, clips_per_step=40), 8, 0.3).exchange == pytest.approx(need(inputs, 8, 0.3).exchange / 2)
