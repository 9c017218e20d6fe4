"""Writes the tables of docs/options.md from the code: ``python -m tests.docs.options_table``."""

import inspect
import re
from dataclasses import MISSING, fields

from loopkit import Checkpoint, Compile, Loader
from loopkit.options import Options
from tests.docs.pages import DOCS

PAGE = DOCS / "options.md"


def meanings(kind: type) -> dict[str, str]:
    """Return the description of each argument in the docstring."""
    section = re.split(
        r"\n\n(?=\w+:)|\Z", inspect.getdoc(kind).split("Args:\n")[-1].split("Attributes:\n")[-1]
    )[0]
    found = {}
    for names, text in re.findall(
        r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE
    ):
        for name in names.split(", "):
            found[name] = re.sub(r"\s+", " ", text)
    return found


def defaults(kind: type) -> dict[str, object]:
    if kind is Loader:
        parameters = list(inspect.signature(kind).parameters.values())[1:]
        return {p.name: p.default for p in parameters}
    return {
        f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(kind)
    }


def table(kind: type) -> str:
    texts = meanings(kind)
    rows = [
        f"| `{name}` | `{default!r}` | {texts[name]} |" for name, default in defaults(kind).items()
    ]
    text = "\n".join(["| name | default | meaning |", "|---|---|---|", *rows])
    return text.replace("``", "`").replace("<", "&lt;") + "\n"


def written(page: str) -> str:
    """Return the page with a new table between each pair of markers."""
    for kind in (Options, Checkpoint, Compile, Loader):
        begin, end = f"<!-- {kind.__name__} -->\n", "<!-- end -->"
        head, _, rest = page.partition(begin)
        page = head + begin + "\n" + table(kind) + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
