"""Writes all generated parts of the pages: ``python -m tests.docs.write_pages``.

The table of docs/strategies.md needs several ranks and a minute: ``tests.docs.parity_table``
writes it. Pictures come from real runs: ``tests.docs.pictures`` draws them.
"""

from __future__ import annotations

from benchmarks import page, record
from tests.docs import (
    architecture_picture,
    front_page,
    lifecycle_trace,
    lightning_tables,
    options_table,
    pictures,
)


def main() -> None:
    """Write the pages that the tests compare with the code."""
    for tables in (options_table, architecture_picture, lightning_tables):
        text = tables.PAGE.read_text(encoding="utf-8")
        tables.PAGE.write_text(tables.written(text), encoding="utf-8")
    lifecycle_trace.PAGE.write_text(lifecycle_trace.page(), encoding="utf-8")
    record.PAGE.write_text(page.render(record.results()), encoding="utf-8")
    front_page.main()
    pictures.benchmarks()


if __name__ == "__main__":
    main()
