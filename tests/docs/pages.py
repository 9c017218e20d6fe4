"""Reads the pages: their blocks in order, and their tables."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r"(?P<skip><!-- not run: [^>]+-->\s*)?^(?P<indent> *)```(?P<language>\w*)(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: number of its first line.
        title: name of the file that it shows; "" without one.
        runs: False after a comment "not run".
        follows: whether nothing but space separates it from the block before.
    """

    language: str
    text: str
    line: int
    title: str
    runs: bool
    follows: bool


def blocks(page: Path) -> list[Block]:
    source, found, end = page.read_text(encoding="utf-8"), [], -1
    for match in _FENCE.finditer(source):
        title = re.search(r'title="([^"]+)"', match["rest"])
        found.append(
            Block(
                match["language"],
                match["text"],
                source.count("\n", 0, match.start("text")) + 1,
                title[1] if title else "",
                match["skip"] is None,
                end >= 0 and not source[end : match.start()].strip(),
            )
        )
        end = match.end()
    return found


def matches(shown: str, printed: str) -> bool:
    """Compare a block of a page with the output. "…" matches anything; spaces are equal."""
    shown, printed = (re.sub(r" +", " ", text.rstrip()) for text in (shown, printed))
    return re.fullmatch(re.escape(shown).replace("…", ".*?"), printed, flags=re.DOTALL) is not None


def rows_of(page: Path) -> list[list[str]]:
    """Return the cells of every row of every table of a page, including headings."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| "))] for line in lines]
    return [row for row in rows if any(cell.strip("-: ") for cell in row)]
