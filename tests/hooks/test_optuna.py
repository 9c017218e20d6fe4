"""OptunaPrune in a real study: the objective of the docs."""

from __future__ import annotations

import pytest
import torch

from tests.docs.pages import DOCS, blocks


def test_the_objective_of_the_docs_prunes_and_finds(tmp_path, monkeypatch, capsys):
    optuna = pytest.importorskip("optuna", reason="pip install 'loopkit-torch[optuna]'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.chdir(tmp_path)
    python = [b.text for b in blocks(DOCS / "hooks-included.md") if b.language == "python"]
    (search,) = [text for text in python if "create_study" in text]
    names = {"__name__": "__main__"}
    # One seed for the search and the weights, and no screen: the page needs neither.
    quiet = search.replace("checkpoint=False,", "checkpoint=False, progress=False, loggers=None,")
    seeded = quiet.replace(
        "pruner=pruner", "pruner=pruner, sampler=optuna.samplers.RandomSampler(1)"
    )
    torch.manual_seed(0)
    exec(python[0] + seeded, names)
    trials = names["study"].trials
    ended = [trial.state.name for trial in trials]
    assert (ended.count("PRUNED") > 0, ended.count("COMPLETE") > 0, len(ended)) == (True, True, 8)
    assert all(trial.user_attrs["pruned"] for trial in trials if trial.state.name == "PRUNED")
    epochs = [len(trial.intermediate_values) for trial in trials]
    assert [count < 6 for count in epochs] == [state == "PRUNED" for state in ended]
    assert capsys.readouterr().out.strip().endswith(str(names["study"].best_value))
