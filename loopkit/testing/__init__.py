"""Checks for your own tests: does a task resume exactly, on any number of ranks, after any fault?"""

from __future__ import annotations

from loopkit.testing.faults import FaultReport, check_faults
from loopkit.testing.ranks import RanksReport, check_ranks
from loopkit.testing.stops import ResumeReport, check_resume

__all__ = [
    "FaultReport", "RanksReport", "ResumeReport", "check_faults", "check_ranks", "check_resume",
]  # fmt: skip
