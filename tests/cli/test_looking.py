"""``loopkit ckpt``, ``report`` and ``doctor``: looking at what is there."""

import json

import pytest
from safetensors.torch import load_file

from loopkit.checkpoint import load_snapshot
from loopkit.checkpoint.tools import list_checkpoints


@pytest.fixture
def run_dir(loopkit, shapes, tmp_path):
    loopkit.ok(
        "fit",
        shapes,
        "--run_dir",
        "r",
        "--epochs",
        "3",
        "--checkpoint.best",
        "eval/loss:min",
        "--log_every",
        "1",
    )
    return tmp_path / "r"


def test_ls_shows_steps_sizes_and_metrics(loopkit, run_dir):
    head, *rows = loopkit.ok("ckpt", "ls", run_dir).splitlines()
    assert head.split() == ["checkpoint", "step", "kind", "size", "eval/loss"]
    found = list_checkpoints(run_dir)
    assert [row.split()[:3] for row in rows] == [[e.path.name, str(e.step), "full"] for e in found]
    assert [row.split()[-1] for row in rows] == [f"{e.metrics['eval/loss']:.4f}" for e in found]


def test_ls_as_json_lines(loopkit, run_dir):
    rows = [json.loads(line) for line in loopkit.ok("ckpt", "ls", "--json", run_dir).splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    files = list_checkpoints(run_dir)[0].path.iterdir()
    assert 0 < rows[0]["bytes"] <= sum(file.stat().st_size for file in files)


def test_ls_of_a_folder_without_any(loopkit, tmp_path):
    assert loopkit.ok("ckpt", "ls", tmp_path) == f"no checkpoints in {tmp_path}\n"
    code, _, err = loopkit("ckpt", "ls", "nowhere")
    assert (code, err) == (1, "loopkit: there is no run directory nowhere\n")


def test_verify_names_what_is_damaged_and_exits_with_65(loopkit, run_dir):
    assert loopkit.ok("ckpt", "verify", run_dir).count("ok ") == 3
    path = list_checkpoints(run_dir)[1].path / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    code, out, _ = loopkit("ckpt", "verify", run_dir)
    assert code == 65
    assert [line[:3] for line in out.splitlines() if not line.startswith(" ")] == [
        "ok ",
        "BAD",
        "ok ",
    ]
    assert "optimizer.safetensors" in out
    assert loopkit("ckpt", "verify", path.parent)[0] == 65
    assert loopkit("ckpt", "verify", list_checkpoints(run_dir)[0].path)[0] == 0
    assert loopkit("ckpt", "verify", run_dir.parent)[0] == 1


def test_diff_shows_what_changed_and_exits_with_1(loopkit, run_dir):
    first, _, last = (entry.path for entry in list_checkpoints(run_dir))
    code, out, _ = loopkit("ckpt", "diff", first, last)
    assert code == 1
    assert "model:net.0.weight" in out
    assert "progress.step" in out
    assert "more (--all)" not in loopkit("ckpt", "diff", "--all", first, last)[1]
    assert loopkit.ok("ckpt", "diff", first, first) == "no difference\n"
    code, out, _ = loopkit("ckpt", "diff", first, run_dir)
    assert code == 1
    assert out.startswith(f"B is {last}\n")


def test_export_writes_weights_that_others_read(loopkit, run_dir, tmp_path):
    assert loopkit.ok("ckpt", "export", run_dir, "out") == "out\n"
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {n: t.tolist() for n, t in weights.items()} == {
        n: t.tolist()
        for n, t in load_snapshot(list_checkpoints(run_dir)[-1].path).tensors["model"].items()
    }
    about = json.loads((tmp_path / "out/loopkit.json").read_text())
    assert (about["task"], about["step"], about["hparams"]["hidden"]) == ("Points", 6, 8)
    assert loopkit("ckpt", "export", run_dir, "out")[0] == 2


def test_report_of_a_run(loopkit, run_dir):
    out = loopkit.ok("report", run_dir)
    lines = [line.strip() for line in out.splitlines()]
    losses = {entry.step: entry.metrics["eval/loss"] for entry in list_checkpoints(run_dir)}
    best = min(losses, key=losses.get)
    assert "task       Points" in lines
    assert "epochs = 3" in out
    assert "hidden = 8" in out
    assert "evaluations: 3" in lines
    assert f"{best}     {losses[best]:.4f}  best eval/loss" in lines
    assert any(line.startswith("train/loss") for line in lines)
    assert f"{run_dir}/metrics.jsonl" in lines


def test_the_best_evaluation_is_the_one_the_run_was_told_to_keep(tmp_path):
    from loopkit.cli.report.text_report import report

    options = {"checkpoint": "Checkpoint(every='1 epoch', best='eval/f1:max')"}
    (tmp_path / "hparams.json").write_text(
        json.dumps({"task": "T", "hparams": {}, "options": options})
    )
    rows = [
        {"step": step, "eval/f1": value, "eval/loss": 1.0}
        for step, value in [(1, 0.1), (2, 0.9), (3, "nan"), (4, 0.2)]
    ]
    rows += [{"step": step, "eval/f1": 0.3, "eval/loss": 1.0} for step in range(5, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report(tmp_path)
    assert [
        line
        for line in text.splitlines()
        if "best" in line and "0.9000" in line and line.split()[0] == "2"
    ]
    assert "evaluations: 29, " in text
    assert "no checkpoints" in text


def test_report_of_what_is_no_run(loopkit, tmp_path):
    code, _, err = loopkit("report", tmp_path)
    assert code == 1
    assert "holds no run" in err
    assert loopkit("report", "nowhere")[2] == "loopkit: there is no run directory nowhere\n"


def test_doctor_tells_versions_devices_and_extras(loopkit, monkeypatch, tmp_path):
    import platform

    import torch

    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = dict(line.split(None, 1) for line in loopkit.ok("doctor").splitlines())
    assert facts["python"].startswith(platform.python_version())
    assert facts["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in facts["cpu"]
    assert f"free in {tmp_path}" in facts["disk"]
    assert facts["compiler"] == "none: --compile needs a-compiler-that-is-not-there for CPU code"


def test_doctor_names_the_command_that_installs_an_extra(monkeypatch):
    from importlib import metadata

    from loopkit.cli import doctor

    wants = [
        "torch>=2.6",
        "numpy>=1 ; extra == 'have'",
        'a-package-not-there>=1; extra == "lack"',
        "numpy>=999; extra == 'old'",
        "loopkit-torch[have]; extra == 'all'",
        "a-tool-not-there; extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: wants)
    assert doctor._extras() == [
        ("[have]", "installed"),
        ("[lack]", "missing a-package-not-there: pip install 'loopkit-torch[lack]'"),
        (
            "[old]",
            f"missing numpy>=999 (installed: {metadata.version('numpy')}): pip install 'loopkit-torch[old]'",
        ),
    ]
