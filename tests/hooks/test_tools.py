"""Profiler, ModelSummary, Numerics and FindLR."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

import loopkit.hooks
from loopkit import Hook, Loader
from loopkit.console.layer_table import layer_table
from loopkit.errors import LoopkitWarning, NotFiniteError, OptionError
from loopkit.hooks import FindLR, ModelSummary, Numerics, Profiler
from loopkit.hooks.find_lr import steepest
from tests.hooks.runs import Normed, go
from tests.support import Tiny, digest, points, quiet


def test_every_hook_is_exported_and_loaded_only_when_asked_for():
    import subprocess
    import sys

    for name in loopkit.hooks.__all__:
        assert issubclass(getattr(loopkit.hooks, name), Hook)
    assert sorted(loopkit.hooks.__all__) == sorted(loopkit.hooks._HOMES)
    code = "import sys, loopkit.hooks; print('torch' in sys.modules, [m for m in sys.modules if 'loopkit.hooks.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"
    with pytest.raises(AttributeError, match="no attribute 'EMO'"):
        loopkit.hooks.EMO  # noqa: B018


# Profiler


def test_the_trace_holds_the_active_steps_and_what_ran_in_them(tmp_path):
    profiler = Profiler(wait=2, warmup=1, active=3)
    quiet(steps=10, batch_size=6, run_dir=tmp_path, hooks=[profiler]).run(Tiny())
    assert profiler.trace == tmp_path / "trace.json"
    names = [
        event.get("name", "") for event in json.loads(profiler.trace.read_text())["traceEvents"]
    ]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {
        f"ProfilerStep#{n}" for n in (3, 4, 5)
    }
    assert names.count("aten::linear") == 3 * 2


def test_profiling_changes_nothing(tmp_path):
    plain, profiled = Tiny(), Tiny()
    quiet(steps=8, batch_size=6).run(plain)
    quiet(
        steps=8, batch_size=6, run_dir=tmp_path, hooks=[Profiler(path=tmp_path / "deep" / "t.json")]
    ).run(profiled)
    assert digest(plain.state_dict()) == digest(profiled.state_dict())
    assert (tmp_path / "deep" / "t.json").is_file()


def test_a_run_too_short_to_profile_says_so(tmp_path):
    with pytest.warns(
        LoopkitWarning,
        match=r"Profiler\(wait=5, warmup=1, active=3\) wrote no trace: the run took 2",
    ):
        quiet(steps=2, run_dir=tmp_path, hooks=[Profiler(wait=5)]).run(Tiny())


def test_a_run_that_raises_stops_the_profiler(tmp_path):
    class Broken(Tiny):
        def on_step_end(self, run, out):
            if run.progress.step == 3:
                raise ZeroDivisionError

    for _ in range(2):  # a profiler left running would refuse the second
        with pytest.raises(ZeroDivisionError):
            quiet(steps=8, run_dir=tmp_path, hooks=[Profiler()]).run(Broken(count=300))


# ModelSummary


def test_the_summary_is_printed_once_to_stderr(capsys):
    task = Normed()
    quiet(steps=1, hooks=[ModelSummary(depth=1)]).run(task)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{layer_table(task, depth=1)}\n"
    assert "BatchNorm1d" not in err


# Numerics


class Root(nn.Module):
    """The square root: not finite below 0 in value, and at 0 in gradient."""

    def forward(self, x):
        return x.sqrt()


class Rooted(Tiny):
    """A square root in the middle; ``shift`` decides what goes in."""

    def __init__(self, shift=0.0, at=3):
        super().__init__(dropout=0.0)
        self.shift, self.at, self.steps = shift, at, 0
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Softplus(), Root(), nn.Linear(16, 3))
        self.net[1].register_forward_hook(lambda module, args, out: self.bent(out))

    def bent(self, out):
        if not self.training or self.steps != self.at:
            return out
        return out * 0.0 + self.shift

    def on_step_end(self, run, out):
        self.steps = run.progress.step


def test_the_first_module_with_an_output_that_is_not_finite_is_named():
    with pytest.raises(
        NotFiniteError,
        match=r"step 4 .epoch 0.: the output of net\.2 \(Root\) is not finite: 192 NaN "
        r"and 0 infinite of 192, shape \(12, 16\)\. Its input and its parameters are finite",
    ):
        quiet(steps=8, batch_size=16, debug="numerics", epochs=4).run(Rooted(shift=-1.0))


def test_a_gradient_that_is_not_finite_is_named_by_the_module_whose_output_it_is_of():
    with pytest.raises(
        NotFiniteError,
        match=r"step 4 .* the gradient at the output of net\.1 \(Softplus\) is not finite",
    ):
        quiet(steps=8, batch_size=16, hooks=[Numerics()], epochs=4).run(Rooted(shift=0.0))


def test_what_was_not_finite_before_the_module_is_said():
    class Poisoned(Tiny):
        def train_step(self, batch):
            return super().train_step((batch[0] / 0.0, batch[1]))

    with pytest.raises(
        NotFiniteError, match=r"the output of net\.0 \(Linear\).*input is not finite already"
    ):
        quiet(steps=2, debug="numerics").run(Poisoned())


def test_parameters_that_are_not_finite_are_said():
    task = Tiny()
    torch.nn.init.constant_(task.net[3].bias, float("inf"))
    with pytest.raises(
        NotFiniteError, match=r"the output of net\.3 \(Linear\).*finite; its parameters are not"
    ):
        quiet(steps=2, debug="numerics").run(task)


def test_a_loss_that_is_not_finite_after_the_last_module_shows_at_its_gradient():
    class BadLoss(Tiny):
        def train_step(self, batch):
            return super().train_step(batch) * torch.tensor(float("inf"))

    with pytest.raises(NotFiniteError, match=r"the gradient at the output of net\.3 \(Linear\)"):
        quiet(steps=2, debug="numerics", on_nan="ignore").run(BadLoss())


def test_looking_changes_nothing_and_leaves_nothing_behind():
    plain, looked_at = Tiny(), Tiny()
    quiet(steps=6, batch_size=8, accumulate=2).run(plain)
    quiet(steps=6, batch_size=8, accumulate=2, debug="numerics").run(looked_at)
    assert digest(plain.state_dict()) == digest(looked_at.state_dict())
    assert not any(module._forward_hooks for module in looked_at.modules())
    assert not any(p._backward_hooks for p in looked_at.parameters())


def test_debug_takes_numerics_alone():
    with pytest.raises(
        OptionError, match=r"debug='numeric' is not known: give one of None, 'numerics'.*'numerics'"
    ):
        quiet(debug="numeric")


# FindLR


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"rng": "stream"},
        {"task": Normed},
        {"precision": "bf16"},
        {"clip_norm": 0.1},
    ],
    ids=str,
)
def test_the_run_after_the_test_is_the_one_without_it(options, tmp_path):
    plain = go(Hook, tmp_path / "plain", **options)
    tested = go(lambda: FindLR(1e-5, 10, steps=30, stop=False), tmp_path / "tested", **options)
    assert (tmp_path / "tested" / "find_lr.csv").is_file()
    for part in ("weights", "optimizer", "losses", "rows"):
        assert tested[part] == plain[part], part


def test_data_with_a_place_of_its_own_is_put_back(tmp_path):
    from tests.resume.test_every_step import Stateful

    class Fed(Tiny):
        def train_data(self):
            return Stateful()

    plain = go(Hook, tmp_path / "plain", task=Fed, steps=20)
    tested = go(
        lambda: FindLR(1e-5, 10, steps=11, stop=False), tmp_path / "tested", task=Fed, steps=20
    )
    assert tested["losses"] == plain["losses"]


def test_workers_are_put_back(tmp_path):
    class Fed(Tiny):
        def train_data(self):
            return Loader(points(60), num_workers=1)

    plain = go(Hook, tmp_path / "plain", task=Fed)
    tested = go(lambda: FindLR(1e-5, 10, steps=11, stop=False), tmp_path / "tested", task=Fed)
    assert (tested["losses"], tested["weights"]) == (plain["losses"], plain["weights"])


class Parabola(Tiny):
    """The loss is w²: with rate r each step multiplies w by (1 - 2r), so it diverges from a rate of
    1 on.
    """

    def __init__(self):
        super().__init__()
        self.net = nn.ParameterList([nn.Parameter(torch.ones(()))])

    def train_step(self, batch):
        return self.net[0] ** 2

    def optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_losses_are_those_of_the_rates_and_it_stops(tmp_path, capsys):
    finder = FindLR(1e-3, 10, steps=50)
    result = quiet(steps=100, eval_every="never", run_dir=tmp_path, hooks=[finder]).run(
        task := Parabola()
    )
    w = 1.0
    for rate, loss, _ in finder.rows:
        assert loss == pytest.approx(w**2, rel=1e-4)
        w *= 1 - 2 * rate
    assert len(finder.rows) < 50  # the last ones diverged
    assert 0.02 < finder.suggestion < 0.6
    assert (result.status, result.step, float(task.net[0].detach())) == ("stopped", 0, 1.0)
    assert (
        result.reason
        == f"FindLR: the loss falls fastest at a learning rate of {finder.suggestion:.2g}"
    )
    err = capsys.readouterr().err
    assert finder.table() in err
    assert result.reason in err
    rows = (tmp_path / "find_lr.csv").read_text().splitlines()
    assert rows[0] == "rate,loss,smoothed"
    assert [tuple(map(float, row.split(","))) for row in rows[1:]] == finder.rows
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")


def test_the_groups_keep_their_ratio():
    seen = []

    class Groups(Tiny):
        def optimizers(self):
            groups = [
                {"params": self.net[0].parameters()},
                {"params": self.net[3].parameters(), "lr": 0.5},
            ]
            optimizer = torch.optim.SGD(groups, lr=0.1)
            optimizer.register_step_pre_hook(
                lambda o, *_: seen.append(tuple(g["lr"] for g in o.param_groups))
            )
            return optimizer

    quiet(steps=5, hooks=[FindLR(1e-4, 1e-2, steps=10)]).run(Groups())
    assert len(seen) == 10
    assert all(second == pytest.approx(5 * first) for first, second in seen)
    assert (seen[0][0], seen[-1][0]) == (1e-4, pytest.approx(1e-2))


def test_a_rate_that_is_never_good_gives_no_suggestion():
    assert steepest([(10.0**n, 1.0, 1.0 + n) for n in range(5)]) is None
    assert (
        steepest([(10.0**n, 1.0, loss) for n, loss in enumerate([3.0, 2.9, 2.0, 0.5, 0.4, 9.0])])
        == 100.0
    )


def test_a_loss_that_is_not_finite_ends_the_test_and_not_the_run():
    class Fragile(Tiny):
        def train_step(self, batch):
            loss = super().train_step(batch)
            return loss * float("nan") if self.net[0].weight.abs().max() > 1 else loss

    finder = FindLR(1e-4, 1e3, steps=40, stop=False)
    result = quiet(steps=5, hooks=[finder]).run(Fragile())
    assert 10 < len(finder.rows) < 40
    assert (result.status, result.step) == ("finished", 5)


def test_a_resumed_run_is_left_alone(tmp_path):
    fit = quiet(steps=4, run_dir=tmp_path, checkpoint=True)
    fit.on("step_end", lambda run, out: run.stop("test") if run.progress.step == 2 else None)
    fit.run(Tiny())
    finder = FindLR()
    result = quiet(steps=4, run_dir=tmp_path, checkpoint=True, resume="auto", hooks=[finder]).run(
        Tiny()
    )
    assert (result.step, finder.rows) == (4, [])


def test_data_that_can_be_read_once_is_refused():
    class Once(Tiny):
        def train_data(self):
            return iter([points(8)[:8]] * 40)

    with pytest.raises(OptionError, match="a list_iterator can be read once"):
        quiet(steps=2, hooks=[FindLR()]).run(Once())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FindLR(low=0), "low=0"),
        (lambda: FindLR(low=1, high=0.1), "high=0.1"),
        (lambda: FindLR(steps=3), "steps=3"),
        (lambda: Profiler(active=0), "active=0"),
        (lambda: Profiler(wait=-1), "wait=-1"),
        (lambda: ModelSummary(depth="all"), "depth='all'"),
    ],
)
def test_bad_arguments_are_named(make, named):
    with pytest.raises(OptionError, match=named):
        make()
