"""Writes docs/lifecycle.md from traces of small runs: ``python -m tests.docs.lifecycle_trace``."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from loopkit import Checkpoint, Fit, Task
from loopkit.optim import AdamW
from tests.docs.pages import DOCS, ROOT
from tests.support import points

PAGE = DOCS / "lifecycle.md"
PACKAGE = str(ROOT / "loopkit") + os.sep
WRITER = os.path.join("checkpoint", "writer.py")
WIDTHS = (34, 46)  # of the columns for module and function


@dataclass(eq=False)
class Call:
    """A call of a function, with the calls inside of it."""

    code: CodeType
    calls: list[Call] = field(default_factory=list)
    number: int = 0

    @property
    def name(self) -> str:
        """Qualified name of the function."""
        return described(self.code)[0]


class Small(Task):
    """A linear classifier of points; it can fail at a step."""

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 3)
        self.fails_at, self.steps = fails_at, 0

    def train_step(self, batch: Any) -> Any:
        """Return the loss of a micro-batch."""
        self.steps += 1
        if self.steps == self.fails_at:
            raise ValueError("a bug in train_step")
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_error(self, run: Any, exception: BaseException) -> None:
        """Listen to the event that reports an error."""

    def optimizers(self) -> Any:
        return AdamW(lr=1e-2)

    def train_data(self) -> Any:
        return points(96)


TASK = {Small.train_step.__code__, Small.on_error.__code__}


@cache
def functions(path: str) -> dict[int, tuple[str, str]]:
    """Return qualified name and first line of the docstring of each function, by line."""
    found: dict[int, tuple[str, str]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = prefix + child.name
                if isinstance(child, ast.FunctionDef):
                    lines = [child.lineno, *(d.lineno for d in child.decorator_list)]
                    text = (ast.get_docstring(child) or "").split("\n\n")[0]
                    found.update(dict.fromkeys(lines, (name, " ".join(text.split()))))
                visit(child, f"{name}." if isinstance(child, ast.ClassDef) else prefix)

    visit(ast.parse(Path(path).read_text(encoding="utf-8")), "")
    return found


def described(code: CodeType) -> tuple[str, str]:
    """Return qualified name and docstring of the function that ``code`` belongs to."""
    return functions(code.co_filename).get(code.co_firstlineno, (code.co_name, ""))


def traced(function: Callable[[], object]) -> Call:
    """Return the tree of calls of loopkit's functions, and of the task, inside ``function``.

    Private functions, lambdas and comprehensions are left out. Calls inside of them belong to their
    caller.
    """
    root = Call(traced.__code__)
    active: dict[FrameType, Call] = {}
    count = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        if event == "return":
            active.pop(frame, None)
        if event != "call" or not is_shown(frame.f_code):
            return
        above = frame.f_back
        while above is not None and above not in active:
            above = above.f_back
        count += 1
        call = Call(frame.f_code, number=count)
        active[frame] = call
        (active[above] if above is not None else root).calls.append(call)

    sys.setprofile(note)
    try:
        with suppress(ValueError):
            function()
    finally:
        sys.setprofile(None)
    return root


def is_shown(code: CodeType) -> bool:
    """Return whether calls of ``code`` are part of the trace."""
    public = not code.co_name.startswith(("_", "<")) or code.co_name == "__call__"
    return code in TASK or (public and code.co_filename.startswith(PACKAGE))


def walk(call: Call) -> Iterator[Call]:
    """Yield all calls inside of a call, in order."""
    for inner in call.calls:
        yield inner
        yield from walk(inner)


def merged(calls: list[Call]) -> list[Call]:
    """Return the calls with all calls of one function joined, also those of a recursion."""
    found: dict[CodeType, Call] = {}
    for call in calls:
        first = found.setdefault(call.code, Call(call.code))
        first.calls += call.calls
    return [Call(code, merged(without(code, call.calls))) for code, call in found.items()]


def without(code: CodeType, calls: list[Call]) -> list[Call]:
    """Return the calls, with the inner calls of ``code`` in place of calls of ``code`` itself."""
    found: list[Call] = []
    for call in calls:
        found += without(code, call.calls) if call.code is code else [call]
    return found


def shown(calls: list[Call], depth: int, indent: int = 0) -> Iterator[str]:
    """Yield a line per call, down to ``depth``: module, function, docstring."""
    for call in calls:
        name, text = described(call.code)
        path = call.code.co_filename
        module = path.removeprefix(PACKAGE) if path.startswith(PACKAGE) else "your task"
        if not path.startswith(PACKAGE):
            name = call.code.co_name
        yield f"{module:{WIDTHS[0]}}{'  ' * indent + name:{WIDTHS[1]}}{text}".rstrip()
        if indent + 1 < depth:
            yield from shown(call.calls, depth, indent + 1)


def block(calls: list[Call], depth: int) -> str:
    """Return the calls as a block of a page, down to ``depth``."""
    return "```text\n" + "\n".join(shown(merged(calls), depth)) + "\n```\n"


def run(folder: str, fails_at: int = 0) -> Call:
    """Return the trace of a run of two epochs of 6 steps with a save after each."""
    options: dict[str, Any] = {"loggers": ["jsonl"], "progress": False, "accelerator": "cpu"}
    checkpoint = Checkpoint(every="1 epoch", background=False)
    fit = Fit(epochs=2, batch_size=16, run_dir=folder, checkpoint=checkpoint, **options)
    task = Small(fails_at)
    return traced(lambda: fit.run(task))


def one_step(trace: Call) -> list[Call]:
    """Return the calls of the fourth step."""
    epoch = next(call for call in walk(trace) if call.name == "EpochLoop.run")
    starts = [i for i, call in enumerate(epoch.calls) if call.name == "fetch"]
    return epoch.calls[starts[3] : starts[4]]


def one_save(trace: Call) -> list[Call]:
    """Return the first call of ``EpochLoop.run`` that writes a checkpoint."""
    epoch = next(call for call in walk(trace) if call.name == "EpochLoop.run")
    writer = one_write(trace)
    return [next(call for call in epoch.calls if writer in walk(call))]


def one_write(trace: Call) -> Call:
    """Return the first call of the function that writes the files of a checkpoint."""
    return next(call for call in walk(trace) if call.code.co_filename == PACKAGE + WRITER)


def one_failure(trace: Call) -> list[Call]:
    """Return the calls after ``train_step`` has raised, without their callers."""
    failed = [call for call in walk(trace) if call.code is Small.train_step.__code__][-1]
    after: list[Call] = []

    def collect(call: Call) -> None:
        for inner in call.calls:
            generator = inner.code.co_flags & inspect.CO_GENERATOR
            if inner.number > failed.number and not generator:
                after.append(inner)
            else:
                collect(inner)

    collect(trace)
    return after


TEXT = """# One step, one save, one failure

This page follows a run by function name. A script traced a small run on one CPU and wrote the blocks below:
`python -m tests.docs.lifecycle_trace`. A test compares the page with a new trace.

Each line has a module, a function and the first line of its docstring. A function that is called by another one is
indented below it. Repeated calls are shown once. Private functions are left out.

## One step

These are the calls of a plain step: nothing is due, and one micro-batch makes the step. `EpochLoop.run` in
[`loops/epoch.py`](../loopkit/loops/epoch.py) makes the outer calls.

{step}
## One save

After the last step of an epoch, `EpochLoop.run` does the work that is due: here the end of the epoch and a save. The
block leaves out calls below the sixth level.

{save}
`{writer}` in [`checkpoint/writer.py`](../loopkit/checkpoint/writer.py) makes these calls, down to the second level:

{write}
## One failure

`train_step` raises an exception in the third step. These are the calls after that, up to the moment at which `Fit.run`
raises the exception again.

{failure}"""


def page() -> str:
    """Return the page, from new traces."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            good, bad = run(f"{folder}/a"), run(f"{folder}/b", fails_at=3)
    finally:
        torch.set_num_threads(threads)
    return TEXT.format(
        step=block(one_step(good), 20),
        save=block(one_save(good), 6),
        writer=one_write(good).name,
        write=block(one_write(good).calls, 2),
        failure=block(one_failure(bad), 3),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
