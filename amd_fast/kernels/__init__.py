"""Path shim: makes the top-level ``kernels/`` folder importable as ``amd_fast.kernels`` from a source tree.

The top-level folder has no ``__init__.py`` and must not get one: ``kernels`` is also another package's import name.
An installation holds the kernels in this very folder (``setup.py`` maps them here); the check for a file of ours then fails
and the path stays as it is, even where that other package lies beside amd_fast.
"""

import os as _os

_source = _os.path.join(_os.path.dirname(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))), "kernels")
if _os.path.isfile(_os.path.join(_source, "free_energy", "__init__.py")):
    __path__.append(_source)
