"""peft's adapters on an HFTask: they alone train and are saved, the base is compared, peft opens
what is exported.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file

from loopkit import Checkpoint
from loopkit.errors import CheckpointError, TaskError
from loopkit.optim import AdamW
from tests.support import digest, quiet

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from loopkit.cli.main import main  # noqa: E402
from loopkit.interop import HFTask  # noqa: E402
from tests.interop.models import made, samples  # noqa: E402

KINDS = {
    "BertForSequenceClassification": ["query", "value"],
    "GPT2LMHeadModel": ["c_attn"],
    "LlamaForCausalLM": "all-linear",
}
TASK_TYPES = {"BertForSequenceClassification": "SEQ_CLS"}


def adapted(kind="BertForSequenceClassification", base=None, seed=0, **settings):
    base = made(kind, seed) if base is None else base
    torch.manual_seed(5)
    options = {
        "r": 4,
        "target_modules": KINDS[kind],
        "task_type": TASK_TYPES.get(kind, "CAUSAL_LM"),
        "lora_dropout": 0.1,
    }
    return peft.get_peft_model(base, peft.LoraConfig(**options | settings))


def task_of(kind="BertForSequenceClassification", **options):
    return HFTask(
        adapted(kind, **options),
        samples(kind, 24),
        samples(kind, 8, seed=1),
        optimizers=AdamW(lr=0.02),
    )


def batch_of(kind):
    return task_of(kind).train_data().collate_fn(samples(kind, 6, seed=2))


def trained(task, run_dir, stop_at=None, **options):
    fit = quiet(
        **{
            "steps": 6,
            "batch_size": 4,
            "run_dir": run_dir,
            "resume": "auto",
            "eval_every": "never",
            "checkpoint": Checkpoint(every="100 steps"),
        }
        | options
    )
    fit.on("step_end", lambda run, out: run.stop("test") if run.progress.step == stop_at else None)
    return fit.run(task)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_train_and_are_saved(kind, tmp_path):
    task = task_of(kind)
    frozen = {
        name: p.detach().clone() for name, p in task.model.named_parameters() if not p.requires_grad
    }
    adapters = digest(task.state_dict())
    result = trained(task, tmp_path)
    assert digest(frozen) == digest({name: task.model.get_parameter(name) for name in frozen})
    assert adapters != digest(task.state_dict())
    saved = load_file(result.checkpoint / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(
        p.numel() for p in task.model.parameters() if p.requires_grad
    )
    assert all("lora_" in name or "classifier" in name for name in saved)
    moments = load_file(result.checkpoint / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in moments} == {
        n for n, p in task.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_stopped_and_resumed_is_bit_identical(kind, tmp_path):
    whole = task_of(kind)
    trained(whole, tmp_path / "whole", activation_checkpointing="full")
    for stop in (1, 4):
        trained(task_of(kind), tmp_path / str(stop), stop, activation_checkpointing="full")
        again = task_of(kind)
        assert trained(again, tmp_path / str(stop), activation_checkpointing="full").step == 6
        assert digest(dict(again.model.named_parameters())) == digest(
            dict(whole.model.named_parameters())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_opens_with_peft(kind, tmp_path, capsys):
    task = task_of(kind)
    result = trained(task, tmp_path / "run")
    batch = batch_of(kind)
    expected = task.eval().predict_step(batch)
    assert main(["ckpt", "export", str(tmp_path / "run"), str(tmp_path / "cli")]) == 0
    for place in (result.export(tmp_path / "out"), tmp_path / "cli"):
        assert {path.name for path in place.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "base.json",
            "loopkit.json",
        }
        opened = peft.PeftModel.from_pretrained(made(kind), place)
        found = HFTask(opened).eval().predict_step(batch)
        assert torch.equal(found, expected)
    plain = HFTask(made(kind)).eval().predict_step(batch)
    assert not torch.equal(plain, expected)


def test_the_names_are_those_that_peft_saves(tmp_path):
    for kind in KINDS:
        task = task_of(kind)
        result = trained(task, tmp_path / kind, steps=1)
        task.model.save_pretrained(tmp_path / "theirs" / kind, save_embedding_layers=False)
        theirs = load_file(tmp_path / "theirs" / kind / "adapter_model.safetensors")
        (tmp_path / "ours").mkdir(exist_ok=True)
        ours = load_file(result.export(tmp_path / "ours" / kind) / "adapter_model.safetensors")
        assert digest(ours) == digest(theirs)
        files = [tmp_path / who / kind / "adapter_config.json" for who in ("theirs", "ours")]
        configs = [json.loads(path.read_text()) for path in files]
        unordered = [
            config | {"target_modules": set(config["target_modules"])} for config in configs
        ]
        assert unordered[0] == unordered[1]


def test_another_base_is_never_passed_over(tmp_path):
    trained(task_of(), tmp_path, steps=2)
    said = r"holds adapters of a model with frozen weights of SHA-256 \w{12}…, and the frozen weights of this task"
    other = task_of(seed=1)
    before = digest(dict(other.model.named_parameters()))
    with pytest.raises(CheckpointError, match=said):
        trained(other, tmp_path)
    with pytest.raises(CheckpointError, match=said):
        quiet().evaluate(other, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=said):
        HFTask.load(tmp_path, model=adapted(seed=1))
    assert digest(dict(other.model.named_parameters())) == before
    with pytest.raises(
        CheckpointError,
        match=r"holds adapters and not the model below them: give the same one again",
    ):
        HFTask.load(tmp_path)
    one_bit = adapted()
    with torch.no_grad():
        weight = one_bit.base_model.model.bert.pooler.dense.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(CheckpointError, match=said):
        HFTask.load(tmp_path, model=one_bit)


def test_a_checkpoint_is_loaded_and_evaluated_on_the_same_base(tmp_path):
    task = task_of()
    trained(task, tmp_path)
    expected = quiet().evaluate(task)["eval/loss"]
    assert quiet().evaluate(task_of(), checkpoint=tmp_path)["eval/loss"] == expected
    loaded = HFTask.load(tmp_path, model=adapted())
    assert (
        quiet().evaluate(
            loaded, samples("BertForSequenceClassification", 8, seed=1) and task.eval_data()
        )["eval/loss"]
        == expected
    )
    assert quiet().evaluate(task_of())["eval/loss"] != expected


def test_adapters_of_another_shape_are_refused(tmp_path):
    trained(task_of(), tmp_path, steps=1)
    with pytest.raises(
        CheckpointError, match=r"lora_A.weight has shape \(4, 16\), the task's has \(2, 16\)"
    ):
        trained(HFTask(adapted(r=2), samples("BertForSequenceClassification", 8)), tmp_path)


def test_what_else_is_trained_or_changes_is_saved_too(tmp_path):
    def make():
        model = adapted()
        inner = model.base_model.model.bert
        inner.embeddings.LayerNorm.requires_grad_(True)
        inner.register_buffer("seen", torch.zeros(()))
        inner.register_forward_pre_hook(lambda module, args: module.seen.add_(1) and None)
        return HFTask(
            model, samples("BertForSequenceClassification", 24), optimizers=AdamW(lr=0.02)
        )

    whole = make()
    result = trained(whole, tmp_path / "whole")
    saved = load_file(result.checkpoint / "model.safetensors")
    assert saved["base_model.model.bert.seen"] == 6
    assert "base_model.model.bert.embeddings.LayerNorm.weight" in saved
    trained(make(), tmp_path / "part", stop_at=2)
    again = make()
    trained(again, tmp_path / "part")
    assert digest(again.state_dict()) == digest(whole.state_dict())


def test_a_base_without_values_is_refused():
    with torch.device("meta"):
        model = adapted()
    with pytest.raises(
        TaskError,
        match="has no values, and a checkpoint of adapters identifies its model by the values",
    ):
        HFTask(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model on disk, to be loaded in few bits."""
    place = tmp_path_factory.mktemp("base")
    made("LlamaForCausalLM", hidden_size=64, intermediate_size=64).save_pretrained(place)
    return place


def few_bits(folder, bits):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    nf4 = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    config = transformers.BitsAndBytesConfig(
        **({"load_in_4bit": True, **nf4} if bits == 4 else {"load_in_8bit": True})
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )
    return peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def quantised(folder, bits):
    kind = "LlamaForCausalLM"
    model = adapted(kind, few_bits(folder, bits))
    return HFTask(model, samples(kind, 24), samples(kind, 8, seed=1), optimizers=AdamW(lr=0.02))


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_base_in_few_bits_train_resume_evaluate_and_open(bits, folder, tmp_path):
    long = {"steps": 12, "epochs": 9, "eval_every": 4}
    whole = quantised(folder, bits)
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in {
        type(module).__name__ for module in whole.modules()
    }
    first = quiet().evaluate(whole, whole.train_data())["eval/loss"]
    result = trained(whole, tmp_path / "whole", **long)
    assert quiet().evaluate(whole, whole.train_data())["eval/loss"] < first - 0.1
    trained(quantised(folder, bits), tmp_path / "part", stop_at=5, **long)
    again = quantised(folder, bits)
    trained(again, tmp_path / "part", **long)
    assert digest(again.state_dict()) == digest(whole.state_dict())
    last = quiet().evaluate(whole)["eval/loss"]
    assert (
        quiet().evaluate(quantised(folder, bits), checkpoint=tmp_path / "part")["eval/loss"] == last
    )
    opened = HFTask(
        peft.PeftModel.from_pretrained(few_bits(folder, bits), result.export(tmp_path / "out"))
    )
    batch = batch_of("LlamaForCausalLM")
    assert torch.equal(opened.eval().predict_step(batch), whole.eval().predict_step(batch))
    plain = adapted(
        "LlamaForCausalLM", made("LlamaForCausalLM", hidden_size=64, intermediate_size=64)
    )
    with pytest.raises(CheckpointError, match="quantised the same way"):
        HFTask.load(tmp_path / "whole", model=plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_go_through_a_base_in_few_bits_after_an_evaluation_too(bits, folder):
    """They are those of the same weights in 32 bits, as near as 8-bit arithmetic comes."""
    task = quantised(folder, bits)
    batch, grads = task.train_data().collate_fn(samples("LlamaForCausalLM", 6)), []
    quiet().evaluate(task)
    plain = adapted(
        "LlamaForCausalLM", made("LlamaForCausalLM", hidden_size=64, intermediate_size=64)
    )
    for name, module in task.model.named_modules():
        if hasattr(module, "base_layer"):
            inner = plain.get_submodule(name)
            eye = torch.eye(module.base_layer.in_features)
            with torch.no_grad():
                inner.base_layer.weight.copy_(module.base_layer(eye).T)
            for part in ("lora_A", "lora_B"):
                getattr(inner, part).load_state_dict(getattr(module, part).state_dict())
                with torch.no_grad():  # B starts at 0, and hides what flows through it
                    getattr(inner, part).default.weight.add_(0.1)
                    getattr(module, part).default.weight.add_(0.1)
    for each in (task, HFTask(plain)):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each.train().train_step(batch)["loss"].backward()
        grads.append({n: p.grad for n, p in each.model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 28
    for layer in ("layers.0.", "layers.1."):
        mine, theirs = (
            torch.cat([g.flatten() for n, g in found.items() if layer in n]) for found in grads
        )
        assert (mine - theirs).norm() <= {4: 1e-4, 8: 0.1}[bits] * theirs.norm()
