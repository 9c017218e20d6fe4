"""Makes docs/benchmarks.md from the results on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import goals

HEAD = """# Benchmarks

The scripts in `benchmarks/` measured these numbers and wrote this page. `benchmarks/results/*.json` has all numbers
with their quartiles. The tables show medians. To measure again, use a machine with nothing else to do:

```console
$ make bench                   # everything below but the GPU, in about an hour and a half
$ python benchmarks/gpu.py     # and the tests that need a GPU
```
"""

OVERHEAD = """
## The cost of a step

The model is a tiny classifier of {steps}, so that the time of the framework is visible. With a large model, the
framework takes the same number of microseconds and a smaller part of the step. Every contestant trains the same model
from the same weights on the same prepared batches, in one process with one torch thread. The contestants take turns, in
{rounds} short runs each. A check compares the final weights, which are the same for all. Every contestant has a fused
AdamW, except the usual hand-written loop, which uses `torch.optim.AdamW(parameters)` with its defaults.

The clock is in the user's code: the model records the time of every call. A step lasts from one call to the next, so
everything in between counts, in the same way for all. Times are averages over blocks of 50 steps with one log each, and
the table shows the median block. "Over the best" and "ratio" compare with the best hand-written loop of the same round.
The start and the last checkpoint lie outside of the blocks.

"Bare" is the plain loop: no logging, no progress, no clipping, no schedule, no checkpoints. "Everything on" means:

- clip to norm 1 and follow a cosine schedule;
- log the loss every 50 steps to files, and draw a progress bar to nowhere;
- save a checkpoint at the end.

Each contestant does that by its own means.

![Bars of the time of a step of each contestant](pictures/benchmarks.svg)

loopkit runs with its defaults in both settings. So it catches non-finite losses and gradients before the update, and
its randomness is a function of seed and step. No other contestant does either by default. loopkit can still be faster
than the best hand-written loop, which uses torch's public interface. The reason: loopkit calls torch's fused kernel
itself and saves the Python code of `optimizer.step()`. The kernel, its arguments and the resulting bits are the same.
"""

PROGRESS = """
## The cost of a progress bar

The same model trains {steps} steps, and the bar is drawn on a pseudo-terminal that another process reads. The bar shows
the loss every 50 steps, or as often as the framework does by itself. Times are averages over a whole run. The table
shows medians of {rounds} runs in turns.
"""

THROUGHPUT = """
## Real jobs with their data

Small jobs on one core, each with its data pipeline. Every contestant reads every sample once per epoch, and has a fused
AdamW. "By hand" is a loop around torch's `DataLoader`. "Ratio" compares the samples per second with it in the same
round, of {rounds}: above 1 is faster. Each round has orders of its own, as the order decides how much is padded. Each
contestant has new processes in each round, as the memory that a process gets is a part of its speed. They take turns
of some steps, so that what else the machine does slows all of them. Memory is the peak of the first run.

While loopkit trains on a CPU, the process keeps the memory that torch frees
([why](decisions/cpu-memory.md)). A loop by hand gets the same with two environment variables of glibc, and "by hand,
tuned malloc" has them: `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_`.

- CNN: images of digits from a `TensorDataset`.
- charlm: a GPT on characters, from a `TensorDataset`.
- BERT: texts of 8 to 64 tokens in a `datasets.Dataset`, padded to the longest of a batch.
- ViT: images that two worker processes cut and mirror at random.
"""

EVALUATION = """
## Evaluation

Accuracy over {classes} classes and the mean loss of {samples:,} samples in batches of 500. The data set makes samples
one by one. "By hand" adds up two tensors; loopkit and Lightning use torchmetrics. "Growth" is how many more MB a fresh
process takes for 1,000,000 samples than for 100,000. Trainer keeps the class of a sample and not its logits.
"""

PREDICTION = """
## Prediction

The class of each of {samples:,} samples, by the model and the data of the evaluation above. "By hand" is a loop around
torch's `DataLoader`.
"""

START = """
## The start, and a resume

The time from the call of the contestant to the first call of the model, on a shuffled data set whose samples take no
memory. "More memory" is what the order of the samples takes: the growth of the peak of a process that trained on
10,000 before. torch's sampler makes a list of all indices, so 1,000,000,000 of them do not fit into 24 GB, and only
loopkit was measured there.
"""

RESUME = """
A resume after {consumed:,} samples, in batches of {batch:,}, in the middle of an epoch. The time goes from the call to
the first step. Trainer and accelerate draw the indices again up to that place. Lightning starts the epoch over.
"""

COUNTS = """
## By number

What a step costs with more parameters and more hooks, and a batch of an evaluation with more metrics. A parameter has 8
numbers. A hook counts the steps in the contestant's own kind of hook. A metric is an F-score of torchmetrics, in a
`MetricCollection`. Medians of {rounds} runs in turns; "ratio" compares with the loop by hand of the same round.
"""

STRATEGIES = """
## The cost of a step over several ranks

The model is a GPT of {parameters:,} parameters on {ranks} ranks over gloo, with one torch thread each. Each contestant
has two new processes in each of {rounds} rounds. The contestants take turns of a few steps, and end with the same
weights. "By hand" is a loop around torch's `DistributedDataParallel` or `fully_shard` with a fused AdamW. "By hand,
tuned malloc" is as above. "Ratio" compares the time of a step with that by hand in the turns of the same moment.
loopkit runs with its defaults: it catches a non-finite value on any rank before the update. All ranks react to a signal
to any rank within about a second.
"""

MODELS = """
### Known models

GPT-2 and ResNet-50 in bfloat16 autocast, compiled, with batches in pinned host memory. "Ratio" compares the time of a
step with that of the loop by hand. MFU is the share of the card's peak: the operations that torch counts in a step,
per second. "Waits" counts how often the host waits for the device in a step. Memory is the peak of the tensors.
"""

GPU = """
## The cost of a step on a GPU

A GPT in bfloat16 autocast on one {gpu}, with fused AdamW, {steps} steps, {rounds} runs of each in turns. "Host" is the
time that the host needs to submit a step. "Device" is the time between the same moments of two steps, by the clock of
the device.
"""

IMPORTS = """
## The cost of `import`

{rounds} fresh processes of each contestant, in turns. "Over torch" compares with `import torch` of the same round.
"""

CHECKPOINTS = """
## Saving and loading

A state of {megabytes} MB in {tensors} tensors, saved and loaded {rounds} times each, in turns, on one file system.
"Durable" says whether the data is on the disk when the call returns (`fsync`). "Verified" says whether loading
notices a flipped bit.
"""

RELIABILITY = """
## After a stop, a kill or damage

A network with dropout trains {steps} steps on noisy, shuffled samples, saves every 5 steps, and is stopped after step
10, in the middle of an epoch. A new process resumes it as the documentation of the framework shows. The oracle is the
run of the same framework that nothing disturbed.

- "Same bits": the resumed run ends with the same weights. If it began at an earlier save, the table says so.
- "Another run": it goes through without a warning, and ends with other weights.
- "Error": it ends with an error, and the user has to help.

Damage is done to the largest file of the newest checkpoint. `kill -9` comes at {kills} moments of a save. "Clock set
back" gives the older checkpoint the later file time. A hostile file holds a pickle that runs a command when it is
loaded. "DCP" is a loop by hand with `torch.distributed.checkpoint`, which leaves the position in the data and the
random numbers to the user. Other settings may do better: accelerate, for one, can save the state of a
`StatefulDataLoader`.
"""


def render(found: dict[str, Any]) -> str:
    """Return the page.

    Args:
        found: results by name, the keys of ``_PARTS``.
    """
    return (
        HEAD
        + goals.table(found)
        + "".join(part(found[name]) for name, part in _PARTS.items() if name in found)
    )


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"\n{result['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load']} at the end; Python {machine['python']}, {packages}.\n"
    )


def _ranked(
    columns: tuple[str, ...],
    rows: dict[str, Any],
    by: str,
    cells: Callable[[dict[str, Any]], tuple[str, ...]],
    *,
    highest_first: bool = False,
) -> str:
    """Return a table of the contestants, the best first.

    Args:
        columns: the heads, that of the contestants first.
        rows: what was measured, by contestant.
        by: the value whose median gives the order.
        cells: makes the other cells of a contestant's row.
        highest_first: the highest median is the best.
    """
    text = f"\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}\n"
    order = sorted(rows, key=lambda name: rows[name][by]["median"], reverse=highest_first)
    return text + "".join(f"| {' | '.join((name, *cells(rows[name])))} |\n" for name in order)


def _overhead(result: dict[str, Any]) -> str:
    text = OVERHEAD.format(rounds=result["rounds"], steps=f"{result['parameters']} parameters")
    columns = ("contestant", "µs per step", "quartiles", "over the best", "ratio")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        step = row["step"]
        quartiles = f"{step['low']:.0f} to {step['high']:.0f}"
        return (f"{step['median']:.0f}", quartiles, *_compared(row))

    for setting, rows in result["settings"].items():
        text += f"\n### {setting.capitalize()}\n" + _ranked(columns, rows, "over", cells)
    return text + _where(result)


def _compared(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['over']['median']:+.0f}", f"{row['ratio']['median']:.2f}"


def _progress(result: dict[str, Any]) -> str:
    text = PROGRESS.format(steps=result["steps"], rounds=result["rounds"])
    columns = ("contestant", "µs per step", "over the best", "ratio")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (f"{row['step']['median']:.0f}", *_compared(row))

    return text + _ranked(columns, result["rows"], "over", cells) + _where(result)


def _throughput(result: dict[str, Any]) -> str:
    text = THROUGHPUT.format(rounds=result["rounds"])
    columns = ("contestant", "samples/s", "ratio", "quartiles", "peak memory, MB")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (f"{row['speed']['median']:.0f}", *_ratio_and_quartiles(row), f"{row['memory']:.0f}")

    for job, rows in result["jobs"].items():
        text += f"\n### {job}\n" + _ranked(columns, rows, "ratio", cells, highest_first=True)
    return text + _where(result)


def _ratio_and_quartiles(row: dict[str, Any]) -> tuple[str, str]:
    ratio = row["ratio"]
    return f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}"


def _evaluation(result: dict[str, Any]) -> str:
    text = EVALUATION.format(classes=result["classes"], samples=result["samples"])
    columns = ("contestant", "samples/s", "ratio", "growth, MB")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        speed, ratio = row["speed"]["median"], row["ratio"]["median"]
        return f"{speed:,.0f}", f"{ratio:.2f}", str(round(row["growth"]))

    table = _ranked(columns, result["rows"], "ratio", cells, highest_first=True)
    return text + table + _where(result)


def _prediction(result: dict[str, Any]) -> str:
    text = PREDICTION.format(samples=result["samples"])
    columns = ("contestant", "samples/s", "ratio", "quartiles")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (f"{row['speed']['median']:,.0f}", *_ratio_and_quartiles(row))

    table = _ranked(columns, result["rows"], "ratio", cells, highest_first=True)
    return text + table + _where(result)


def _start(result: dict[str, Any]) -> str:
    text = START + "\n| contestant | samples | ms to the first step | more memory, MB |\n"
    text += "|---|---:|---:|---:|\n"
    for row in result["samples"]:
        text += (
            f"| {row['name']} | {row['samples']:,} | {row['seconds']['median'] * 1e3:,.0f} | "
            f"{row['growth']:,.0f} |\n"
        )
    text += RESUME.format(consumed=result["resume"][0]["samples"], batch=result["batch"])
    text += "\n| contestant | ms to the first step |\n|---|---:|\n"
    for row in sorted(result["resume"], key=lambda row: row["seconds"]["median"]):
        text += f"| {row['name']} | {row['seconds']['median'] * 1e3:,.0f} |\n"
    return text + _where(result)


def _counts(result: dict[str, Any]) -> str:
    text = COUNTS.format(rounds=result["rounds"])
    for kind, numbers in result["kinds"].items():
        names = list(next(iter(numbers.values())))
        heads = [head for name in names for head in (f"{name}, µs", "ratio")]
        text += f"\n### {kind.capitalize()}\n\n| {kind} | {' | '.join(heads)} |\n"
        text += f"|---:|{'---:|' * len(heads)}\n"
        for number, rows in numbers.items():
            cells = [
                cell
                for row in rows.values()
                for cell in (f"{row['time']['median']:,.0f}", f"{row['ratio']['median']:.2f}")
            ]
            text += f"| {int(number):,} | {' | '.join(cells)} |\n"
    return text + _where(result)


def _strategies(result: dict[str, Any]) -> str:
    text = STRATEGIES.format(**{key: result[key] for key in ("parameters", "ranks", "rounds")})
    columns = ("contestant", "ms per step", "ratio", "quartiles")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (f"{row['step']['median']:.2f}", *_ratio_and_quartiles(row))

    for kind, rows in result["settings"].items():
        text += f"\n### {kind}\n" + _ranked(columns, rows, "ratio", cells)
    return text + _where(result)


def _gpu(result: dict[str, Any]) -> str:
    text = GPU.format(**{key: result[key] for key in ("gpu", "steps", "rounds")})
    text += "\n| contestant | host, ms | device, ms | ratio |\n|---|---:|---:|---:|\n"
    for name, row in result["rows"].items():
        text += (
            f"| {name} | {row['host']['median']:.2f} | {row['device']['median']:.2f} | "
            f"{row['ratio']['median']:.3f} |\n"
        )
    if "models" in result:
        text += _models(result["models"])
    return text + _where(result)


def _models(result: dict[str, Any]) -> str:
    text = MODELS
    for name, found in result["speeds"].items():
        text += (
            f"\n| {name}, {found['rounds']} runs | step, ms | ratio | {found['unit']}/s | MFU | peak, MB | waits |\n"
            "|---|---:|---:|---:|---:|---:|---:|\n"
        )
        for contestant, row in found["rows"].items():
            mfu = f"{row['mfu']:.2f}" if "mfu" in row else "not known"
            text += (
                f"| {contestant} | {row['device']:.2f} | {row['ratio']:.3f} | {row['per_second']:,.0f} | {mfu} | "
                f"{row['peak']:,.0f} | {row['waits']:.1f} |\n"
            )
    save, copies, plan = result["save"], result["copies"], result["plan"]
    return text + (
        f"\n- A save of {save['megabytes']:,.0f} MB in the background lengthens the run by {save['stall']:.0f} ms.\n"
        f"- A step with the copy of its batch takes {copies['loopkit']:.3f} of a step whose batch lies on the device "
        f"(by hand {copies['by hand']:.3f}).\n"
        f"- `loopkit plan` says {plan['planned']:,.0f} MB for GPT-2, not compiled. Measured are "
        f"{plan['measured']:,.0f} MB.\n"
    )


def _imports(result: dict[str, Any]) -> str:
    text = (
        IMPORTS.format(rounds=result["rounds"])
        + "\n| package | ms | over torch |\n|---|---:|---:|\n"
    )
    for name, row in result["milliseconds"].items():
        text += f"| {name} | {row['whole']['median']:.0f} | {row['over']['median']:+.0f} |\n"
    return text + _where(result)


def _checkpoints(result: dict[str, Any]) -> str:
    text = CHECKPOINTS.format(**{key: result[key] for key in ("megabytes", "tensors", "rounds")})
    text += "\n| format | save, s | durable | load, s | verified |\n|---|---:|---|---:|---|\n"
    for name, row in result["seconds"].items():
        text += (
            f"| {name} | {row['save']['median']:.2f} | {row['durable']} | "
            f"{row['load']['median']:.2f} | "
            f"{row['verified']} |\n"
        )
    return text + _where(result)


def _reliability(result: dict[str, Any]) -> str:
    table = result["table"]
    names = list(next(iter(table.values())))
    text = RELIABILITY.format(steps=result["steps"], kills=result["kills"])
    text += f"\n| test | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"
    for scene, row in table.items():
        text += f"| {scene} | {' | '.join(row[name] for name in names)} |\n"
    return text + _where(result)


_PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "overhead": _overhead,
    "progress": _progress,
    "throughput": _throughput,
    "evaluation": _evaluation,
    "prediction": _prediction,
    "start": _start,
    "counts": _counts,
    "strategies": _strategies,
    "gpu": _gpu,
    "import_time": _imports,
    "checkpoint": _checkpoints,
    "reliability": _reliability,
}
