"""The command line: ``loopkit fit``, ``evaluate``, ``predict``, ``ckpt``, ``bench``, ``report`` and
``doctor``.
"""
