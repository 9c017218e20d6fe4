"""A command line as tokens: every option with the text of its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loopkit.errors import OptionError


class Text(str):
    """The text of a value that was typed: its type depends on the option that it is for."""


@dataclass(frozen=True)
class Token:
    """One option as it was typed.

    Attributes:
        name: without the leading dashes; every ``-`` in it is a ``_``.
        text: the value; None if the option stands alone.
        append: whether it was typed as ``--name+=value``.
    """

    name: str
    text: str | None = None
    append: bool = False

    @property
    def flag(self) -> str:
        """The option as messages show it: ``--name``."""
        return f"--{self.name}"

    @property
    def argument(self) -> str:
        """One argument of a command line that reads as this token again."""
        sign = "+=" if self.append else "="
        return self.flag if self.text is None else f"{self.flag}{sign}{self.text}"


def read_tokens(argv: Sequence[str]) -> list[Token]:
    """Read ``--name value``, ``--name=value``, ``--name+=value`` and ``--name`` alone.

    The value is the next argument, unless that begins with ``--``; such a value needs the ``=``.

    Raises:
        OptionError: an argument is neither an option nor the value of one.
    """
    tokens: list[Token] = []
    rest = ["--help" if argument == "-h" else argument for argument in argv]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise OptionError(
                f"unexpected argument {argument!r}: give options as --name value, "
                "and lists as --name '[a, b]'"
            )
        name, equals, value = argument[2:].partition("=")
        text: str | None = value if equals else None
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        tokens.append(Token(name.removesuffix("+").replace("-", "_"), text, name.endswith("+")))
    return tokens


def take_flag(tokens: list[Token], name: str) -> bool:
    """Remove the option ``name``, which takes no value; return whether it was typed.

    Raises:
        OptionError: it has a value.
    """
    found = _take(tokens, name)
    for token in found:
        if token.text is not None:
            raise OptionError(f"{token.flag} takes no value, and got {token.text!r}")
    return bool(found)


def take_value(tokens: list[Token], name: str) -> str | None:
    """Remove the option ``name``; return its value, or None if it was not typed.

    Raises:
        OptionError: it has no value, or it was typed several times.
    """
    values = take_values(tokens, name)
    if len(values) > 1:
        raise OptionError(f"--{name} is given several times: give it once")
    return values[0] if values else None


def take_values(tokens: list[Token], name: str) -> list[str]:
    """Remove all options ``name``; return their values in order.

    Raises:
        OptionError: one of them has no value.
    """
    values = []
    for token in _take(tokens, name):
        if token.text is None:
            raise OptionError(f"{token.flag} needs a value")
        values.append(token.text)
    return values


def _take(tokens: list[Token], name: str) -> list[Token]:
    found = [token for token in tokens if token.name == name]
    tokens[:] = [token for token in tokens if token.name != name]
    return found
