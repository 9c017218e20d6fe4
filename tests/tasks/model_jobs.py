"""Runs of PPO, the language models and LoRA, for other processes: on ranks, or to be killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from loopkit import Checkpoint, Task
from tests.contract.jobs import gathered, make
from tests.support import digest, quiet

NAMES = ("ppo", "gpt2", "llama", "lora")
SMALL = {"pieces": 300, "width": 16, "layers": 1, "context": 16}


def made(name: str, folder: Path, **changed: Any) -> Task:
    """Return a small task, always the same one.

    Args:
        name: one of ``NAMES``.
        folder: has the texts, and a base for LoRA in ``model``.
        changed: other arguments of its constructor.
    """
    torch.manual_seed(0)
    if name == "ppo":
        from tasks.ppo import PPO

        return PPO(**{"games": 8, "moves": 16, "passes": 2, "hidden": 16, **changed})
    texts = str(folder / ("other.jsonl" if name == "lora" else "texts.jsonl"))
    if name == "lora":
        from tasks.finetune_lora import FinetuneLora

        return FinetuneLora(
            str(folder / "model"), texts, **{"context": 16, "dropout": 0.1, "lr": 1e-2, **changed}
        )
    from tasks.language_model import LanguageModel

    kinds = {"kind": name, "batches": {"gpt2": "packed", "llama": "flat"}[name]}
    return LanguageModel(texts, **{**SMALL, **kinds, "lr": 1e-2, **changed})


def write_texts(folder: Path) -> Path:
    """Write two small files of texts, and a small Llama that has learned the first, for LoRA."""
    import json
    from pydoc_data.topics import topics

    names = ("assert", "break", "class", "del", "for", "global", "if", "import", "lambda", "pass")
    parts = {"texts": names[:6], "other": names[6:]}
    for file, each in parts.items():
        lines = [json.dumps({"text": topics[name][:600]}) for name in each]
        (folder / f"{file}.jsonl").write_text("\n".join(lines), "utf-8")
    base = made("llama", folder, lr=2e-2)
    quiet(epochs=12, batch_size=8, eval_every="never").run(base)
    for part in (base.model, base.tokenizer):
        part.save_pretrained(folder / "model")
    return folder


def train(
    name: str, folder: Path, run_dir: Path, kill_at: int | None = None, stop_at: int | None = None
) -> str:
    """Train 14 steps, or continue the run in ``run_dir``; return a digest of all state.

    Args:
        kill_at: the step after which this process is killed.
        stop_at: the step after which the run stops.
    """
    task = made(name, folder)
    fit = quiet(
        steps=14,
        batch_size=2 if name == "ppo" else 4,
        clip_norm=0.5,
        eval_every="never" if name == "ppo" else 5,
        run_dir=run_dir,
        resume="auto",
        checkpoint=Checkpoint(every="3 steps", background=False),
    )

    def end(run: Any, out: Any) -> None:
        if run.progress.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if run.progress.step == stop_at:
            run.stop("test")

    fit.on("step_end", end)
    fit.run(task)
    return digest(task.state_dict())


def measured(name: str, folder: Path, strategy: str, **options: Any) -> tuple[Any, Any]:
    """Train 8 steps, without dropout; return what the evaluation measures, and the weights."""
    task = made(name, folder, **({"dropout": 0.0} if name == "lora" else {}))
    if name == "ppo":
        task.world.longest = 60  # of the games in an evaluation, too
    found: dict[str, Any] = {}
    fit = quiet(steps=8, strategy=make(strategy), accelerator="cpu", eval_every=8, **options)
    fit.on("fit_end", lambda run: found.update(gathered(run, run.strategy.model_state())))
    metrics = fit.run(task).metrics
    timed = ("eval/runtime", "eval/samples_per_second")
    return {n: v for n, v in metrics.items() if n.startswith("eval/") and n not in timed}, found


if __name__ == "__main__":
    job, where, run = sys.argv[1:4]
    train(job, Path(where), Path(run), kill_at=int(sys.argv[4]))
