"""The qa task: it learns its sample and real questions, and its windows hold the answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from loopkit.errors import DataError
from tests.support import quiet

pytest.importorskip("transformers")

from tasks.qa import QuestionAnswering, main
from tasks.qa_data import first_words, pair_tokenizer, read_squad, windows

SMALL = {"width": 32, "layers": 1, "dropout": 0.1, "lr": 1e-2}
REAL = Path(os.environ.get("LOOPKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def written(path, *questions, context="Ann lives in Rome."):
    """Write a SQuAD JSON file; a question is (its text, the text of its answer or None)."""
    qas = []
    for number, (question, answer) in enumerate(questions):
        start = context.find(answer) if answer else 0
        answers = [{"text": answer, "answer_start": start}] if answer else []
        qas.append({"id": str(number), "question": question, "answers": answers})
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    return str(path)


def test_it_learns_its_sample_and_answers_new_questions():
    torch.manual_seed(0)
    task = QuestionAnswering(**SMALL)
    metrics = quiet(epochs=8, batch_size=16, eval_every="8 epochs").run(task).metrics
    assert metrics["eval/squad/exact_match"] == metrics["eval/squad/f1"] == 100
    assert first_words(task.measured) < 40
    text = "Eve was born in Lima, in the spring of 2004."
    assert task.answer("Where was Eve born?", text) == "Lima"
    assert task.answer("When was Eve born?", text) == "2004"


def test_a_window_marks_the_answer_that_it_holds_whole_and_no_other():
    text = " ".join(f"word{i}" for i in range(40)) + " the été answer, " + "end " * 20
    answer = {"text": "été answer", "answer_start": text.index("été")}
    example = {"id": "q", "context": text, "question": "Which WORD7 answer?", "answers": [answer]}
    pieces = pair_tokenizer([text], size=300)
    rows = list(windows(pieces, [example], length=64, stride=16, marked=True))
    assert len(rows) > 3
    assert {bool(row["start_positions"]) for row in rows} == {True, False}
    covered = set()
    for row in rows:
        offsets = row["offset_mapping"]
        seen = offsets[offsets[:, 1] > 0]
        covered |= {place for a, b in seen for place in range(a, b)}
        whole = seen[0, 0] <= answer["answer_start"] and answer["answer_start"] + 10 <= seen[-1, 1]
        assert bool(row["start_positions"]) == whole
        if whole:
            first, last = row["start_positions"], row["end_positions"]
            assert text[offsets[first, 0] : offsets[last, 1]] == "été answer"
        repeated = offsets[[kind == 2 for kind in row["token_type_ids"]]]
        assert all(text[a:b] in "word7 answer" for a, b in repeated)
        assert len(repeated) > 0 or not (whole or "word7" in text[seen[0, 0] : seen[-1, 1]])
    assert covered >= {place for place, letter in enumerate(text) if letter != " "}


def test_questions_without_an_answer_are_measured(tmp_path):
    file = written(
        tmp_path / "v2.json", ("Where does Ann live?", "Rome"), ("Who is in Oslo?", None)
    )
    with pytest.raises(DataError, match=r"the question 1 has no answer.*--no-answer"):
        QuestionAnswering(file, file, **SMALL)
    torch.manual_seed(0)
    task = QuestionAnswering(file, file, no_answer=True, **SMALL)
    metrics = quiet(steps=60, batch_size=2, eval_every=60).run(task).metrics
    assert metrics["eval/squad/no_answer/exact_match"] == 100
    assert metrics["eval/squad/has_answer/f1"] == 100
    assert task.answer("Who is in Oslo?", "Ann lives in Rome.") == ""


def test_a_model_of_transformers_gets_the_columns_that_it_knows(tmp_path):
    from transformers import RobertaConfig, RobertaForQuestionAnswering

    pieces = pair_tokenizer(["Where does Ann live? Ann lives in Rome."], size=300)
    config = RobertaConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=80, pad_token_id=0, type_vocab_size=1,
    )  # fmt: skip
    RobertaForQuestionAnswering(config).save_pretrained(tmp_path / "model")
    pieces.model_input_names = ["input_ids", "attention_mask"]
    pieces.save_pretrained(tmp_path / "model")
    file = written(tmp_path / "a.json", ("Where does Ann live?", "Rome"))
    task = QuestionAnswering(file, file, str(tmp_path / "model"), length=64)
    assert "eval/squad/f1" in quiet(steps=1, eval_every=1).run(task).metrics


def test_what_is_wrong_with_a_file_is_said(tmp_path, capsys):
    file = tmp_path / "a.json"
    for text in ("[]", "{}", "not JSON", '{"data": [{"paragraphs": [{"qas": []}, 3]}]}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"a\.json is not a SQuAD JSON file"):
            read_squad(file)
    written(file, ("Where?", "Oslo"))
    with pytest.raises(DataError, match="the answer 'Oslo' to the question 0 is not at character"):
        read_squad(file)
    named = written(file, ("Where? " * 60, "Rome"))
    with pytest.raises(DataError, match=r"the question 0 has .* tokens, and windows of 128 tokens"):
        QuestionAnswering(named, named, **SMALL)
    with pytest.raises(DataError, match="fewer than 10 texts: give held_out"):
        QuestionAnswering(written(file, ("Where?", "Rome")), **SMALL)
    assert main(["--data", "nowhere"]) == 1
    assert "nowhere is not a SQuAD JSON file (FileNotFoundError" in capsys.readouterr().err


def test_the_script_trains_measures_a_baseline_and_answers(capsys):
    assert main(["--epochs", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:2]] == ["F1", "F1"]
    assert out[1].endswith("by answering with the first words of each text")
    assert "was" in out[2]


@pytest.mark.long
@pytest.mark.skipif(
    not (REAL / "xquad.en.json").is_file(), reason="LOOPKIT_DATA names no folder with xquad.en.json"
)
def test_it_learns_real_questions_better_than_first_words():
    torch.manual_seed(0)
    task = QuestionAnswering(str(REAL / "xquad.en.json"), length=384, stride=128)
    fit = quiet(epochs=8, batch_size=16, clip_norm=1.0, eval_every="2 epochs")
    fit.on("eval_end", lambda run, metrics: print(run.progress.step, metrics, flush=True))
    metrics = fit.run(task).metrics
    print(metrics["eval/squad/f1"], first_words(task.measured))
    assert metrics["eval/squad/f1"] > 2 * first_words(task.measured)
