"""``loopkit convert-args`` for Lightning: a ``Trainer(...)`` call, or the YAML of a LightningCLI."""
