"""Arguments as they are written: plain values, calls of classes, and what only running code knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopkit.cli.lightning_args.signatures import SIGNATURES


@dataclass(frozen=True)
class Unknown:
    """An expression whose value is known only when the user's file runs.

    Attributes:
        text: the expression.
    """

    text: str


@dataclass(frozen=True)
class WrittenCall:
    """A call of a class, or a ``class_path`` with its ``init_args``.

    Attributes:
        name: the class, without its module.
        module: the module that a ``class_path`` names; "" without one.
        positional: the arguments without names.
        named: the arguments by name.
        text: the call as it was written; "" without one.
    """

    name: str
    module: str = ""
    positional: Sequence[Any] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def shown(self) -> str:
        """The call for a message."""
        return self.text or f"{self.name}(...)"


class Arguments:
    """The arguments of one call. Reading one marks it as used; ``rest`` has those nobody read.

    Args:
        call: the call.
        notes: takes, by name, what is not carried over, and why.

    Attributes:
        given: the arguments by name.
    """

    def __init__(self, call: WrittenCall, notes: dict[str, str]) -> None:
        self.name = call.name
        self._defaults = SIGNATURES.get(call.name, {})
        self._notes = notes
        names = iter(self._defaults)
        self.given = {next(names, str(n)): value for n, value in enumerate(call.positional)}
        self.given.update(call.named)
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """Return an argument, or its default; mark it as used, and note what nobody can know yet."""
        self._used.add(name)
        value = self.given.get(name)
        if isinstance(value, Unknown):
            self.note(name, f"{value.text} is known only when your file runs. Give it here")
            value = None
        if value is None:
            value = self._defaults.get(name)
        return None if value is ... else value

    def is_set(self, name: str) -> bool:
        """Return whether an argument was given, with another value than its default."""
        value = self.given.get(name)
        return name in self.given and value is not None and value != self._defaults.get(name)

    def note(self, name: str, reason: str) -> None:
        """Note that an argument is not carried over, and mark it as used."""
        self._used.add(name)
        where = name if self.name == "Trainer" else f"{self.name}({name}=)"
        self._notes[where] = reason

    def note_rest(self, reasons: Mapping[str, str], otherwise: str) -> None:
        """Note each argument that was set and that nobody read."""
        for name in self.given:
            if name not in self._used and self.is_set(name):
                self.note(name, reasons.get(name, otherwise))

    def peek(self, name: str) -> Any:
        """Return an argument as it was given, without marking it as used."""
        return self.given.get(name)

    def use(self, *names: str) -> None:
        """Mark arguments as used."""
        self._used.update(names)
