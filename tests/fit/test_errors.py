"""Bad input gets an error that names what, where and what to do; the family is one."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from loopkit import Checkpoint, Fit, Hook, Loader, SingleDevice, Task
from loopkit.errors import (
    DataError,
    LoopkitError,
    MetricError,
    NotFiniteError,
    OptionError,
    RunDirError,
    TaskError,
)
from loopkit.optim import SGD, AdamW
from tests.support import Tiny, points, quiet

OPTIONS = [
    ({"precison": "bf16"}, "no option 'precison'. Did you mean 'precision'?"),
    ({"num_train_epochs": 3}, "here that is epochs"),
    ({"fp16": True}, 'here that is precision="fp16"'),
    ({"evaluation_strategy": "epoch"}, 'here that is eval_every="1 epoch"'),
    ({"warmup_ratio": 0.1}, 'cosine(warmup="10%")'),
    ({"precision": "bf17"}, "precision='bf17' is not known: give one of fp32, tf32, bf16"),
    ({"strategy": "dpp"}, "strategy='dpp' is not known"),
    ({"accelerator": "tpu"}, "accelerator='tpu': loopkit trains on CPUs, CUDA GPUs and Apple GPUs"),
    ({"epochs": 0}, "epochs=0: give a number above 0"),
    ({"epochs": True}, "epochs=True: give a number above 0"),
    ({"steps": 1.5}, "steps=1.5: give a whole number of at least 1"),
    ({"batch_size": -1}, "batch_size=-1: give a whole number of at least 1"),
    ({"eval_every": "often"}, "eval_every='often' is not a duration: give '500 steps'"),
    ({"log_every": 0}, 'log_every=0: here that is "never"'),
    ({"time": "3 epochs"}, "time='3 epochs': give a length of time"),
    ({"on_nan": "warn"}, "on_nan='warn' is not known: give one of 'raise', 'skip', 'ignore'"),
    ({"rng": "philox"}, "rng='philox' is not known"),
    ({"limit_train": 1.5}, "limit_train=1.5: give a whole number of batches, or a fraction"),
    ({"devices": 0}, "devices=0: give 'auto' or a whole number"),
    ({"clip_norm": "1"}, "clip_norm='1': give a number above 0"),
    (
        {"global_batch_size": 64, "accumulate": 2},
        "accumulate out, which follows from global_batch_size",
    ),
    ({"hooks": [Hook]}, "give an instance, with ()"),
    ({"hooks": ["ema"]}, "which is not a Hook"),
    ({"checkpoint": "yes"}, "checkpoint='yes': give True, False or a Checkpoint(...)"),
    ({"step": object()}, "is not a loop: give an object with run(run, ...)"),
    ({"loggers": ["jsonlines"]}, "jsonl"),
    ({"progress": "fancy"}, "progress='fancy' is not known"),
]


@pytest.mark.parametrize(
    ("options", "text"), OPTIONS, ids=[next(iter(o)) + str(i) for i, (o, _) in enumerate(OPTIONS)]
)
def test_a_bad_option_is_named_with_what_is_accepted(options, text, tmp_path):
    with pytest.raises(OptionError, match=re.escape(text)):
        Fit(progress=False, run_dir=tmp_path, **options).run(
            Tiny()
        ) if "progress" not in options else Fit(**options)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"every": "sometimes"}, "Checkpoint(every='sometimes')"),
        ({"keep": 0}, "Checkpoint(keep=0): give a whole number of at least 1"),
        ({"best": "eval/loss"}, "'eval/loss:min' or 'eval/accuracy:max'"),
        ({"load_best": True}, "needs best="),
    ],
)
def test_a_bad_checkpoint_setting_is_named(settings, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        Checkpoint(**settings)


def test_a_class_in_place_of_a_task_is_named():
    with pytest.raises(TaskError, match=r"give an instance, Tiny\(\)"):
        quiet().run(Tiny)
    with pytest.raises(
        TaskError, match=r"got a Linear, which is not a Task: derive its class from loopkit\.Task"
    ):
        quiet().run(nn.Linear(2, 2))


def test_a_task_without_a_needed_method_says_which():
    class Bare(Task):
        pass

    for method in ("train_step", "eval_step"):
        with pytest.raises(TaskError, match=f"Bare has no {method}: define {method}"):
            getattr(Bare(), method)(None)
    with pytest.raises(TaskError, match="Bare has no train_data"):
        quiet().run(Bare())

    class NoOptimizer(Tiny):
        optimizers = Task.optimizers

    with pytest.raises(TaskError, match="NoOptimizer has no optimizers"):
        quiet().run(NoOptimizer())


class Left(Tiny):
    def optimizers(self):
        return AdamW(lr=1e-3, params="net.0")


def test_a_parameter_in_no_optimizer_is_named():
    with pytest.raises(
        TaskError, match=r"leaves 2 trainable parameter\(s\) in no group: net.3.weight, net.3.bias"
    ):
        quiet().run(Left())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda t: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "in no group"),
        (lambda t: "adamw", "returned str: give a loopkit.optim spec"),
        (lambda t: {}, "empty dict"),
        (lambda t: AdamW(lr=-1), "lr=-1"),
        (lambda t: SGD(lr=0.1, params="nothing"), "picks no trainable parameter of Tiny"),
        (lambda t: AdamW(lr=0.1, schedule=lambda s: 1.0), "give a schedule of loopkit.optim"),
        (lambda t: SGD(lr=0.1, nesterov=True), "SGD cannot be built: Nesterov"),
    ],
)
def test_a_bad_optimizer_is_explained(make, text):
    task = Tiny()
    task.optimizers = lambda: make(task)
    with pytest.raises((TaskError, OptionError), match=re.escape(text)):
        quiet().run(task)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda loss: None, "Tiny.train_step returned None, with no loss"),
        (lambda loss: {"los": loss}, "returned a dict with 'los', with no loss"),
        (lambda loss: {"loss": 1.0}, "returned a float as loss"),
        (lambda loss: loss.detach(), "a loss without a gradient"),
        (lambda loss: loss.expand(3), "a loss of shape (3,); take its mean"),
    ],
)
def test_a_step_that_returns_no_loss_says_what_it_returned(returned, text):
    task = Tiny()
    step = task.train_step
    task.train_step = lambda batch: returned(step(batch))
    with pytest.raises(TaskError, match=re.escape(text)):
        quiet().run(task)


def test_a_loss_that_reaches_no_parameter_is_an_error():
    task = Tiny()
    stray = torch.zeros((), requires_grad=True)
    task.train_step = lambda batch: stray * 2
    with pytest.raises(TaskError, match="reaches no parameter of main"):
        quiet().run(task)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (list, "list without a batch: there is nothing to read"),
        (lambda: points(0), "of 0 samples: there is nothing to read"),
        (lambda: Loader(points(3), 8, drop_last=True), "fewer than one batch of 8 with drop_last"),
        (lambda: iter(()), "gave no batch in epoch 0: there is nothing to train on"),
        (lambda: 7, "returned int: give a Dataset, a DataLoader"),
        (lambda: None, "returned NoneType"),
    ],
)
def test_data_with_nothing_to_train_on_is_refused(data, text):
    task = Tiny()
    task.train_data = data
    task.optimizers = lambda: AdamW(lr=1e-3)
    with pytest.raises(DataError, match=re.escape(text)):
        quiet().run(task)


def test_an_iterator_that_is_spent_after_one_epoch_says_so():
    task = Tiny()
    task.train_data = lambda: (points(8)[:] for _ in range(3))
    task.optimizers = lambda: AdamW(lr=1e-3)
    once = iter([points(8)[:]] * 3)
    task.train_data = lambda: once
    with pytest.raises(DataError, match="can be read only once, and epoch 1 needs it again"):
        quiet(epochs=2).run(task)


@pytest.mark.parametrize("weight", [0, torch.tensor(0)])
def test_a_step_with_nothing_to_train_on_names_its_weight(weight):
    task = Tiny()
    task.train_step = lambda batch: {"loss": task.net(batch[0])[:0].mean(), "weight": weight}
    with pytest.raises((DataError, NotFiniteError), match="nothing to train on"):
        quiet().run(task)


def test_a_failing_sample_is_named():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            if index == 7:
                raise KeyError("label")
            return points(10)[index]

    task = Tiny()
    for workers in (0, 1):
        task.train_data = lambda w=workers: Loader(Broken(), 2, num_workers=w)
        with pytest.raises(DataError, match=r"Broken\[7\] failed in epoch 0: KeyError: 'label'"):
            quiet().run(task)


class Poisoned(Tiny):
    """Tiny whose loss is not finite at one step."""

    def __init__(self, at: int, what: str, **hparams: Any) -> None:
        super().__init__(dropout=0.0, **hparams)
        self.at, self.what, self.seen = at, what, 0
        self.before: dict[str, torch.Tensor] = {}

    def train_step(self, batch):
        self.seen += 1
        loss = super().train_step(batch)
        if self.seen == self.at:
            self.before = {n: p.detach().clone() for n, p in self.named_parameters()}
            if self.what == "gradient":
                return (
                    loss + 0 * (self.net[0].weight[0, 0] * 0).sqrt()
                )  # 0, with an infinite slope times 0
            return loss * math.nan
        return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(what, clip, fused):
    task = Poisoned(5, what)
    task.optimizers = lambda: AdamW(lr=0.1, fused=fused)
    with pytest.raises(NotFiniteError) as error:
        quiet(batch_size=4, clip_norm=clip, epochs=2, eval_every="never").run(task)
    text = str(error.value)
    assert "step 5 (epoch 0)" in text
    assert (
        ("the loss is nan" in text)
        if what == "loss"
        else ("finite, but its gradient is not" in text)
    )
    from loopkit.data.sampler import permutation

    ids = [int(i) for i in permutation(60, seed=0, epoch=0, shuffle=True)[16:20]]
    assert f"Samples: {', '.join(map(str, ids))}." in text
    for name, parameter in task.named_parameters():
        assert torch.equal(parameter, task.before[name])


def test_skip_leaves_the_step_out_and_counts_it():
    task = Poisoned(5, "loss")
    result = quiet(batch_size=4, on_nan="skip", eval_every="never", log_every=7).run(task)
    assert result.step == 15
    assert [
        row["train/skipped_steps"] for row in result.history if "train/skipped_steps" in row
    ] == [1]
    assert all(p.isfinite().all() for p in task.parameters())


def test_ignore_lets_it_through():
    task = Poisoned(5, "loss")
    quiet(batch_size=4, on_nan="ignore", eval_every="never").run(task)
    assert all(p.isnan().any() for p in task.parameters())


class Measured(Tiny):
    def metrics(self):
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(3)}


def test_a_metric_that_gets_no_argument_names_metric_argument_and_keys():
    task = Measured()
    task.eval_step = lambda batch: {"loss": 0.0, "logits": None}
    type(task).eval_step  # noqa: B018 - the class defines one, so that evaluation is on
    with pytest.raises(
        MetricError, match=r"'accuracy' \(MulticlassAccuracy\) asks for 'preds'.*'loss', 'logits'"
    ):
        quiet().evaluate(task)


def test_an_object_that_is_no_metric_is_refused():
    task = Tiny()
    task.metrics = lambda: {"accuracy": len}
    with pytest.raises(
        MetricError, match=re.escape("metrics()['accuracy'] is a builtin_function_or_method")
    ):
        quiet().evaluate(task)


def test_an_unknown_best_metric_fails_at_the_first_evaluation_listing_the_known(tmp_path):
    task = Measured()
    with pytest.raises(
        MetricError, match=r"gave no 'eval/acuracy'. Did you mean 'eval/accuracy'\?.*eval/loss"
    ) as error:
        quiet(epochs=3, run_dir=tmp_path, checkpoint=Checkpoint(best="eval/acuracy:max")).run(task)
    assert isinstance(error.value, LoopkitError)


def test_a_best_metric_of_a_run_that_never_evaluates_is_refused(tmp_path):
    for options, task in (({"eval_every": "never"}, Tiny()), ({}, Tiny())):
        if not options:
            task.eval_data = lambda: None
        with pytest.raises(
            OptionError, match=r"Checkpoint\(best='eval/loss:min'\) waits for an evaluation"
        ):
            quiet(run_dir=tmp_path, checkpoint=Checkpoint(best="eval/loss:min"), **options).run(
                task
            )


def test_an_event_with_a_typing_error_is_refused():
    class Typo(Hook):
        def on_step_ends(self, run, out): ...

    with pytest.raises(
        OptionError, match=r"Typo.on_step_ends is no event. Did you mean 'on_step_end'\?"
    ):
        quiet(hooks=[Typo()]).run(Tiny())
    with pytest.raises(OptionError, match=r"no event 'step_ends'. Did you mean 'step_end'\?"):
        quiet().on("step_ends", print)


def test_a_loop_for_a_place_there_is_not():
    task = Tiny()
    task.loops = lambda: {"train": object()}
    with pytest.raises(TaskError, match="the names are step, epoch, eval, predict"):
        quiet().run(task)


def test_a_device_that_is_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(
            OptionError, match="accelerator='cuda' is not on this machine, which has: cpu"
        ):
            SingleDevice("cuda")


def test_every_error_is_of_one_family_and_has_an_exit_code():
    import loopkit.errors as errors

    kinds = [
        k
        for k in vars(errors).values()
        if isinstance(k, type) and issubclass(k, Exception) and k.__module__ == errors.__name__
    ]
    ours = [k for k in kinds if not issubclass(k, Warning)]
    assert all(issubclass(k, LoopkitError) for k in ours)
    codes = {k.__name__: k.exit_code for k in ours}
    assert (codes["OptionError"], codes["NoValidCheckpointError"], codes["RunDirError"]) == (
        2,
        65,
        73,
    )
    assert (codes["DiskFullError"], codes["HungError"], codes["DataError"]) == (74, 75, 1)
    assert RunDirError.exit_code == 73


def test_asking_for_an_evaluation_that_cannot_be_is_an_error():
    fit = quiet(eval_every="never")
    fit.on("step_end", lambda run, out: run.request("eval"))
    with pytest.raises(OptionError, match="nothing to evaluate on: define eval_data"):
        fit.run(Tiny())
    task = Tiny()
    task.eval_data = lambda: None
    with pytest.raises(
        DataError,
        match=r"Tiny.eval_data\(\) returned nothing to evaluate on: define it, or give data=",
    ):
        quiet().evaluate(task)


def test_deterministic_has_torch_refuse_what_is_not_and_leaves_it_as_it_was():
    seen = []
    for wanted in (True, False):
        fit = quiet(deterministic=wanted, steps=1)
        fit.on(
            "step_end", lambda run, out: seen.append(torch.are_deterministic_algorithms_enabled())
        )
        fit.run(Tiny())
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_strategy_object_used_again_keeps_nothing_of_the_run_before():
    strategy = SingleDevice("cpu")
    with pytest.raises(NotFiniteError):
        quiet(strategy=strategy, batch_size=4, eval_every="never").run(Poisoned(5, "loss"))
    quiet(strategy=strategy, precision="fp16", steps=1, eval_every="never").run(Tiny())
    task = Poisoned(5, "loss")
    quiet(strategy=strategy, batch_size=4, on_nan="ignore", eval_every="never").run(task)
    assert all(p.isnan().any() for p in task.parameters())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes since Python 3.11")
def test_an_error_of_a_label_out_of_range_names_the_samples_of_its_step():
    class Wrong(Tiny):
        def train_data(self):
            x, y = points(60).tensors
            return TensorDataset(x, torch.where(torch.arange(60) == 7, 9, y))

    with pytest.raises(IndexError) as caught:
        quiet(batch_size=4, progress=False).run(Wrong())
    (note,) = caught.value.__notes__
    assert re.search(r"step \d+ \(epoch 0\)\. Samples: .*\b7\b", note)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes since Python 3.11")
def test_a_batch_that_forward_cannot_take_in_prediction_gets_a_note():
    class NoPredictStep(Tiny):
        predict_step = Task.predict_step

    class Wrong(Tiny):
        def predict_step(self, batch):
            return self(batch)

    with pytest.raises(TypeError) as caught:
        quiet().predict(NoPredictStep(), points(8))
    (note,) = caught.value.__notes__
    assert "def predict_step(self, batch): return self(batch[0])" in note
    with pytest.raises(TypeError) as caught:
        quiet().predict(Wrong(), points(8))
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes since Python 3.11")
def test_a_loss_that_is_added_to_a_dict_gets_a_note_without_a_predict_step_too():
    class Adds(Tiny):
        predict_step = Task.predict_step

        def train_step(self, batch):
            return {"loss": super().train_step(batch)} + 1

    with pytest.raises(TypeError) as caught:
        quiet(batch_size=4).run(Adds())
    (note,) = caught.value.__notes__
    assert "Change the loss in it" in note
