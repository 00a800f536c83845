"""AFMIR in other people's code: training loops of TRX's and HyRSM's shape, Lightning, the Hugging Face hub.

Names are imported on first use; what needs a package that is not installed says so then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amd_fast.lazy import attach

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

__getattr__, __dir__ = attach(__name__, _PUBLIC)
