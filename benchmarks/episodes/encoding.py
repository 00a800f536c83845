"""What a feature bank saves: the same episodes with every clip decoded and encoded anew, as evaluations without a bank do."""

from __future__ import annotations

import dataclasses
import tempfile
import time

import torch

import amd_fast
from amd_fast.data.loader import ClipLoader
from amd_fast.data.synth.writing import synthesize
from amd_fast.evaluation.protocol import Condition, Draw, Features, draw, score

_SIZE, _FRAMES = 64, 8  # as the demo's model reads clips


@dataclasses.dataclass
class Encoded:
    """Seconds for the same episodes with and without a bank; 5-way 1-shot, the demo's network with random weights, synthetic clips.

    Attributes:
        episodes, clips: scored, and in the bank.
        bank: encoding every clip once.
        scoring: all episodes from the bank.
        anew: all episodes, their clips decoded and encoded episode by episode.
        error: largest difference of the log-posteriors.
    """

    episodes: int
    clips: int
    bank: float
    scoring: float
    anew: float
    error: float

    def text(self) -> str:
        """The ratio, with and without the cost of the bank."""
        whole = self.anew / (self.bank + self.scoring)
        return (
            f"{self.episodes} episodes over {self.clips} clips: {self.anew:.1f} s anew, {self.bank:.1f} s for the bank and "
            f"{self.scoring:.3f} s from it: {whole:.1f} times faster with the bank's cost, {self.anew / self.scoring:.0f} times without"
        )


def measure(episodes: int, classes: int = 10, clips_per_class: int = 12) -> Encoded:
    """Times both ways on the same clips, decoded by the same loader."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = synthesize(folder, classes=classes, clips_per_class=clips_per_class, size=_SIZE, workers=1)
        torch.manual_seed(0)
        model = amd_fast.create_model("afmir_small").eval()
        model.frames, model.size = _FRAMES, _SIZE
        started = time.perf_counter()
        bank = amd_fast.FeatureBank.build(model, manifest, progress=False)
        encoded = time.perf_counter() - started
        features = Features.of(model, bank)
        drawn = draw(bank, Condition(episodes=episodes))
        started = time.perf_counter()
        ours = torch.cat([part.output.log_probs for part in score(model, features, drawn, 5)])
        scored = time.perf_counter() - started
        started = time.perf_counter()
        theirs = _anew(model, ClipLoader(manifest, model.modalities, frames=_FRAMES, size=_SIZE), drawn)
        anew = time.perf_counter() - started
    return Encoded(episodes, len(bank), encoded, scored, anew, float((ours - theirs).abs().max()))


def _anew(model: amd_fast.AFMIR, loader: ClipLoader, drawn: Draw) -> torch.Tensor:
    found = []
    labels = torch.from_numpy(drawn.support_label)
    for support, query in zip(drawn.support, drawn.query, strict=True):
        with torch.inference_mode():
            sides = [loader.load_test(side, 1) for side in (support, query)]
            output = model(sides[0].clips, labels, sides[1].clips, ways=5)
        found.append(output.log_probs)
    return torch.stack(found)
