"""Measures and writes the table of docs/strategies.md: ``python -m tests.docs.parity_table``."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract import jobs
from tests.docs.pages import DOCS
from tests.ranks import Ranks

PAGE = DOCS / "strategies.md"
# Without this setting DeepSpeed would not shard layers as small as these.
ZERO3 = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STRATEGIES: dict[str, Any] = {
    "DDP": "ddp", "FSDP": "fsdp", "DeepSpeed, stage 1": ("DeepSpeed", {"stage": 1}),
    "DeepSpeed, stage 2": ("DeepSpeed", {"stage": 2}), "DeepSpeed, stage 3": ("DeepSpeed", {"stage": 3, "config": ZERO3}),
    "TensorParallel": "tensor",
}  # fmt: skip
# Two epochs of 7 steps over 52 sentences, with dropout, a schedule and weighted losses. The one
# process accumulates.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_norm": {"clip_norm": 0.5},
    "accumulate": {"accumulate": 2, "batch_size": 4, "clip_norm": 0.5},
    "bf16": {"precision": "bf16"},
}
HEAD = [
    "| on 2 ranks, against one process | fp32 | fp32, `clip_norm` | fp32, `clip_norm`, "
    "`accumulate=2` | bf16 |",
    "|---|---|---|---|---|",
]
BEGIN, END = "<!-- parity -->\n", "<!-- end -->"


def distances(pair: Ranks, strategy: Any) -> dict[str, tuple[float, float]]:
    """Return by case the largest difference of a weight and of a loss, relative to the largest."""
    found = {}
    for case, given in CASES.items():
        options = {"batch_size": 8, "epochs": 2, "log_every": 1, **given}
        mine = pair.call(jobs.train, strategy, "words", **options)[0]
        # Ranks of a tensor-parallel group train on the same samples.
        dp_size = 1 if strategy == "tensor" else 2
        alone = jobs.train(
            "single", "words", **{**options, "accumulate": dp_size * options.get("accumulate", 1)}
        )
        gap = max(
            float((mine["model"][n].double() - t.double()).abs().max())
            for n, t in alone["model"].items()
        )
        size = max(float(t.abs().max()) for t in alone["model"].values())
        losses = [
            (a["train/loss"], b["train/loss"])
            for a, b in zip(mine["rows"], alone["rows"])
            if "train/loss" in a
        ]
        found[case] = gap / size, max(abs(a - b) / abs(b) for a, b in losses)
    return found


def shown(weights: float, losses: float) -> str:
    """Return the distances in words: powers of ten, large enough for other processors."""
    if weights == losses == 0:
        return "the same bits"
    return ", ".join(
        f"{what} {bound(value)}" for what, value in (("weights", weights), ("losses", losses))
    )


def bound(value: float) -> str:
    """Return the next power of ten above three times ``value``, in words."""
    if not value:
        return "the same"
    power = -20
    while 10.0**power < 3 * value:
        power += 1
    return f"within 1e{power}"


def within(cell: str, weights: float, losses: float) -> bool:
    """Whether measured distances are within what a cell of the page says."""
    if cell == "the same bits":
        return weights == losses == 0
    limits = [float(part.split()[-1]) if "within" in part else 0.0 for part in cell.split(", ")]
    return weights <= limits[0] and losses <= limits[1]


def table(pair: Ranks) -> str:
    """The table as Markdown."""
    rows = []
    for name, strategy in STRATEGIES.items():
        found = distances(pair, strategy)
        # In bf16 the same run in two processes need not give the same bits: oneDNN's kernels round
        # by circumstance.
        gaps = [tuple(max(gap, 1e-3 * (case == "bf16")) for gap in found[case]) for case in CASES]
        rows.append(f"| {name} | " + " | ".join(shown(*pair_of) for pair_of in gaps) + " |")
    return "\n".join([*HEAD, *rows]) + "\n"


def written(page: str, text: str) -> str:
    """Return the page with a new table between its markers."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = Ranks(2)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table(ranks)), encoding="utf-8")
    ranks.close()
