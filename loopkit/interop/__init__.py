"""Models of other libraries as tasks: transformers, and peft's adapters on them."""

from loopkit.interop.huggingface import HFTask

__all__ = ["HFTask"]
