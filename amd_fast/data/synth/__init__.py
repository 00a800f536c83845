"""A synthetic few-shot action set of real video files: articulated figures and moving shapes, clean and with sensor damage."""

from amd_fast.data.synth.catalogue import catalogue, confusable_pairs
from amd_fast.data.synth.render import ClipSpec, render_clip
from amd_fast.data.synth.writing import encode, synthesize

__all__ = ["ClipSpec", "catalogue", "confusable_pairs", "encode", "render_clip", "synthesize"]
