"""Questions about texts: reads SQuAD's JSON files, and splits long texts into windows that overlap."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import processors

from loopkit.errors import DataError
from loopkit.metrics.squad import f1
from tasks.tagging import trained_tokenizer

Question = dict[str, Any]


def pair_tokenizer(texts: Iterable[str], size: int = 3000) -> Any:
    """Return a tokenizer of byte pairs, trained on texts, for pairs of a question and a text."""
    pieces = trained_tokenizer(texts, size)
    marks = [(name, pieces.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    ends = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    trimmed = processors.ByteLevel(trim_offsets=True)  # a piece begins after its space
    pieces.backend_tokenizer.post_processor = processors.Sequence([trimmed, ends])
    return pieces


def windows(
    pieces: Any, examples: Iterable[Question], length: int, stride: int, marked: bool
) -> Iterator[dict[str, Any]]:
    """Yield the windows of all texts, with the tokens at which the first answer starts and ends.

    Both are token 0 where the window does not hold the whole answer.

    Args:
        pieces: the tokenizer.
        examples: questions, as ``read_squad`` returns them.
        length: the most tokens of a window.
        stride: the tokens that two windows share.
        marked: whether words of the text that are in the question have token type 2.

    Raises:
        DataError: a question is so long that windows of its text would not advance.
    """
    pieces.padding_side = "right"
    for example in examples:
        question, text = example["question"].strip(), example["context"]
        asked = len(pieces(question, add_special_tokens=False)["input_ids"])
        if length - asked - pieces.num_special_tokens_to_add(pair=True) <= stride:
            raise DataError(
                f"the question {example['id']} has {asked} tokens, and windows of {length} tokens "
                f"share {stride}: make length larger, or stride smaller"
            )
        encoded = pieces(
            question, text, truncation="only_second", max_length=length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        for number, ids in enumerate(encoded["input_ids"]):
            of_text = np.array(encoded.sequence_ids(number)) == 1  # None for special tokens
            offsets = np.where(of_text[:, None], encoded["offset_mapping"][number], -1)
            start, end = _places(offsets, example)
            row = {"input_ids": ids, "start_positions": start, "end_positions": end}
            if marked:
                row["token_type_ids"] = np.add(
                    of_text, _repeated(offsets, question, text), dtype=int
                ).tolist()
            elif "token_type_ids" in encoded:
                row["token_type_ids"] = encoded["token_type_ids"][number]
            yield row | {"example_id": example["id"], "offset_mapping": offsets}


def _places(offsets: np.ndarray, example: Question) -> tuple[int, int]:
    """Return the first and the last token of the answer; 0 and 0 unless the window holds it all."""
    if not example["answers"]:
        return 0, 0
    first = example["answers"][0]["answer_start"]
    after = first + len(example["answers"][0]["text"])
    inside = _overlaps(offsets, first, after).nonzero()[0]
    seen = offsets[offsets[:, 1] > 0]
    whole = len(inside) and seen[0, 0] <= first and after <= seen[-1, 1]
    return (int(inside[0]), int(inside[-1])) if whole else (0, 0)


def _repeated(offsets: np.ndarray, question: str, text: str) -> np.ndarray:
    """Return which tokens are of a word that is in the question.

    Numbers and words of 4 letters or more count. Words that begin with the same 5 letters are the
    same, so that most inflected forms are found.
    """
    words = r"\w{4,}|\d+"
    asked = {word.lower()[:5] for word in re.findall(words, question)}
    found = np.zeros(len(offsets), dtype=bool)
    for match in re.finditer(words, text):
        if match[0].lower()[:5] in asked:
            found |= _overlaps(offsets, *match.span())
    return found


def _overlaps(offsets: np.ndarray, first: int, after: int) -> np.ndarray:
    return (offsets[:, 0] < after) & (offsets[:, 1] > first)


def read_squad(path: Path, no_answer: bool = False) -> list[Question]:
    """Return the questions of a SQuAD JSON file: id, context, question and answers.

    Raises:
        DataError: there is no such file, it is of another form, or an answer is not in its text.
    """
    try:
        articles = json.loads(path.read_text("utf-8"))["data"]
        found = [
            {name: qa[name] for name in ("id", "question", "answers")} | {"context": part["context"]}
            for article in articles for part in article["paragraphs"] for qa in part["qas"]
        ]  # fmt: skip
        starts = [(each, a["answer_start"], a["text"]) for each in found for a in each["answers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not a SQuAD JSON file ({reason})") from error
    for each, start, text in starts:
        if not text or not each["context"].startswith(text, start):
            raise DataError(
                f"{path}: the answer {text!r} to the question {each['id']} is not at character "
                f"{start} of its context"
            )
    bare = next((each["id"] for each in found if not each["answers"]), None)
    if bare is not None and not no_answer:
        raise DataError(
            f"{path}: the question {bare} has no answer, as in SQuAD 2.0: give no_answer=True "
            "(--no-answer)"
        )
    if len({each["id"] for each in found}) < len(found):
        raise DataError(f"{path}: two questions have the same id: give each its own")
    return found


def first_words(examples: Sequence[Question]) -> float:
    """Return the F1, in percent, of answering with the first words of each text.

    Their number, from 0 to 20, is the best one for these questions.
    """
    scores = []
    for count in range(21):
        pairs = [
            (" ".join(each["context"].split()[:count]), [a["text"] for a in each["answers"]] or [""])
            for each in examples
        ]  # fmt: skip
        scores.append(100 * sum(f1(*pair, no_answer=True) for pair in pairs) / len(pairs))
    return max(scores)


def sample_questions() -> list[Question]:
    """Return made questions about made texts."""
    names, places = ("Ann", "Bob", "Eve", "Kim", "Max"), ("Rome", "Oslo", "Lima", "Cairo")
    made: list[Question] = []
    for name, place, year in product(names, places, ("1950", "1961", "1987", "2004")):
        text = f"{name} was born in {place}, in the spring of {year}."
        for asked, answer in (("Where", place), ("When", year)):
            answers = [{"text": answer, "answer_start": text.index(answer)}]
            question = f"{asked} was {name} born?"
            made.append(
                {"id": str(len(made)), "context": text, "question": question, "answers": answers}
            )
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return [made[int(number)] for number in order]
