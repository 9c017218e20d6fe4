"""Constructors refuse a keyword that they do not have, with the name that was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from numbers import Real
from typing import Any, TypeVar

from loopkit.errors import OptionError, nearest
from loopkit.foreign_names import FOREIGN_NAMES, Reason

Constructor = TypeVar("Constructor", bound=Callable[..., Any])
_MOST_LISTED = 12


def checks_keywords(constructor: Constructor) -> Constructor:
    """Decorate a class or a function, so that an unknown keyword raises an ``OptionError``.

    A constructor with ``**keywords`` hands names that it does not know on. It refuses those alone
    that ``FOREIGN_NAMES`` answers.
    """
    is_class = isinstance(constructor, type)
    function: Callable[..., Any] = constructor.__init__ if is_class else constructor
    parameters = list(inspect.signature(function).parameters.values())[is_class:]
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    name = constructor.__name__
    foreign = FOREIGN_NAMES.get(name, {})

    @wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        for keyword in keywords:
            if keyword not in known and (not hands_on or keyword in foreign):
                raise unknown_keyword(name, keyword, known)
        if arguments and known[:1] == ["lr"]:
            _check_rate(name, arguments[0], keywords)
        return function(*arguments, **keywords)

    if is_class:
        constructor.__init__ = checked  # type: ignore[method-assign]
        return constructor
    return checked  # type: ignore[return-value]


def _check_rate(name: str, first: Any, keywords: Collection[str]) -> None:
    """Refuse an optimizer's first argument if it holds parameters, as in torch."""
    if "lr" in keywords or not isinstance(first, (Real, str)):
        raise OptionError(
            f"{name} got a {type(first).__name__} as its first argument, which is lr: it takes the "
            f"parameters of the task by itself. Give {name}(lr=1e-3), or params= for some of them"
        )


def unknown_keyword(
    owner: str, keyword: str, known: Collection[str], foreign: Mapping[str, str] | None = None
) -> OptionError:
    """Return the error for a keyword that ``owner`` does not have.

    It says what loopkit calls the same thing, else which known name is written alike, else where
    the names are listed.

    Args:
        owner: the name of the class or function that was called.
        known: the keywords that it has.
        foreign: other libraries' names; None takes those of ``FOREIGN_NAMES`` for ``owner``.
    """
    foreign = FOREIGN_NAMES.get(owner, {}) if foreign is None else foreign
    said = f"{owner} has no option {keyword!r}"
    if keyword in foreign:
        meant = foreign[keyword]
        return OptionError(f"{said}: {'' if isinstance(meant, Reason) else 'here that is '}{meant}")
    hint = nearest(keyword, known)
    if not hint and len(known) > _MOST_LISTED:
        hint = f" See help({owner}) for its {len(known)} options"
    elif not hint:
        hint = f" It has {', '.join(known) or 'no options'}"
    return OptionError(f"{said}.{hint}")
