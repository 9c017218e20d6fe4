"""LightningModules as tasks: the module, its data module and its callbacks run unmodified."""
