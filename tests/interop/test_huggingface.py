"""HFTask: any transformers model as a task; its loss, its columns, its checkpoints as transformers
reads them.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from loopkit import Checkpoint, Compile, Loader, Task
from loopkit.errors import CheckpointError, DataError, MissingExtraError, TaskError
from loopkit.optim import SGD, AdamW, linear
from tests.support import digest, quiet

transformers = pytest.importorskip("transformers")

from loopkit.interop import HFTask  # noqa: E402
from tests.interop.models import KINDS, made, samples, tokenizer  # noqa: E402


def task_of(kind, count=24, **options):
    return HFTask(made(kind), samples(kind, count), samples(kind, 10, seed=1), **options)


def batch_of(kind, count=8):
    task = task_of(kind)
    return task.train_data().collate_fn(samples(kind, count))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_makes_parts_of_a_batch_the_whole(kind):
    """The loss of a batch is that of its parts, weighed: what accumulation and ranks rest on."""
    task, near = (
        task_of(kind).double().eval(),
        {"abs": 1e-12 if kind.startswith("Bert") else 1e-6},
    )  # others' losses are fp32
    collate = task.train_data().collate_fn
    data = samples(kind, 9, seed=3)
    whole = task.train_step(collate(data))
    parts = [task.train_step(collate(part)) for part in (data[:2], data[2:3], data[3:])]
    if kind == "BertForQuestionAnswering":  # each sample counts once
        expected = sum(part * size for part, size in zip(parts, (2, 1, 6))) / 9
        assert expected.item() == pytest.approx(whole.item(), **near)
        return
    total = sum(part["weight"] for part in parts)
    assert total == whole["weight"] > 0
    expected = sum(part["loss"] * part["weight"] for part in parts) / total
    assert expected.item() == pytest.approx(whole["loss"].item(), **near)


def test_pixels_that_a_segmentation_leaves_out_are_not_counted():
    size = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
    }
    size |= {
        "strides": [2, 2],
        "num_attention_heads": [1, 1],
        "mlp_ratios": [1, 1],
        "decoder_hidden_size": 16,
        "num_labels": 3,
    }
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(semantic_loss_ignore_index=255, **size)
    )
    left_out = [torch.rand(16, 16) < 0.15 * number for number in range(6)]
    data = [
        {
            "pixel_values": torch.randn(3, 16, 16),
            "labels": torch.randint(0, 3, (16, 16)).masked_fill(out, 255),
        }
        for out in left_out
    ]
    task = HFTask(model, data).double().eval()
    batches = [
        {
            name: t.double() if t.is_floating_point() else t
            for name, t in task.train_data().collate_fn(part).items()
        }
        for part in (data, data[:2], data[2:])
    ]
    whole, *parts = (task.train_step(batch) for batch in batches)
    assert whole["weight"] == 6 * 256 - sum(int(out.sum()) for out in left_out)
    expected = sum(part["loss"] * part["weight"] for part in parts) / sum(
        part["weight"] for part in parts
    )
    assert expected.item() == pytest.approx(whole["loss"].item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertForTokenClassification"])
def test_accumulation_and_evaluation_are_those_of_the_whole(kind):
    ends, losses = [], []
    for size in (8, 2):
        task = task_of(kind, optimizers=SGD(lr=0.5))
        for module in task.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        result = quiet(
            steps=6, batch_size=size, eval_batch_size=size, global_batch_size=8, precision="fp64"
        ).run(task)
        ends.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
        losses.append(result.metrics["eval/loss"])
    # GPT-2's loss is in single precision whatever the model's
    near = 1e-7 if kind.startswith("GPT2") else 1e-12
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=near)
    assert losses[0] == pytest.approx(losses[1], rel=10 * near)


def test_it_trains_as_a_loop_written_by_hand():
    kind = "BertForSequenceClassification"
    data = samples(kind, 24)
    loader = torch.utils.data.DataLoader(
        data, 8, shuffle=True, collate_fn=task_of(kind).train_data().collate_fn
    )
    task = HFTask(
        made(kind), loader, optimizers=AdamW(lr=1e-3, weight_decay=0.01, schedule=linear())
    )
    quiet(epochs=2, rng="stream").run(task)
    model = made(kind).train()
    decay, none = (
        [p for p in model.parameters() if p.ndim > 1],
        [p for p in model.parameters() if p.ndim < 2],
    )
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": none, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    schedule = transformers.get_scheduler("linear", optimizer, 0, 6)
    torch.manual_seed(0)
    for _ in range(2):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert (
        digest(task.state_dict()) == digest(model.state_dict()) != digest(made(kind).state_dict())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_opens_with_from_pretrained(kind, tmp_path):
    """The folder itself and what is exported of it: the same logits to the bit; tied weights are
    written once.
    """
    task = task_of(kind, tokenizer=tokenizer(), optimizers=AdamW(lr=1e-2))
    result = quiet(
        steps=2, batch_size=8, checkpoint=True, run_dir=tmp_path / "run", eval_every="never"
    ).run(task)
    batch = batch_of(kind)
    expected = task.eval().predict_step(batch)
    for place in (result.checkpoint, result.export(tmp_path / "out")):
        opened = getattr(transformers, kind).from_pretrained(place)
        assert opened.config.architectures == [kind]
        found = HFTask(opened).eval().predict_step(batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        words = transformers.AutoTokenizer.from_pretrained(place)
        assert words("a very good film")["input_ids"] == [1, 7, 8, 4, 6, 2]
        assert ("generation_config.json" in os.listdir(place)) == opened.can_generate()
        assert not [name for name in os.listdir(place) if name.endswith((".bin", ".pt", ".pkl"))]
    again = HFTask.load(tmp_path / "run").eval()
    torch.testing.assert_close(again.predict_step(batch), expected, rtol=0, atol=0)
    assert again.tokenizer("film")["input_ids"] == [1, 6, 2]


def test_the_class_is_chosen_by_auto_model(tmp_path):
    kind = "BertForSequenceClassification"
    task = task_of(kind)
    result = quiet(
        steps=1,
        batch_size=8,
        checkpoint=True,
        run_dir=tmp_path,
        eval_every="never",
        precision="bf16-true",
    ).run(task)
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(result.checkpoint)
    assert opened.dtype == torch.bfloat16
    batch = batch_of(kind)
    assert torch.equal(opened.eval()(**batch).logits, task.model.eval()(**batch).logits)


@pytest.mark.parametrize(
    "kind", ["BertForSequenceClassification", "GPT2LMHeadModel", "ViTForImageClassification"]
)
def test_stopped_and_resumed_is_bit_identical(kind, tmp_path):
    def run(run_dir, stop_at=None):
        task = task_of(kind)
        fit = quiet(
            steps=8,
            batch_size=4,
            accumulate=2,
            run_dir=run_dir,
            resume="auto",
            activation_checkpointing="full",
            checkpoint=Checkpoint(every="100 steps"),
            eval_every="never",
        )
        fit.on("step_end", lambda r, out: r.stop("test") if r.progress.step == stop_at else None)
        fit.run(task)
        return digest(task.state_dict())

    whole = run(tmp_path / "whole")
    assert whole != digest(made(kind).state_dict())
    for stop in (1, 5):
        assert run(tmp_path / str(stop), stop) != whole
        assert run(tmp_path / str(stop)) == whole


def test_activation_checkpointing_is_the_models_own_and_changes_no_bit():
    ends = []
    for activation_checkpointing in (None, "full"):
        task = task_of("LlamaForCausalLM")
        quiet(
            steps=3,
            batch_size=8,
            activation_checkpointing=activation_checkpointing,
            eval_every="never",
        ).run(task)
        assert any(getattr(m, "gradient_checkpointing", False) for m in task.modules()) == (
            activation_checkpointing is not None
        )
        ends.append(digest(task.state_dict()))
    assert ends[0] == ends[1]


def test_metrics_of_both_kinds_are_computed(tmp_path):
    class Right:
        def __init__(self):
            self.counts = [0, 0]

        def reset(self):
            self.__init__()

        def update(self, preds, target):
            self.counts = [
                self.counts[0] + int((preds.argmax(-1) == target).sum()),
                self.counts[1] + len(target),
            ]

        def compute(self):
            return self.counts[0] / self.counts[1]

    def accuracy(outputs):
        logits, labels = outputs
        return {"share": (logits.argmax(-1) == labels).mean()}

    task = task_of(
        "BertForSequenceClassification", metrics={"right": Right()}, compute_metrics=accuracy
    )
    found = [quiet(eval_batch_size=3).evaluate(task) for _ in range(2)][-1]
    assert found["eval/right"] == pytest.approx(found["eval/share"], abs=1e-7)
    data = task.eval().eval_data()
    with torch.no_grad():
        batch = data.collate_fn(data.dataset)
        assert found["eval/share"] == pytest.approx(
            (task.predict_step(batch).argmax(-1) == batch["labels"]).float().mean().item()
        )
        assert found["eval/loss"] == pytest.approx(task.model(**batch).loss.item(), abs=1e-6)


def test_without_a_function_over_the_whole_set_outputs_are_not_kept():
    from loopkit.distributed.communicator import Communicator
    from loopkit.metrics.evaluation import Evaluation

    for given, kept in ((None, False), (lambda outputs: {}, True)):
        task = task_of("BertForSequenceClassification", compute_metrics=given)
        evaluation = Evaluation(task, torch.device("cpu"), Communicator())
        evaluation.update(task.eval_step(batch_of("BertForSequenceClassification")), 8)
        assert bool(evaluation._outputs) == kept


def test_question_answering_gives_both_logits_and_both_targets():
    task = task_of(
        "BertForQuestionAnswering",
        compute_metrics=lambda o: {"n": len(o.preds[0]), "m": len(o.target[1])},
    )
    found = quiet().evaluate(task)
    assert (found["eval/n"], found["eval/m"]) == (10, 10)


def test_what_the_model_does_not_take_is_left_out_and_said_once(capsys):
    data = [
        {**sample, "label": sample["labels"], "length": 3}
        for sample in samples("BertForSequenceClassification", 8)
    ]
    for sample in data:
        del sample["labels"]
    task = HFTask(made("BertForSequenceClassification"), data, {"a": data, "b": data})
    quiet(epochs=2, batch_size=4).run(task)
    said = capsys.readouterr().err
    assert (
        said.count(
            "loopkit: BertForSequenceClassification is called without the column(s) length, text"
        )
        == 1
    )
    assert set(task.train_data().collate_fn(data)) == {"input_ids", "labels", "attention_mask"}


def test_columns_and_label_names_can_be_given(capsys):
    class Weighing(transformers.BertForSequenceClassification):
        def forward(
            self, input_ids=None, attention_mask=None, importance=None, truth=None, **kwargs
        ):
            out = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            losses = torch.nn.functional.cross_entropy(out.logits, truth, reduction="none")
            return transformers.utils.ModelOutput(
                loss=(losses * importance).mean(), logits=out.logits
            )

    config = made("BertForSequenceClassification").config
    data = [
        {"input_ids": s["input_ids"], "importance": 0.5, "truth": s["labels"]}
        for s in samples("BertForSequenceClassification", 8)
    ]
    named = HFTask(Weighing(config), data, data, label_names=["truth"])
    assert set(named.eval_step(named.train_data().collate_fn(data))) >= {"target", "loss"}
    assert quiet(batch_size=4).run(named).step == 2
    fewer = HFTask(Weighing(config), data, columns=["input_ids", "truth"])
    with pytest.raises(TypeError, match="NoneType"):  # the model was called without the importance
        quiet(batch_size=4).run(fewer)
    assert "without the column(s) importance" in capsys.readouterr().err


def test_a_collate_function_of_ones_own_gets_samples_whole(capsys):
    words = tokenizer()
    data = [{"text": "a good film", "label": 1}, {"text": "bad", "label": 0}] * 4

    def collate(found):
        texts = words(
            [sample["text"] for sample in found],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return {
            **texts,
            "labels": torch.tensor([s["label"] for s in found]),
            "texts": [s["text"] for s in found],
        }

    task = HFTask(
        made("BertForSequenceClassification"), data, data, tokenizer=words, collate_fn=collate
    )
    assert quiet(epochs=2, batch_size=4).run(task).step == 4
    assert capsys.readouterr().err.count("column(s) texts") == 1


def test_transformers_own_collators_serve():
    words = tokenizer()
    data = [
        {"input_ids": words("a very good film")["input_ids"]},
        {"input_ids": words("bad")["input_ids"]},
    ] * 4
    causal = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    task = HFTask(made("GPT2LMHeadModel"), data, data, collate_fn=causal)
    result = quiet(epochs=2, batch_size=4).run(task)
    assert result.step == 4
    assert task.weight(causal(data[:2])) == 5 + 2


@pytest.mark.parametrize(
    "how", ["list", "datasets", "stream", "Loader", "DataLoader", "generator", "workers"]
)
def test_data_of_every_kind_trains_the_same(how):
    kind = "BertForSequenceClassification"
    data = samples(kind, 8)
    plain = task_of(kind).train_data().collate_fn
    if how == "datasets":
        data = pytest.importorskip("datasets").Dataset.from_list(data)
    elif how == "stream":
        data = pytest.importorskip("datasets").Dataset.from_list(data).to_iterable_dataset()
    elif how in ("Loader", "workers"):
        data = Loader(data, batch_size=4, shuffle=False, num_workers=int(how == "workers"))
    elif how == "DataLoader":
        data = torch.utils.data.DataLoader(data, 4, collate_fn=plain)
    elif how == "generator":
        data = (plain(samples(kind, 8)[at : at + 4]) for at in (0, 4))
    torch.manual_seed(0)
    task = HFTask(
        made(kind),
        data
        if how in ("Loader", "workers", "DataLoader", "generator", "stream")
        else Loader(data, shuffle=False),
    )
    quiet(steps=2, batch_size=4).run(task)
    expected = HFTask(made(kind), [plain(samples(kind, 8)[at : at + 4]) for at in (0, 4)])
    expected.train_data = lambda: expected._data["train"]
    quiet(steps=2).run(expected)
    assert digest(task.state_dict()) == digest(expected.state_dict())


def test_a_class_derived_from_it_brings_its_own_arguments_and_layers(tmp_path):
    class Smoothed(HFTask):
        def __init__(self, smoothing: float = 0.1):
            super().__init__(
                made("BertForSequenceClassification"), samples("BertForSequenceClassification", 8)
            )
            self.smoothing, self.scale = smoothing, torch.nn.Linear(1, 1)

        def train_step(self, batch):
            logits = self.predict_step(batch) * self.scale.weight
            return torch.nn.functional.cross_entropy(
                logits, batch["labels"], label_smoothing=self.smoothing
            )

    task = Smoothed(0.3)
    task.scale.bias.requires_grad_(False)
    quiet(steps=2, batch_size=4, checkpoint=True, run_dir=tmp_path).run(task)
    again = Smoothed.load(tmp_path)
    assert again.smoothing == 0.3
    assert {"bert.pooler.dense.weight", "scale.weight"} <= set(again.state_dict())
    assert digest(again.state_dict()) == digest(task.state_dict())


def test_hyperparameters_hold_values_and_no_data(tmp_path):
    task = task_of("BertForSequenceClassification", label_names=["labels"])
    result = quiet(
        steps=1, checkpoint=True, run_dir=tmp_path, eval_every="never", loggers="jsonl"
    ).run(task)
    assert task.hparams == {
        "label_names": ["labels"],
        "columns": None,
        "loss_fn": None,
        "generate": None,
        "tokenizer": None,
        "collate_fn": None,
        "metrics": None,
        "compute_metrics": None,
        "optimizers": None,
        "predict_data": None,
    }
    assert "input_ids" not in (result.checkpoint / "state.json").read_text()


def test_a_model_that_is_not_transformers_own_is_asked_for(tmp_path):
    class Other(transformers.BertForSequenceClassification):
        pass

    config = made("BertForSequenceClassification").config
    data = samples("BertForSequenceClassification", 8)
    quiet(steps=1, batch_size=4, checkpoint=True, run_dir=tmp_path).run(HFTask(Other(config), data))
    with pytest.raises(
        CheckpointError,
        match=r"model is Other, which cannot be made from its files: .* load\(path, model=",
    ):
        HFTask.load(tmp_path)
    assert isinstance(HFTask.load(tmp_path, model=Other(config)).model, Other)


def test_mistakes_are_explained():
    model, data = made("BertForSequenceClassification"), samples("BertForSequenceClassification", 8)
    with pytest.raises(TaskError, match="HFTask was given nothing to train on: give train_data="):
        quiet().run(HFTask(model))
    with pytest.raises(
        TaskError,
        match=r"gave no loss for a batch of input_ids, attention_mask: it takes its labels as labels",
    ):
        quiet().run(HFTask(model, [{"input_ids": s["input_ids"]} for s in data]))
    with pytest.raises(
        DataError,
        match=r"a sample has the columns text, of which the model takes none: give dicts with some of input_ids",
    ):
        quiet().run(HFTask(model, [{"text": "a"}] * 4))
    with pytest.raises(DataError, match="a sample has a Tensor, of which the model takes none"):
        quiet().run(HFTask(model, [torch.ones(3)] * 4))
    with pytest.raises(DataError, match="HFTask got a batch that is a tuple"):
        HFTask(model).train_step((1, 2))


def test_a_model_that_returns_a_tuple_is_explained():
    model = made("BertForSequenceClassification")
    model.config.return_dict = False
    with pytest.raises(
        TaskError, match=r"returned a tuple: HFTask reads a dict, .* \(config.return_dict=True\)"
    ):
        HFTask(model).train_step(batch_of("BertForSequenceClassification"))


def test_what_cannot_be_saved_is_found_before_the_first_step(tmp_path):
    task = task_of("GPT2LMHeadModel")
    task.model.generation_config.update(do_sample=False, temperature=0.3)
    task.train_step = lambda batch: pytest.fail("it trained")
    with pytest.raises(ValueError, match="temperature"):
        quiet(checkpoint=True, run_dir=tmp_path).run(task)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "evil"}, {"architectures": ["os.system"]}, {"architectures": ["Trainer"]}, {}],
)
def test_a_config_that_names_code_runs_none(tmp_path, change):
    """Code is never run from a checkpoint, wherever its config says that the class is."""
    task, marker = task_of("BertForSequenceClassification"), tmp_path / "ran"
    files = dict(task.checkpoint_files())
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoConfig": "evil.Config"}} | change
    code = f"open({str(marker)!r}, 'w')\nclass Config: pass\n".encode()
    task.checkpoint_files = lambda: (
        files | {"config.json": json.dumps(config).encode(), "evil.py": code}
    )
    quiet(steps=1, run_dir=tmp_path / "run", checkpoint=True, eval_every="never").run(task)
    if change:
        with pytest.raises(CheckpointError):
            HFTask.load(tmp_path / "run")
    else:
        assert digest(HFTask.load(tmp_path / "run").state_dict()) == digest(task.state_dict())
    assert not marker.exists()


def test_a_missing_package_is_an_error_with_the_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(
        MissingExtraError,
        match=r"HFTask needs the package 'transformers': pip install 'loopkit-torch\[hf\]'",
    ):
        HFTask(torch.nn.Linear(1, 1))


def test_it_compiles():
    ends = []
    for how in (False, Compile(backend="aot_eager")):
        torch.manual_seed(0)
        task = task_of("LlamaForCausalLM")
        quiet(steps=3, batch_size=8, compile=how, eval_every="never").run(task)
        ends.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)


def test_an_optimizer_is_given_as_a_spec_or_a_function():
    model = made("BertForSequenceClassification")
    assert HFTask(model).optimizers().lr == 5e-5
    assert HFTask(model, optimizers=SGD(lr=0.1)).optimizers().lr == 0.1
    given = HFTask(
        model, optimizers=lambda task: torch.optim.SGD(task.model.classifier.parameters(), lr=0.2)
    ).optimizers()
    assert given.param_groups[0]["lr"] == 0.2


def test_a_task_that_is_none_of_it_keeps_its_files_to_itself(tmp_path):
    from tests.support import Tiny

    result = quiet(steps=1, checkpoint=True, run_dir=tmp_path).run(Tiny())
    assert {path.name for path in result.checkpoint.iterdir()} == {
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "state.safetensors",
    }
    assert json.loads((result.checkpoint / "MANIFEST.json").read_text())["kind"] == "full"
    assert Task.checkpoint_files(Tiny()) == {}
