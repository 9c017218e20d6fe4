"""What the drawings of the pages share: colours, folders, programs that are run, and plain SVG."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tests.docs.pages import DOCS, ROOT, blocks

FOLDER = DOCS / "pictures"
COLOURS = ("#1f77b4", "#e6550d", "#2ca25f", "#8250df", "#cf222e", "#0a7ea4", "#bf8700")
# Background, text, lines, and a paler fill.
LIGHT = {"back": "#ffffff", "text": "#24292f", "line": "#8c959f", "fill": "#eef2f6"}
DARK = {"back": "#1e2129", "text": "#d7dbe0", "line": "#768390", "fill": "#2b303b"}


@contextmanager
def digits() -> Iterator[Path]:
    """A folder with digits.py of First ten minutes."""
    with tempfile.TemporaryDirectory() as name:
        for block in blocks(DOCS / "first-ten-minutes.md"):
            if block.title == "digits.py":
                Path(name, block.title).write_text(block.text, encoding="utf-8")
        yield Path(name)


def python(folder: Path, code: str, *arguments: str, ends: int = 0) -> str:
    """Run Python in a folder and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == ends, done.stderr
    return done.stdout


def page_code(page: str, last: int | None = None) -> dict[str, Any]:
    """Run the Python blocks of a page, up to the ``last`` one; return what they have defined."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        os.chdir(folder)
        try:
            for block in [b for b in blocks(DOCS / page) if b.language == "python"][:last]:
                exec(compile(block.text, page, "exec"), namespace)
        finally:
            os.chdir(before)
    return namespace


def plot(
    name: str,
    draw: Callable[[Any, dict[str, str]], None],
    size: tuple[float, float] = (5.0, 3.0),
    grid: bool = True,
) -> None:
    """Write one drawing in its light and its dark form."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    for colours, path in (
        (LIGHT, FOLDER / f"{name}.svg"),
        (DARK, FOLDER / f"{name}-dark.svg"),
    ):
        line = {f"{part}.color": colours["text"] for part in ("xtick", "ytick", "text")}
        settings = {
            **line, "axes.labelcolor": colours["text"], "axes.edgecolor": colours["line"],
            "axes.facecolor": colours["back"], "svg.fonttype": "none", "svg.hashsalt": name,
            "font.family": "sans-serif", "font.size": 10,
        }  # fmt: skip
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=size, layout="constrained", facecolor=colours["back"])
            canvas = FigureCanvasSVG(figure)
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            if grid:
                axes.grid(True, alpha=0.25)
            axes.set_axisbelow(True)
            draw(axes, colours)
            canvas.print_svg(path, metadata={"Date": None, "Creator": None})
        text = "\n".join(row.rstrip() for row in path.read_text(encoding="utf-8").splitlines())
        path.write_text(text + "\n", encoding="utf-8")


class Drawing:
    """An SVG picture of at most ``width`` pixels, which a narrow screen shows smaller.

    Text of 13 pixels in a picture of 460 is still read on a phone.
    """

    def __init__(self, width: int, about: str, colours: dict[str, str]) -> None:
        self.width, self.height, self.about, self.colours = width, 0.0, about, colours
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, more: str = ""
    ) -> None:
        """Draw a rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:g}" fill="{fill}"{more}/>'
        )
        self.height = max(self.height, y + height)

    def text(self, x: float, y: float, text: str, kind: str = "", more: str = "") -> None:
        """Write a line; ``kind`` is "", "code", "small" or "bold"."""
        named = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text x="{x:g}" y="{y:g}"{named}{more}>{escape(text)}</text>')
        self.height = max(self.height, y + 4)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw an upright arrow, from its first end to its second."""
        line, tip = self.colours["line"], 6 if y2 > y1 else -6
        self._parts.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}M{x2 - 4:g} {y2 - tip:g}L{x2:g} {y2:g}L{x2 + 4:g} '
            f'{y2 - tip:g}" fill="none" stroke="{line}" stroke-width="1.6"/>'
        )

    def svg(self) -> str:
        """Return the picture."""
        height = self.height + 12
        rules = (
            f"text{{font:13px system-ui,sans-serif;fill:{self.colours['text']}}}"
            ".code{font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
            ".small{font-size:12px}.bold{font-weight:600}.title{font-size:17px;font-weight:600}"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{height:g}" '
            f'viewBox="0 0 {self.width} {height:g}" role="img" aria-label="{escape(self.about)}">'
            f"<style>{rules}</style>"
            f'<rect width="{self.width}" height="{height:g}" rx="8" fill="{self.colours["back"]}"/>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )


def draw_both(name: str, draw: Callable[[dict[str, str]], Drawing]) -> None:
    """Write one drawing in its light and its dark form."""
    for colours, path in ((LIGHT, f"{name}.svg"), (DARK, f"{name}-dark.svg")):
        (FOLDER / path).write_text(draw(colours).svg(), encoding="utf-8")
