"""LoRA: a causal model learns new texts through small adapters; QLoRA on a base in 4 or 8 bits.

    pip install 'loopkit-torch[peft]'      # and [quant] for --bits
    python -m tasks.finetune_lora
    python -m tasks.finetune_lora --data notes.jsonl --model path/to/llama --bits 4
    loopkit fit tasks/finetune_lora.py --model path/to/llama --data notes.jsonl

Without ``--model`` the script first trains a small Llama on Python's help pages. Without ``--data`` the
adapters learn the source code of Python's email package.
"""

from __future__ import annotations

import argparse
import logging
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loopkit import Checkpoint, Fit
from loopkit.errors import LoopkitError, OptionError
from tasks.causal_text import CausalTask, read_texts
from tasks.language_model import LanguageModel


class FinetuneLora(CausalTask):
    """Trains low-rank adapters (Hu et al. 2021) on a frozen causal model.

    Args:
        model: a folder with a causal model and its tokenizer.
        data: texts, as ``LanguageModel`` takes them; None for the code of Python's email package.
        rank: the rank of the matrices that are added to each layer.
        alpha: their factor is alpha / rank.
        dropout: share of their inputs that are set to 0 in training.
        bits: 4 or 8 to load the frozen weights with bitsandbytes (QLoRA, Dettmers et al. 2023); 32
            for their own type.
        batches: "flat", "packed" or "padded", see ``CausalTask``.
        context: most tokens of a row.
        lr: peak learning rate.
    """

    def __init__(
        self,
        model: str,
        data: str | None = None,
        rank: int = 8,
        alpha: int = 16,
        dropout: float = 0.0,
        bits: int = 32,
        batches: str = "flat",
        context: int = 64,
        lr: float = 3e-3,
    ) -> None:
        email = Path(sysconfig.get_path("stdlib"), "email")
        texts = read_texts(email if data is None else Path(data))
        words: Any = AutoTokenizer.from_pretrained(model)
        adapters = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        net: Any = get_peft_model(load_base(model, bits), adapters)
        super().__init__(net, words, texts, batches, context, lr)


def load_base(folder: str, bits: int) -> Any:
    """Return a causal model for adapters, its weights in 4, 8 or 32 bits.

    Raises:
        OptionError: another number of bits.
    """
    if bits == 32:
        return AutoModelForCausalLM.from_pretrained(folder)
    if bits not in (4, 8):
        raise OptionError(f"bits={bits}: give 4 or 8, or 32 for the weights as they are")
    # It warns at every multiplication of float32 numbers in 8 bits.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")
    few = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=few)
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train adapters, and print the perplexity before and after, and what they weigh."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.finetune_lora", description="Fine-tune a model by adapters."
    )
    parser.add_argument(
        "--model", help="a folder with a causal model (default: trains a small one)"
    )
    parser.add_argument(
        "--data", help="a folder of texts, or a file (default: Python's email code)"
    )
    parser.add_argument(
        "--bits", type=int, default=32, help="4 or 8 for QLoRA (default: %(default)s)"
    )
    parser.add_argument(
        "--rank", type=int, default=8, help="of the adapters (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=float, default=2, help="passes (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        model = args.model or str(trained_base())
        task = FinetuneLora(model, args.data, args.rank, bits=args.bits)
        fit = Fit(
            epochs=args.epochs,
            batch_size=16,
            clip_norm=1.0,
            checkpoint=Checkpoint(keep=2, best="eval/perplexity:min", load_best=True),
        )
        before = fit.evaluate(task)["eval/perplexity"]
        result = fit.run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    print(
        f"perplexity {before:.1f} before, {result.best['value']:.1f} after; {trained:,} numbers trained"
    )
    print(f"adapters, which peft opens: {result.export(Path(str(result.run_dir), 'adapters'))}")
    print(task.write("def "))
    return 0


def trained_base() -> Path:
    """Train a small Llama on Python's help pages; return the folder that it is exported to."""
    result = Fit(epochs=2, batch_size=16, clip_norm=1.0).run(LanguageModel(kind="llama"))
    return result.export(Path(str(result.run_dir), "model"))


if __name__ == "__main__":
    sys.exit(main())
