"""The words of a command line as options with their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loopkit.errors import OptionError


@dataclass(frozen=True)
class Word:
    """One option as it was typed.

    Attributes:
        name: without the dashes in front; ``-`` within it is ``_``.
        value: None when there was none.
        append: typed as ``--name+=value``.
    """

    name: str
    value: str | None = None
    append: bool = False

    @property
    def shown(self) -> str:
        """As it is shown in messages."""
        return f"--{self.name}"

    @property
    def typed(self) -> str:
        """As one argument that reads as this word again."""
        return f"--{self.name}{'+' if self.append else ''}{'' if self.value is None else f'={self.value}'}"


def read_words(argv: Sequence[str]) -> list[Word]:
    """``--name value``, ``--name=value``, ``--name+=value`` and ``--name`` alone.

    A value is whatever follows and does not start with ``--``; one that does is given with ``=``.

    Raises:
        OptionError: a value that no option takes.
    """
    words: list[Word] = []
    rest = list(argv)
    while rest:
        text = rest.pop(0)
        if text == "-h":
            text = "--help"
        if not text.startswith("--") or text == "--":
            raise OptionError(
                f"unexpected argument {text!r}: options are given as --name value, a list as "
                f"--name "
                "'[a, b]'"
            )
        name, equals, value = text[2:].partition("=")
        append = name.endswith("+")
        given: str | None = value if equals else None
        if not equals and rest and not rest[0].startswith("--") and rest[0] != "-h":
            given = rest.pop(0)
        words.append(Word(name.removesuffix("+").replace("-", "_"), given, append))
    return words


def take_flag(words: list[Word], name: str) -> bool:
    """Remove the option ``name``, which takes no value; whether it was there.

    Raises:
        OptionError: it has a value.
    """
    found = _take(words, name)
    for word in found:
        if word.value is not None:
            raise OptionError(f"{word.shown} takes no value, and got {word.value!r}")
    return bool(found)


def take_values(words: list[Word], name: str) -> list[str]:
    """Remove the option ``name`` and give its values, in order.

    Raises:
        OptionError: it has no value.
    """
    values = []
    for word in _take(words, name):
        if word.value is None:
            raise OptionError(f"{word.shown} needs a value")
        values.append(word.value)
    return values


def _take(words: list[Word], name: str) -> list[Word]:
    found = [word for word in words if word.name == name]
    words[:] = [word for word in words if word.name != name]
    return found
