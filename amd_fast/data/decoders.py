"""Which decoder reads a clip, and why: NVIDIA DALI (NVDEC on a GPU), or PyAV (FFmpeg on the CPU)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from amd_fast.errors import ConfigError, ImplementationError

if TYPE_CHECKING:
    from amd_fast.data.cut import CutStream
    from amd_fast.data.manifest import Manifest

DecoderName = Literal["auto", "dali", "pyav"]
DECODERS = ("auto", "dali", "pyav")

CPU_CODECS = ("vp8", "vp9", "mjpeg")
"""Codecs that DALI decodes without a GPU."""
# cudaVideoCodec. NVDEC takes MJPEG too, but not every version of DALI hands it on; PyAV loses little on it, for no frame needs another.
_NVDEC_CODECS = {"mpeg4": 2, "h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}
_CHROMA_420 = 1  # cudaVideoChromaFormat
_NV12 = 1  # bit 0 of the mask of output formats: what DALI has NVDEC write
_INSTALL = "pip install 'amd_fast[dali]'"


class DecoderChoice(NamedTuple):
    """The decoder that reads (``"dali"`` or ``"pyav"``) and the reason, a clause that completes "because"."""

    decoder: Literal["dali", "pyav"]
    reason: str


def choose_decoder(codec: str | None, decoder: str = "auto", device: str | torch.device | None = None) -> DecoderChoice:
    """Chooses the decoder of a clip.

    Args:
        codec: FFmpeg's name of the codec, such as "h264"; None where it is not known yet.
        decoder: "auto", or the name of one, which is then used or refused, never replaced.
        device: where the decoded clips are wanted: "cuda" or "cpu"; None for "cuda" where torch sees a GPU.

    Raises:
        ConfigError: there is no such decoder.
        ImplementationError: DALI was asked for by name and cannot decode this here; says why, and what to do.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"unknown decoder {decoder!r}; choose one of {', '.join(map(repr, DECODERS))}")
    if decoder == "pyav":
        return DecoderChoice("pyav", "it was asked for by name")
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    obstacle = dali_obstacle(codec, kind)
    if decoder == "dali":
        if obstacle is not None:
            raise ImplementationError(f"decoder='dali' cannot be used here: {obstacle}; use decoder='auto' or 'pyav' to decode without it")
        return DecoderChoice("dali", "it was asked for by name")
    if kind != "cuda":
        return DecoderChoice("pyav", "there is no GPU to decode on, and on a CPU it is never slower than DALI and reads every codec")
    if obstacle is not None:
        return DecoderChoice("pyav", obstacle)
    return DecoderChoice("dali", "the GPU decodes this codec")


def dali_obstacle(codec: str | None, device: str) -> str | None:
    """Why DALI cannot decode a codec on a kind of device ("cuda" or "cpu"), None where it can; the codec None stands for any."""
    if not dali_installed():
        return f"NVIDIA DALI is not installed ({_INSTALL})"
    if codec is not None and (obstacle := codec_obstacle(codec, device)) is not None:
        return obstacle
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _nvdec_obstacle(codec)


def codec_obstacle(codec: str, device: str) -> str | None:
    """Why DALI decodes a codec on no machine with this kind of device, None where it does; asks neither driver nor GPU."""
    if device == "cpu":
        if codec in CPU_CODECS:
            return None
        return f"DALI decodes {', '.join(CPU_CODECS)} on a CPU and not {codec} (that takes an NVIDIA GPU)"
    return None if codec in _NVDEC_CODECS else f"DALI does not decode {codec} on a GPU"


def stream_obstacle(cut: CutStream, device: str) -> str | None:
    """Why DALI cannot decode this very stream, or would show other pictures in silence; None where nothing speaks against it.

    Asks the current GPU, and decodes nothing: a batch that DALI fails to decode is lost as a whole, and then tried in parts.
    """
    if device == "cpu":
        return None
    if cut.hidden:
        return "it holds pictures that are not shown, which DALI counts on a GPU"
    if cut.interlaced:
        return "it may be stored in fields (interlaced H.264), which DALI counts as frames on a GPU"
    if cut.width % 2 or cut.height % 2:
        return f"its pictures are {cut.width} x {cut.height}, and on a GPU DALI reads odd sizes wrongly"
    return _caps_obstacle(cut)


def _caps_obstacle(cut: CutStream) -> str | None:
    import av  # left to those who decode, as torch's CUDA is

    if not cut.pixel_format:
        return "how its pixels are stored is not known without decoding it"
    pixels = av.VideoFormat(cut.pixel_format)
    bits, chroma = pixels.components[0].bits, _chroma_format(pixels)
    caps = _decode_caps(_NVDEC_CODECS[cut.codec], chroma, bits, torch.cuda.current_device())
    if caps is None or not caps.supported or not caps.output_formats & _NV12:
        return f"this GPU's video decoder does not take {cut.codec} with {bits} bits as {cut.pixel_format}"
    least, most = (caps.min_width, caps.min_height), (caps.max_width, caps.max_height)
    fits = least[0] <= cut.width <= most[0] and least[1] <= cut.height <= most[1]
    if not fits or cut.width * cut.height / 256 > caps.max_macroblocks:
        between = f"from {least[0]} x {least[1]} to {most[0]} x {most[1]} with {caps.max_macroblocks} blocks of 16 x 16 pixels"
        return f"its pictures are {cut.width} x {cut.height}, and this GPU's video decoder takes {cut.codec} {between}"
    return None


def _chroma_format(pixels: Any) -> int:
    """The ``cudaVideoChromaFormat`` of an ``av.VideoFormat``."""
    if len(pixels.components) < 3:
        return 0
    halved = pixels.chroma_width(2) == 1, pixels.chroma_height(2) == 1
    return {(True, True): _CHROMA_420, (True, False): 2, (False, False): 3}.get(halved, -1)


@functools.cache
def dali_installed() -> bool:
    """Whether the package is here; importing it takes most of a second, and is left to those who decode."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package called nvidia at all
        return False


class _DecodeCaps(ctypes.Structure):
    """``CUVIDDECODECAPS`` of NVIDIA's video codec headers: the first three fields ask, the others answer."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved_1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("decoders", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("reserved_3", ctypes.c_uint * 16),  # generous: later versions use some of it
    )


def _nvdec_obstacle(codec: str | None) -> str | None:
    """Why the GPU's decoder does not take a codec at its plainest (8 bits, 4:2:0); the codec None stands for any."""
    if _nvdec_library() is None:
        return (
            "the driver's video library (libnvcuvid) is not here; "
            "in a container, start it with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    if codec is None:
        return None
    caps = _decode_caps(_NVDEC_CODECS[codec], _CHROMA_420, 8, torch.cuda.current_device())
    return None if caps is not None and caps.supported else f"this GPU's video decoder does not take {codec}"


@functools.cache
def _nvdec_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libnvcuvid.so.1" if os.name == "posix" else "nvcuvid.dll")
    except OSError:
        return None


@functools.cache
def _decode_caps(codec: int, chroma: int, bits: int, gpu: int) -> _DecodeCaps | None:
    """What a GPU's decoder says of a kind of stream; None where it does not answer."""
    library = _nvdec_library()
    if library is None:
        return None
    caps = _DecodeCaps(codec=codec, chroma=chroma, bit_depth_minus_8=bits - 8)
    with torch.cuda.device(gpu):
        torch.cuda.current_stream().query()  # a call that does not wait: the decoder's own takes the context that this makes current
        return caps if library.cuvidGetDecoderCaps(ctypes.byref(caps)) == 0 else None


def explain_decoder(manifest_or_path: Manifest | str | os.PathLike[str] | None = None, decoder: str = "auto") -> str:
    """Says which decoder reads what, and why.

    Args:
        manifest_or_path: the clips: a manifest, a manifest's file (``.csv``), or one video; None for this machine in general.
        decoder: as the loader gets it.

    Returns:
        One line per codec: how many clips have it, which decoder reads them, and why. Where DALI reads some of a manifest's clips, also
        which of them it does not, as far as the manifest tells.

    Raises:
        ConfigError: there is no such decoder.
        ImplementationError: DALI was asked for by name and cannot decode some of this here.
        DataError: the manifest or the video cannot be read.
    """
    manifest = _manifest(manifest_or_path)
    counts = _codecs(manifest_or_path if manifest is None else manifest)
    choices = {codec: choose_decoder(codec, decoder) for codec in counts}
    lines = []
    for codec, choice in choices.items():
        what = f"{codec} ({counts[codec]} {'clip' if counts[codec] == 1 else 'clips'})" if codec else "video of unknown codec"
        lines.append(f"{what} is decoded by {choice.decoder} because {choice.reason}.")
    by_dali = {codec or "" for codec, choice in choices.items() if choice.decoder == "dali"}
    return "\n".join(lines if manifest is None or not by_dali else [*lines, *_exceptions(manifest, by_dali, decoder)])


def _exceptions(manifest: Manifest, codecs: set[str], decoder: str) -> list[str]:
    """Which clips of DALI's codecs it does not read."""
    instead = "lost with decoder='dali'" if decoder == "dali" else "read by PyAV"
    sizes = manifest.table.loc[manifest.table["codec"].isin(codecs), ["width", "height"]]
    odd = int((sizes % 2).any(axis=1).sum()) if torch.cuda.is_available() else 0
    lines = [f"What DALI refuses once it sees the file (turned pictures, say) is {instead}, and counted in the log."]
    if odd:
        lines.insert(
            0, f"Of DALI's clips {odd} of odd width or height {'is' if odd == 1 else 'are'} {instead}: it reads such wrongly on a GPU."
        )
    if decoder != "dali":
        lines.append("PyAV also decodes what is kept in memory: all training clips with data.cache ram, or auto where they fit.")
    return lines


def _manifest(manifest_or_path: Manifest | str | os.PathLike[str] | None) -> Manifest | None:
    """The manifest, where it is one or the file of one."""
    from amd_fast.data.manifest import Manifest

    if manifest_or_path is None or isinstance(manifest_or_path, Manifest):
        return manifest_or_path
    return Manifest.from_csv(manifest_or_path) if os.fspath(manifest_or_path).lower().endswith(".csv") else None


def _codecs(manifest_or_video: Manifest | str | os.PathLike[str] | None) -> dict[str | None, int]:
    """Number of clips by codec."""
    if manifest_or_video is None:
        return {None: 1}
    from amd_fast.data.manifest import Manifest

    if isinstance(manifest_or_video, Manifest):
        return {codec or None: clips for codec, clips in Counter(manifest_or_video.table["codec"].tolist()).items()}
    from amd_fast.data.decode import probe_video

    return {probe_video(manifest_or_video).codec: 1}
