"""The layout of the script: calls and imports as ruff's formatter writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from loopkit.cli.eject.source import Import, is_users

# A line within 88 characters stays as it is under any longer limit, too.
WIDTH = 88


def fold(indent: int, head: str, parts: Sequence[str], tail: str) -> str:
    """Return ``head``, the parts and ``tail`` on one line, or the parts on a line each.

    Args:
        indent: the column of the first line, which is not written.
    """
    line = f"{head}{', '.join(parts)}{tail}"
    if indent + len(line) <= WIDTH or not parts:
        return line
    inner = " " * (indent + 4)
    return "\n".join([head, *(f"{inner}{part}," for part in parts), f"{' ' * indent}{tail}"])


def literal(value: object) -> str:
    """Return ``repr`` with double quotes, as the formatter writes it, where that is the same."""
    text = repr(value)
    return text if '"' in text or "\\'" in text else text.replace("'", '"')


def import_lines(imports: Iterable[Import]) -> str:
    """Return imports in sections: the future, Python's own, installed packages, the user's."""
    sections: list[list[Import]] = [[], [], [], []]
    for each in imports:
        sections[_section(each.module)].append(each)
    return "\n\n".join("\n".join(_section_lines(part)) for part in sections if part)


def _section(module: str) -> int:
    top = module.split(".")[0]
    if top == "__future__":
        return 0
    if top in sys.stdlib_module_names:
        return 1
    loaded = sys.modules.get(top)
    return 3 if loaded is not None and is_users(loaded) else 2


def _section_lines(imports: list[Import]) -> list[str]:
    whole = sorted({(i.module, i.name) for i in imports if i.attribute is None})
    lines = [
        f"import {module}" if name == module.split(".")[0] else f"import {module} as {name}"
        for module, name in whole
    ]
    members: dict[str, set[tuple[str, str]]] = {}
    for each in imports:
        if each.attribute is not None:
            members.setdefault(each.module, set()).add((each.attribute, each.name))
    for module, names in sorted(members.items()):
        plain = sorted((attribute for attribute, name in names if attribute == name), key=_rank)
        if plain:
            whole_line = f"from {module} import {', '.join(plain)}"
            lines.append(
                whole_line
                if len(whole_line) <= WIDTH
                else fold(0, f"from {module} import (", plain, ")")
            )
        lines += [f"from {module} import {a} as {n}" for a, n in sorted(names) if a != n]
    return lines


def _rank(name: str) -> tuple[int, str]:
    """Return where a member is sorted: constants, then classes, then the others."""
    if name.isupper() and len(name) > 1:
        return 0, name
    return (1 if name[:1].isupper() else 2), name
