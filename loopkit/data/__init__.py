"""Where batches come from: the Loader, and the sources that training and evaluation read."""

from loopkit.data.collate import Padded
from loopkit.data.loader import Loader, mixed

__all__ = ["Loader", "Padded", "mixed"]
