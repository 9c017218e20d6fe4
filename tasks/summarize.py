"""Summaries of texts: a transformers encoder-decoder learns to write them, measured by ROUGE.

    pip install 'loopkit-torch[hf]'
    python -m tasks.summarize
    python -m tasks.summarize --data news.csv --text article --summary highlights --model path/to/t5
    loopkit fit tasks/summarize.py --data news.parquet --num-beams 4 --epochs 3

``--data`` is a CSV, TSV, JSON Lines or Parquet file, or a folder or name that the ``datasets``
package loads, with a split as in "xsum:validation". Two columns hold the texts and their summaries.
Without it, the task learns a small built-in sample in seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from tokenizers import processors
from torchmetrics.text import ROUGEScore
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from loopkit import Checkpoint, Fit, Loader
from loopkit.data import Padded
from loopkit.errors import DataError, LoopkitError
from loopkit.interop import HFTask
from loopkit.metrics import ROUGELsum
from loopkit.optim import AdamW, linear
from tasks.summary_data import Pair, by_sentence, lead_1, read_pairs, sample_pairs
from tasks.tagging import trained_tokenizer


class Summarize(HFTask):
    """Writes the summaries of texts.

    Args:
        data: a file of texts and summaries, or a folder or name that ``datasets`` loads; None for
            a small sample.
        held_out: the same, to measure on; None holds out every tenth text.
        text: the column of the texts; "" for the first column.
        summary: the column of the summaries; "" for the second column.
        model: a folder with a transformers encoder-decoder to fine-tune; None makes a small one
            and its pieces of words.
        kind: the architecture of the small model; the BART learns faster from scratch.
        prefix: what comes before each text, such as "summarize: " for a pretrained T5.
        longest_text: the most tokens of a text; the rest is cut off.
        max_new_tokens: the most tokens of a summary, written or learnt.
        min_new_tokens: the fewest tokens of a written summary.
        num_beams: beams of the search for a summary; 1 takes the likeliest token at each place.
        length_penalty: more than 0 for longer summaries, less for shorter ones, with several beams.
        width: size of the vectors of the small model.
        layers: layers of the small model's encoder, and of its decoder.
        dropout: share of the small model's activations that are set to 0 in training.
        lr: peak learning rate; about 1e-4 for a pretrained model.
        workers: processes that load data.
    """

    def __init__(
        self,
        data: str | None = None,
        held_out: str | None = None,
        text: str = "",
        summary: str = "",
        model: str | None = None,
        kind: Literal["bart", "t5"] = "bart",
        prefix: str = "",
        longest_text: int = 256,
        max_new_tokens: int = 48,
        min_new_tokens: int = 1,
        num_beams: int = 4,
        length_penalty: float = 1.0,
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.1,
        lr: float = 3e-3,
        workers: int = 0,
    ) -> None:
        pairs = sample_pairs() if data is None else read_pairs(data, text, summary)
        if held_out is None:
            measured = pairs[9::10]
            pairs = [pair for number, pair in enumerate(pairs) if number % 10 != 9]
            if not measured:
                raise DataError(f"{data} has fewer than 10 texts: give held_out, other data")
        else:
            measured = read_pairs(held_out, text, summary)
        if model is None:
            pieces: Any = trained_tokenizer(" ".join(pair) for pair in pairs)
            pieces.eos_token = "[SEP]"
            pieces.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="$A [SEP]", special_tokens=[("[SEP]", pieces.eos_token_id)]
            )
            positions = max(longest_text, max_new_tokens + 1)
            writer = small_model(kind, pieces, width, layers, dropout, positions)
        else:
            pieces = AutoTokenizer.from_pretrained(model)
            writer = AutoModelForSeq2SeqLM.from_pretrained(model)
        train, held = [
            tokenized(pieces, part, prefix, longest_text, max_new_tokens)
            for part in (pairs, measured)
        ]
        generate = {
            "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "num_beams": num_beams,
            "length_penalty": length_penalty,
        }  # fmt: skip
        super().__init__(
            writer,
            Loader(train, num_workers=workers, group_by_length=True),
            [
                row | {"reference": by_sentence(summary)}
                for row, (_, summary) in zip(held, measured)
            ],
            tokenizer=pieces,
            generate=generate,
            collate_fn=Padded({"input_ids": pieces.pad_token_id, "labels": -100}),
        )
        self.measured, self.lr = measured, lr
        self.prefix, self.longest_text = prefix, longest_text

    def optimizers(self) -> Any:
        return AdamW(lr=self.lr, weight_decay=0.01, schedule=linear(warmup="10%"))

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        inputs = {name: value for name, value in batch.items() if name != "reference"}
        step = super().eval_step(inputs)
        return {**step, "preds": self.texts(step["preds"]), "target": batch["reference"]}

    def compute_metrics(self, outputs: Any) -> Mapping[str, float]:
        # Rank 0 has the texts of all ranks.
        alone: Any = {"sync_on_compute": False}
        keys = ("rouge1", "rouge2", "rougeL")
        found: dict[str, Any] = {}
        for metric in (ROUGEScore(rouge_keys=keys, **alone), ROUGELsum(**alone)):
            metric.update(outputs.preds, outputs.target)
            found |= metric.compute()
        return {
            name.removesuffix("_fmeasure"): float(value)
            for name, value in found.items()
            if name.endswith("_fmeasure")
        }

    def texts(self, tokens: Any) -> list[str]:
        """Return the texts of rows of tokens, [texts, tokens], with each sentence on a line."""
        return [*map(by_sentence, self.tokenizer.batch_decode(tokens, skip_special_tokens=True))]

    @torch.no_grad()
    def summarize(self, text: str) -> str:
        """Return the summary that the model writes for a text."""
        given = self.tokenizer(
            self.prefix + text, truncation=True, max_length=self.longest_text, return_tensors="pt"
        )
        inputs = {
            name: given[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }
        return self.texts(self.eval().predict_step(inputs))[0]


def tokenized(
    pieces: Any, pairs: Sequence[Pair], prefix: str, longest_text: int, longest_summary: int
) -> list[dict[str, list[int]]]:
    """Return the tokens of the texts and, as labels, of their summaries."""
    texts = pieces([prefix + text for text, _ in pairs], truncation=True, max_length=longest_text)
    summaries = pieces(
        text_target=[summary for _, summary in pairs], truncation=True, max_length=longest_summary
    )
    rows = zip(texts["input_ids"], summaries["input_ids"])
    return [{"input_ids": ids, "labels": labels} for ids, labels in rows]


def small_model(
    kind: str, pieces: Any, width: int, layers: int, dropout: float, positions: int
) -> Any:
    """Return a new encoder-decoder of that kind for the tokenizer ``pieces``."""
    tokens = {
        "vocab_size": len(pieces), "pad_token_id": pieces.pad_token_id, "eos_token_id": pieces.eos_token_id,
        "decoder_start_token_id": pieces.pad_token_id,
    }  # fmt: skip
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(
            d_model=width, d_kv=width // 4, d_ff=4 * width, num_layers=layers, num_heads=4,
            dropout_rate=dropout, **tokens,
        ))  # fmt: skip
    return BartForConditionalGeneration(BartConfig(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        dropout=dropout, max_position_embeddings=positions, init_std=width**-0.5, forced_eos_token_id=None,
        **tokens,
    ))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, keep the best model by ROUGE-L, print it beside a baseline, and summarize a text."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.summarize", description="Learn to summarize texts."
    )
    parser.add_argument("--data", help="a file, folder or name (default: a small sample)")
    parser.add_argument("--eval", help="the same, to measure on (default: a tenth of the data)")
    parser.add_argument("--text", default="", help="the column of the texts (default: the first)")
    parser.add_argument(
        "--summary", default="", help="the column of the summaries (default: the second)"
    )
    parser.add_argument(
        "--model", help="a folder with a transformers encoder-decoder (default: a small new one)"
    )
    parser.add_argument(
        "--epochs", type=float, help="passes over the data (default: 10; with --model 3)"
    )
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        pretrained = {"lr": 1e-4, "longest_text": 512, "max_new_tokens": 128} if args.model else {}
        task = Summarize(args.data, args.eval, args.text, args.summary, args.model, **pretrained)
        result = Fit(
            epochs=args.epochs or (3 if args.model else 10),
            batch_size=16,
            clip_norm=1.0,
            checkpoint=Checkpoint(keep=2, best="eval/rougeL:max", load_best=True),
        ).run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"ROUGE-L {result.best['value']:.3f} after {result.best['step']} steps")
    print(f"ROUGE-L {lead_1(task.measured):.3f} by taking the first sentence of each text")
    print(f"{task.measured[0][0]} -> {task.summarize(task.measured[0][0])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
