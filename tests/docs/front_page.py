"""Writes the three numbers of README and docs/index.md from ``benchmarks/results``."""

from __future__ import annotations

from benchmarks import record
from tests.docs.pages import DOCS, ROOT

FRONT = (ROOT / "README.md", DOCS / "index.md")
BEGIN, END = "<!-- numbers -->\n", "<!-- end -->"


def numbers() -> str:
    """Return a table of three results, each with the command that measures it."""
    found = record.results()
    steps = {
        name: row["step"]["median"]
        for name, row in found["overhead"]["settings"]["everything on"].items()
    }
    ratios = {
        name: row["ratio"]["median"] for name, row in found["strategies"]["settings"]["DDP"].items()
    }
    loading = found["import_time"]["milliseconds"]["loopkit"]["over"]["median"]
    rows = [
        f"| **{steps['loopkit']:.0f} µs** | a step with clipping, a schedule, logs, a progress bar and a "
        f"checkpoint. A fast hand-written loop takes {steps['best hand-written loop']:.0f}, the Hugging "
        f"Face Trainer {steps['transformers']:.0f}, Lightning {steps['lightning']:.0f} | "
        "`python benchmarks/overhead.py` |",
        f"| **{ratios['loopkit']:.2f} ×** | the time of a step written by hand, under DDP on two ranks. "
        f"Lightning takes {ratios['lightning']:.2f} × | `python benchmarks/strategies.py` |",
        f"| **{loading:+.0f} ms** | for `import loopkit`, beside `import torch` | "
        "`python benchmarks/import_time.py` |",
    ]
    return "\n".join(["| measured | what | with |", "|---:|---|---|", *rows]) + "\n"


def written(page: str) -> str:
    """Return the page with new numbers between the markers."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + "\n" + numbers() + "\n" + END + rest.partition(END)[2]


def main() -> None:
    """Write both pages."""
    for front in FRONT:
        front.write_text(written(front.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
