"""A run in a store has the promises of a run on a disk: whole, verified, resumed, retained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from loopkit import Checkpoint, Fit
from loopkit.checkpoint import Store, scan
from loopkit.cli.main import main
from loopkit.errors import LoopkitWarning, NoValidCheckpointError, RunDirError, StorageError
from loopkit.storage import local_copy_of
from loopkit.storage.copies import open_remote
from tests.storage.stores import LAST, STEPS, at_requests, fit, held, names, until, whole
from tests.support import Tiny, digest

TARGET = f"{Path(__file__).parents[1] / 'support.py'}:Tiny"


def rows(data: bytes) -> list:
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if k != "time" and "second" not in k and "runtime" not in k
        }
        for line in data.splitlines()
    ]


def test_a_run_in_a_store_leaves_there_what_a_run_on_a_disk_leaves(url, on_disk):
    task = Tiny(noisy=True)
    result = fit(url).run(task)
    assert digest(task.state_dict()) == on_disk[1]
    expected = {p.relative_to(on_disk[0]).as_posix() for p in on_disk[0].rglob("*") if p.is_file()}
    assert set(names(url)) == expected - {".lock"} | {".owner.json"}
    assert held(url) == {entry.path.name: [] for entry in scan(Store(), on_disk[0])}
    remote = open_remote(url)
    assert rows(remote.read("metrics.jsonl", 1 << 20)) == rows(
        (on_disk[0] / "metrics.jsonl").read_bytes()
    )
    assert json.loads(remote.read("run.json", 1 << 20))["status"] == "finished"
    assert json.loads(remote.read("checkpoints/latest", 1 << 20))["dir"] == LAST
    # On this machine are the newest and the best checkpoint.
    assert (result.url, result.run_dir) == (url, local_copy_of(url))
    assert whole(result.run_dir) == sorted({LAST, Path(result.best["checkpoint"]).name})
    assert result.checkpoint.is_dir()


@pytest.mark.parametrize("stops", [(6,), (4, 9, 13)], ids=str)
def test_a_run_that_moves_from_machine_to_machine_ends_with_the_same_bits(
    url, stops, on_disk, other_machine
):
    for step in stops:
        until(step, url)
        other_machine()
    task = Tiny(noisy=True)
    result = fit(url, resume="auto").run(task)
    assert digest(task.state_dict()) == on_disk[1]
    assert rows(open_remote(url).read("metrics.jsonl", 1 << 20)) == rows(
        (on_disk[0] / "metrics.jsonl").read_bytes()
    )
    assert all(problems == [] for problems in held(url).values())
    assert result.best["checkpoint"] is not None
    attempts = json.loads(open_remote(url).read("run.json", 1 << 20))["attempts"]
    assert [each["to_step"] for each in attempts] == [*stops, STEPS]


def test_memory_is_a_store_too(on_disk, other_machine):
    until(6, "memory://runs/a")
    other_machine()
    task = Tiny(noisy=True)
    fit("memory://runs/a", resume="memory://runs/a").run(task)
    assert digest(task.state_dict()) == on_disk[1]


def test_a_run_starts_from_a_checkpoint_of_another_run_by_url(
    url, on_disk, other_machine, tmp_path
):
    until(6, url)
    other_machine()
    before = names(url)
    for place in (f"file://{tmp_path}/store/other", tmp_path / "other"):
        task = Tiny(noisy=True)
        result = fit(place, resume=f"{url}/checkpoints/step-{6:012d}").run(task)
        assert digest(task.state_dict()) == on_disk[1]
        assert not list(result.run_dir.glob(".fetched"))
    assert names(url) == before


def test_later_checkpoints_are_moved_aside_in_the_store(url, on_disk, other_machine):
    fit(url, checkpoint=Checkpoint(every=4, keep=None)).run(Tiny(noisy=True))
    other_machine()
    named = f"{url}/checkpoints/step-{8:012d}"
    task = Tiny(noisy=True)
    fit(url, resume=named, checkpoint=Checkpoint(every=4, keep=None)).run(task)
    assert digest(task.state_dict()) == on_disk[1]
    folders, _ = open_remote(url).entries("checkpoints")
    assert folders == [
        *(f"step-{step:012d}" for step in (4, 8, 12)),
        f"step-{12:012d}.left-1",
        LAST,
        f"{LAST}.left-1",
    ]
    task = Tiny(noisy=True).load(f"{url}/checkpoints/{LAST}.left-1")
    assert digest(task.state_dict()) == on_disk[1]


def test_a_corrupt_checkpoint_of_the_store_is_named_and_the_one_before_is_used(
    url, on_disk, other_machine, tmp_path
):
    until(13, url)
    other_machine()
    file = tmp_path / "store" / "run" / "checkpoints" / f"step-{13:012d}" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    task = Tiny(noisy=True)
    with pytest.warns(
        LoopkitWarning, match=r"optimizer.safetensors: its bytes .* kept as .*corrupt-1; "
    ):
        fit(url, resume="auto").run(task)
    assert digest(task.state_dict()) == on_disk[1]
    for manifest in (tmp_path / "store" / "run" / "checkpoints").glob("step-*/MANIFEST.json"):
        manifest.write_bytes(b"{}")
    other_machine()
    with pytest.raises(NoValidCheckpointError, match="none of the checkpoints in file://"):
        fit(url, resume="auto").run(Tiny(noisy=True))


def test_a_store_with_checkpoints_is_not_written_into_without_resume(url):
    until(4, url)
    before = names(url)
    with pytest.raises(
        RunDirError, match=r"holds 1 checkpoint\(s\), up to step-000000000004: pass resume='auto'"
    ):
        fit(url).run(Tiny(noisy=True))
    assert names(url) == before


def test_a_start_that_fails_leaves_nothing_anywhere(url, tmp_path):
    broken = Tiny(noisy=True)
    broken.eval_data = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(url).run(broken)
    with pytest.raises(Exception, match="no such checkpoint"):
        fit(url, resume=f"{url}/checkpoints/{LAST}").run(Tiny(noisy=True))
    assert names(url) == []
    assert [p for p in (tmp_path / "here").rglob("*") if p.is_file()] == []


def test_checkpoints_that_another_machine_has_replaced_are_kept_apart(
    url, on_disk, other_machine, monkeypatch, tmp_path
):
    """Machine A saves and uploads nothing more; B continues from the store; A comes back."""
    until(4, url)
    down = False

    def fault(number, kind, name):
        if down and kind == "write" and "step-" in name:
            raise ConnectionError("unplugged")

    from loopkit.storage import mirror

    monkeypatch.setattr(mirror, "PATIENCE", 0.05)
    with at_requests(fault):
        down = True
        with pytest.raises(StorageError, match=r"is not complete: cannot write .*unplugged"):
            until(9, url)
    assert set(held(url)) == {f"step-{4:012d}"}
    other_machine()
    until(6, url, seed=3)
    monkeypatch.setenv("LOOPKIT_STAGING", str(tmp_path / "here"))
    with pytest.warns(LoopkitWarning, match=r"held checkpoints that file://.* does not have"):
        until(7, url, seed=3)
    aside = local_copy_of(url) / ".left-1"
    assert f"step-{9:012d}" in whole(aside)
    # Nothing is lost: the run of A continues from there, on a disk.
    task = Tiny(noisy=True)
    fit(tmp_path / "again", resume=aside).run(task)
    assert digest(task.state_dict()) == on_disk[1]


def test_commands_and_loading_take_urls(url, on_disk, other_machine, capsys, tmp_path):
    until(9, url)
    fit(url, resume="auto").run(Tiny(noisy=True))
    other_machine()
    assert digest(Tiny.load(url).state_dict()) == on_disk[1]
    one = f"{url}/checkpoints/{LAST}"
    quiet = Fit(progress=False)
    assert (
        quiet.evaluate(Tiny(), checkpoint=one)["eval/loss"]
        == quiet.evaluate(Tiny.load(one))["eval/loss"]
    )
    assert torch.equal(
        quiet.predict(Tiny(), Tiny().eval_data(), checkpoint=url),
        quiet.predict(Tiny.load(one), Tiny().eval_data()),
    )

    def shown(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(list(words)) == code
        out = capsys.readouterr()
        return out.out + out.err

    assert LAST in shown("ckpt", "ls", url)
    assert json.loads(shown("ckpt", "ls", url, "--json").splitlines()[-1])["path"] == one
    assert [row.split()[0] for row in shown("ckpt", "ls", one).splitlines()] == ["checkpoint", LAST]
    assert shown("ckpt", "verify", url).count("ok   file://") == len(held(url))
    assert shown("ckpt", "verify", one) == f"ok   {one}\n"
    assert "no difference" in shown("ckpt", "diff", url, one)
    assert shown("ckpt", "export", url, str(tmp_path / "out")).strip() == str(tmp_path / "out")
    assert "is a URL" in shown("ckpt", "export", url, f"{url}-out", code=2)
    assert f"{url}  finished" in shown("runs", url.rpartition("/")[0])
    assert url in shown("report", url)
    assert "leave --watch out" in shown("report", url, "--watch", code=2)
    assert "eval/loss" in shown("evaluate", TARGET, "--checkpoint", url)
    assert "was not started by loopkit fit" in shown("resume", url, code=73)
    parent = url.rpartition("/")[0]
    for words in (["ckpt", "ls"], ["ckpt", "verify"], ["evaluate", TARGET, "--checkpoint"]):
        assert "there is no such checkpoint or run" in shown(*words, f"{url}-none", code=1)
        assert f"is no run, and holds 1: name one of {url}" in shown(*words, parent, code=1)
    assert f"is no run, and holds 1: name one of {url}" in shown(
        "ckpt", "diff", url, parent, code=1
    )
    assert not [
        p for p in Path(tmp_path).glob("there-*/.*") if p.is_dir()
    ]  # copies for reading are gone


@pytest.mark.filterwarnings("ignore:the schedule 'cosine' was made for a run of")
def test_the_command_line_starts_and_continues_a_run_in_a_store(url, other_machine, capsys):
    words = ["--steps", "4", "--batch-size", "8", "--progress", "false"]
    assert main(["fit", TARGET, "--run-dir", url, *words]) == 0
    assert url in capsys.readouterr().out
    other_machine()
    assert main(["resume", url, "--steps", "6"]) == 0
    assert set(held(url)) == {f"step-{step:012d}" for step in (4, 6)}


def test_no_warning_comes_from_a_run_in_a_store(url):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        until(5, url)
        fit(url, resume="auto").run(Tiny(noisy=True))
