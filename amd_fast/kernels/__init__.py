"""Path shim: makes the top-level ``kernels/`` folder importable as ``amd_fast.kernels`` from a source tree.

In a wheel the kernels lie in this very folder and the shim is not shipped (the folder is then a namespace package),
so no code may live here. The top-level folder has no ``__init__.py``: ``kernels`` is also another package's import name.
"""

import os as _os

_source = _os.path.join(_os.path.dirname(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))), "kernels")
if _os.path.isfile(_os.path.join(_source, "free_energy", "reference.py")):
    __path__.append(_source)
