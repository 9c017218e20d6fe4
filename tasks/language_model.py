"""A small GPT-2 or Llama learns to write: language modelling over packed or padding-free batches.

    pip install 'loopkit-torch[hf]'
    python -m tasks.language_model
    python -m tasks.language_model --data texts/ --kind llama --batches flat
    loopkit fit tasks/language_model.py --data notes.jsonl --epochs 3

Without ``--data`` it learns the help pages that come with Python. A folder holds text files. A JSON
Lines or CSV file has a column text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from loopkit import Checkpoint, Fit
from loopkit.errors import LoopkitError, OptionError
from tasks.causal_text import CausalTask, read_texts, trained_tokenizer


class LanguageModel(CausalTask):
    """Learns to predict the next token of texts.

    Args:
        data: a folder of text files, a text file, a ``.jsonl`` or a ``.csv`` file with a column text;
            None for Python's help pages.
        model: a folder with a causal model to train further; None makes a small one and its pieces
            of words.
        kind: "gpt2" or "llama", what a small model is.
        batches: "packed", "flat" or "padded", see ``CausalTask``.
        context: most tokens of a row.
        pieces: most pieces of words that a small model knows.
        width: size of the vectors of a small model.
        layers: number of layers of a small model.
        lr: peak learning rate; about 5e-5 for a pretrained model.
    """

    def __init__(
        self,
        data: str | None = None,
        model: str | None = None,
        kind: str = "gpt2",
        batches: str = "packed",
        context: int = 64,
        pieces: int = 1000,
        width: int = 64,
        layers: int = 2,
        lr: float = 3e-3,
    ) -> None:
        texts = list(topics.values()) if data is None else read_texts(Path(data))
        words: Any
        if model is None:
            words = trained_tokenizer(texts, pieces)
            net = small_model(kind, words, context, width, layers)
        else:
            words = AutoTokenizer.from_pretrained(model)
            net = AutoModelForCausalLM.from_pretrained(model)
        super().__init__(net, words, texts, batches, context, lr)


def small_model(kind: str, words: Any, context: int, width: int, layers: int) -> Any:
    """Return a new model of the class ``kind`` for a tokenizer.

    Raises:
        OptionError: there is no such kind.
    """
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), words.eos_token_id)
    size: Any = {"vocab_size": len(words), "tie_word_embeddings": True, **ends}
    if kind == "gpt2":
        size |= {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": context}
        size |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return AutoModelForCausalLM.from_config(GPT2Config(**size))
    if kind == "llama":
        size |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
        size |= {"intermediate_size": 3 * width, "max_position_embeddings": context}
        return AutoModelForCausalLM.from_config(LlamaConfig(**size))
    raise OptionError(f"kind={kind!r}: give gpt2 or llama")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print the perplexity beside that of the tokens' frequencies, and a text."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.language_model", description="Teach a small model to write."
    )
    parser.add_argument(
        "--data", help="a folder of texts, or a file (default: Python's help pages)"
    )
    parser.add_argument("--model", help="a folder with a causal model (default: a small new one)")
    parser.add_argument("--kind", default="gpt2", help="gpt2 or llama (default: %(default)s)")
    parser.add_argument(
        "--batches", default="packed", help="packed, flat or padded (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=float, default=2, help="passes (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        task = LanguageModel(
            args.data, args.model, args.kind, args.batches, lr=5e-5 if args.model else 3e-3
        )
        result = Fit(
            epochs=args.epochs,
            batch_size=16,
            clip_norm=1.0,
            checkpoint=Checkpoint(keep=2, best="eval/perplexity:min", load_best=True),
        ).run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    found = result.best["value"]
    print(f"perplexity {found:.1f}; by the frequencies of tokens {task.unigram:.1f}")
    print(task.write("The"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
