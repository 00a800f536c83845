"""What 8 and 64 GPUs need to train on Kinetics-400, by arithmetic: which part of the machine would be full first.

``python -m benchmarks.planning`` prints the tables of docs/planning.md. Inputs are figures of data sheets and documents, or follow from
the model's shapes; nothing here is measured. What no document gives us (the share of its peak that a GPU reaches, the rates of
NVDEC and of storage) is not guessed: for some shares of the peak, the rates that are needed to keep up are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

SHARES_OF_PEAK = (0.1, 0.3, 1.0)
GPUS = (8, 64)


@dataclass(frozen=True)
class Inputs:
    """A machine and the work of a clip. Giga is 10^9, mega 10^6; rates are per second and in one direction."""

    gpus_per_node: int = 8
    peak_tflops: float = 989.0
    decoders_per_gpu: int = 7
    pcie_gigabytes: float = 64.0
    nvlink_gigabytes: float = 450.0
    network_gigabits_per_node: float = 3200.0
    gigamacs_per_image: float = 4.09
    images_per_clip: int = 16
    million_parameters: float = 2 * 23.5
    frames_per_clip: float = 250.0
    megabytes_per_clip: float = 135e3 / (234_619 + 19_761)
    clips_per_step: int = 20


SOURCES = {
    "gpus_per_node": "HGX H100",
    "peak_tflops": "data sheet of the H100 SXM: bfloat16, without sparsity",
    "decoders_per_gpu": "data sheet of the H100 SXM: 7 NVDEC",
    "pcie_gigabytes": "PCIe 5.0, 16 lanes",
    "nvlink_gigabytes": "data sheet of the H100 SXM: 900 GB/s, both directions together",
    "network_gigabits_per_node": "AWS p5.48xlarge: EFA, 3200 Gbit/s",
    "gigamacs_per_image": "torchvision's table of models: ResNet-50 at 224 x 224",
    "images_per_clip": "8 frames each of RGB and flow",
    "million_parameters": "two ResNet-50 without classifiers",
    "frames_per_clip": "10 s (Kinetics-400) at 25 frames/s: all frames are decoded",
    "megabytes_per_clip": "the copy that PaddleVideo's documentation describes: 135 GB for 254 380 clips",
    "clips_per_step": "one episode of 5 x (1 + 3) clips on each GPU",
}


class Need(NamedTuple):
    """What one share of the peak asks of the rest of the machine.

    Attributes:
        share: of the GPUs' peak.
        clips: clips/s of all GPUs together.
        decoder_frames: frames/s of every NVDEC.
        storage: GB/s read by every node.
        pcie: share of a GPU's PCIe that packets take.
        exchange: share of a step that the gradients' exchange takes at the line rate, where nothing hides it.
    """

    share: float
    clips: float
    decoder_frames: float
    storage: float
    pcie: float
    exchange: float


def clips_per_second(inputs: Inputs, share: float) -> float:
    """Clips/s of one GPU: two operations a multiply-add, the backward pass twice the forward."""
    return inputs.peak_tflops * 1e3 * share / (3 * 2 * inputs.gigamacs_per_image * inputs.images_per_clip)


def exchange_seconds(inputs: Inputs, gpus: int) -> float:
    """Seconds of a ring all-reduce of float32 gradients: ``2 (n - 1) / n`` times their bytes over a GPU's slowest link."""
    link = inputs.nvlink_gigabytes
    if gpus > inputs.gpus_per_node:
        link = min(link, inputs.network_gigabits_per_node / 8 / inputs.gpus_per_node)
    return 2 * (gpus - 1) / gpus * inputs.million_parameters * 1e6 * 4 / (link * 1e9)


def need(inputs: Inputs, gpus: int, share: float) -> Need:
    """What ``gpus`` GPUs ask for at a share of their peak."""
    own = clips_per_second(inputs, share)
    step = inputs.clips_per_step / own
    return Need(
        share,
        own * gpus,
        own * inputs.frames_per_clip / inputs.decoders_per_gpu,
        own * min(gpus, inputs.gpus_per_node) * inputs.megabytes_per_clip / 1e3,
        own * inputs.megabytes_per_clip / 1e3 / inputs.pcie_gigabytes,
        exchange_seconds(inputs, gpus) / step,
    )


def sparse(inputs: Inputs) -> Inputs:
    """Of a clip, only what 8 frames need is decoded: with a key frame every 12 frames, 6.5 for each on average."""
    return replace(inputs, frames_per_clip=8 * 6.5)


def input_table(inputs: Inputs) -> str:
    """The inputs with their sources, as a Markdown table."""
    rows = [f"| `{field.name}` | {getattr(inputs, field.name):,.4g} | {SOURCES[field.name]} |" for field in fields(inputs)]
    return "\n".join(["| input | value | source |", "|---|---|---|", *rows])


def table(inputs: Inputs, gpus: int) -> str:
    """What is needed at each share of the peak, as a Markdown table."""
    head = f"| {gpus} GPUs at | clips/s | frames/s per NVDEC | storage, GB/s per node | PCIe | exchange of gradients |"
    rows = []
    for found in (need(inputs, gpus, share) for share in SHARES_OF_PEAK):
        first = f"| {found.share:.0%} of their peak | {found.clips:,.0f} | {found.decoder_frames:,.0f}"
        rows.append(f"{first} | {found.storage:.1f} | {found.pcie:.1%} | {found.exchange:.1%} |")
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def tables() -> list[str]:
    """Everything that docs/planning.md shows: inputs, then 8 and 64 GPUs, all frames decoded and only the needed ones."""
    inputs = Inputs()
    return [input_table(inputs), *(table(each, gpus) for each in (inputs, sparse(inputs)) for gpus in GPUS)]


if __name__ == "__main__":
    print("\n\n".join(tables()))
