"""``loopkit plan``: what a run would need in memory on each rank, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loopkit.cli.args.request import Command, read_request
from loopkit.cli.args.tokens import take_flag, take_value
from loopkit.cli.bench.plot import check
from loopkit.cli.plan.plan_picture import draw
from loopkit.cli.plan.plan_tables import Plan, as_json, as_text
from loopkit.plan.cards import card_bytes, usable
from loopkit.plan.planned import planned_run
from loopkit.plan.savings import savings
from loopkit.task import Task

OPTIONS = {
    "--card CARD": "a card, as 80GB, 24GiB or h100: also find the largest micro-batch that fits it",
    "--no-savings": "leave out what each way to save memory would save, which takes a plan for each",
    "--picture FILE": "also draw the plan to this file; its ending says the format. "
    "Needs matplotlib: loopkit-torch[plots]",
    "--json": "print the plan as JSON",
}
PLAN = Command(
    "plan",
    "Foresee the memory of a training step on each rank. It computes shapes and no values, so it "
    "needs neither GPUs nor other machines, and --devices may be any number.",
    OPTIONS,
    hidden=(
        "accelerator", "resume", "checkpoint", "run_dir", "eval_every", "eval_first", "eval_after",
        "eval_batch_size", "loggers", "progress", "dry_run", "debug",
    ),
    examples=("--strategy fsdp --devices 64 --precision bf16 --card 80GB", "--batch-size 4 --json"),
)  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Plan the target; return the exit code, which is 1 if it does not fit the card."""
    request = read_request(PLAN, argv)
    if request is None:
        return 0
    tokens = request.tokens
    card, picture = take_value(tokens, "card"), take_value(tokens, "picture")
    wants_json, without_savings = take_flag(tokens, "json"), take_flag(tokens, "no_savings")
    size = None if card is None else card_bytes(card)
    if picture is not None:
        check(Path(picture))
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    options = request.build(values)[0].options

    def make_task() -> Task:
        return request.build(values)[1]

    with planned_run(make_task, options) as planned:
        strategy = planned.run.strategy
        plan = Plan(
            f"{request.task.__name__}: {strategy.name} on {planned.ranks} "
            f"device{'s' if planned.ranks > 1 else ''}, {options.precision}, "
            f"{planned.batch_size} samples in a micro-batch",
            planned.peak(),
            notes=planned.notes,
            card=size,
            largest=None if size is None else planned.largest_batch(usable(size)),
        )
        batch_size = planned.batch_size
    if not without_savings:
        plan.savings = list(savings(make_task, options, strategy, batch_size))
    print(json.dumps(as_json(plan), indent=2) if wants_json else "\n".join(as_text(plan)))
    if picture is not None:
        draw(plan, Path(picture))
    return 0 if plan.fits else 1
