"""PushToHub against a server on this machine that speaks the hub's own API to the real
huggingface_hub.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from loopkit import Checkpoint, Hook
from loopkit.errors import LoopkitWarning, MissingExtraError, OptionError
from loopkit.hooks import PushToHub
from tests.hooks.hub import Hub
from tests.support import Tiny, quiet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # huggingface_hub's own


def at(url: str, monkeypatch, tmp_path) -> None:
    """Have huggingface_hub speak to ``url``; its constants are read when it is imported."""
    import huggingface_hub  # noqa: F401

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    at(server.url, monkeypatch, tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def go(
    hook: PushToHub,
    *more: Hook,
    task: Tiny | None = None,
    checkpoint: object = None,
    **options: object,
):
    checkpoint = checkpoint or Checkpoint(every="4 steps", keep=1)
    options = {
        "epochs": 2,
        "batch_size": 10,
        "run_dir": "run",
        "loggers": "jsonl",
        "eval_every": "3 steps",
        **options,
    }
    return quiet(hooks=[hook, *more], checkpoint=checkpoint, **options).run(task or Tiny())


class Waits(Hook):
    """Waits for the uploads of each save, as a longer run would."""

    def __init__(self, hook: PushToHub) -> None:
        self.hook = hook

    def on_save(self, run, path):
        while self.hook._queue or (self.hook._thread and self.hook._thread.is_alive()):
            time.sleep(0.01)


def test_at_the_end_the_weights_and_what_tells_of_them_arrive(hub, tmp_path):
    task, hook = Tiny(), PushToHub("me/tiny", private=True)
    result = go(hook, task=task)
    files = hub.files("me/tiny")
    assert sorted(files) == [
        "README.md",
        "hparams.json",
        "loopkit.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    sent = load(files["model.safetensors"])
    assert all(torch.equal(value, sent[name]) for name, value in task.state_dict().items())
    assert json.loads(files["loopkit.json"])["hparams"]["lr"] == 1e-2
    assert files["metrics.jsonl"] == Path("run/metrics.jsonl").read_bytes()
    assert (hook.pushed, hub.messages, hub.private) == ([12], ["12 steps"], {"me/tiny"})
    assert {token for _, path, token in hub.calls if path.startswith("/api/models/")} == {
        "Bearer hf_secret"
    }
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: loopkit\n")
    assert f"| eval/loss | {result.metrics['eval/loss']:.6g} |" in card
    assert "| optimizer steps | 12 |" in card
    assert "| lr | 0.01 |" in card
    assert not list(Path("run").glob(".push-*"))


def test_every_save_is_a_commit(hub):
    hook = PushToHub("me/tiny", "every_save")
    go(hook, Waits(hook))
    assert hub.messages == ["4 steps", "8 steps", "12 steps", "12 steps"]
    assert len({commit["model.safetensors"] for commit in hub.commits["me/tiny", "main"][1:]}) == 3


def test_saves_that_follow_faster_than_they_upload_are_passed_over(hub):
    hub.slow = 0.5
    hook = PushToHub("me/tiny", "every_save")
    go(hook, checkpoint=Checkpoint(every="1 step", keep=1, background=False))
    assert hook.pushed[0] < hook.pushed[-1] == 12
    assert len(hook.pushed) < 6


def test_the_newest_checkpoint_goes_whole_and_a_run_is_resumed_from_it(hub, tmp_path):
    from huggingface_hub import snapshot_download

    hook = PushToHub("me/tiny", "checkpoint")
    go(hook, Waits(hook))
    assert {name.split("/")[0] for name in hub.files("me/tiny") if "/" in name} == {
        "last-checkpoint"
    }
    folder = Path(snapshot_download("me/tiny", local_dir=tmp_path / "there", endpoint=hub.url))
    task = Tiny.load(folder / "last-checkpoint")
    assert torch.equal(
        task.net[0].weight, load(hub.files("me/tiny")["model.safetensors"])["net.0.weight"]
    )
    with pytest.warns(LoopkitWarning, match="made for a run of 12 steps"):
        result = quiet(
            epochs=3, batch_size=10, resume=folder / "last-checkpoint", run_dir="more"
        ).run(Tiny())
    assert result.step == 18


def test_all_checkpoints_go_though_the_run_keeps_one(hub):
    hub.slow = 0.3  # the run is over before the first has arrived
    hook = PushToHub("me/tiny", "all_checkpoints")
    go(hook)
    there = {name.split("/")[1] for name in hub.files("me/tiny") if name.startswith("checkpoints/")}
    assert there == {"step-000000000004", "step-000000000008", "step-000000000012"}


def test_the_best_weights_go_where_the_run_ends_with_them(hub):
    task = Tiny(lr=1.0)  # which soon makes it worse
    result = go(
        PushToHub("me/tiny"),
        task=task,
        eval_every="2 steps",
        checkpoint=Checkpoint(every="2 steps", best="eval/loss:min", load_best=True),
    )
    assert result.best["step"] < result.step
    sent = load(hub.files("me/tiny")["model.safetensors"])
    assert all(torch.equal(value, sent[name]) for name, value in task.state_dict().items())
    assert (
        f"| eval/loss | {result.best['value']:.6g} |" in hub.files("me/tiny")["README.md"].decode()
    )


def test_a_branch_and_a_readme_of_somebody_else(hub):
    hub.commits["me/tiny", "main"] = [{"README.md": b"# written by hand"}]
    go(PushToHub("me/tiny", revision="trial"))
    assert hub.files("me/tiny") == {"README.md": b"# written by hand"}
    assert hub.files("me/tiny", "trial")["README.md"] == b"# written by hand"
    assert "model.safetensors" in hub.files("me/tiny", "trial")


def test_our_own_readme_is_replaced(hub):
    go(PushToHub("me/tiny"))
    go(PushToHub("me/tiny"), epochs=3, run_dir="other")
    assert "| optimizer steps | 18 |" in hub.files("me/tiny")["README.md"].decode()


def test_a_hub_that_is_down_is_reported_once_at_the_end(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch, tmp_path)
        with pytest.warns(
            LoopkitWarning, match=r"of \d uploads to me/tiny, \d failed, the last by ConnectError"
        ) as told:
            result = go(PushToHub("me/tiny", "every_save"))
    assert (result.status, result.step, len(told)) == ("finished", 12, 1)
    assert not list(Path("run").glob(".push-*"))


def test_a_hub_that_refuses_is_reported_and_one_that_hangs_is_left(hub):
    hub.broken = 403
    with pytest.warns(LoopkitWarning, match="1 failed, the last by HfHubHTTPError"):
        assert go(PushToHub("me/tiny")).status == "finished"
    hub.broken, hub.slow = 0, 3.0
    with pytest.warns(LoopkitWarning, match=r"an upload was not done after 0\.2 s"):
        assert go(PushToHub("me/tiny", timeout=0.2), run_dir="other").status == "finished"


def test_a_run_that_fails_uploads_nothing_more(hub):
    class Fails(Hook):
        def on_commit(self, run):
            if run.progress.step == 6:
                raise RuntimeError("the machine went down")

    hook = PushToHub("me/tiny")
    with pytest.raises(RuntimeError, match="went down"):
        go(hook, Fails())
    assert hook.pushed == []
    assert hub.commits == {}


def test_bad_input(monkeypatch):
    with pytest.raises(OptionError, match="Did you mean 'every_save'"):
        PushToHub("me/tiny", "every_saves")
    with pytest.raises(OptionError, match="such as 'me/digits'"):
        PushToHub("a/b/c")
    with pytest.raises(OptionError, match="saves nothing"):
        quiet(hooks=[PushToHub("me/tiny")], checkpoint=False).run(Tiny())
    monkeypatch.setattr("loopkit.hooks.push_to_hub.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"'huggingface_hub': pip install 'loopkit-torch\[hf\]'"
    ):
        go(PushToHub("me/tiny"))


def pushing(url: str, run_dir: str) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        at(url, patch, Path(run_dir))
        hook = PushToHub("me/tiny", "checkpoint")
        quiet(
            strategy="ddp",
            epochs=2,
            batch_size=5,
            run_dir=run_dir,
            checkpoint=Checkpoint(every="4 steps"),
            hooks=[hook],
        ).run(Tiny())
    return hook.pushed


def test_of_several_ranks_the_first_uploads(hub, tmp_path, pair):
    first, second = pair.call(pushing, hub.url, str(tmp_path / "run"))
    assert (first[-1], second) == (12, [])
    assert {call[2] for call in hub.calls if "/commit/" in call[1]} == {"Bearer hf_secret"}
