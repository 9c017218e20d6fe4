"""Carry over the user's code: the task's classes, and every name of their files that they use."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Any

import loopkit
from loopkit.cli.eject.loop import check_carried
from loopkit.cli.eject.refusals import refuse
from loopkit.cli.eject.source import (
    Import,
    SourceModule,
    SourceModules,
    free_names,
    is_users,
    uses_loopkit,
)
from loopkit.cli.eject.task_class import TaskClasses
from loopkit.data import Loader, Padded
from loopkit.data.collate import _as_tensor
from loopkit.distributed.gather import all_gather
from loopkit.errors import LoopkitError
from loopkit.run import Run

_ERROR = '''class {name}(Exception):
    """{about}"""
'''
_LOADER = '''class {name}:
    """A data set, and how to read it."""

    collate_fn = None

    def __init__(self, dataset: Any, batch_size: int | None = None, **options: Any) -> None:
        self.dataset = dataset
        vars(self).update(options)
'''
_PADDED = '''class {name}:
    """Makes a batch of samples that are dicts. Sequences are padded to the longest of the batch."""

    def __init__(
        self,
        values: Mapping[str, float] | None = None,
        *,
        mask: str | None = "attention_mask",
        mask_of: str = "input_ids",
        multiple_of: int = 1,
        padding_side: str = "right",
    ) -> None:
        self.values, self.mask, self.mask_of = values or {{}}, mask, mask_of
        self.multiple_of, self.padding_side = multiple_of, padding_side

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch: [batch, longest, ...] for sequences, [batch, ...] for others."""
        first, batch = samples[0], {{}}
        for key in first:
            column = [_as_tensor(sample[key]) for sample in samples]
            if all(isinstance(value, Tensor) and value.ndim for value in column):
                batch[key] = self._pad(column, self.values.get(key, 0))
            else:
                batch[key] = default_collate([sample[key] for sample in samples])
        if self.mask and self.mask not in first and self.mask_of in first:
            ones = [torch.ones(len(s[self.mask_of]), dtype=torch.long) for s in samples]
            batch[self.mask] = self._pad(ones, 0)
        return batch
'''


_ALL_GATHER = '''def {name}(tensor: Tensor) -> tuple[Tensor, slice]:
    """Return the rows of all processes, and which are this one's: there is one process."""
    return tensor, slice(0, len(tensor))
'''


class Carrier:
    """Collects the user's code for the script, name by name.

    Attributes:
        imports: the imports that it needs.
        stand_ins: short classes in the place of those of loopkit that it uses, by name.

    Args:
        classes: the classes of the task.
        modules: the modules of the user.
        provided: stand-ins that the script has in any case; "" where another one brings it.
        ddp: whether the script runs on several ranks.
    """

    def __init__(
        self,
        classes: TaskClasses,
        modules: SourceModules,
        provided: Mapping[str, str],
        *,
        ddp: bool,
    ) -> None:
        self._ddp = ddp
        self.imports: set[Import] = set()
        self.stand_ins: dict[str, str] = {name: text for name, text in provided.items() if text}
        self._provided = provided
        self._classes, self._modules = classes, modules
        self._needs: dict[str, set[str]] = {}
        self._seen: set[tuple[str, str]] = set()

    def carry(self, source: SourceModule, name: str) -> None:
        """Take over what ``name`` is in a module, and all that this uses in turn.

        Raises:
            OptionError: a name is loopkit's, or cannot be carried over.
        """
        module = source.module.__name__
        if (module, name) in self._seen:
            return
        self._seen.add((module, name))
        if module not in self._needs:
            self._needs[module] = set()
            for effect in source.effects:
                self._take(source, effect.lineno, source.segment(effect))
        own = self._classes.nodes.get(name)
        if own is not None and own[0] is source:
            self._take(source, own[1].lineno, self._classes.text(name))
        elif name in source.definitions:
            for statement in source.definitions[name]:
                self._take(source, statement.lineno, source.segment(statement))
        elif name in source.imports:
            self._carry_import(source, source.imports[name])
        elif name in vars(source.module) and not name.startswith("__"):
            raise refuse(f"{name} in {source.file}", "import or define it by its name at the top")

    def _take(self, source: SourceModule, line: int, text: str) -> None:
        if line not in source.carried:
            check_carried(source, text)
            source.carried[line] = text
            for name in sorted(free_names(text)):
                self.carry(source, name)

    def _carry_import(self, source: SourceModule, found: Import) -> None:
        value = vars(source.module).get(found.name)
        names = (found.module, f"{found.module}.{found.attribute}")
        if found.module.split(".")[0] == loopkit.__name__:
            if found.name in self._provided and value is not None:
                return
            self.stand_ins[found.name] = _stand_in(source, found, value, ddp=self._ddp)
            return
        module = sys.modules.get(found.module)
        if module is None or not is_users(module):
            self.imports.add(found)
            return
        inside = [sys.modules[name] for name in names if name in sys.modules]
        if not any(map(uses_loopkit, inside)):
            self.imports.add(found)
            return
        if found.attribute is None or len(inside) > 1 or found.name != found.attribute:
            raise refuse(
                f"{source.file}, which imports {found.name} from {found.module}",
                "that module uses loopkit. Import each name from it, under its own name",
            )
        self._needs[source.module.__name__].add(found.module)
        self.carry(self._modules.of(found.module), found.attribute)

    def pieces(self) -> list[str]:
        """Return the carried code: what is defined first comes first."""
        ordered = TopologicalSorter(self._needs).static_order()
        modules = [self._modules.of(name) for name in ordered]
        stand_ins = [text for _, text in sorted(self.stand_ins.items())]
        return [*stand_ins, *(m.carried[line] for m in modules for line in sorted(m.carried))]


def _stand_in(source: SourceModule, found: Import, value: Any, *, ddp: bool) -> str:
    if isinstance(value, type) and issubclass(value, LoopkitError):
        about = (value.__doc__ or "An error.").strip().splitlines()[0]
        return _ERROR.format(name=found.name, about=about)
    if value is Loader:
        return _LOADER.format(name=found.name)
    if value is Padded:
        return padded_text(found.name)
    if value is Run:
        return f"{found.name} = Any  # events have no run here"
    if value is all_gather and not ddp:
        return _ALL_GATHER.format(name=found.name)
    if value is all_gather:
        raise refuse(
            "all_gather under strategy='ddp'",
            "eject the run for one device, and call torch.distributed.nn.functional.all_gather",
        )
    raise refuse(
        f"{source.file}, which uses loopkit's {found.name} in code that training runs",
        "take it out of there: what optimizers, eval_step and the like use does not count",
    )


def padded_text(name: str) -> str:
    """Return the class that stands for ``Padded``."""
    shared = (inspect.getsource(part) for part in (Padded._pad, _as_tensor))
    return _PADDED.format(name=name) + "\n" + "\n\n".join(shared)
