"""Programs in a pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios

from tests import fork_server


def in_terminal(
    command: list[str], stdout: int | None = None, columns: int = 100, term: str = "xterm-256color"
) -> tuple[str, int]:
    """What a program writes to a pseudo-terminal, and its exit code."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    sizes = ("COLUMNS", "LINES")
    environment = {name: value for name, value in os.environ.items() if name not in sizes}
    environment |= {"TERM": term, "OMP_NUM_THREADS": "1"}
    process = fork_server.Popen(
        command, stdin=follower, stdout=stdout or follower, stderr=follower, env=environment
    )
    os.close(follower)
    received = b""
    while True:
        ready, _, _ = select.select([leader], [], [], 60)
        try:
            part = os.read(leader, 65536) if ready else b""
        except OSError:
            break
        if not part:
            break
        received += part
    os.close(leader)
    return received.decode(), process.wait(timeout=60)


def screen_of(text: str) -> list[str]:
    """The lines a terminal ends up with: cursor up, erase line, carriage return, newline, text."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b"):
            lines[row] = (
                lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            )
            column += len(token)
    return [line.rstrip() for line in lines]
