"""Several ranks for a session without a script, such as a notebook: Fit's call goes to new ranks.

The process of the session writes what the ranks unpickle here, a moment before, in a directory that
only its user can read.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from loopkit.distributed.environment import is_rank_zero
from loopkit.distributed.launcher import launch
from loopkit.errors import LoopkitError, missing_extra
from loopkit.fit.signals import PREEMPTED
from loopkit.strategies.dtensor import full_tensor
from loopkit.task import Task


def on_ranks(count: int, fit: Any, method: str, task: Task, *args: Any) -> Any:
    """Return what ``fit.<method>(task, *args)`` returns on rank 0 of ``count`` new processes.

    The task, the options and the hooks are copied to the ranks. The returned value and the task's
    weights come back from rank 0; other changes in the ranks do not.

    Raises:
        MissingExtraError: cloudpickle, which copies classes defined in a session, is not installed.
        LoopkitError: a rank failed and has printed the reason.
        SystemExit: with status 143, after SIGTERM.
    """
    try:
        import cloudpickle
    except ImportError:
        raise missing_extra(
            "cloudpickle", "notebook", f"a session without a script, on {count} devices,"
        ) from None
    with tempfile.TemporaryDirectory(prefix="loopkit-session-") as name:
        directory = Path(name)
        task.cpu()
        (directory / "path").write_text(json.dumps(sys.path))
        (directory / "call").write_bytes(cloudpickle.dumps((fit, method, task, args)))
        code = launch(count, [sys.executable, "-u", "-m", "loopkit.fit.notebook", name])
        if code == PREEMPTED:
            raise SystemExit(PREEMPTED)
        if code:
            raise LoopkitError(
                f"the {count} ranks of this session ended with exit code {code}; the error is "
                "printed above"
            )
        value, weights = cloudpickle.loads((directory / "answer").read_bytes())
    task.load_state_dict(weights)
    return value


def main(directory: Path) -> None:
    """Make the call on this rank; rank 0 writes the answer."""
    import cloudpickle

    sys.path[:] = json.loads((directory / "path").read_text())
    fit, method, task, args = cloudpickle.loads((directory / "call").read_bytes())
    value = getattr(fit, method)(task, *args)
    # Under FSDP every rank takes part in gathering the weights.
    weights = {
        name: full_tensor(tensor).detach().cpu() for name, tensor in task.state_dict().items()
    }
    if is_rank_zero():
        (directory / "answer").write_bytes(cloudpickle.dumps((value, weights)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
