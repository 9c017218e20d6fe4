"""The page of runs: one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

_SCRIPTS = (
    "uplot/uPlot.iife.min.js",
    "format.js",
    "curves.js",
    "charts.js",
    "tables.js",
    "sections.js",
    "main.js",
)
_STYLES = ("uplot/uPlot.min.css", "page.css")
_LICENCES = ("uplot/LICENSE",)


def html_page(values: Mapping[str, Any]) -> str:
    """Return the page.

    Its policy allows the packed scripts and styles alone: whatever a logged name holds, it is text.

    Args:
        values: what ``payload`` returned.
    """
    # In a script element, only "<" could end it.
    data = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    script, style = _joined(_SCRIPTS, "\n;\n"), _joined(_STYLES, "\n")
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "TITLE": _title(values),
        "STYLE": style,
        "LICENCES": _joined(_LICENCES, "\n").replace("--", "- -"),
        "DATA": data.replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    before, *rest = _asset("page.html").split("{{")
    page = [before]
    for piece in rest:
        name, _, text = piece.partition("}}")
        page += [parts[name], text]
    return "".join(page)


def _joined(names: Sequence[str], between: str) -> str:
    return between.join(_asset(name).rstrip() for name in names)


def _asset(name: str) -> str:
    place = resources.files("loopkit.cli.report").joinpath("assets")
    return place.joinpath(*name.split("/")).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    code = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{code}'"


def _title(values: Mapping[str, Any]) -> str:
    names = [run["name"] for run in values["runs"]]
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return shown.replace("&", "&amp;").replace("<", "&lt;")
