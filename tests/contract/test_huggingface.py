"""transformers' models and peft's adapters over two ranks, under every strategy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from loopkit import Checkpoint
from loopkit.optim import AdamW
from loopkit.strategies.dtensor import full_tensor
from tests.contract.jobs import gathered, make
from tests.support import quiet

pytest.importorskip("transformers")
pytest.importorskip("peft")


def train(
    strategy: Any,
    run_dir: Path,
    adapters: bool,
    stop_at: int | None = None,
    kind: str = "GPT2LMHeadModel",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a small model, without dropout, on texts of different lengths.

    Returns:
        Its weights, its checkpoint, and the loss of the evaluation.
    """
    from loopkit.interop import HFTask
    from tests.interop.models import made, samples
    from tests.interop.test_adapters import adapted

    found: dict[str, Any] = {}
    model = made(
        kind,
        **(
            {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            if settings is None
            else settings
        ),
    )
    model = adapted(kind, model, lora_dropout=0.0) if adapters else model
    task = HFTask(model, samples(kind, 24), samples(kind, 7, seed=1), optimizers=AdamW(lr=0.01))
    save = Checkpoint(every="100 steps", background=False)
    fit = quiet(
        strategy=make(strategy),
        steps=4,
        eval_every=2,
        run_dir=run_dir,
        resume="auto",
        checkpoint=save,
        **options,
    )
    fit.on("step_end", lambda run, out: run.stop("test") if run.progress.step == stop_at else None)
    fit.on("fit_end", lambda run: found.update(gathered(run, run.strategy.model_state())))
    result = fit.run(task)
    weights = {name: full_tensor(tensor).clone() for name, tensor in found.items()}
    return {
        "weights": weights,
        "checkpoint": str(result.checkpoint),
        "loss": result.metrics["eval/loss"],
    }


def test_an_image_classifier_on_shards_resumes_and_opens(pair, tmp_path):
    import transformers

    from loopkit.checkpoint.tools import export_model

    vit = {"kind": "ViTForImageClassification", "settings": {}}
    alone = train("single", tmp_path / "alone", False, batch_size=2, accumulate=2, **vit)
    first, _ = pair.call(train, "fsdp", tmp_path / "two", False, batch_size=2, **vit)
    pair.call(train, "fsdp", tmp_path / "part", False, 2, batch_size=2, **vit)
    again, _ = pair.call(train, "fsdp", tmp_path / "part", False, batch_size=2, **vit)
    opened = transformers.AutoModelForImageClassification.from_pretrained(
        export_model(Path(first["checkpoint"]), tmp_path / "out")
    )
    assert type(opened) is transformers.ViTForImageClassification
    found = opened.state_dict()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-5)
        assert torch.equal(again["weights"][name], first["weights"][name])
        assert torch.equal(found[name], first["weights"][name])
    assert first["loss"] == pytest.approx(alone["loss"], abs=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.long)])
def test_a_model_trains_resumes_and_opens_under_every_strategy(pair, strategy, adapters, tmp_path):
    """The losses are weighted by labels over all ranks, as in one process that accumulates."""
    import peft
    import transformers

    from loopkit.checkpoint.tools import export_model
    from tests.interop.models import made

    alone = train("single", tmp_path / "alone", adapters, batch_size=2, accumulate=2)
    first, second = pair.call(train, strategy, tmp_path / "two", adapters, batch_size=2)
    pair.call(train, strategy, tmp_path / "part", adapters, 2, batch_size=2)
    again, _ = pair.call(train, strategy, tmp_path / "part", adapters, batch_size=2)
    assert first["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-5)
        assert torch.equal(second["weights"][name], first["weights"][name])
        assert torch.equal(again["weights"][name], first["weights"][name])
    assert first["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    place = export_model(Path(first["checkpoint"]), tmp_path / "out")
    if adapters:
        opened = peft.PeftModel.from_pretrained(made("GPT2LMHeadModel"), place)
    else:
        opened = transformers.GPT2LMHeadModel.from_pretrained(place)
    for name, parameter in opened.named_parameters():
        if "lora_" in name or not adapters:
            assert torch.equal(parameter, first["weights"][name.replace(".default", "")])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("BertForSequenceClassification", {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}),
        ("LlamaForCausalLM", {}),
        ("T5ForConditionalGeneration", {"dropout_rate": 0}),
    ],
    ids=["bert", "llama", "t5"],
)  # fmt: skip
def test_a_model_on_shards_resumes_and_its_export_opens(pair, kind, settings, tmp_path):
    """As ``test_a_model_trains_resumes_and_opens_under_every_strategy`` shows of GPT-2."""
    import transformers

    from loopkit.checkpoint.tools import export_model

    options = {"kind": kind, "settings": settings, "batch_size": 2}
    alone = train("single", tmp_path / "alone", False, accumulate=2, **options)
    first, second = pair.call(train, "fsdp", tmp_path / "two", False, **options)
    pair.call(train, "fsdp", tmp_path / "part", False, 2, **options)
    again, _ = pair.call(train, "fsdp", tmp_path / "part", False, **options)
    opened = getattr(transformers, kind).from_pretrained(
        export_model(Path(first["checkpoint"]), tmp_path / "out")
    )
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-5)
        for other in (second["weights"], again["weights"], opened.state_dict()):
            assert torch.equal(other[name], first["weights"][name])
    assert first["loss"] == pytest.approx(alone["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("strategy", "size", "tied"),
    [
        (("TensorParallel", {"plan": "auto"}), 2, False),
        (("TensorParallel", {"plan": "auto", "size": 2}), 4, True),
    ],
)
def test_a_model_is_split_by_the_plan_that_it_has(pool, tmp_path, strategy, size, tied):
    import transformers

    from loopkit.checkpoint.tools import export_model

    llama = {"kind": "LlamaForCausalLM", "settings": {"tie_word_embeddings": tied}}
    alone = train("single", tmp_path / "alone", False, batch_size=2, accumulate=size // 2, **llama)
    ranks = pool(size).call(train, strategy, tmp_path / "split", False, batch_size=2, **llama)
    pool(size).call(train, strategy, tmp_path / "part", False, 2, batch_size=2, **llama)
    again = pool(size).call(train, strategy, tmp_path / "part", False, batch_size=2, **llama)
    assert ("lm_head.weight" in alone["weights"]) or tied
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=0, atol=5e-5)
        for other in (*ranks[1:], *again):
            assert torch.equal(other["weights"][name], ranks[0]["weights"][name])
    assert ranks[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    opened = transformers.LlamaForCausalLM.from_pretrained(
        export_model(Path(ranks[0]["checkpoint"]), tmp_path / "out")
    )
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, ranks[0]["weights"][name])
