"""Draws what the guides tell as screens: commands that are run, and what they print on a terminal."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from unittest import mock

from tests.docs.drawing import FOLDER, digits
from tests.docs.pages import DOCS, ROOT, blocks
from tests.docs.terminal import Recording, Screen, still

_PROGRAMS = {
    "python": [sys.executable],
    "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
}
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    "TERM": "xterm-256color",
}  # fmt: skip


@contextmanager
def _files(page: str, *names: str, until: str = "\0", **own: str) -> Iterator[Path]:
    """A folder with the first blocks of Python of a page, under these names.

    Args:
        page: the page.
        names: the files, one for each block; "" leaves a block out.
        until: how the line begins before which each block ends.
        own: further files without their ``.py``: their text.
    """
    with TemporaryDirectory() as place:
        code = [block.text for block in blocks(DOCS / page) if block.language == "python"]
        for name, text in zip(names, code):
            if name:
                kept = f"import torch\n{text}".partition(f"\n{until}")[0].rstrip()
                Path(place, name).write_text(f"{kept}\n", encoding="utf-8")
        for name, text in own.items():
            Path(place, f"{name}.py").write_text(text, encoding="utf-8")
        yield Path(place)


def _screen(
    name: str,
    title: str,
    where: AbstractContextManager[Path],
    commands: Sequence[str],
    columns: int = 64,
    end: str | None = None,
) -> None:
    """Draw what commands print in a folder, up to the line before the first that has ``end`` in it."""
    film = Recording(Screen(columns))
    with where as folder:
        for command in commands:
            words = shlex.split(command)
            if words[0] == "loopkit":
                film.loopkit(folder, command.partition(" ")[2])
            else:
                given = dict(word.split("=") for word in takewhile(lambda w: "=" in w, words))
                program, *words = words[len(given) :]
                film.run(
                    command,
                    [*_PROGRAMS.get(program, [program]), *words],
                    {**os.environ, **_ENVIRONMENT, **given},
                    folder=folder,
                )
            film.screen.write("\n")
    _draw(name, title, film, end)


def _draw(name: str, title: str, film: Recording, end: str | None = None) -> None:
    lines = film.screen.text(height=1000).splitlines()
    if end is not None:
        lines = lines[: next(n for n, line in enumerate(lines) if end in line)]
    (FOLDER / f"{name}.svg").write_text(still(title, lines, film.screen.width), encoding="utf-8")


def console() -> None:
    """A run on a terminal of 64 columns, up to its summary."""
    _screen(
        "console",
        "The bar and the table of a run on a terminal",
        digits(),
        ["loopkit fit digits.py --epochs 5 --run-dir runs/digits"],
        end="***** finished",
    )


def cli() -> None:
    """Misspellings and their answers, a sweep, and the checkpoints of its best run."""
    _screen(
        "cli",
        "Commands and their answers on a terminal",
        digits(),
        [
            "loopkit fit digits.py --epohcs 3",
            "loopkit fit digits.py --num_train_epochs 3",
            "loopkit sweep digits.py hidden=8,64,256 --epochs 3 --progress false",
            "loopkit ckpt ls sweeps/digits/003",
        ],
    )


def eject() -> None:
    """The script of a run, its run, the run itself, and the comparison of their weights."""
    options = "points.py --steps 50 --clip-norm 1.0"
    _screen(
        "eject",
        "A run and its script give the same weights",
        _files("eject.md", "points.py", "compare.py"),
        [
            f"loopkit eject {options} --out train_points.py",
            "python train_points.py",
            f"loopkit fit {options} --run-dir run --progress false",
            "python compare.py",
        ],
        columns=76,
    )


def troubleshooting() -> None:
    """A loss that is not finite, and the layer that debug="numerics" names."""
    options = "points.py --epochs 5 --scale 1e30 --lr 1e9 --progress false"
    _screen(
        "troubleshooting",
        "A loss that is not finite, and where it begins",
        _files("troubleshooting.md", "points.py"),
        [f"loopkit fit {options}", f"loopkit fit {options} --debug numerics"],
        columns=76,
    )


_TESTS = """\
from small import Small, fit
from loopkit.testing import check_ranks, check_resume

class Forgetful(Small):
    seen = 0  # a plain attribute: no checkpoint holds it

    def train_step(self, batch):
        self.seen += 1
        return super().train_step(batch) / self.seen

def test_ranks():
    check_ranks(Small(), fit, steps=3)

def test_resume():
    check_resume(Small(), fit, steps=4)

def test_resume_of_a_forgetful_task():
    check_resume(Forgetful(), fit, steps=3)
"""


def testing() -> None:
    """Tests of a task that pass, and one of a task that forgets, which says what differs."""
    _screen(
        "testing",
        "Tests of a task: two pass, and one finds what no checkpoint holds",
        _files("testing.md", "small.py", test_small=_TESTS),
        ["cat test_small.py", "pytest -vv --no-header --tb=no test_small.py"],
        columns=76,
    )


_PLAIN = """\
import sys
import torch
from safetensors.torch import load_file
from torch import nn

net = nn.Sequential(
    nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)
)
state = load_file("shipped/model.safetensors")
net.load_state_dict({n.removeprefix("net."): t for n, t in state.items()})
x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(2))
right = net.eval()(x).argmax(1) == (x.sum(1) > 0)
print(f"right for {right.float().mean():.1%} of new points")
print("loopkit was imported:", "loopkit" in sys.modules)
"""


def export() -> None:
    """A run, its export, and a script that uses the file without loopkit."""
    _screen(
        "export",
        "The weights of a run are exported, and used without loopkit",
        _files("export.md", "signs.py", plain=_PLAIN),
        [
            "python signs.py",
            "loopkit ckpt export runs/signs shipped",
            "ls -1 shipped",
            "cat plain.py",
            "python plain.py",
        ],
        columns=76,
    )


_CLASSIFY = """\
from transformers import pipeline

classify = pipeline("text-classification", "sentiment")
for text in ("a very dull film", "a very moving film"):
    print(text, *classify(text))
"""


def transformers() -> None:
    """A run of HFTask, the files of its export, and transformers, which opens them."""
    _screen(
        "transformers",
        "A run of a transformers model, and its export in a pipeline",
        _files("transformers.md", "reviews.py", classify=_CLASSIFY),
        [
            "python reviews.py",
            "loopkit ckpt export runs/reviews sentiment",
            "ls -1 sentiment",
            "cat classify.py",
            "python classify.py",
        ],
        columns=76,
    )


@contextmanager
def _bucket(folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """The folder, while a server of S3 on this machine has a bucket."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel("ERROR")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    values = {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
    }  # fmt: skip
    try:
        with folder as place, mock.patch.dict(os.environ, values):
            s3fs.S3FileSystem().mkdir("bucket")
            yield place
    finally:
        server.stop()


_STORED = """\
from loopkit import Fit
from small import Small

fit = Fit(
    epochs=6, run_dir="s3://bucket/runs/a", resume="auto", progress=False
)
fit.on("step_end", lambda run, out: run.progress.step == 7 and run.stop(""))
result = fit.run(Small())
print(result.status, "at step", result.step)
"""


def storage() -> None:
    """A run in a bucket, which another machine continues."""
    _screen(
        "storage",
        "A run in a bucket, its checkpoints, and its end on another machine",
        _bucket(_files("storage.md", "", "small.py", until="os.environ", train=_STORED)),
        [
            "cat train.py",
            "LOOPKIT_STAGING=first-machine python train.py",
            "loopkit ckpt ls s3://bucket/runs/a",
            "loopkit ckpt verify s3://bucket/runs/a",
            "LOOPKIT_STAGING=second-machine python train.py",
            "loopkit ckpt ls s3://bucket/runs/a",
        ],
        columns=76,
    )


def clusters() -> None:
    """Two launchers of a rank each, as on two machines: a rank is killed, and both start again."""
    film = Recording(Screen(76))
    place = "MASTER_ADDR=localhost MASTER_PORT=29400"
    options = "Fit(nodes=2, devices=1, accelerator='cpu', epochs=100,"
    with _files("clusters.md", "train.py") as folder:
        file = folder / "train.py"
        code = file.read_text(encoding="utf-8").replace("Fit(", options)
        file.write_text(code, encoding="utf-8")
        environment = {**os.environ, **_ENVIRONMENT, **dict(w.split("=") for w in place.split())}
        command = [sys.executable, "train.py"]
        for killed in (True, False):
            other = subprocess.Popen(
                command, cwd=folder, env={**environment, "NODE_RANK": "1"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            if killed:
                Thread(target=_kill_rank, args=(other.pid, folder / "runs/points")).start()
            film.run(
                f"NODE_RANK=0 {place} python train.py", command,
                {**environment, "NODE_RANK": "0"}, folder=folder,
            )  # fmt: skip
            film.screen.write(f"\n\x1b[32m$\x1b[0m NODE_RANK=1 {place} python train.py\r\n")
            film.screen.write(other.communicate()[0].replace("\n", "\r\n") + "\n")
    _draw("clusters", "A rank is killed, all ranks end, and the same commands resume", film)


def _kill_rank(launcher: int, run: Path) -> None:
    """Kill the rank of a launcher as soon as the run has saved step 100 or a later one."""
    while not any(run.glob("checkpoints/step-*[1-9]??/MANIFEST.json")):
        time.sleep(0.1)
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True)
    os.kill(int(found.stdout), signal.SIGKILL)


PICTURES: dict[str, Callable[[], None]] = {
    "cli": cli,
    "clusters": clusters,
    "console": console,
    "eject": eject,
    "export": export,
    "storage": storage,
    "testing": testing,
    "transformers": transformers,
    "troubleshooting": troubleshooting,
}
