"""Adapters of other kinds and names, put on the model in other ways; bases that cannot be trained."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from loopkit.errors import LoopkitWarning, OptionError, TaskError
from loopkit.optim import AdamW
from tests.interop.test_adapters import trained
from tests.support import digest, quiet

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from loopkit.interop import HFTask  # noqa: E402
from tests.interop.models import made, samples  # noqa: E402

KIND = "LlamaForCausalLM"
ON = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, **ON),
    "ia3": lambda: peft.IA3Config(**ON, feedforward_modules=[]),
    "trained head": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **ON),
    "biases": lambda: peft.LoraConfig(r=4, bias="lora_only", **ON),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **ON),
}


def logits(model):
    rows = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        return model.eval()(input_ids=rows).logits


def task_of(model):
    rows = samples(KIND, 24)
    return HFTask(model, rows, rows[:8], optimizers=AdamW(lr=0.05))


@pytest.mark.parametrize("name", ["default", "first"])
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_opens_an_export_of_each_kind_and_name(config, name, tmp_path):
    def model():
        torch.manual_seed(3)
        return peft.get_peft_model(made(KIND), CONFIGS[config](), adapter_name=name)

    task = task_of(model())
    before = logits(task.model)
    task.model.train()
    folder = trained(task, tmp_path / "run").export(tmp_path / "out")
    opened = peft.PeftModel.from_pretrained(made(KIND), folder)
    assert torch.equal(logits(opened), logits(task.model))
    assert not torch.equal(before, logits(task.model))
    loaded = HFTask.load(tmp_path / "run", model=model())
    assert torch.equal(logits(loaded.model), logits(task.model))


def test_several_active_adapters_have_a_folder_each(tmp_path):
    model = peft.get_peft_model(made(KIND), CONFIGS["lora"](), adapter_name="first")
    model.add_adapter("second", CONFIGS["lora"]())
    model.base_model.set_adapter(["first", "second"])
    folder = trained(task_of(model), tmp_path / "run").export(tmp_path / "out")
    opened = peft.PeftModel.from_pretrained(made(KIND), folder / "first", adapter_name="first")
    opened.load_adapter(folder / "second", adapter_name="second")
    opened.base_model.set_adapter(["first", "second"])
    assert torch.equal(logits(opened), logits(model))


def test_an_adapter_that_transformers_puts_on_resumes_and_opens(tmp_path, monkeypatch):
    # transformers 5.24 asks for a peft that is newer than 0.21, which serves.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)

    def task():
        model = made(KIND)
        torch.manual_seed(3)
        model.add_adapter(CONFIGS["lora"](), adapter_name="mine")
        return task_of(model)

    whole, parts = task(), task()
    trained(whole, tmp_path / "whole")
    trained(parts, tmp_path / "parts", stop_at=3)
    result = trained(parts := task(), tmp_path / "parts")
    assert digest(parts.state_dict()) == digest(whole.state_dict())
    opened = peft.PeftModel.from_pretrained(made(KIND), result.export(tmp_path / "out"))
    assert torch.equal(logits(opened), logits(parts.model))


def test_adapters_that_peft_computes_are_reported_and_resume(tmp_path):
    def task():
        torch.manual_seed(3)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        return task_of(peft.get_peft_model(made(KIND), config))

    whole = task()
    with pytest.warns(LoopkitWarning, match="peft cannot open exports of these adapters"):
        trained(whole, tmp_path / "whole")
    with pytest.warns(LoopkitWarning):
        trained(task(), tmp_path / "parts", stop_at=3)
    parts = task()
    with pytest.warns(LoopkitWarning):
        trained(parts, tmp_path / "parts")
    assert digest(parts.state_dict()) == digest(whole.state_dict())


def test_a_quantised_model_without_adapters_is_refused(tmp_path):
    model = made(KIND)
    model.is_quantized = True
    with pytest.raises(TaskError, match=r"quantised and cannot be trained: put adapters on it"):
        quiet(steps=1, run_dir=tmp_path).run(task_of(model))
    adapted = peft.get_peft_model(model, CONFIGS["lora"]())
    assert quiet(steps=1).run(task_of(adapted)).step == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_of_16_bits_are_reported(precision, dtype):
    task = task_of(made(KIND).to(dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(LoopkitWarning, match=f"trained weights of LlamaForCausalLM are {name}"):
        quiet(steps=1, precision=precision).run(task)


def test_16_bits_are_silent_where_they_are_asked_for_or_frozen(recwarn):
    quiet(steps=1, precision="bf16-true").run(task_of(made(KIND)))
    base = made(KIND).to(torch.bfloat16)
    adapted = peft.get_peft_model(base, CONFIGS["lora"]())
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    quiet(steps=1, precision="bf16").run(task_of(adapted))
    assert not [w for w in recwarn if "trained weights" in str(w.message)]


def test_a_scaler_over_weights_of_float16_is_an_error():
    with pytest.raises(OptionError, match="needs float32 weights: load the model with dtype="):
        quiet(steps=1, precision="fp16").run(task_of(made(KIND).half()))
