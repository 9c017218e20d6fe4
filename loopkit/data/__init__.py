"""Where batches come from: the Loader, the pure sampler, and what else may feed a run."""

from loopkit.data.collate import Padded
from loopkit.data.loader import Loader, mixed

__all__ = ["Loader", "Padded", "mixed"]
