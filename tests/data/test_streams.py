"""Streams of other libraries: each sample once in a pass, and a resume reads on, on any number of ranks."""

from __future__ import annotations

import importlib

import pytest

from loopkit.data.known_streams import divides_itself, has_state, warn_of_inexact
from loopkit.errors import CheckpointError, LoopkitWarning
from tests.data import stream_jobs
from tests.data.stream_jobs import COUNT, DIVIDING, PACKAGES, SHARED, read


@pytest.fixture
def made(request, tmp_path):
    """A folder with the shards; skips where the library is not installed."""
    kind = request.getfixturevalue("kind")
    pytest.importorskip(PACKAGES.get(kind, kind), reason=f"needs {kind}")
    stream_jobs.write(kind, tmp_path)
    return str(tmp_path)


def samples(batches):
    return sorted(value for batch in batches for value in batch)


@pytest.mark.parametrize("kind", [*SHARED, *DIVIDING])
@pytest.mark.parametrize("stop", [5, 17])  # in the first pass of 12 steps, and in the second
def test_a_resume_reads_on_and_each_pass_has_each_sample_once(kind, stop, made):
    whole = read(kind, made, "whole")
    assert samples(whole[:12]) == samples(whole[12:]) == list(range(COUNT))
    assert read(kind, made, "parts", stop) + read(kind, made, "parts") == whole


@pytest.mark.parametrize("kind", SHARED)
def test_ranks_share_the_samples_and_another_number_of_ranks_reads_on(kind, made, pair, tmp_path):
    run_dir = str(tmp_path / "run")
    first = pair.call(read, kind, made, run_dir, 4)
    rest = read(kind, made, run_dir)
    first_pass = [*first[0], *first[1], *rest[: 12 - 8]]
    assert samples(first_pass) == samples(rest[12 - 8 :]) == list(range(COUNT))


@pytest.mark.parametrize("kind", DIVIDING)
def test_ranks_with_parts_of_their_own_read_on_and_other_ranks_are_refused(
    kind, made, pair, tmp_path
):
    whole = pair.call(read, kind, made, str(tmp_path / "whole"))
    for one_pass in (slice(6), slice(6, None)):
        assert samples([*whole[0][one_pass], *whole[1][one_pass]]) == list(range(COUNT))
    first = pair.call(read, kind, made, str(tmp_path / "run"), 9)
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks .* start as many ranks as before"):
        read(kind, made, str(tmp_path / "run"))
    rest = pair.call(read, kind, made, str(tmp_path / "run"))
    assert [begun + read_on for begun, read_on in zip(first, rest)] == whole


@pytest.mark.parametrize("kind", ["webdataset"])
def test_a_shuffle_by_the_clock_is_a_warning_that_says_what_to_take(kind, made):
    data = importlib.import_module(kind).WebDataset(made, shardshuffle=False).shuffle(8)
    with pytest.warns(LoopkitWarning, match="detshuffle"):
        warn_of_inexact(data, "train_data()")


@pytest.mark.parametrize("kind", ["datasets"])
def test_what_divides_itself_and_what_a_state_would_lose_is_known(kind, made):
    data = stream_jobs.stream("datasets", made)
    split = importlib.import_module("datasets.distributed").split_dataset_by_node(data, 0, 2)
    assert (divides_itself(data), divides_itself(split)) == (False, True)
    assert (has_state(data), has_state(data.shuffle(buffer_size=4))) == (True, False)
