"""docs/support.md says what the strategies do."""

from __future__ import annotations

import re

import pytest

from loopkit.strategies.precision import PRECISIONS
from tests.docs import support_table
from tests.docs.pages import rows_of

TEXT = support_table.PAGE.read_text(encoding="utf-8")
SAID = {
    row[0]: dict(zip(support_table.STRATEGIES, row[1:]))
    for row in rows_of(support_table.PAGE)
    if row[0] in support_table.ROWS
}
REASONS = dict(re.findall(r"^(\d+)\. `(.+)`$", TEXT, re.MULTILINE))
REFUSED = sorted(
    (name, row) for row, cells in SAID.items() for name, cell in cells.items() if cell != "yes"
)


def said(name, row):
    cell = SAID[row][name]
    return "" if cell == "yes" else REASONS[re.fullmatch(r"no \((\d+)\)", cell)[1]]


def lacks_fp16(row, found):
    return row == '`"fp16"`' and "DeepSpeed finds no fp16 on this cpu" in found


def test_every_precision_has_a_row():
    assert {row.strip('`"') for row in SAID} >= set(PRECISIONS)
    assert list(SAID) == support_table.ROWS


@pytest.mark.parametrize(("name", "row"), REFUSED)
def test_what_the_page_says_no_to_is_refused_with_its_message(pair, name, row):
    kind = support_table.STRATEGIES[name]
    found = (
        support_table.tried(kind, row)
        if kind == "single"
        else pair.call(support_table.tried, kind, row)[0]
    )
    if lacks_fp16(row, found):
        pytest.skip("this processor has no fp16 for DeepSpeed, which is said first")
    assert found == said(name, row)


@pytest.mark.long
@pytest.mark.parametrize("row", support_table.ROWS)
def test_every_cell_of_the_page_is_as_it_says(pair, row):
    for name, message in support_table.cells(pair, row).items():
        assert lacks_fp16(row, message) or message == said(name, row), name
