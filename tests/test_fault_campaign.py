"""A few runs of the fault campaign, one of every kind."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of other processes are set, and file systems mounted, as Linux does it")
def test_every_run_ends_in_a_good_model_or_a_clear_stop(tmp_path: Path) -> None:
    campaign = runpy.run_path(str(Path(__file__).with_name("fault_campaign.py")))
    runs = campaign["Campaign"](tmp_path, seed=0)
    outcomes = [runs.run(number, fault) for number, fault in enumerate(campaign["available"]())]
    assert not [outcome for outcome in outcomes if outcome.wrong]
