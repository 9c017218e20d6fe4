"""What a person sees of a run: progress, the table of evaluations, summaries."""

from loopkit.console.progress import build_progress

__all__ = ["build_progress"]
