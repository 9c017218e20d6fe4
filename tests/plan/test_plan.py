"""A plan has the peak of a real step, names what it cannot foresee, and answers what people ask it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loopkit.cli.plan.plan_picture import draw
from loopkit.cli.plan.plan_tables import Plan, as_text
from loopkit.errors import OptionError, TaskError
from loopkit.options import Options
from loopkit.plan.cards import card_bytes
from loopkit.plan.planned import planned_run
from loopkit.plan.savings import Saving
from loopkit.plan.timeline import KINDS, Peak
from loopkit.strategies.ddp import DDP
from tests import fork_server
from tests.docs.pages import DOCS, blocks, matches
from tests.plan import cases
from tests.support import Tiny

QUICK = ("bf16", "checkpointing", "ddp")
# Kernels of convolutions allocate for themselves, which a plan does not see.
LIMITS = dict.fromkeys(cases.CASES, 0.02) | {"convolutions": 0.05}
# gloo copies what it reduces over shards, and frees the copy at a time that is a matter of chance.
LIMITS |= {name: 0.08 for name in cases.CASES if name.startswith("fsdp")}


def run(*words: str, code: int = 0) -> str:
    """Run a program of this Python in a process that has joined no ranks; return what it prints."""
    done = fork_server.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code in (0, 1) else done.stderr


@pytest.fixture(scope="module")
def planned(request) -> dict[str, int]:
    """The planned peaks of the cases that this session compares."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {call.params["case"] for call in calls if call and "case" in call.params}
    return json.loads(run("tests.plan.cases", *(case for case in cases.CASES if case in wanted)))


def long_unless(case: str, quick: tuple[str, ...]) -> Any:
    return case if case in quick else pytest.param(case, marks=pytest.mark.long)


ALONE = [long_unless(case, QUICK) for case, (ranks, _, _) in cases.CASES.items() if ranks == 1]
PAIRS = [long_unless(case, QUICK) for case, (ranks, _, _) in cases.CASES.items() if ranks == 2]


@pytest.mark.parametrize("case", ALONE)
def test_the_peak_is_what_the_allocator_gives_out_in_a_real_step(case, planned):
    real = cases.real(case)
    assert abs(planned[case] - real) < LIMITS[case] * real, (planned[case], real)


@pytest.mark.parametrize("case", PAIRS)
def test_so_it_is_on_each_of_two_ranks(case, planned, pair):
    for real in pair.call(cases.real, case, last=8):
        assert abs(planned[case] - real) < LIMITS[case] * real, (planned[case], real)


def test_the_largest_micro_batch_fits_and_one_sample_more_does_not():
    shown = sys.excepthook
    with planned_run(lambda: cases.Language(64, 1), Options(batch_size=4)) as plan:
        assert sys.excepthook is shown
        limit = 20_000_000
        found = plan.largest_batch(limit)
        assert plan.peak(found).total <= limit < plan.peak(found + 1).total
        assert plan.largest_batch(1000) == 0


class Reads(Tiny):
    def train_step(self, batch: Any) -> Any:
        loss = super().train_step(batch)
        return {"loss": loss, "seen": loss.item()}


def test_a_step_that_reads_values_is_refused_with_its_line():
    line = r"test_plan\.py:\d+, in train_step: return .*loss\.item"
    with pytest.raises(TaskError, match=line), planned_run(Reads, Options()):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "deepspeed"}, "strategy='fsdp'"),
        ({"device_map": {"": "cpu"}}, "leave device_map out"),
        ({"activation_checkpointing": "offload"}, "plan 'full'"),
        ({"strategy": DDP(compress="powersgd")}, "powersgd"),
    ],
)
def test_what_cannot_be_foreseen_is_refused_by_name(options, message):
    with pytest.raises(OptionError, match=message), planned_run(Tiny, Options(**options)):
        pass


def test_what_is_left_out_is_said():
    with planned_run(Tiny, Options(compile=True, micro_batch="auto")) as plan:
        assert [note.split(" is left out")[0] for note in plan.notes] == [
            "compile",
            "micro_batch='auto'",
        ]


def test_a_task_keeps_its_real_data_and_its_parameters_take_no_memory():
    made = []

    def make() -> Tiny:
        made.append(Tiny())
        return made[0]

    with planned_run(make, Options()) as plan:
        assert all(type(p.data).__name__ == "FakeTensor" for p in made[0].parameters())
        assert plan.peak().bytes["parameters"] == 4 * (8 * 16 + 16 + 16 * 3 + 3)
        assert plan.batch_size == 32


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("h100", 80e9), ("A100_40", 40e9)]
)
def test_cards(text, size):
    assert card_bytes(text) == size


@pytest.mark.parametrize("text", ["h1000", "80 ducks", "0GB", ""])
def test_what_is_no_card(text):
    with pytest.raises(OptionError, match="--card"):
        card_bytes(text)


def test_the_page_is_what_the_command_prints(tmp_path):
    written, commands = "", 0
    for block in blocks(DOCS / "plan.md"):
        if block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "console":
            for part in block.text.split("$ ")[1:]:
                command, _, shown = part.partition("\n")
                written = run(*command.split())
                assert matches(shown.rstrip(), written.rstrip()), written
                commands += 1
    assert commands == 1


def test_more_ranks_hold_less_and_what_does_not_fit_is_an_exit_code(tmp_path):
    words = ["--strategy", "fsdp", "--devices", "64", "--card", "1MB", "--json", "--no-savings"]
    said = json.loads(run("loopkit", "plan", "tests.plan.cases:Language", *words, code=1))
    whole = sum(p.numel() for p in cases.Language().parameters()) * 4
    assert said["parts"]["parameters"] < whole / 50
    assert (said["fits"], said["largest_batch"]) == (False, 0)


def test_a_picture_has_a_bar_for_each_way_to_save(tmp_path):
    peaks = [Peak(dict.fromkeys(KINDS, size)) for size in (2 * 10**9, 10**9)]
    plan = Plan(
        "Gpt",
        peaks[0],
        card=24 * 10**9,
        savings=[Saving("precision", "--precision bf16", peaks[1])],
    )
    draw(plan, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text().count("<path") > 12
    assert "--precision bf16" in "\n".join(as_text(plan))
