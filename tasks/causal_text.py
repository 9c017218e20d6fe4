"""Texts for causal language models: read from files, cut into rows of tokens, and put into batches."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchmetrics.text import Perplexity
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast

from loopkit.errors import DataError, OptionError
from loopkit.interop import HFTask
from loopkit.optim import AdamW, cosine

SUFFIXES = (".md", ".py", ".rst", ".txt")
Row = dict[str, list[int]]


class CausalTask(HFTask):
    """A causal model on texts: what ``LanguageModel`` and fine-tuning share.

    Args:
        model: the causal model.
        words: its tokenizer.
        texts: the texts. Every tenth row of tokens is for evaluation.
        batches: "packed" puts texts one after the other and cuts blocks of equal length. "flat" is
            padding-free: the texts of a batch are one row, and none sees another. "padded" pads to
            the longest.
        context: most tokens of a row.
        lr: peak learning rate.

    Attributes:
        unigram: perplexity on the rows for evaluation if only the tokens' frequencies are known.
    """

    def __init__(
        self, model: Any, words: Any, texts: Iterable[str], batches: str, context: int, lr: float
    ) -> None:
        rows = rows_of(words, texts, context, packed=batches == "packed")
        train, held_out = [row for i, row in enumerate(rows) if i % 10 != 9], rows[9::10]
        super().__init__(model, train, held_out, tokenizer=words, collate_fn=collate_of(batches))
        self.lr = lr
        self.unigram = unigram_perplexity(train, held_out, len(words))

    def optimizers(self) -> Any:
        return AdamW(
            lr=self.lr,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            schedule=cosine(warmup="10%", floor=0.1),
        )

    def metrics(self) -> Mapping[str, Any]:
        return {"perplexity": Perplexity(ignore_index=-100)}

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        """Return the loss, and each prediction beside the next token, as ``Perplexity`` wants them."""
        found = dict(super().eval_step(batch))
        return {**found, "preds": found["preds"][:, :-1], "target": found["target"][:, 1:]}

    @torch.no_grad()
    def write(self, start: str, tokens: int = 40, seed: int = 0) -> str:
        """Continue the text ``start``. The same weights and seed give the same text."""
        inputs = self.tokenizer(start, return_tensors="pt", return_token_type_ids=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = self.model.eval().generate(
                **inputs.to(self.model.device), max_new_tokens=tokens, do_sample=True, top_k=20
            )
        return str(self.tokenizer.decode(found[0], skip_special_tokens=True))


def trained_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte pairs, trained on texts. It knows every character."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )


def rows_of(words: Any, texts: Iterable[str], context: int, *, packed: bool) -> list[Row]:
    """Return rows of up to ``context`` tokens, with labels equal to the tokens.

    Args:
        words: the tokenizer. Its end-of-text token is put after each text.
        texts: the texts.
        context: the most tokens of a row.
        packed: whether a row may hold several texts. All rows then have ``context`` tokens, and the
            rest of the last text is left out.

    Raises:
        DataError: there are fewer than ten rows, so none could be held out.
    """
    ids = [[*row, words.eos_token_id] for row in words([*texts], verbose=False)["input_ids"]]
    if packed:
        ids = [list(chain.from_iterable(ids))]
        ids[0] = ids[0][: len(ids[0]) // context * context]
    cut = [row[at : at + context] for row in ids for at in range(0, len(row), context)]
    rows = [{"input_ids": row, "labels": row} for row in cut if len(row) > 1]
    if len(rows) < 10:
        raise DataError(
            f"the texts give {len(rows)} rows of up to {context} tokens, and at least 10 are needed: "
            "give more text, or a smaller context"
        )
    return rows


def collate_of(batches: str) -> Any:
    """Return what makes a batch of rows; None for padding, which is HFTask's own.

    Raises:
        OptionError: there are no such batches.
    """
    if batches not in ("packed", "flat", "padded"):
        raise OptionError(f"batches={batches!r}: give packed, flat or padded")
    return DataCollatorWithFlattening() if batches == "flat" else None


def unigram_perplexity(train: Iterable[Row], held_out: Iterable[Row], size: int) -> float:
    """Return the perplexity of a model that knows how frequent each of ``size`` tokens is.

    Each token counts once more than it was seen. The first of a row is not predicted.
    """
    counts = Counter(chain.from_iterable(row["input_ids"] for row in train))
    total = counts.total() + size
    seen = [token for row in held_out for token in row["input_ids"][1:]]
    return exp(-sum(log((counts[token] + 1) / total) for token in seen) / len(seen))


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file or of a folder of text files.

    Raises:
        DataError: there is no text.
    """
    texts: list[str] = []
    try:
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
            texts = [file.read_text("utf-8") for file in files if file.is_file()]
        elif path.suffix == ".jsonl":
            texts = [
                json.loads(line)["text"] for line in path.open(encoding="utf-8") if line.strip()
            ]
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                texts = [row["text"] for row in csv.DictReader(file)]
        else:
            texts = [path.read_text("utf-8")]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as texts: {type(error).__name__}: {error}"
        ) from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(
            f"{path} holds no text: give a folder with {', '.join(SUFFIXES)} files, a text file, or a "
            ".jsonl or .csv file with a column text"
        )
    return texts
