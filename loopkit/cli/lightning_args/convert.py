"""Convert what a file says to Lightning into a script that trains with loopkit."""

from __future__ import annotations

from loopkit.cli.lightning_args.call_arguments import Arguments, Unknown
from loopkit.cli.lightning_args.callbacks import convert_callbacks
from loopkit.cli.lightning_args.lightning_script import Script
from loopkit.cli.lightning_args.places import convert_loggers, convert_strategy
from loopkit.cli.lightning_args.plain_options import convert_options, reason_of
from loopkit.cli.lightning_args.signatures import SIGNATURES
from loopkit.cli.lightning_args.trainer_source import Given
from loopkit.errors import OptionError, nearest


def convert_lightning(given: Given) -> Script:
    """Convert a Trainer and what is around it.

    Raises:
        OptionError: Lightning's Trainer has no such argument.
    """
    found = Script(
        package=given.package, model=given.model, data=given.data, notes=dict(given.notes)
    )
    args = Arguments(given.trainer, found.notes)
    for name in args.given:
        if name not in SIGNATURES["Trainer"] and not name.startswith("**"):
            raise OptionError(
                f"Lightning's Trainer has no {name!r}.{nearest(name, SIGNATURES['Trainer'])}"
            )
    convert_options(args, found)
    convert_strategy(args, found)
    convert_loggers(args, found)
    convert_callbacks(args, found)
    found.checkpoint = {"every": "'1 epoch'", "keep": "1", **found.checkpoint}
    _convert_around(given, found)
    known = {name: reason_of(name) for name in SIGNATURES["Trainer"]}
    args.note_rest(known, "known only when your file runs")
    return found


def _convert_around(given: Given, found: Script) -> None:
    if isinstance(given.seed, Unknown):
        found.notes["seed_everything"] = (
            f"{given.seed.text} is known only when your file runs: Fit(seed=)"
        )
    elif given.seed is not None:
        found.fit["seed"] = repr(given.seed)
    path = given.checkpoint
    if path in ("last", "hpc"):
        found.fit["resume"] = "'auto'"
    elif isinstance(path, Unknown):
        found.notes["ckpt_path"] = f"{path.text} is known only when your file runs: Fit(resume=)"
    elif path is not None:
        found.notes["ckpt_path"] = (
            f"bring in its weights first: loopkit ckpt import {path} runs/a; or Fit(resume='auto') "
            "for a run of loopkit"
        )
