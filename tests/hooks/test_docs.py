"""The page on the hooks: every hook has its place there (its blocks are run with those of all
pages).
"""

from __future__ import annotations

import re
from pathlib import Path

import loopkit.hooks

PAGE = Path(__file__).parents[2] / "docs/hooks-included.md"


def test_every_hook_has_a_section():
    titles = set(re.findall(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(loopkit.hooks.__all__) <= titles
