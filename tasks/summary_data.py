"""Texts and their summaries: read from files and data sets, with ROUGE-L of their first sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torchmetrics.text import ROUGEScore

from loopkit.errors import DataError

Pair = tuple[str, str]
TEXTS = {"dtype": str, "keep_default_na": False}
READERS = {
    ".csv": partial(pd.read_csv, **TEXTS),
    ".tsv": partial(pd.read_csv, sep="\t", **TEXTS),
    ".jsonl": partial(pd.read_json, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}


def read_pairs(data: str, text: str = "", summary: str = "") -> list[Pair]:
    """Return the texts and summaries of a file, or of a folder or name that ``datasets`` loads.

    Raises:
        DataError: it cannot be read, has no such columns, or a row lacks its text or summary.
    """
    path = Path(data)
    try:
        if path.is_file():
            table = READERS[path.suffix.lower()](path)
        else:
            name, _, split = data.partition(":")
            table = _loaded(name, split or "train").to_pandas()
    except Exception as error:
        raise DataError(
            f"{data} cannot be read ({type(error).__name__}: {error}): give a file that ends in "
            f"{', '.join(READERS)}, or a folder or name that datasets.load_dataset takes"
        ) from error
    columns = list(map(str, table.columns))
    chosen = [text or columns[0], summary or columns[min(1, len(columns) - 1)]]
    if set(chosen) - set(columns) or chosen[0] == chosen[1]:
        raise DataError(
            f"{data} has the columns {', '.join(columns)}: give text= and summary=, two of them"
        )
    pairs = [tuple(map(_text, row)) for row in table[chosen].itertuples(index=False)]
    for number, pair in enumerate(pairs):
        if not all(pair):
            raise DataError(
                f"{data}: row {number} has an empty {' or '.join(chosen)}: fill or drop it"
            )
    return pairs


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value).strip()


def _loaded(name: str, split: str) -> Any:
    """Return the data set in a folder or of a name, with the ``datasets`` package."""
    import datasets

    if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
        found = datasets.load_from_disk(name)  # what save_to_disk wrote
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    return datasets.load_dataset(name, split=split)


def by_sentence(text: str) -> str:
    """Return a text with each sentence on a line, as ROUGE-Lsum takes them."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


def lead_1(pairs: Sequence[Pair]) -> float:
    """Return the F1 of ROUGE-L of taking the first sentence of each text as its summary."""
    rouge = ROUGEScore(rouge_keys="rougeL")
    rouge.update([by_sentence(text).split("\n")[0] for text, _ in pairs], [to for _, to in pairs])
    return float(rouge.compute()["rougeL_fmeasure"])


def sample_pairs() -> list[Pair]:
    """Return made reports, each with what was sold to whom."""
    people, things = (
        ("Ann", "Bob", "Eve", "Kim", "Max"),
        ("a car", "a boat", "two lamps", "a house"),
    )
    made = [
        (
            f"It was a long day in {place}. {buyer} had looked for weeks. In the end {seller} sold {thing}.",
            f"{seller} sold {thing} to {buyer}.",
        )
        for seller, buyer, thing, place in product(people, people, things, ("Rome", "Oslo", "Lima"))
        if seller != buyer
    ]  # fmt: skip
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return [made[int(number)] for number in order]
