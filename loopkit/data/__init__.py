"""Where batches come from: the Loader, and the sources that training and evaluation read."""

from loopkit.data.collate import Padded
from loopkit.data.combined import CombinedLoader
from loopkit.data.loader import Loader, mixed

__all__ = ["CombinedLoader", "Loader", "Padded", "mixed"]
