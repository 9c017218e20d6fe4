"""The console: progress, the table of evaluations, and summaries."""

from loopkit.console.progress import build_progress

__all__ = ["build_progress"]
