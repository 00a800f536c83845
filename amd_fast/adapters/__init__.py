"""AFMIR in other people's code: training loops of TRX's and HyRSM's shape, Lightning, the Hugging Face hub.

Names are imported on first use; what needs a package that is not installed says so then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amd_fast.adapters.hub import HubAFMIR
    from amd_fast.adapters.hyrsm import HyRSMAdapter
    from amd_fast.adapters.lightning import AFMIRModule
    from amd_fast.adapters.trx import TRXAdapter

_PUBLIC = {
    "AFMIRModule": "amd_fast.adapters.lightning",
    "HubAFMIR": "amd_fast.adapters.hub",
    "HyRSMAdapter": "amd_fast.adapters.hyrsm",
    "TRXAdapter": "amd_fast.adapters.trx",
}

__all__ = ["AFMIRModule", "HubAFMIR", "HyRSMAdapter", "TRXAdapter"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
