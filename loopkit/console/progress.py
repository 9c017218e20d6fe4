"""The choice of the hook that shows the progress of a run."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from loopkit.console.display import Display
from loopkit.errors import OptionError, nearest

KINDS = {
    "rich": ("loopkit.console.rich_progress", "RichProgress"),
    "html": ("loopkit.console.html_progress", "HtmlProgress"),
    "plain": ("loopkit.console.plain_progress", "PlainProgress"),
}


def build_progress(option: object) -> Display | None:
    """Return the hook for ``Fit(progress=option)``.

    Args:
        option: "rich", "html", "plain", "auto" or True for the one that suits: a bar on a terminal,
            a bar and a table in a notebook, plain lines elsewhere. False or None for no hook.

    Raises:
        OptionError: the option is none of these.
    """
    if option is None or option is False:
        return None
    if option is True or option == "auto":
        option = "html" if in_notebook() else "rich" if on_terminal() else "plain"
    if not isinstance(option, str) or option not in KINDS:
        known = ("auto", *KINDS)
        hint = nearest(str(option), known)
        raise OptionError(
            f"progress={option!r} is not known: give one of {', '.join(known)} or False.{hint}"
        )
    module, name = KINDS[option]
    hook: Display = getattr(import_module(module), name)()
    return hook


def on_terminal() -> bool:
    """Return whether stderr is a terminal that can move its cursor."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except (AttributeError, ValueError):
        # There is no stderr, or it is closed.
        return False


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")
