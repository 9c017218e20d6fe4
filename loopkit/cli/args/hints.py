"""Hints at the option that a wrong name means: by its meaning first, then by its spelling."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Collection, Mapping

from loopkit.errors import closest
from loopkit.foreign_names import FOREIGN_NAMES, Reason


def hint(name: str, owner: str, known: Mapping[str, str], settings: Collection[str] = ()) -> str:
    """Return a sentence about an unknown name, with a space before it; empty if none is sure.

    Args:
        owner: the class that the name is for; ``FOREIGN_NAMES`` answers other libraries' names.
        known: the names that there are, each with how it is typed.
        settings: options with fields, such as ``checkpoint``.
    """
    meant = FOREIGN_NAMES.get(owner, {}).get(name)
    if isinstance(meant, Reason):
        return f" {meant[0].upper()}{meant[1:]}"
    if meant is not None:
        return f" Here that is {_as_typed(meant, known, settings)}"
    near = closest(name, known)
    return f" Did you mean {known[near]!r}?" if near is not None else ""


def _as_typed(meant: str, known: Mapping[str, str], settings: Collection[str]) -> str:
    """Return ``name`` or ``name=value, a remark``, as the tables have it, with options as typed."""
    code = meant
    while code:
        try:
            call = ast.parse(f"f({code})", mode="eval").body
        except SyntaxError:
            code = code.rpartition(", ")[0]
            continue
        rest = meant.removeprefix(code)
        if code in known:
            return known[code] + rest
        if isinstance(call, ast.Call) and call.keywords:
            return " ".join(_keyword(each, known, settings) for each in call.keywords) + rest
        break
    return meant


def _keyword(keyword: ast.keyword, known: Mapping[str, str], settings: Collection[str]) -> str:
    name = str(keyword.arg)
    flag = known.get(name, name)
    value = keyword.value
    if not flag.startswith("--"):  # in a config
        return f"{name}={ast.unparse(value)}"
    if isinstance(value, ast.Call) and name in settings:
        return " ".join(f"{flag}.{each.arg} {_quote(each.value)}" for each in value.keywords)
    if isinstance(value, ast.List):
        return f"{flag}+={_quote(value.elts[0])}"
    return f"{flag} {_quote(value)}"


def _quote(node: ast.expr) -> str:
    """Return a value as it is typed in a shell."""
    text = ast.unparse(node).removesuffix("()")
    if isinstance(node, ast.Constant):
        text = str(node.value).lower() if isinstance(node.value, bool) else str(node.value)
    elif isinstance(node, ast.Tuple):
        text = f"[{', '.join(map(str, ast.literal_eval(node)))}]"
    return f'"{text}"' if "'" in text else shlex.quote(text)
