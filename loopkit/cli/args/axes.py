"""``name=a,b`` after the target: the values that a command tries."""

from __future__ import annotations

from loopkit.errors import OptionError


def take_axes(argv: list[str], command: str) -> dict[str, list[str]]:
    """Remove the ``name=a,b`` arguments after the target; return the values to try by name.

    ``none`` and an empty value mean null. A value cannot hold a comma.

    Args:
        argv: TARGET first; the arguments are removed from it.
        command: the command, for messages.

    Raises:
        OptionError: an argument is no ``name=a,b``, or a name comes twice.
    """
    axes: dict[str, list[str]] = {}
    while len(argv) > 1 and not argv[1].startswith("-"):
        name, equals, values = argv.pop(1).partition("=")
        name = name.replace("-", "_")
        if not equals or not name:
            raise OptionError(
                f"{command}: {name!r} is no name=a,b: say what to vary as in accumulate=2,4,8"
            )
        if name in axes:
            raise OptionError(
                f"{command}: {name} is given twice: give its values at once, as in {name}=a,b"
            )
        axes[name] = ["null" if value in ("none", "") else value for value in values.split(",")]
    return axes
