"""Sessions without a script (a notebook, a prompt): what Fit is asked for is carried to ranks, and
the outcome back.

What is unpickled here was written a moment before by the process that started it, in a directory
that only its user can read.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from loopkit.distributed.launcher import launch
from loopkit.errors import LoopkitError, missing_extra
from loopkit.fit.signals import PREEMPTED
from loopkit.strategies.dtensor import whole
from loopkit.task import Task


def on_ranks(count: int, fit: Any, method: str, task: Task, *rest: Any) -> Any:
    """What ``fit.<method>(task, *rest)`` gives, called on ``count`` new processes; ``task`` has its
    weights then.

    The task, the options and the hooks are copied to the ranks. Of what changes there, the returned
    value and the weights come back; they are the first rank's.

    Raises:
        MissingExtraError: cloudpickle, which copies classes defined in a session, is not installed.
        LoopkitError: the ranks failed; why was printed. SystemExit(143) after SIGTERM.
    """
    try:
        import cloudpickle
    except ImportError:
        raise missing_extra(
            "cloudpickle", "notebook", f"a session without a script, on {count} devices,"
        ) from None
    with tempfile.TemporaryDirectory(prefix="loopkit-session-") as folder:
        place = Path(folder)
        task.cpu()
        (place / "path").write_text(json.dumps(sys.path))
        (place / "call").write_bytes(cloudpickle.dumps((fit, method, task, rest)))
        code = launch(count, [sys.executable, "-u", "-m", "loopkit.fit.notebook", folder])
        if code == PREEMPTED:
            raise SystemExit(PREEMPTED)
        if code:
            raise LoopkitError(
                f"the {count} ranks of this session ended with exit code {code}; what happened "
                f"stands "
                "above"
            )
        value, weights = cloudpickle.loads((place / "answer").read_bytes())
    task.load_state_dict(weights)
    return value


def main(folder: str) -> None:
    """On each rank: do what the session asked for; the first rank leaves the outcome."""
    import cloudpickle

    sys.path[:] = json.loads((Path(folder) / "path").read_text())
    fit, method, task, rest = cloudpickle.loads((Path(folder) / "call").read_bytes())
    value = getattr(fit, method)(task, *rest)
    weights = {name: whole(tensor).detach().cpu() for name, tensor in task.state_dict().items()}
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_rank() == 0:
        (Path(folder) / "answer").write_bytes(cloudpickle.dumps((value, weights)))


if __name__ == "__main__":
    main(sys.argv[1])
