"""What a program shows on a terminal, recorded while it runs, as a moving SVG picture."""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import sys
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tests.docs.pages import ROOT

WIDTH, HEIGHT = 88, 26
MOST_FRAMES, FRAME = 18, 0.4  # of one command, and the seconds for which each is seen
_SEQUENCES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])|(\x1b.)", re.DOTALL)
THEME = TerminalTheme(
    (22, 27, 34), (201, 209, 217),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
)  # fmt: skip


class Screen:
    """The cells of a terminal that has no end.

    Raises:
        ValueError: a program sends a sequence that is not known here.
    """

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width
        self.rows: list[list[tuple[str, str]]] = [[]]
        self._row, self._column, self._style = 0, 0, ""

    def write(self, text: str) -> None:
        """Take what a program has written."""
        for numbers, command, character, other in _SEQUENCES.findall(text):
            if other:
                raise ValueError(f"unknown sequence {other!r}")
            if command:
                self._obey(numbers, command)
            elif character == "\r":
                self._column = 0
            elif character == "\n":
                self._move(self._row + 1)
            elif character != "\a":
                self._put(character)

    def _put(self, character: str) -> None:
        if self._column == self.width:
            self._column = 0
            self._move(self._row + 1)
        row = self.rows[self._row]
        row += [(" ", "")] * (self._column + 1 - len(row))
        row[self._column] = (character, self._style)
        self._column += 1

    def _move(self, row: int) -> None:
        self._row = max(row, 0)
        self.rows += [[] for _ in range(self._row + 1 - len(self.rows))]

    def _obey(self, numbers: str, command: str) -> None:
        row = self.rows[self._row]
        if command == "m":
            code = f"\x1b[{numbers}m"
            self._style = "" if numbers in ("", "0") else self._style + code
        elif command == "A":
            self._move(self._row - int(numbers or 1))
        elif command == "B":
            self._move(self._row + int(numbers or 1))
        elif command == "G":
            self._column = int(numbers or 1) - 1
        elif command == "K":
            del row[0 if numbers == "2" else self._column :]
        elif command == "J":
            del row[self._column :]
            del self.rows[self._row + 1 :]
        elif command not in "hl":  # show or hide the cursor
            raise ValueError(f"unknown sequence ESC[{numbers}{command}")

    def text(self, height: int = HEIGHT) -> str:
        """Return the last rows, with the codes of their colours."""
        rows = self.rows[: 1 + max((n for n, row in enumerate(self.rows) if row), default=0)]
        lines = []
        for row in rows[-height:]:
            line, before = "", ""
            for character, style in row:
                line += ("\x1b[0m" + style if style != before else "") + character
                before = style
            lines.append(line + "\x1b[0m")
        return "\n".join(lines)


@dataclass
class Recording:
    """The frames of a terminal, and the seconds for which each is seen."""

    screen: Screen = field(default_factory=Screen)
    frames: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def see(self, seconds: float) -> None:
        """Keep the present screen as a frame for some seconds."""
        self._keep(self.screen.text(), seconds)

    def _keep(self, text: str, seconds: float) -> None:
        if self.frames and self.frames[-1] == text:
            self.seconds[-1] += seconds
        else:
            self.frames.append(text)
            self.seconds.append(seconds)

    def run(
        self,
        shown: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        press: Callable[[str], bool] = lambda text: False,
        folder: Path | None = None,
    ) -> int:
        """Run a command on a terminal of its own, and record what it shows.

        A fast program and a slow one give as many frames: evenly spaced ones of all that was seen.

        Args:
            shown: the command as it is typed.
            press: is given all that the program has written, and returns True once: when Ctrl-C
                is pressed.
            folder: where the program runs.

        Returns:
            The exit code.
        """
        self.screen.write(f"\x1b[32m$\x1b[0m {shown}\r\n")
        self.see(1.2)
        size = struct.pack("HHHH", HEIGHT, self.screen.width, 0, 0)
        child, terminal = pty.fork()
        if child == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            if folder is not None:
                os.chdir(folder)
            os.execvpe(command[0], list(command), dict(environment))
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        written, pressed, seen = "", False, [self.screen.text()]
        for piece in _pieces(terminal):
            text = decoder.decode(piece)
            written += text
            self.screen.write(text)
            seen.append(self.screen.text())
            if not pressed and press(written):
                pressed = True
                os.write(terminal, b"\x03")
        each = max(1, len(seen) // MOST_FRAMES)
        for frame in seen[::each]:
            self._keep(frame, FRAME)
        self.see(1.5)
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def loopkit(
        self, folder: Path, typed: str, press: Callable[[str], bool] = lambda text: False
    ) -> int:
        """Run ``loopkit`` in a folder, as it is typed, and record it; return its exit code."""
        program = "import sys; from loopkit.cli.main import main; sys.exit(main(sys.argv[1:]))"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLORTERM": "truecolor",
            "COLUMNS": str(self.screen.width), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-c", program, *shlex.split(typed)]
        return self.run(f"loopkit {typed}", command, environment, press, folder)

    def svg(self, title: str) -> str:
        """Return the frames as one picture that plays them, or shows the last one where motion is unwanted."""
        total, at = sum(self.seconds), 0.0
        styles, groups = [], []
        for number, (frame, seconds) in enumerate(zip(self.frames, self.seconds)):
            start, end = 100 * at / total, 100 * (at + seconds) / total
            at += seconds
            last = number == len(self.frames) - 1
            hidden = "" if number == 0 else "0%{visibility:hidden}"
            ends = "" if last else f"{end:.2f}%{{visibility:hidden}}"
            styles.append(
                f"@keyframes f{number}{{{hidden}{start:.2f}%{{visibility:visible}}{ends}}}"
            )
            rules, body = _drawn(frame, f"f{number}", self.screen.width)
            styles.append(rules)
            groups.append(
                f'<g class="frame{" last" if last else ""}" '
                f'style="animation:f{number} {total:.1f}s infinite step-end">{body}</g>'
            )
        styles.append(
            ".frame{visibility:hidden}.last{visibility:visible}"
            "@media(prefers-reduced-motion:reduce){.frame{animation:none!important}}"
        )
        return _window(title, "".join(styles), "".join(groups), self.screen.width, HEIGHT)


def _pieces(terminal: int) -> Iterator[bytes]:
    """Yield what a program writes on its terminal, until it has closed it."""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says so
            return
        if not piece:
            return
        yield piece


def still(title: str, lines: Sequence[str], columns: int) -> str:
    """Return the lines of a terminal, with the codes of their colours, as one picture."""
    while lines and not re.sub(r"\x1b\[[\d;]*m", "", lines[-1]).strip():
        lines = lines[:-1]
    rules, body = _drawn("\n".join(lines), "f", columns)
    return _window(title, rules, f"<g>{body}</g>", columns, len(lines))


_FORMAT = "{styles}\0{backgrounds}{matrix}\0{char_height}\0{line_height}\0{terminal_width}"


def _drawn(frame: str, name: str, columns: int) -> tuple[str, str]:
    """Return the rules and the elements of one frame."""
    console = Console(
        record=True, width=columns, file=io.StringIO(), force_terminal=True,
        color_system="truecolor", legacy_windows=False, height=HEIGHT,
    )  # fmt: skip
    text = Text.from_ansi(frame, no_wrap=True)
    console.print(text, crop=True)
    rules, body, *_ = console.export_svg(
        title="", theme=THEME, code_format=_FORMAT, unique_id=name
    ).split("\0")
    body = re.sub(r' clip-path="[^"]*"| shape-rendering="[^"]*"', "", body)
    # Shorter coordinates, within tags alone: what the program has printed stays as it is.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), body)
    return re.sub(r"\s+", " ", rules), re.sub(r"\s*\n\s*", "", body)


def _window(title: str, styles: str, body: str, columns: int, lines: int) -> str:
    # A character of rich's pictures is 12.2 wide, and a line 24.4 high.
    width, height = columns * 12.2 + 24, lines * 24.4 + 60
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{0.7 * width:.0f}" '
        f'height="{0.7 * height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{title}"><style>'
        "text{font:20px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
        f'{styles}</style><rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#161b22"/>'
        '<circle cx="24" cy="22" r="7" fill="#ff5f57"/><circle cx="46" cy="22" r="7" '
        'fill="#febc2e"/><circle cx="68" cy="22" r="7" fill="#28c840"/>'
        f'<g transform="translate(12,46)">{body}</g></svg>\n'
    )
