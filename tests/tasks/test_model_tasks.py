"""PPO, language models and LoRA: they learn what a baseline does not know, survive kill -9, and measure
on two ranks what one process measures.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from loopkit.errors import DataError, OptionError
from tests.support import quiet
from tests.tasks.model_jobs import NAMES, made, measured, train, write_texts

for package in ("transformers", "peft"):
    pytest.importorskip(package)

from tasks import finetune_lora, language_model, ppo  # noqa: E402
from tasks.causal_text import collate_of, read_texts, rows_of, unigram_perplexity  # noqa: E402

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LOOPKIT_DATA", ROOT.parent / "shared" / "data"))
PLAY = DATA / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, and a base for LoRA."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_it_ends_with_the_same_bits(rank_programs, name, folder, tmp_path):
    whole = train(name, folder, tmp_path / "whole")
    words = [sys.executable, "-m", "tests.tasks.model_jobs", name, str(folder)]
    killed = rank_programs.Popen([*words, str(tmp_path / "killed"), "8"], cwd=ROOT)
    assert killed.wait(timeout=120) == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert kept[-1].endswith("6")
    assert train(name, folder, tmp_path / "killed") == whole


@pytest.mark.parametrize(
    ("name", "strategy"), [*((name, "ddp") for name in NAMES), ("ppo", "fsdp")]
)
def test_two_ranks_have_the_metrics_of_one_process(pair, name, strategy, folder):
    alone, expected = measured(name, folder, "single", batch_size=2, accumulate=2)
    first, second = pair.call(measured, name, folder, strategy, batch_size=2)
    assert first[0] == second[0] == pytest.approx(alone, rel=1e-5)
    for key, weight in expected.items():
        torch.testing.assert_close(first[1][key], weight, rtol=0, atol=1e-5)
        assert torch.equal(first[1][key], second[1][key])


def test_the_games_continue_after_a_stop_at_any_step(tmp_path):
    """The fourth step ends a pass, the eighth the last pass over a rollout."""
    whole = train("ppo", tmp_path, tmp_path / "whole")
    for stop in (1, 4, 8, 9):
        assert train("ppo", tmp_path, tmp_path / str(stop), stop_at=stop) != whole
        assert train("ppo", tmp_path, tmp_path / str(stop)) == whole


def test_ppo_solves_the_game():
    torch.manual_seed(0)
    task = ppo.PPO()
    (starts,) = task.eval_data().dataset[:]
    random = task.returns(starts, lambda state: torch.randint(2, (len(state),)))
    metrics = (
        quiet(epochs=16 * task.passes, batch_size=4, eval_every="128 epochs").run(task).metrics
    )
    assert metrics["eval/return"] >= ppo.SOLVED
    assert 15 < random.mean() < 40


def test_the_cart_and_the_pole_obey_the_equations_of_motion():
    """Those of forces on both, and of torques on the pole, which the task solves for the two."""
    games = ppo.CartPoles(50).double()
    state = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    action = torch.arange(50) % 2
    after = games.move(state, action)
    torch.testing.assert_close(after[:, 0], state[:, 0] + 0.02 * state[:, 1])
    push, bend = ((after - state) / 0.02)[:, [1, 3]].T
    force, angle, turning = torch.where(action == 1, 10.0, -10.0), state[:, 2], state[:, 3]
    forces = 1.1 * push + 0.05 * (bend * angle.cos() - turning**2 * angle.sin())
    torch.testing.assert_close(forces, force.double())
    torques = 4 / 3 * 0.5 * bend + push * angle.cos() - 9.8 * angle.sin()
    torch.testing.assert_close(torques, torch.zeros(50).double(), rtol=0, atol=1e-9)
    edge = torch.tensor([[2.41, 0, 0, 0], [0, 9, 0.2, 9], [0, 0, 0.22, 0], [-2.5, 0, 0, 0]])
    assert games.fell(edge).tolist() == [True, False, True, True]


def test_a_game_ends_where_it_falls_or_is_long_enough():
    games = ppo.CartPoles(3)
    games.state[0, 2] = 1.0  # it falls
    games.age[1] = games.longest - 1
    before = games.state.clone()
    reward, after, fell, cut = games.step(torch.tensor([0, 1, 0]))
    assert (reward.tolist(), fell.tolist(), cut.tolist()) == (
        [1, 1, 1], [True, False, False], [False, True, False],
    )  # fmt: skip
    assert games.age.tolist() == [0, 0, 1]
    assert torch.equal(after, games.move(before, torch.tensor([0, 1, 0])))
    assert torch.equal(games.state[2], after[2])
    assert (games.state[:2].abs() <= 0.05).all()


def test_a_rollout_holds_the_moves_and_generalised_advantages():
    torch.manual_seed(3)
    task = ppo.PPO(games=4, moves=30, hidden=8)
    task.world.age[:] = torch.tensor([0, 480, 490, 0])
    found = {"fell": [], "over": [], "after": []}
    step = task.world.step

    def record(action):
        reward, after, fell, cut = step(action)
        for name, value in (("fell", fell), ("over", fell | cut), ("after", after)):
            found[name].append(value)
        return reward, after, fell, cut

    task.world.step = record
    task.play(0)
    fell, over, after = (torch.stack(found[name], 1) for name in ("fell", "over", "after"))
    assert over.any()
    assert (over & ~fell).any()
    roll = dict(task.rollout.named_buffers())
    with torch.no_grad():
        value, later = (task.value(x)[..., 0] for x in (roll["state"], after))
        odds = task(roll["state"]).softmax(-1)
    error = 1 + task.discount * later * ~fell - value
    expected = torch.zeros(4, 30)
    for game in range(4):
        for start in range(30):
            factor = 1.0
            for move in range(start, 30):
                expected[game, start] += factor * error[game, move]
                factor *= task.discount * task.trace
                if over[game, move]:
                    break
    torch.testing.assert_close(roll["target"], expected + value)
    normal = (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(roll["advantage"], normal)
    chosen = odds.gather(-1, roll["action"][..., None])[..., 0]
    torch.testing.assert_close(roll["logp"], chosen.log())
    kept = {name: value.clone() for name, value in roll.items()}
    task.play(0)  # it is there already
    assert all(torch.equal(kept[name], value) for name, value in roll.items())
    task.play(1)
    assert not torch.equal(kept["state"], roll["state"])


def test_actions_are_drawn_by_their_probabilities():
    games = ppo.CartPoles(1)
    games.actions = 3
    odds = torch.tensor([0.2, 0.0, 0.8]).expand(4000, 3)
    share = games.draw(odds).bincount(minlength=3) / 4000
    assert share.tolist() == pytest.approx([0.2, 0.0, 0.8], abs=0.03)


def test_the_texts_of_a_padding_free_batch_do_not_see_each_other(folder):
    """Loss, gradient and weight are those of a padded batch, to rounding."""
    for kind in ("gpt2", "llama"):
        task = made(kind, folder, batches="flat").double()
        rows = [{k: v[:n] for k, v in row.items()} for row, n in
                zip(task.train_data().dataset, (16, 3, 9, 2))]  # fmt: skip
        flat = task.train_data().collate_fn(rows)
        assert {name: tuple(t.shape) for name, t in flat.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), (1, 30)
        )
        padded = type(task).__mro__[2](task.model, rows, tokenizer=task.tokenizer)
        grads, losses = [], []
        for batch in (flat, padded.train_data().collate_fn(rows)):
            out = task.train_step(batch)
            losses.append(out["loss"])
            assert out["weight"] == 15 + 2 + 8 + 1
            names, parameters = zip(*task.named_parameters())
            grads.append(torch.autograd.grad(out["loss"], parameters))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        for name, mine, other in zip(names, *grads):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7, msg=name)


def test_packed_rows_are_equal_and_lose_no_token(folder):
    task = made("gpt2", folder)
    words, texts = task.tokenizer, read_texts(folder / "texts.jsonl")
    ids = [token for row in words(texts)["input_ids"] for token in [*row, words.eos_token_id]]
    packed = rows_of(words, texts, 16, packed=True)
    assert {len(row["input_ids"]) for row in packed} == {16}
    joined = [token for row in packed for token in row["input_ids"]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < 16
    flat = rows_of(words, texts, 16, packed=False)
    assert sum(len(row["input_ids"]) for row in flat) >= len(ids) - len(texts)
    assert "".join(words.decode(row["input_ids"]) for row in flat).count("<|end|>") > 4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_learns_more_than_frequencies(name, folder, tmp_path):
    # With twice this learning rate the last digits of a processor's sums decide how far llama comes.
    task = made(name, folder, lr=1e-2)
    fit = quiet(epochs=16, batch_size=8, eval_every="16 epochs", run_dir=tmp_path, checkpoint=True)
    metrics = fit.run(task).metrics
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(metrics["eval/loss"]), rel=1e-4)
    assert metrics["eval/perplexity"] < 0.75 * task.unigram
    loaded = type(task).load(tmp_path)
    assert loaded.write("The ", 8) == task.write("The ", 8)
    assert task.write("The ", 8, seed=1).startswith("The ")


def test_the_unigram_perplexity_is_that_of_the_formula():
    train, held = [{"input_ids": [0, 0, 1]}], [{"input_ids": [1, 0, 2]}]
    expected = math.exp(-(math.log(3 / 6) + math.log(1 / 6)) / 2)
    assert unigram_perplexity(train, held, 3) == pytest.approx(expected)


def test_adapters_learn_on_a_frozen_base(folder, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    task = made("lora", folder, lr=2e-2)
    base = {n: p.detach().clone() for n, p in task.named_parameters() if not p.requires_grad}
    assert base
    fit = quiet(epochs=10, batch_size=8, run_dir=tmp_path / "run", checkpoint=True)
    before = fit.evaluate(task)
    result = fit.run(task)
    assert result.metrics["eval/perplexity"] < 0.8 * before["eval/perplexity"]
    now = dict(task.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in base.items())
    assert all("lora_" in name for name in task.state_dict())
    opened = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), result.export(tmp_path / "out")
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours, theirs = task.eval().model(ids).logits, opened.eval()(ids).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_a_base_in_few_bits(bits, folder):
    pytest.importorskip("bitsandbytes")
    task = made("lora", folder, bits=bits, dropout=0.0, lr=2e-2)
    kinds = {type(module).__name__ for module in task.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    fit = quiet(steps=12, batch_size=8, eval_every="never")
    before = fit.evaluate(task)["eval/perplexity"]
    fit.run(task)
    assert fit.evaluate(task)["eval/perplexity"] < 0.9 * before


def test_files_of_every_kind_are_read_and_mistakes_are_named(folder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.csv").write_text('text,n\n"three, four",1\n" ",2\n')
    (tmp_path / "d.bin").write_bytes(b"\xff")
    assert read_texts(tmp_path) == ["one", "two"]
    assert read_texts(tmp_path / "a.txt") == ["one"]
    assert read_texts(tmp_path / "c.csv") == ["three, four"]
    assert len(read_texts(folder / "texts.jsonl")) == 6
    (tmp_path / "e.jsonl").write_text('{"words": "x"}\n')
    for bad in ("d.bin", "e.jsonl", "none.txt"):
        with pytest.raises(DataError, match=rf"{bad} cannot be read as texts"):
            read_texts(tmp_path / bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no text: give a folder with \.md"):
        read_texts(tmp_path / "empty")
    with pytest.raises(DataError, match=r"give 0 rows of up to 64 tokens, and at least 10"):
        language_model.LanguageModel(str(tmp_path / "a.txt"))
    with pytest.raises(OptionError, match="batches='long': give packed, flat or padded"):
        collate_of("long")
    with pytest.raises(OptionError, match="kind='bert': give gpt2 or llama"):
        made("gpt2", folder, kind="bert")
    with pytest.raises(OptionError, match="bits=5: give 4 or 8, or 32"):
        made("lora", folder, bits=5)


def test_the_scripts_run_and_report_an_error_in_one_line(folder, capsys):
    texts, model = str(folder / "texts.jsonl"), str(folder / "model")
    assert ppo.main(["--rollouts", "1"]) == 0
    assert "not solved" in capsys.readouterr().out
    assert language_model.main(["--data", texts, "--kind", "llama", "--epochs", "0.2"]) == 0
    assert re.search(r"perplexity \d+\.\d; by the frequencies", capsys.readouterr().out)
    assert finetune_lora.main(["--data", texts, "--model", model, "--epochs", "0.2"]) == 0
    assert "which peft opens: runs/finetunelora/1/adapters" in capsys.readouterr().out
    assert ppo.main(["--resume", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: resume=")
    for main in (language_model.main, finetune_lora.main):
        assert main(["--data", "nowhere", "--model", model]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: nowhere cannot be read")


def said(capsys, pattern: str) -> list[float]:
    """Return the numbers that a script printed."""
    out = capsys.readouterr().out
    found = re.search(pattern, out)
    assert found, out
    return [float(number) for number in found.groups()]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_ppo_solves_the_game_whatever_the_seed(seed):
    torch.manual_seed(seed)
    task = ppo.PPO(seed=seed)
    epochs = 40 * task.passes
    metrics = quiet(epochs=epochs, batch_size=4, eval_every=f"{epochs} epochs").run(task).metrics
    print(f"seed {seed}: {metrics['eval/return']:.1f}")
    assert metrics["eval/return"] >= ppo.SOLVED


@pytest.mark.long
def test_the_scripts_learn_what_their_pages_say(capsys):
    assert ppo.main([]) == 0
    found, random = said(capsys, r"at most 500: (\d+); of random moves (\d+)\nsolved")
    assert found >= 475 > 40 > random
    assert language_model.main(["--kind", "llama", "--batches", "flat"]) == 0
    found, unigram = said(capsys, r"perplexity (\d+\.\d); by the frequencies of tokens (\d+\.\d)")
    assert found < 0.35 * unigram
    assert finetune_lora.main([]) == 0
    before, after = said(capsys, r"perplexity (\d+\.\d) before, (\d+\.\d) after")
    assert after < 0.6 * before


@pytest.mark.long
@pytest.mark.skipif(
    not PLAY.is_file(), reason="LOOPKIT_DATA names no folder with tinyshakespeare.txt"
)
@pytest.mark.parametrize(("kind", "batches"), [("gpt2", "packed"), ("llama", "flat")])
def test_plays_are_learned(kind, batches, capsys):
    words = ["--data", str(PLAY), "--kind", kind, "--batches", batches, "--epochs", "1"]
    assert language_model.main(words) == 0
    found, unigram = said(capsys, r"perplexity (\d+\.\d); by the frequencies of tokens (\d+\.\d)")
    assert found < 0.6 * unigram
