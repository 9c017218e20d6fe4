"""The table of docs/strategies.md gives the differences that each strategy has."""

from __future__ import annotations

import pytest

from tests.docs import parity_table
from tests.docs.pages import rows_of

SAID = {row[0]: row[1:] for row in rows_of(parity_table.PAGE)}


@pytest.mark.parametrize("name", parity_table.STRATEGIES)
def test_the_numbers_under_a_strategy_are_as_near_as_the_page_says(pair, name):
    found = parity_table.distances(pair, parity_table.STRATEGIES[name])
    assert len(SAID[name]) == len(parity_table.CASES)
    for cell, (case, gaps) in zip(SAID[name], found.items()):
        assert parity_table.within(cell, *gaps), (case, cell, gaps)


def test_the_table_can_be_wrong():
    assert not parity_table.within("the same bits", 1e-9, 0.0)
    assert not parity_table.within("weights within 1e-7, losses the same", 1e-6, 0.0)
    assert not parity_table.within("weights within 1e-7, losses the same", 1e-8, 1e-9)
    assert parity_table.within("weights within 1e-7, losses within 1e-7", 1e-8, 1e-9)
