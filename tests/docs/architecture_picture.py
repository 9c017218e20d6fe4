"""Writes the rooms and imports of docs/architecture.md: ``python -m tests.docs.architecture_picture``.

A room is an entry of ``LAYERS`` in ``tests/rules/test_rules.py``: a module or package of loopkit.
"""

from __future__ import annotations

import ast
import textwrap
from collections import defaultdict
from pathlib import Path

from tests.docs.pages import DOCS
from tests.rules.test_rules import FILES, LAYERS, PACKAGE, imports, parsed

PAGE = DOCS / "architecture.md"
WIDTH = 110


def room_of(module: str) -> str:
    """Return the entry of LAYERS that a dotted name below loopkit belongs to."""
    rooms = {room for layer in LAYERS for room in layer}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in rooms:
            return ".".join(parts[:length])
    raise AssertionError(f"loopkit.{module} has no layer: give it one in LAYERS")


def imported_rooms() -> dict[str, set[str]]:
    """Return for each room the other rooms that it imports at run time."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        here = room_of(module.removesuffix(".__init__"))
        for name, _ in imports(parsed(path)):
            if name.startswith("loopkit.") and name != "loopkit.__version__":
                found[here].add(room_of(name.removeprefix("loopkit.")))
        found[here].discard(here)
    return found


def rooms() -> str:
    """Return a table of the packages and modules of loopkit, with their docstrings' first lines."""
    paths = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    paths += [path.parent for path in PACKAGE.glob("*/__init__.py")]
    rows = []
    for path in sorted(paths, key=lambda path: (path.is_file(), path.name)):
        source = path / "__init__.py" if path.is_dir() else path
        if path.name in ("__init__.py", "__main__.py"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        rows.append(f"| `{name}` | {summary(source)} |")
    return "\n".join(["| room | content |", "|---|---|", *rows]) + "\n"


def summary(source: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(parsed(source)) or ""
    first = " ".join(text.split("\n\n")[0].split()).removesuffix(".")
    return first.replace("``", "`").replace("|", "\\|")


def picture() -> str:
    """Return one line per room with the rooms that it imports; lines part the layers."""
    found = imported_rooms()
    height = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    width = max(map(len, height)) + 1
    layers = []
    for layer in reversed(LAYERS):
        lines = []
        for room in sorted(layer - {"__init__", "__main__"}):
            below = sorted(found[room], key=lambda other: (-height[other], other))
            lines += textwrap.wrap(
                f"{room:{width}}-> {', '.join(below)}" if below else room,
                WIDTH,
                subsequent_indent=" " * (width + 3),
                break_on_hyphens=False,
            )
        layers.append("\n".join(lines))
    return "```text\n" + f"\n{'-' * WIDTH}\n".join(layers) + "\n```\n"


def written(page: str) -> str:
    """Return the page with new text between its markers."""
    for name, text in (("rooms", rooms()), ("imports", picture())):
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        head, _, rest = page.partition(begin)
        page = head + begin + "\n" + text + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
