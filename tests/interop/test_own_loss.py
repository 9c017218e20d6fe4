"""A loss of one's own, labels of every type, text that is generated, and collators of transformers."""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.nn import functional as F

from loopkit.errors import DataError
from loopkit.optim import SGD
from tests.support import quiet

transformers = pytest.importorskip("transformers")

from loopkit.interop import HFTask  # noqa: E402
from loopkit.interop.labels import Labels, shifts_labels  # noqa: E402
from tests.interop.models import made, samples, tokenizer  # noqa: E402

BERT, T5 = "BertForSequenceClassification", "T5ForConditionalGeneration"


def smoothed(out, batch):
    return F.cross_entropy(out["logits"], batch["labels"], label_smoothing=0.4)


def expected(task, rows):
    batch = task.train_data().collate_fn(rows)
    with torch.no_grad():
        out = task.eval().model(**batch)
    return float(smoothed(out, batch)), float(out.loss)


def certain():
    """A model of large logits, whose loss label smoothing changes."""
    model = made(BERT)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    return model


class Derived(HFTask):
    def train_step(self, batch):
        return smoothed(self._call(batch), batch)


class Twice(HFTask):
    """Calls the model more than once, as for a consistency loss."""

    def train_step(self, batch):
        self._call(batch)
        return smoothed(self._call(batch), batch)


@pytest.mark.parametrize("kind", ["loss_fn", Derived, Twice])
def test_the_evaluation_measures_the_loss_that_is_trained(kind):
    rows = samples(BERT, 12)
    if kind == "loss_fn":
        task = HFTask(certain(), rows, rows, loss_fn=smoothed)
    else:
        task = kind(certain(), rows, rows)
    own, models = expected(task, rows)
    assert own != pytest.approx(models, rel=1e-3)
    metrics = quiet(eval_batch_size=5).evaluate(task)
    assert metrics["eval/loss"] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool])
def test_classes_of_every_integer_type_train(dtype):
    rows = [{**row, "labels": torch.tensor(n % 2, dtype=dtype)}
            for n, row in enumerate(samples(BERT, 8))]  # fmt: skip
    wide = [{**row, "labels": int(row["labels"])} for row in rows]
    losses = [
        quiet().evaluate(HFTask(made(BERT), each, each))["eval/loss"] for each in (rows, wide)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 1}, lambda n: n % 5),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, lambda n: [n % 2, 1, 0]),
        ({"num_labels": 3}, lambda n: [True, False, n % 2 == 0]),
    ],
)
def test_labels_that_are_values_become_floats(settings, labels):
    rows = [{**row, "labels": labels(n)} for n, row in enumerate(samples(BERT, 8))]
    task = HFTask(made(BERT, **settings), rows, rows, optimizers=SGD(lr=0.1))
    assert quiet(steps=2, batch_size=4, eval_every=1).run(task).metrics["eval/loss"] > 0


class Own(transformers.DataCollatorForLanguageModeling):
    """A collator that is derived from one of transformers."""


@pytest.mark.parametrize("collator", [transformers.DataCollatorForLanguageModeling, Own])
def test_a_text_that_a_collator_of_transformers_cannot_take_is_left_out(collator):
    rows = [
        {"input_ids": row["input_ids"], "text": "a word", "where": "here"}
        for row in samples("GPT2LMHeadModel", 8)
    ]
    task = HFTask(made("GPT2LMHeadModel"), rows, rows, collate_fn=collator(tokenizer(), mlm=False))
    assert quiet(steps=2, batch_size=4).run(task).step == 2


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM", T5])
def test_the_first_batch_shows_whether_a_loss_shifts(kind):
    model = made(kind)
    labels = Labels(model, ["labels"])
    known = labels.shifts
    assert known == shifts_labels(model) == (kind != T5)
    labels.shifts = not known  # as for a class that transformers does not have
    tokens = torch.randint(3, 30, (3, 6))
    batch = {"input_ids": tokens, "labels": tokens}
    labels.observe(batch, model.eval()(**batch))
    assert labels.shifts == known


def test_generated_tokens_are_predictions_and_reach_the_metrics():
    seen = SimpleNamespace()

    def keep(outputs):
        seen.preds, seen.target = outputs.preds, outputs.target
        return {"rows": float(len(outputs.preds))}

    rows, model = samples(T5, 6), made(T5)
    task = HFTask(model, rows, rows, compute_metrics=keep, generate={"max_new_tokens": 4})
    fit = quiet(eval_batch_size=3)
    assert fit.evaluate(task)["eval/rows"] == 6
    assert seen.preds.shape[0] == seen.target.shape[0] == 6
    predicted = fit.predict(task)
    assert torch.equal(predicted, torch.as_tensor(seen.preds))
    batch = task.eval_data().collate_fn(rows[:1])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    alone = model.eval().generate(**inputs, max_new_tokens=4)[0]
    assert predicted[0][: len(alone)].tolist() == alone.tolist()


def test_labels_that_are_texts_are_refused():
    rows = [{**row, "labels": "good"} for row in samples(BERT, 4)]
    with pytest.raises(DataError, match="the column labels holds texts, such as 'good': give each"):
        quiet(steps=1).run(HFTask(made(BERT), rows))
