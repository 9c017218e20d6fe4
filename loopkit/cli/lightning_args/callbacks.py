"""Lightning's callbacks and profilers, as hooks and options of Fit."""

from __future__ import annotations

from collections.abc import Callable

from loopkit.cli.lightning_args.call_arguments import Arguments, Unknown, WrittenCall
from loopkit.cli.lightning_args.lightning_script import Script
from loopkit.cli.lightning_args.plain_options import in_seconds
from loopkit.foreign_names import FOREIGN_NAMES, Reason
from loopkit.interop.lightning.left_out import CALLBACKS

_NO_ARGUMENT = "loopkit's counterpart has no such argument"


def convert_callbacks(args: Arguments, found: Script) -> None:
    """Convert the callbacks, one by one; those that are the user's own stay callbacks."""
    given = args["callbacks"]
    for each in given if isinstance(given, list) else [given] if given else []:
        if isinstance(each, Unknown):
            found.notes[f"callbacks: {each.text}"] = (
                "known only when your file runs. Give it to LightningTask(callbacks=[...])"
            )
        elif not isinstance(each, WrittenCall):
            found.notes[f"callbacks: {each!r}"] = "it is no callback"
        elif each.name in _KINDS:
            own = Arguments(each, found.notes)
            _KINDS[each.name](own, found)
            own.note_rest(_reasons(each.name), _NO_ARGUMENT)
        elif each.name in CALLBACKS:
            found.notes[f"callbacks: {each.name}"] = CALLBACKS[each.name]
        elif each.module:
            found.callbacks.append(each)
        else:
            found.notes[f"callbacks: {each.name}"] = (
                f"it runs as it is: LightningTask(..., callbacks=[{each.shown}])"
            )
    if args["enable_model_summary"]:
        found.hook("ModelSummary(depth=1)")
    _convert_profiler(args, found)


_OURS = {
    "ModelCheckpoint": "Checkpoint",
    "EarlyStopping": "EarlyStop",
    "StochasticWeightAveraging": "SWA",
}
_NAMED = "a checkpoint is named by its step"
_REASONS = {
    "verbose": "the console shows it without being asked",
    "save_on_exception": "a run saves at every end that it can",
    "auto_insert_metric_name": _NAMED,
    "enable_version_counter": _NAMED,
    "check_finite": "Fit(on_nan=...) says what to do about values that are not finite",
    "logging_interval": "rates are logged with each log: Fit(log_every=...)",
    "batch_size_fn": "samples are counted from the batch",
    "mode": "no monitor is given, so there is no best one",
}


def _reasons(name: str) -> dict[str, str]:
    named = FOREIGN_NAMES.get(_OURS.get(name, ""), {})
    fitting = {k: v for k, v in named.items() if isinstance(v, Reason)}
    return {**_REASONS, **fitting}


def _monitored(own: Arguments, found: Script) -> str:
    name = str(own["monitor"])
    found.monitored.append(name)
    return f"{name}:{'max' if own['mode'] == 'max' else 'min'}"


def _checkpoint(own: Arguments, found: Script) -> None:
    if found.checkpoint:
        found.notes["callbacks: ModelCheckpoint"] = "a run has one Checkpoint: this is the second"
        own.use(*own.given)
        return
    kept, settings = own["save_top_k"], found.checkpoint
    seconds = in_seconds(own["train_time_interval"])
    if own["every_n_train_steps"]:
        settings["every"] = f"'{own['every_n_train_steps']} steps'"
    elif seconds:
        settings["every"] = f"'{seconds:g} s'"
    else:
        settings["every"] = f"'{own['every_n_epochs'] or 1} epochs'".replace(
            "'1 epochs'", "'1 epoch'"
        )
    if own["monitor"] is not None:
        settings["best"] = repr(_monitored(own, found))
        settings["keep"] = "1"
        if kept is not None and kept > 0:
            settings["keep_best"] = repr(kept)
        elif kept == -1:
            settings["keep"] = "None"
    else:
        settings["keep"] = "None" if kept == -1 else "1"
    if kept == 0:
        found.saves = False
    if own["save_weights_only"]:
        settings["weights_only"] = "True"
    if own["dirpath"]:
        found.fit.setdefault("run_dir", repr(own["dirpath"]))


def _early_stop(own: Arguments, found: Script) -> None:
    shown = [repr(_monitored(own, found)), f"patience={own['patience']!r}"]
    if own["min_delta"]:
        shown.append(f"min_delta={abs(own['min_delta'])!r}")
    found.hook(f"EarlyStop({', '.join(shown)})")


def _swa(own: Arguments, found: Script) -> None:
    start = own["swa_epoch_start"]
    part = f"{start * 100:g}%" if isinstance(start, float) else f"{start} epochs"
    found.hook(f"SWA(start={part!r})")


def _ema(own: Arguments, found: Script) -> None:
    shown = [f"decay={own['decay']!r}"]
    if own["update_every_n_steps"] != 1:
        shown.append(f"every={own['update_every_n_steps']!r}")
    found.hook(f"EMA({', '.join(shown)}, apply_at_end=True)")


def _summary(own: Arguments, found: Script) -> None:
    found.hook(f"ModelSummary(depth={max(0, own['max_depth'])!r})")


def _bar(own: Arguments, found: Script) -> None:
    found.fit.setdefault("progress", "'rich'" if own.name == "RichProgressBar" else "'auto'")


def _timer(own: Arguments, found: Script) -> None:
    seconds = in_seconds(own["duration"])
    if seconds:
        found.fit["time"] = repr(seconds)
    elif own.is_set("duration"):
        own.note("duration", "give Fit(time=...) in seconds")


def _throughput(own: Arguments, found: Script) -> None:
    found.hook("Throughput()")


def _rates(own: Arguments, found: Script) -> None:
    found.hook("LRMonitor()")


_KINDS: dict[str, Callable[[Arguments, Script], None]] = {
    "ModelCheckpoint": _checkpoint,
    "EarlyStopping": _early_stop,
    "StochasticWeightAveraging": _swa,
    "EMAWeightAveraging": _ema,
    "ModelSummary": _summary,
    "RichModelSummary": _summary,
    "TQDMProgressBar": _bar,
    "RichProgressBar": _bar,
    "Timer": _timer,
    "DeviceStatsMonitor": _throughput,
    "ThroughputMonitor": _throughput,
    "LearningRateMonitor": _rates,
}


def _convert_profiler(args: Arguments, found: Script) -> None:
    profiler = args["profiler"]
    if profiler is None:
        return
    name = profiler.name if isinstance(profiler, WrittenCall) else str(profiler)
    if name in ("pytorch", "PyTorchProfiler"):
        found.hook("Profiler()")
        if isinstance(profiler, WrittenCall):
            Arguments(profiler, found.notes).note_rest({}, "give Profiler(path=, memory=, stacks=)")
    elif name != "PassThroughProfiler":
        args.note("profiler", f"{name} measures Lightning's hooks: result.timings has the seconds "
                  "of data, computation and update, and hooks=[Profiler()] a trace")  # fmt: skip


def known_callbacks() -> set[str]:
    """Return the names of Lightning's callbacks that have an answer."""
    return {*_KINDS, *CALLBACKS}
