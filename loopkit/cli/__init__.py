"""The command line: ``loopkit fit``, ``evaluate``, ``predict``, ``ckpt``, ``report`` and ``doctor``."""
