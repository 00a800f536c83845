"""A model as programs that need torch and nothing of this library, in Python or C++.

Two programs, so that clips are encoded once, when they are enrolled: the *encoder* takes clips to tokens; the *head* takes the tokens of
support and query to the fused posterior (read-out, matching, active inference, fusion). The library's own ops are written out as their
reference. The number of clips and classes is free; frames and size are the model's.
"""

from amd_fast.export.package import Package, export_package, load_package, verify
from amd_fast.export.programs import Encoder, Format, Head

__all__ = ["Encoder", "Format", "Head", "Package", "export_package", "load_package", "verify"]
