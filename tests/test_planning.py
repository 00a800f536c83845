"""The planning page: its arithmetic by hand, its tables as the script prints them, every input with a source."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from amd_fast.models.backbones import create_backbone
from benchmarks.planning import SOURCES, Inputs, clips_per_second, exchange_seconds, frames_per_second, need, sparse, tables


def test_the_page_shows_what_the_script_prints(repository: Path) -> None:
    page = (repository / "docs" / "planning.md").read_text(encoding="utf-8")
    assert all(table in page for table in tables())
    assert "Nothing on this page is measured" in page


def test_the_page_names_the_first_bottlenecks_that_the_script_finds(repository: Path) -> None:
    page = (repository / "docs" / "planning.md").read_text(encoding="utf-8").split("## The first bottleneck")[1]
    few, many = need(Inputs(), 8), need(Inputs(), 64)
    assert few.first() == "none; next NVDEC" and f"**8 GPUs: NVDEC**, {few.decoders:.0%} full" in page
    assert many.first() == "object store" and f"**64 GPUs: the object store**, {many.store:.0%} full" in page


def test_every_input_has_a_source_with_an_address_or_says_that_it_is_assumed_or_ours() -> None:
    assert list(SOURCES) == [field.name for field in fields(Inputs)]
    ours = {"gpus_per_node", "pcie_gigabytes", "images_per_clip", "million_parameters", "gigamacs_per_image", "clips_per_step"}
    for name in SOURCES.keys() - ours:
        assert "https://" in SOURCES[name] or "assumed" in SOURCES[name] or "NVIDIA's page" in SOURCES[name], name


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
        share_of_peak=0.1,
        decoders_per_gpu=5,
        decoder_megapixels=4000.0,
        pcie_gigabytes=50.0,
        exchange_gigabytes_one_node=400.0,
        exchange_gigabytes_more_nodes=50.0,
        disk_gigabytes_per_node=32.0,
        store_requests=10_000.0,
        gigamacs_per_image=1.0,
        images_per_clip=10,
        million_parameters=100.0,
        frames_per_clip=100.0,
        megapixels_per_frame=0.1,
        megabytes_per_clip=2.0,
        clips_per_step=20,
    )
    assert clips_per_second(inputs) == pytest.approx(1000)  # 60 TFLOP/s / 60 GFLOP
    assert frames_per_second(inputs) == pytest.approx(1000 * 100 / 5)
    found = need(inputs, 8)
    assert found.clips == pytest.approx(8000)
    assert found.decoders == pytest.approx(20_000 * 0.1 / 4000)
    assert found.disks == pytest.approx(16 / 32)
    assert found.store == pytest.approx(8000 / 10_000)
    assert found.pcie == pytest.approx(2 / 50)
    assert exchange_seconds(inputs, 8) == pytest.approx(2 * 7 / 8 * 0.4 / 400)
    assert found.exchange == pytest.approx(exchange_seconds(inputs, 8) / 0.02)
    assert exchange_seconds(inputs, 16) == pytest.approx(2 * 15 / 16 * 0.4 / 50)
    assert found.first() == "none; next object store"
    assert need(inputs, 16).first() == "object store"


def test_more_gpus_need_the_same_of_each_decoder_and_sparse_decoding_needs_less() -> None:
    inputs = Inputs()
    assert need(inputs, 64).decoders == pytest.approx(need(inputs, 8).decoders)
    assert need(inputs, 64).clips == pytest.approx(8 * need(inputs, 8).clips)
    assert need(sparse(inputs), 8).decoders / need(inputs, 8).decoders == pytest.approx(52 / 250)
    assert exchange_seconds(inputs, 1) == 0
    assert need(replace(inputs, clips_per_step=40), 8).exchange == pytest.approx(need(inputs, 8).exchange / 2)
