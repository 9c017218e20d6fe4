"""Retries: an operation on a store is tried again, less and less often, while the store fails."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from loopkit.errors import LoopkitError, StorageError

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds between two tries: of the first pause, and at most."""

# What a store answers, and no failure of it.
_ANSWERS = (FileNotFoundError, FileExistsError)
# Waiting does not help: the caller is not allowed in, or is not known.
_REFUSALS = ("PermissionError", "CredentialsError", "CredentialError", "AuthenticationError")

T = TypeVar("T")


class Retries:
    """Calls operations again while they fail, with a pause that doubles from try to try.

    Args:
        patience: seconds from the first failure in a row until an operation raises.
        refusals: try again also where the store refuses the caller. Credentials may be renewed
            while a run trains.

    Attributes:
        trouble: the error of the last try; "" while operations succeed.
        stopped: set it to end all pauses: what fails then raises.
    """

    def __init__(self, patience: float, *, refusals: bool = False) -> None:
        self.patience = patience
        self.refusals = refusals
        self.trouble = ""
        self.stopped = threading.Event()
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the first of the failures in a row; 0 while operations succeed."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def restart(self, patience: float) -> None:
        """Wait up to ``patience`` seconds from now on."""
        self._since, self.patience = None, patience

    def call(self, function: Callable[[], T], what: str) -> T:
        """Return what ``function`` returns at the first try that succeeds.

        Args:
            function: the operation, which may be done twice.
            what: names the operation and the place, for messages: "read s3://bucket/run/run.json".

        Raises:
            FileNotFoundError, FileExistsError: the answer of the store.
            StorageError: the patience is over, or the store refuses the caller.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                result = function()
            except (*_ANSWERS, LoopkitError):
                self._succeeded()
                raise
            except Exception as error:
                self._failed(error, what, pause)
            else:
                self._succeeded()
                return result
            # Not by Python's own generator, whose state belongs to the run.
            self.stopped.wait(pause * (0.5 + secrets.randbelow(500) / 1000))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _succeeded(self) -> None:
        self._since, self.trouble = None, ""

    def _failed(self, error: Exception, what: str, pause: float) -> None:
        """Note a failure. Raise if there is no further try."""
        self._since = time.monotonic() if self._since is None else self._since
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.trouble = f"cannot {what}: {text}"
        logger.debug("%s; the next try is in %.2g s", self.trouble, pause)
        refused = type(error).__name__.endswith(_REFUSALS) and not self.refusals
        if refused or self.stopped.is_set() or self.seconds + pause > self.patience:
            raise StorageError(self.trouble) from error
