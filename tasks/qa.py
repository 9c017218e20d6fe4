"""Answers in a text: a transformers encoder learns where the answer to a question starts and ends.

    pip install 'loopkit-torch[hf]'
    python -m tasks.qa
    python -m tasks.qa --data train-v1.1.json --eval dev-v1.1.json --model path/to/bert
    loopkit fit tasks/qa.py --data train-v2.0.json --no-answer true --epochs 2

The files are SQuAD's JSON. Long texts become windows that overlap. Without ``--data`` it learns a
small built-in sample in seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForQuestionAnswering,
)

from loopkit import Checkpoint, Fit, Loader
from loopkit.data import Padded
from loopkit.errors import DataError, LoopkitError
from loopkit.interop import HFTask
from loopkit.metrics import SQuAD
from loopkit.optim import AdamW, linear
from tasks.qa_data import first_words, pair_tokenizer, read_squad, sample_questions, windows

MEASURED = ("example_id", "offset_mapping")


class QuestionAnswering(HFTask):
    """Finds the words of a text that answer a question.

    A thousand questions teach a small encoder little about words. So it sees, by a third token
    type, which words of the text are in the question (the exact match of Chen et al. 2017, DrQA),
    and it has relative positions, as a DeBERTa does: the answer is near these words.

    Args:
        data: a SQuAD JSON file to learn from; None for a small sample.
        held_out: a SQuAD JSON file to measure on; None holds out a tenth of the texts.
        model: a folder with a transformers encoder to fine-tune; None makes a small one and its
            pieces of words.
        no_answer: whether a question may have no answer, as in SQuAD 2.0.
        length: the most tokens of a window, those of the question included; 384 is usual for a
            pretrained model.
        stride: the tokens that two neighbouring windows share; 128 is usual for 384.
        width: size of the vectors of the small encoder.
        layers: number of layers of the small encoder.
        dropout: share of the small encoder's activations that are set to 0 in training.
        lr: peak learning rate; about 3e-5 for a pretrained model.
        workers: processes that load data.
    """

    def __init__(
        self,
        data: str | None = None,
        held_out: str | None = None,
        model: str | None = None,
        no_answer: bool = False,
        length: int = 128,
        stride: int = 32,
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.2,
        lr: float = 2e-3,
        workers: int = 0,
    ) -> None:
        examples = sample_questions() if data is None else read_squad(Path(data), no_answer)
        if held_out is None:
            held = {*list(dict.fromkeys(example["context"] for example in examples))[9::10]}
            measured = [each for each in examples if each["context"] in held]
            examples = [each for each in examples if each["context"] not in held]
            if not held:
                raise DataError(f"{data} has fewer than 10 texts: give held_out, another file")
        else:
            measured = read_squad(Path(held_out), no_answer)
        if model is None:
            pieces: Any = pair_tokenizer(f"{e['context']} {e['question']}" for e in examples)
            encoder: Any = DebertaV2ForQuestionAnswering(DebertaV2Config(
                vocab_size=len(pieces), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                intermediate_size=4 * width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                max_position_embeddings=length, type_vocab_size=3, pad_token_id=pieces.pad_token_id,
                relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32, share_att_key=True,
                position_biased_input=False, norm_rel_ebd="layer_norm", conv_kernel_size=3, conv_act="gelu",
                initializer_range=width**-0.5,
            ))  # fmt: skip
        else:
            pieces = AutoTokenizer.from_pretrained(model)
            encoder = AutoModelForQuestionAnswering.from_pretrained(model)
        window = {"length": length, "stride": stride, "marked": model is None}
        train = [_without(row, MEASURED) for row in windows(pieces, examples, **window)]
        held_rows = list(windows(pieces, measured, **window))
        numbered = [_without(row, MEASURED) | {"feature": i} for i, row in enumerate(held_rows)]
        super().__init__(
            encoder,
            Loader(train, num_workers=workers, group_by_length=True),
            numbered,
            tokenizer=pieces,
            collate_fn=Padded({"input_ids": pieces.pad_token_id}),
        )
        self.features = [{name: row[name] for name in MEASURED} for row in held_rows]
        self.measured, self.window = measured, window
        self.no_answer, self.lr = no_answer, lr

    def optimizers(self) -> Any:
        return AdamW(lr=self.lr, weight_decay=0.01, schedule=linear(warmup="10%"))

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        step = dict(super().eval_step(_without(batch, ["feature"])))
        start, end = step["preds"]
        return step | {"start_logits": start, "end_logits": end, "feature": batch["feature"]}

    @cached_property
    def squad(self) -> SQuAD:
        """The metric; it holds where the tokens of all windows are in their texts."""
        return SQuAD(self.measured, self.features, no_answer=self.no_answer)

    def metrics(self) -> Mapping[str, Any]:
        return {"squad": self.squad}

    @torch.no_grad()
    def answer(self, question: str, text: str) -> str:
        """Return the words of the text that answer the question; "" for no answer."""
        example = {"id": "", "question": question, "context": text, "answers": []}
        rows = list(windows(self.tokenizer, [example], **self.window))
        names = [name for name in rows[0] if name in ("input_ids", "token_type_ids")]
        batch = Padded()([{name: row[name] for name in names} for row in rows])
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        start, end = (logits.cpu() for logits in self.eval().predict_step(inputs))
        squad = SQuAD([example], rows, no_answer=self.no_answer)
        squad.update(start, end, feature=torch.arange(len(rows)))
        return squad.predictions()[""]


def _without(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, keep the best model by F1, print it beside a baseline, and answer a question."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.qa", description="Learn to find answers in texts."
    )
    parser.add_argument("--data", help="a SQuAD JSON file to learn from (default: a small sample)")
    parser.add_argument(
        "--eval", help="a SQuAD JSON file to measure on (default: a tenth of the texts)"
    )
    parser.add_argument(
        "--model", help="a folder with a transformers encoder (default: a small new one)"
    )
    parser.add_argument("--no-answer", action="store_true", help="questions may have no answer")
    parser.add_argument(
        "--epochs", type=float, help="passes over the data (default: 10; with --model 2)"
    )
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        pretrained = {"lr": 3e-5, "length": 384, "stride": 128} if args.model else {}
        task = QuestionAnswering(args.data, args.eval, args.model, args.no_answer, **pretrained)
        result = Fit(
            epochs=args.epochs or (2 if args.model else 10),
            batch_size=16,
            clip_norm=1.0,
            checkpoint=Checkpoint(keep=2, best="eval/squad/f1:max", load_best=True),
        ).run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"F1 {result.best['value']:.1f} after {result.best['step']} steps")
    print(f"F1 {first_words(task.measured):.1f} by answering with the first words of each text")
    example = task.measured[0]
    print(example["question"], task.answer(example["question"], example["context"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
