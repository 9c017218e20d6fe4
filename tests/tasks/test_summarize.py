"""The summarize task: it learns its sample and docstrings, reads files of every kind, and obeys lengths."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import pytest
import torch

from loopkit.errors import DataError
from tests.support import quiet

pytest.importorskip("transformers")

import datasets

from tasks.summarize import Summarize, main
from tasks.summary_data import by_sentence, lead_1, read_pairs

SMALL = {"width": 32, "layers": 1, "dropout": 0.0, "num_beams": 2, "max_new_tokens": 16}
ROWS = [(f"Text {i}, with a comma. It\nhas two lines.", f'"Quoted" summary {i}') for i in range(20)]


@pytest.fixture(scope="module")
def learnt():
    torch.manual_seed(0)
    task = Summarize(**SMALL, lr=5e-3)
    return task, quiet(epochs=8, batch_size=8, eval_every="8 epochs").run(task).metrics


def test_it_learns_its_sample_and_summarizes_a_new_text(learnt):
    task, metrics = learnt
    assert metrics["eval/rougeL"] > 0.95 > 0.2 > lead_1(task.measured)
    assert metrics["eval/rouge2"] <= metrics["eval/rougeL"] == metrics["eval/rougeLsum"]
    told = "It was a long day in Rome. Ann had looked for weeks. In the end Eve sold a house."
    assert task.summarize(told) == "Eve sold a house to Ann."


def test_the_settings_of_generation_reach_the_evaluation(learnt):
    task, _ = learnt
    settings = task._generate
    task._generate = {
        "num_beams": 3,
        "length_penalty": 2.0,
        "max_new_tokens": 20,
        "min_new_tokens": 20,
    }
    try:
        longer = quiet(limit_eval=1).evaluate(task)
        tokens = quiet(limit_eval=1).predict(task)
    finally:
        task._generate = settings
    assert tokens.shape[1] == 21  # the first token starts the decoder
    assert longer["eval/rougeL"] < quiet(limit_eval=1).evaluate(task)["eval/rougeL"]


def test_scores_are_those_of_the_whole_summaries():
    torch.manual_seed(0)
    task = Summarize(**{**SMALL, "max_new_tokens": 2})
    batch = task._collate(task.eval_data().dataset[:4])
    assert batch["labels"].shape[1] == 2
    step = task.eval().eval_step(batch)
    assert step["target"] == [summary for _, summary in task.measured[:4]]
    assert by_sentence("One. Two!  Three") == "One.\nTwo!\nThree"


def test_files_of_every_kind_give_the_same_pairs(tmp_path):
    table = pd.DataFrame(ROWS, columns=["text", "summary"])
    table.insert(0, "id", range(20))
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "a.parquet")
    made = datasets.Dataset.from_pandas(table)
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "held": made.select(range(3))}).save_to_disk(
        tmp_path / "two"
    )
    (tmp_path / "plain").mkdir()
    table.to_csv(tmp_path / "plain" / "train.csv", index=False)
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "saved", "two", "plain"):
        assert read_pairs(str(tmp_path / name), "text", "summary") == ROWS, name
    assert read_pairs(f"{tmp_path / 'two'}:held", "text", "summary") == ROWS[:3]
    table[["text", "summary"]].to_csv(tmp_path / "two.csv", index=False)
    task = Summarize(str(tmp_path / "two.csv"), **SMALL)
    assert task.measured == ROWS[9::10]


def test_what_is_wrong_with_data_is_said(tmp_path, capsys, monkeypatch):
    # Without a network, the hub would be tried for 20 seconds.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "a.csv"
    file.write_text("id,text\n1,a\n2,\n")
    for name, columns, said in (
        (file, ("text", "summary"), "has the columns id, text: give text= and summary="),
        (file, ("id", "id"), "has the columns id, text: give text= and summary="),
        (file, ("", ""), "row 1 has an empty id or text"),
        (tmp_path / "nothing.csv", ("", ""), "nothing.csv cannot be read"),
        (Path(__file__), ("", ""), "give a file that ends in .csv, .tsv, .jsonl, .parquet"),
    ):
        with pytest.raises(DataError, match=re.escape(said)):
            read_pairs(str(name), *columns)
    file.write_text("text,summary\na,b\n")
    with pytest.raises(DataError, match="fewer than 10 texts: give held_out"):
        Summarize(str(file))
    assert main(["--data", "no/where"]) == 1
    assert "error: no/where cannot be read" in capsys.readouterr().err


def test_the_script_trains_measures_a_baseline_and_summarizes(capsys):
    assert main(["--epochs", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:2]] == ["ROUGE-L", "ROUGE-L"]
    assert out[1].endswith("by taking the first sentence of each text")
    assert " -> " in out[2]


def names_of_functions(folder):
    """Write pairs from Python's own library: the docstring of a function, and the words of its name."""
    found = {}
    for path in sorted(Path(ast.__file__).parent.rglob("*.py")):
        if {"test", "tests", "site-packages", "idle_test", "lib2to3", "turtledemo"} & {*path.parts}:
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", node.name)
                if len(words) >= 2 and len(text.split()) >= 4:
                    found.setdefault(text, " ".join(words).lower())
    rows = [json.dumps({"text": text, "summary": name}) for text, name in found.items()]
    (folder / "docstrings.jsonl").write_text("\n".join(rows))
    return str(folder / "docstrings.jsonl")


@pytest.mark.long
def test_it_names_functions_by_their_docstrings_better_than_lead_1(tmp_path):
    torch.manual_seed(0)
    sizes = {"width": 128, "longest_text": 40, "max_new_tokens": 10, "dropout": 0.2, "lr": 2e-3}
    task = Summarize(names_of_functions(tmp_path), **sizes)
    fit = quiet(epochs=20, batch_size=32, clip_norm=1.0, eval_every="10 epochs")
    fit.on("eval_end", lambda run, metrics: print(run.progress.step, metrics, flush=True))
    metrics = fit.run(task).metrics
    print("lead-1", lead_1(task.measured), "of", len(task.measured))
    assert metrics["eval/rougeL"] > lead_1(task.measured)
