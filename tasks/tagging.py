"""Names in sentences: a transformers encoder learns to tag words, measured by spans.

    pip install 'loopkit[hf]'
    python -m tasks.tagging
    python -m tasks.tagging --data train.conll --eval dev.conll --model path/to/bert
    loopkit fit tasks/tagging.py --data train.conll --epochs 10

A CoNLL file has a word and its tag on each line, in the first and the last column, and an empty line
after each sentence. Without ``--data`` it learns a small built-in sample in seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

from loopkit import Checkpoint, Fit, Loader
from loopkit.errors import DataError, LoopkitError
from loopkit.interop import HFTask
from loopkit.metrics import SpanF1
from loopkit.optim import AdamW, linear

Sentence = list[tuple[str, str]]


class Tagging(HFTask):
    """Tags words of sentences; the first piece of a word has its tag.

    Args:
        data: a CoNLL file to learn from; None for a small sample.
        held_out: a CoNLL file to measure on; None holds out a tenth of the sentences.
        model: a folder with a transformers encoder to fine-tune; None makes a small one and its
            pieces of words.
        width: size of the vectors of the small encoder.
        layers: number of layers of the small encoder.
        dropout: share of the small encoder's activations that are set to 0 in training.
        lr: peak learning rate; about 5e-5 for a pretrained model.
        workers: processes that load data.
    """

    def __init__(
        self,
        data: str | None = None,
        held_out: str | None = None,
        model: str | None = None,
        width: int = 128,
        layers: int = 2,
        dropout: float = 0.3,
        lr: float = 1e-3,
        workers: int = 0,
    ) -> None:
        sentences = _sample() if data is None else read_conll(Path(data))
        if held_out is None:
            measured, sentences = (
                sentences[9::10],
                [s for i, s in enumerate(sentences) if i % 10 != 9],
            )
        else:
            measured = read_conll(Path(held_out))
        self.tags = sorted({tag for s in (*sentences, *measured) for _, tag in s} | {"O"})
        names = {
            "id2label": dict(enumerate(self.tags)),
            "label2id": {t: i for i, t in enumerate(self.tags)},
        }
        if model is None:
            pieces: Any = trained_tokenizer(" ".join(word for word, _ in s) for s in sentences)
            config = BertConfig(
                vocab_size=len(pieces), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                intermediate_size=4 * width, max_position_embeddings=256, hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=0.1, pad_token_id=pieces.pad_token_id, **names,
            )  # fmt: skip
            encoder: Any = BertForTokenClassification(config)
        else:
            pieces = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
            encoder = AutoModelForTokenClassification.from_pretrained(model, **names)
        rows = [[_row(pieces, s, self.tags) for s in part] for part in (sentences, measured)]
        train = Loader(rows[0], num_workers=workers, group_by_length=True)
        super().__init__(encoder, train, rows[1], tokenizer=pieces)
        self.lr = lr

    def optimizers(self) -> Any:
        return AdamW(lr=self.lr, weight_decay=0.01, schedule=linear(warmup="10%"))

    def metrics(self) -> Mapping[str, Any]:
        return {"spans": SpanF1(self.tags)}

    @torch.no_grad()
    def tag(self, words: Sequence[str]) -> list[str]:
        """Return the tag of each word of a sentence."""
        encoded = self.tokenizer(
            [*words], is_split_into_words=True, truncation=True, max_length=256, return_tensors="pt"
        )
        inputs = {
            key: encoded[key].to(self.model.device) for key in ("input_ids", "attention_mask")
        }
        best = self.eval().predict_step(inputs)[0].argmax(-1).tolist()
        first = {word: place for place, word in reversed([*enumerate(encoded.word_ids(0))])}
        return [self.tags[best[first[i]]] if i in first else "O" for i in range(len(words))]


def trained_tokenizer(texts: Any, size: int = 3000) -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte pairs, trained on texts: capital letters and every character stay."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pieces.decoder = decoders.ByteLevel()
    special, letters = ["[PAD]", "[CLS]", "[SEP]"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _row(pieces: Any, sentence: Sentence, tags: Sequence[str]) -> dict[str, Any]:
    """Return the pieces of a sentence, with -100 for those that begin no word."""
    encoded = pieces(
        [word for word, _ in sentence], is_split_into_words=True, truncation=True, max_length=256
    )
    words = encoded.word_ids()
    labels = [
        tags.index(sentence[word][1]) if word is not None and word != before else -100
        for before, word in zip([None, *words], words)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def read_conll(path: Path) -> list[Sentence]:
    """Return the sentences of a CoNLL file, each a list of words with their tags.

    Raises:
        DataError: there is no such file, or a line has no tag.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file: give a CoNLL file, a word and its tag on each line")
    sentences: list[Sentence] = [[]]
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        columns = line.rstrip("\r").split("\t" if "\t" in line else None)
        if not line.strip():
            sentences.append([])
        elif len(columns) < 2:
            raise DataError(f"{path}, line {number}: {line!r} has no tag: give a word and its tag")
        elif columns[0] != "-DOCSTART-":
            sentences[-1].append((columns[0], columns[-1].strip()))
    return [sentence for sentence in sentences if sentence]


def _sample() -> list[Sentence]:
    """Return made sentences, in random order."""
    people = [["Ann"], ["Bob"], ["Ann", "Lee"], ["Bob", "Ray"]]
    places, verbs = [["Rome"], ["Oslo"], ["New", "York"]], ["lives", "works", "stays"]
    made = []
    for person, verb, place in product(people, verbs, places):
        tagged = [(w, f"{'I' if i else 'B'}-person") for i, w in enumerate(person)]
        tagged += [(verb, "O"), ("in", "O")]
        made.append(tagged + [(w, f"{'I' if i else 'B'}-place") for i, w in enumerate(place)])
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return [made[int(number)] for number in order]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, keep the best model by F1 of spans, and tag a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.tagging", description="Learn to find names."
    )
    parser.add_argument("--data", help="a CoNLL file to learn from (default: a small sample)")
    parser.add_argument("--eval", help="a CoNLL file to measure on (default: a tenth of the data)")
    parser.add_argument(
        "--model", help="a folder with a transformers encoder (default: a small new one)"
    )
    parser.add_argument(
        "--epochs", type=float, help="passes over the data (default: 10; of the sample 40)"
    )
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        task = Tagging(args.data, args.eval, args.model, lr=5e-5 if args.model else 1e-3)
        result = Fit(
            epochs=args.epochs or (10 if args.data else 40),
            batch_size=16,
            clip_norm=1.0,
            checkpoint=Checkpoint(keep=2, best="eval/spans/f1:max", load_best=True),
        ).run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"F1 of spans {result.best['value']:.3f} after {result.best['step']} steps")
    words = ["Ann", "Ray", "works", "in", "New", "York"]
    print(*map("/".join, zip(words, task.tag(words))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
