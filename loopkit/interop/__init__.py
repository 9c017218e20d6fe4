"""Models of other libraries as tasks: transformers models, and adapters of peft on them."""

from loopkit.interop.huggingface import HFTask

__all__ = ["HFTask"]
