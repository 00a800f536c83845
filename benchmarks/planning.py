"""What 8 and 64 GPUs need to train on Kinetics-400, by arithmetic: which part of the machine would be full first.

``python -m benchmarks.planning`` prints the tables of docs/planning.md. Inputs are figures of documents, or follow from the model's
shapes, or are assumed, and then say so; nothing here is measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

GPUS = (8, 64)


@dataclass(frozen=True)
class Inputs:
    """A machine and the work of a clip. Giga is 10^9, mega 10^6; rates are per second and in one direction."""

    gpus_per_node: int = 8
    peak_tflops: float = 989.0
    share_of_peak: float = 16_621 / 8 * 6 * 4.09e9 / 312e12
    decoders_per_gpu: int = 7
    decoder_megapixels: float = 771 * 1920 * 1080 / 1e6 * 1545 / 1860
    pcie_gigabytes: float = 64.0
    exchange_gigabytes_one_node: float = 450.0
    exchange_gigabytes_more_nodes: float = 289.0
    disk_gigabytes_per_node: float = 16.0
    store_requests: float = 5500.0
    gigamacs_per_image: float = 4.09
    images_per_clip: int = 16
    million_parameters: float = 2 * 23.5
    frames_per_clip: float = 250.0
    megapixels_per_frame: float = 340 * 256 / 1e6
    megabytes_per_clip: float = 135e3 / (234_619 + 19_761)
    clips_per_step: int = 20


SOURCES = {
    "gpus_per_node": "HGX H100, and AWS p5.48xlarge",
    "peak_tflops": "[NVIDIA's page of the H100](https://www.nvidia.com/en-us/data-center/h100/), SXM: bfloat16, without sparsity",
    "share_of_peak": "an A100's in [NVIDIA's ResNet-50 for PyTorch]"
    "(https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5): "
    "16 621 images/s on 8 of them, of 312 TFLOP/s each; that an H100 reaches the same share is assumed",
    "decoders_per_gpu": "[NVIDIA's MIG guide](https://docs.nvidia.com/datacenter/tesla/mig-user-guide/supported-mig-profiles.html): "
    "7 NVDEC in a whole H100 (an A100 has 5)",
    "decoder_megapixels": "[NVDEC Application Note, SDK 13.0]"
    "(https://docs.nvidia.com/video-technologies/video-codec-sdk/13.0/nvdec-application-note/index.html): 771 frames/s of H.264 at "
    "1920 x 1080 and 1860 MHz for Turing, and Hopper the same, scaled by its clock; 1545 MHz for an H100 is assumed, and so is that small "
    "frames decode as many pixels a second as large ones",
    "pcie_gigabytes": "PCIe 5.0, 16 lanes",
    "exchange_gigabytes_one_node": "NVIDIA's page of the H100: NVLink, 900 GB/s in both directions together; an upper bound",
    "exchange_gigabytes_more_nodes": "[nccl-tests on two p5.48xlarge]"
    "(https://github.com/aws-samples/awsome-distributed-training/tree/main/micro-benchmarks/nccl-tests), "
    "all-reduce of 134 MB over EFA: 289 GB/s bus bandwidth; that eight nodes reach the same is assumed",
    "disk_gigabytes_per_node": "[AWS on the p4d](https://aws.amazon.com/blogs/compute/amazon-ec2-p4d-instances-deep-dive/): about 16 GB/s "
    "from its eight NVMe disks; that those of a p5 are no slower is assumed",
    "store_requests": "[AWS on S3](https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html): at least 5500 GET/s "
    "for each partitioned prefix; here one prefix, and one GET a clip",
    "gigamacs_per_image": "torchvision's table of models: ResNet-50 at 224 x 224",
    "images_per_clip": "8 frames each of RGB and flow",
    "million_parameters": "two ResNet-50 without classifiers",
    "frames_per_clip": "10 s (Kinetics-400) at 25 frames/s, which is assumed: all frames are decoded",
    "megapixels_per_frame": "assumed: 340 x 256",
    "megabytes_per_clip": "[PaddleVideo's copy](https://github.com/PaddlePaddle/PaddleVideo/blob/develop/docs/zh-CN/dataset/k400.md): "
    "135 GB for 254 380 clips",
    "clips_per_step": "one episode of 5 x (1 + 3) clips on each GPU",
}


class Need(NamedTuple):
    """What training asks of the rest of the machine; all but ``clips`` are shares of what there is, and more than 1 cannot be had.

    Attributes:
        clips: clips/s of all GPUs together.
        decoders: of NVDEC, if it decodes as many pixels a second in small frames as in large ones.
        disks: of a node's own disks, if clips are read from there.
        store: of an object store's requests, if every clip is fetched from one prefix of it.
        pcie: of a GPU's PCIe, for packets.
        exchange: of a step that the gradients' exchange takes, where nothing hides it.
    """

    clips: float
    decoders: float
    disks: float
    store: float
    pcie: float
    exchange: float

    def first(self) -> str:
        """The part that is full first, or comes nearest to it."""
        name = max(NAMES, key=lambda name: getattr(self, name))
        return NAMES[name] if getattr(self, name) > 1 else f"none; next {NAMES[name]}"


NAMES = {"decoders": "NVDEC", "disks": "own disks", "store": "object store", "pcie": "PCIe", "exchange": "exchange of gradients"}


def clips_per_second(inputs: Inputs) -> float:
    """Clips/s of one GPU that waits for nothing: two operations a multiply-add, the backward pass twice the forward."""
    return inputs.peak_tflops * 1e3 * inputs.share_of_peak / (3 * 2 * inputs.gigamacs_per_image * inputs.images_per_clip)


def frames_per_second(inputs: Inputs) -> float:
    """Frames/s that one NVDEC has to decode."""
    return clips_per_second(inputs) * inputs.frames_per_clip / inputs.decoders_per_gpu


def exchange_seconds(inputs: Inputs, gpus: int) -> float:
    """Seconds of an all-reduce of float32 gradients: ``2 (n - 1) / n`` times their bytes at the bus bandwidth, as nccl-tests define it."""
    rate = inputs.exchange_gigabytes_one_node if gpus <= inputs.gpus_per_node else inputs.exchange_gigabytes_more_nodes
    return 2 * (gpus - 1) / gpus * inputs.million_parameters * 1e6 * 4 / (rate * 1e9)


def need(inputs: Inputs, gpus: int) -> Need:
    """What ``gpus`` GPUs ask for."""
    own = clips_per_second(inputs)
    gigabytes = own * inputs.megabytes_per_clip / 1e3
    return Need(
        own * gpus,
        frames_per_second(inputs) * inputs.megapixels_per_frame / inputs.decoder_megapixels,
        gigabytes * min(gpus, inputs.gpus_per_node) / inputs.disk_gigabytes_per_node,
        own * gpus / inputs.store_requests,
        gigabytes / inputs.pcie_gigabytes,
        exchange_seconds(inputs, gpus) * own / inputs.clips_per_step,
    )


def sparse(inputs: Inputs) -> Inputs:
    """Of a clip, only what 8 frames need is decoded: with a key frame every 12 frames, 6.5 for each on average."""
    return replace(inputs, frames_per_clip=8 * 6.5)


def input_table(inputs: Inputs) -> str:
    """The inputs with their sources, as a Markdown table."""
    rows = [f"| `{field.name}` | {getattr(inputs, field.name):,.4g} | {SOURCES[field.name]} |" for field in fields(inputs)]
    return "\n".join(["| input | value | source |", "|---|---|---|", *rows])


def need_table(inputs: Inputs) -> str:
    """What is needed of each part, with the first that is full, as a Markdown table."""
    head = f"| GPUs | frames decoded | clips/s | {' | '.join(NAMES.values())} | full first |"
    rows = []
    for gpus in GPUS:
        for name, each in (("all", inputs), ("those needed", sparse(inputs))):
            found = need(each, gpus)
            shares = " | ".join(f"{share:.1%}" for share in found[1:])
            rows.append(f"| {gpus} | {name} | {found.clips:,.0f} | {shares} | {found.first()} |")
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *rows])


def decoder_table(inputs: Inputs) -> str:
    """How full NVDEC is by what is not known: the GPU's share of its peak, and whether small frames decode faster than large ones."""
    large = inputs.decoder_megapixels / (1920 * 1080 / 1e6)
    head = f"| GPU at | frames/s per NVDEC | of {inputs.decoder_megapixels / inputs.megapixels_per_frame:,.0f} | of {large:,.0f} |"
    rows = []
    for share in (0.05, inputs.share_of_peak, 0.4):
        each = replace(inputs, share_of_peak=share)
        frames = frames_per_second(each)
        rows.append(f"| {share:.0%} of its peak | {frames:,.0f} | {need(each, 8).decoders:.0%} | {frames / large:.0%} |")
    return "\n".join([head, "|---|---|---|---|", *rows])


def tables() -> list[str]:
    """Everything that docs/planning.md shows."""
    inputs = Inputs()
    return [input_table(inputs), need_table(inputs), *(decoder_table(each) for each in (inputs, sparse(inputs)))]


if __name__ == "__main__":
    print("\n\n".join(tables()))
