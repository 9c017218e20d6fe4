"""Where batches come from: the Loader, the pure sampler, and what else may feed a run."""

from loopkit.data.loader import Loader, mixed
from loopkit.data.padding import Padded

__all__ = ["Loader", "Padded", "mixed"]
