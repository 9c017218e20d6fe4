"""Two machines, as two network namespaces: trained, disturbed in mid-step, cut apart, killed, joined again."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.cluster.programs import Program, models, outcome, steps_of, train, wait_for
from tests.cluster.train import STEPS
from tests.cluster.two_nodes import ADDRESSES, PORT, TwoNodes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
TIMEOUT = 20.0
# A failure is known after the limit of a collective; then come the diagnosis and the ends.
ENDS_WITHIN = TIMEOUT + 60.0


def start_both(nodes: TwoNodes, how: str, tmp_path, *options: str, **given) -> list[Program]:
    """Start a run on both nodes, by "torchrun" or "by hand"."""
    if how == "torchrun":
        words = train("run", **given)
        return [
            nodes.torchrun(node, words, tmp_path, *(options or ("--nnodes=2",))) for node in (0, 1)
        ]
    words = train("run", nodes=2, devices=1, **given)
    return [nodes.by_hand(node, words, tmp_path) for node in (0, 1)]


@pytest.mark.parametrize("how", ["torchrun", "by hand"])
def test_two_machines_train_to_the_bits_of_two_ranks_on_one(nodes, tmp_path, whole, how):
    one, two = start_both(nodes, how, tmp_path)
    assert two.end() == 0, two.text()
    assert one.outcome() == whole.outcome
    assert models(tmp_path / "run") == models(whole.run_dir)
    assert "end" not in two.text(), "what ranks print shows once"


def test_shards_of_two_machines_make_one_checkpoint(nodes, tmp_path, whole_fsdp):
    one, two = start_both(nodes, "torchrun", tmp_path, under="fsdp")
    assert two.end() == 0, two.text()
    assert one.outcome() == whole_fsdp.outcome
    saved = models(tmp_path / "run")
    assert saved == models(whole_fsdp.run_dir)
    assert any("model-00001" in name for name in saved)


@pytest.mark.parametrize(("limit", "loses"), [("100000", False), ("1600", True)])
def test_a_slow_and_a_lossy_network_change_no_bit(nodes, tmp_path, whole, limit, loses):
    one, two = start_both(nodes, "by hand", tmp_path)
    one.until("step 8\n")
    nodes.narrow("400kbit", limit)
    assert two.end() == 0, two.text()
    assert one.outcome() == whole.outcome
    assert (nodes.dropped() > 0) == loses


def test_a_link_that_comes_back_in_time_costs_only_time(nodes, tmp_path, whole):
    one, two = start_both(nodes, "by hand", tmp_path)
    one.until("step 8\n")
    nodes.cut()
    wait_for(lambda: is_still(one), "the wait of rank 0 for rank 1")
    nodes.heal()
    assert two.end() == 0, two.text()
    assert one.outcome() == whole.outcome


def is_still(program: Program) -> bool:
    """Return whether a program has printed nothing for a second."""
    before = program.text()
    time.sleep(1.0)
    return program.text() == before


@pytest.mark.parametrize("how", ["torchrun", "by hand"])
def test_a_link_that_stays_cut_ends_both_and_each_names_whom_it_cannot_reach(
    nodes, tmp_path, whole, how
):
    one, two = start_both(nodes, how, tmp_path, timeout=TIMEOUT)
    one.until("step 8\n")
    nodes.cut()
    began = time.monotonic()
    wait_for(lambda: "rank 1, on node1, cannot reach" in two.text(), "the end of rank 1")
    assert one.end(ENDS_WITHIN) != 0
    assert time.monotonic() - began < ENDS_WITHIN
    if how == "torchrun":
        # Its agent on the machine that is cut off waits for its store, until TCP itself gives up.
        nodes.heal()
    codes = [one.end(), two.end()]
    assert codes == ([75, 75] if how == "by hand" else [1, 1]), one.text() + two.text()
    seen = f"hung: rank 1 cannot be reached from rank 0, on node0 ({ADDRESSES[0]}): no heartbeat"
    assert one.text().count(seen) == 1, one.text()
    assert f"rank 1 was last on node1 ({ADDRESSES[1]})" in one.text()
    alone = f"hung: rank 1, on node1, cannot reach {ADDRESSES[0]}:"
    assert two.text().count(alone) == 1, two.text()
    assert "cannot reach" not in one.text()
    assert nodes.processes(0) + nodes.processes(1) == [], "nobody is left"
    nodes.heal()
    again = start_both(nodes, how, tmp_path)
    assert again[1].end() == 0, again[1].text()
    assert again[0].outcome() == whole.outcome


@pytest.mark.parametrize(("how", "dies"), [("torchrun", 1), ("by hand", 1), ("by hand", 0)])
def test_a_machine_that_dies_ends_the_other_and_the_run_resumes_to_the_same_bits(
    nodes, tmp_path, whole, how, dies
):
    both = start_both(nodes, how, tmp_path, timeout=TIMEOUT)
    both[0].until("step 8\n")
    nodes.kill(dies)
    left = both[1 - dies]
    assert left.end(ENDS_WITHIN) not in (0, None), left.text()
    if how == "by hand":
        assert f"rank {1 - dies}: ended, as one on another machine did" in left.text()
    assert "Traceback (most recent call last)" not in left.text() or how == "torchrun"
    assert not nodes.processes(1 - dies), "nobody is left"
    again = start_both(nodes, how, tmp_path)
    assert again[1].end() == 0, again[1].text()
    assert again[0].outcome() == whole.outcome
    began = next(line for line in again[0].text().splitlines() if line.startswith("began"))
    assert int(began.split()[1]) >= 4, "it did not start from zero"


def test_a_signal_to_one_machine_saves_on_both(nodes, tmp_path, whole):
    one, two = start_both(nodes, "by hand", tmp_path)
    one.until("step 8\n")
    two.process.terminate()
    assert [one.end(), two.end()] == [143, 143], one.text() + two.text()
    again = start_both(nodes, "by hand", tmp_path)
    assert again[1].end() == 0, again[1].text()
    assert again[0].outcome() == whole.outcome


def test_an_elastic_run_continues_with_one_machine_and_takes_the_other_back(nodes, tmp_path, whole):
    elastic = ["--nnodes=1:2", "--max-restarts=5", "--monitor-interval=0.2"]
    # By default torch 2.13 tells a machine that joins later no address (docs/clusters.md).
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # So many steps that the node has time to come back; the restarts themselves take seconds.
    steps = 600
    words = train("run", steps=steps, timeout=TIMEOUT)
    one, two = (nodes.torchrun(node, words, tmp_path, *elastic, **env) for node in (0, 1))
    both = one.until("of 2\n")
    one.until("step ", both, times=8)
    nodes.kill(1)
    alone = one.until("of 1\n", both)
    two = nodes.torchrun(1, words, tmp_path, *elastic, **env)
    one.until("of 2\n", alone)
    starts = [int(line.split()[1]) for line in one.text().splitlines() if line[:5] == "began"]
    assert starts == sorted(starts), "each start continues where the last one was"
    assert starts[-1] > 4
    assert one.end() == 0, one.text() + two.text()
    two.end()
    words = train("undisturbed", devices=2, steps=steps)
    assert outcome(one.text()) == Program(words, tmp_path / "log.txt", tmp_path).outcome()


def test_a_port_that_is_taken_is_named(nodes, tmp_path):
    holder = nodes.start(0, ["python3", "-m", "http.server", str(PORT)], tmp_path)
    wait_for(lambda: "Serving" in holder.text(), "the server")
    one = nodes.by_hand(0, train("run", nodes=2, devices=1), tmp_path)
    assert one.end() != 0
    assert f"port {PORT}, where the ranks are to meet, is taken" in one.text()


def test_run_directories_that_differ_by_machine_are_found_whoever_is_rank_zero(
    nodes, tmp_path, whole
):
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    shutil.copytree(whole.run_dir, disks[0] / "run")
    disks[1].mkdir()
    newest = steps_of(whole.run_dir)[-1]
    words = train("run", nodes=2, devices=1, steps=2 * STEPS)
    for order in ((0, 1), (1, 0)):
        both = [nodes.by_hand(node, words, disks[order[node]]) for node in (0, 1)]
        codes = [each.end() for each in both]
        said = "".join(each.text() for each in both)
        assert 0 not in codes
        assert "rank 1 cannot see the run directory of rank 0" in said
        assert (f"rank 1 holds {newest} there" in said) == (order == (1, 0))
        assert "step " not in both[0].text(), "found before the first step"
    assert not (disks[1] / "run" / "checkpoints").exists()


@pytest.mark.parametrize("under", ["ddp", "fsdp"])
def test_two_machines_with_disks_of_their_own(nodes, tmp_path, whole, whole_fsdp, under):
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    words = train("run", nodes=2, devices=1, each_node=1, under=under)
    both = [nodes.by_hand(node, words, disks[node]) for node in (0, 1)]
    both[0].until("step 14\n")
    nodes.kill(1)
    assert both[0].end() != 0
    # The other machine is rank 0 now.
    again = [nodes.by_hand(node, words, disks[1 - node]) for node in (0, 1)]
    assert again[1].end() == 0, again[1].text()
    # Without the rows of the log, of which each machine has those of its time as rank 0.
    assert again[0].outcome()[:-1] == (whole if under == "ddp" else whole_fsdp).outcome[:-1]
    began = next(line for line in again[0].text().splitlines() if line.startswith("began"))
    assert int(began.split()[1]) >= 4
    assert steps_of(disks[0] / "run")[-1] == steps_of(disks[1] / "run")[-1]
