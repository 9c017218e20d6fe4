"""docs/benchmarks.md, made from the results on disk."""

from __future__ import annotations

from typing import Any

HEAD = """# Benchmarks

Made by the scripts in `benchmarks/` from what they measured; the numbers with all quartiles are in
`benchmarks/results/*.json`. Medians throughout. To measure again, on a machine with nothing else to do:

```console
$ pip install -c constraints.txt -e '.[bench]'
$ python benchmarks/overhead.py
$ python benchmarks/strategies.py
$ python benchmarks/gpu.py  # and the tests that need a GPU
$ python benchmarks/import_time.py
$ python benchmarks/checkpoint.py
```
"""

OVERHEAD = """
## The cost of a step

A tiny classifier of {steps}, so that what a framework adds to a step can be seen; with a large
model it is the same number of microseconds and a smaller share. Every contestant trains the same model from the
same weights on the same list of prepared batches, in one process with one torch thread, in short runs taken in
turns, {rounds} of each; all end with the same weights, which is checked. Each has a fused AdamW, but for the
usual hand-written loop, which takes `torch.optim.AdamW(parameters)` as it comes.

The clock is in the user's code: the model notes the time whenever it is called. A step lasts from one call to the
next, so whatever happens in between is counted, in the same way for all. Times are averaged over blocks of 50
steps, each with one log in it; the figure is the median block. "Over the best" and "ratio" compare with the best
hand-written loop of the same round. Starting up, and the checkpoint at the end, lie outside the blocks.

"Bare" is the plain loop: no logging, no progress, no clipping, no schedule, no checkpoints. "Everything on" clips
to norm 1, follows a cosine, logs the loss every 50 steps to files, draws a progress bar to nowhere and saves a
checkpoint at the end, each contestant by its own means. loopkit runs with its defaults in both: a loss or gradient
that is not finite is caught before it is used, and randomness is a function of seed and step; no other contestant
does either by default. It can still be below the best hand-written loop, which uses torch's public interface,
because it hands parameters to torch's fused kernel itself and spares the Python in `optimizer.step()`: the same
kernel with the same arguments, and the same bits.
"""

STRATEGIES = """
## The cost of a step over several ranks

A GPT of {parameters:,} parameters on {ranks} ranks over gloo, one torch thread each: every contestant in one process
group, in short runs taken in turns, {rounds} of each, all to the same weights. "By hand" is the loop one writes around
torch's `DistributedDataParallel` or `fully_shard` with a fused AdamW; "ratio" compares with it in the same round.
loopkit runs with its defaults: a value that is not finite on any rank is caught before it is used, and a signal to any
rank is heard by all within about a second.
"""

GPU = """
## The cost of a step on a GPU

A GPT in bfloat16 autocast on one {gpu}, fused AdamW, {steps} steps, {rounds} runs of each in turns. "Host" is the time
in which the host has handed a step to the device, "device" that between the same moments of two steps by its own clock.
"""

IMPORTS = """
## The cost of `import`

{rounds} fresh processes of each, in turns; "over torch" compares with `import torch` of the same round.
"""

CHECKPOINTS = """
## Saving and loading

A state of {megabytes} MB in {tensors} tensors, {rounds} times each, in turns, on one file system. "Durable" says
whether the data is on the disk when the call returns (`fsync`), "verified" whether loading notices a flipped bit.
"""


def render(found: dict[str, Any]) -> str:
    """The page for the results by name: "overhead", "strategies", "gpu", "import_time",
    "checkpoint".
    """
    parts = [HEAD]
    if "overhead" in found:
        parts.append(_overhead(found["overhead"]))
    if "strategies" in found:
        parts.append(_strategies(found["strategies"]))
    if "gpu" in found:
        parts.append(_gpu(found["gpu"]))
    if "import_time" in found:
        parts.append(_imports(found["import_time"]))
    if "checkpoint" in found:
        parts.append(_checkpoints(found["checkpoint"]))
    return "".join(parts)


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"\n{result['date']}, {machine['cpu']}, {machine['cores']} cores, load {machine['load']} "
        f"at the end; "
        f"Python {machine['python']}, {packages}.\n"
    )


def _overhead(result: dict[str, Any]) -> str:
    text = OVERHEAD.format(rounds=result["rounds"], steps=f"{result['parameters']} parameters")
    for setting, rows in result["settings"].items():
        text += f"\n### {setting.capitalize()}\n\n| | µs per step | quartiles | over the best | ratio |\n"
        text += "|---|---:|---:|---:|---:|\n"
        for name, row in sorted(rows.items(), key=lambda item: item[1]["over"]["median"]):
            step = row["step"]
            text += (
                f"| {name} | {step['median']:.0f} | {step['low']:.0f} to {step['high']:.0f} | "
                f"{row['over']['median']:+.0f} | {row['ratio']['median']:.2f} |\n"
            )
    return text + _where(result)


def _strategies(result: dict[str, Any]) -> str:
    text = STRATEGIES.format(**{key: result[key] for key in ("parameters", "ranks", "rounds")})
    for kind, rows in result["settings"].items():
        text += f"\n### {kind}\n\n| | ms per step | ratio | quartiles |\n|---|---:|---:|---:|\n"
        for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]["median"]):
            ratio = row["ratio"]
            text += (
                f"| {name} | {row['step']['median']:.2f} | {ratio['median']:.3f} | "
                f"{ratio['low']:.3f} to {ratio['high']:.3f} |\n"
            )
    return text + _where(result)


def _gpu(result: dict[str, Any]) -> str:
    text = GPU.format(**{key: result[key] for key in ("gpu", "steps", "rounds")})
    text += "\n| | host, ms | device, ms | ratio |\n|---|---:|---:|---:|\n"
    for name, row in result["rows"].items():
        text += (
            f"| {name} | {row['host']['median']:.2f} | {row['device']['median']:.2f} | "
            f"{row['ratio']['median']:.3f} |\n"
        )
    return text + _where(result)


def _imports(result: dict[str, Any]) -> str:
    text = IMPORTS.format(rounds=result["rounds"]) + "\n| | ms | over torch |\n|---|---:|---:|\n"
    for name, row in result["milliseconds"].items():
        text += f"| {name} | {row['whole']['median']:.0f} | {row['over']['median']:+.0f} |\n"
    return text + _where(result)


def _checkpoints(result: dict[str, Any]) -> str:
    text = CHECKPOINTS.format(**{key: result[key] for key in ("megabytes", "tensors", "rounds")})
    text += "\n| | save, s | durable | load, s | verified |\n|---|---:|---|---:|---|\n"
    for name, row in result["seconds"].items():
        text += (
            f"| {name} | {row['save']['median']:.2f} | {row['durable']} | "
            f"{row['load']['median']:.2f} | "
            f"{row['verified']} |\n"
        )
    return text + _where(result)
