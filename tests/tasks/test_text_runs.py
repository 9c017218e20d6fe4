"""Runs of the tasks on texts: they resume after kill -9 to the same bits, open with transformers, and
measure on two ranks what one process measures.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tests.support import digest
from tests.tasks.text_jobs import made, measured, train

ROOT = Path(__file__).parents[2]
OPENS = {
    "qa": transformers.AutoModelForQuestionAnswering,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "bart": transformers.AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("name", OPENS)
def test_killed_and_resumed_gives_the_same_bits_and_opens_with_transformers(
    rank_programs, name, tmp_path
):
    whole = train(name, tmp_path / "whole")
    command = [sys.executable, "-m", "tests.tasks.text_jobs", name, str(tmp_path / "killed"), "5"]
    killed = rank_programs.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    _, err = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, err.decode()
    again = train(name, tmp_path / "killed")
    assert digest(again.state_dict()) == digest(whole.state_dict())
    assert digest(again.state_dict()) != digest(made(name).state_dict())
    (folder,) = (tmp_path / "killed" / "checkpoints").glob("step-*6")
    opened = OPENS[name].from_pretrained(folder)
    ours = dict(again.model.named_parameters())
    assert all(torch.equal(tensor, ours[key]) for key, tensor in opened.named_parameters())
    words = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Where was Ann born?", "Ann was born in Rome."
    assert words(*text)["input_ids"] == again.tokenizer(*text)["input_ids"]
    assert type(again).load(tmp_path / "killed").tokenizer(*text) == again.tokenizer(*text)


@pytest.mark.parametrize("name", OPENS)
def test_two_ranks_measure_what_one_process_measures(pair, name):
    alone = measured(name, "single", batch_size=8, accumulate=2)
    for found in pair.call(measured, name, "ddp", batch_size=8):
        names = [
            n for n in alone if n.startswith("eval/") and "runtime" not in n and "per_" not in n
        ]
        assert len(names) > 2
        assert {n: found[n] for n in names} == pytest.approx({n: alone[n] for n in names}, abs=1e-5)
