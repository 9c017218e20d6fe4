"""Orders that are computed where they are read: each number once, from any place, at any length."""

import pytest
import torch
from torch.utils.data import Dataset

from loopkit import Hook, Loader
from loopkit.data import sampler
from loopkit.data.shuffled_range import ShuffledRange
from tests.data.test_loader import ids, numbered, source
from tests.support import Tiny, quiet

HUGE = 10**9


class Huge(Dataset):
    """A thousand million samples: an order in memory would take 8 GB."""

    def __len__(self) -> int:
        return HUGE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(index % n) for n in range(7, 15)]), torch.tensor(index % 3)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 100, 9_999, 40_000])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_it_holds_each_number_once(length, seed):
    order = ShuffledRange(length, seed)
    assert len(order) == length
    assert order[:].dtype == torch.int64
    assert torch.equal(order[:].sort().values, torch.arange(length))


def test_a_slice_is_the_same_from_wherever_it_is_read():
    whole = ShuffledRange(50_001, 3)[:]
    for step in (1, 32, 1_000, 16_384, 20_000):
        order = ShuffledRange(50_001, 3)
        parts = [order[low : low + step] for low in range(0, 50_001, step)]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(order[49_000:60_000], whole[49_000:])
        assert torch.equal(order[7:9], whole[7:9])
        assert not len(order[9:9])
        assert not len(order[60_000:60_009])
        assert not len(order[9:7])


def test_orders_look_random():
    """Each number is as likely at each place, and neighbours do not follow each other."""
    orders = torch.stack([ShuffledRange(10, seed)[:] for seed in range(3_000)])
    counts = torch.stack([torch.bincount(orders[:, place], minlength=10) for place in range(10)])
    # Chi-squared with 81 degrees of freedom: above 143 once in 25,000 draws. The seeds are fixed.
    assert float(((counts - 300.0) ** 2 / 300.0).sum()) < 143
    assert len({tuple(order) for order in orders.tolist()}) > 2_990
    long = ShuffledRange(1_000_000, 5)[:].double()
    assert abs(float(torch.corrcoef(torch.stack([long[:-1], long[1:]]))[0, 1])) < 0.004


def test_the_order_of_many_samples_takes_no_memory(monkeypatch):
    assert sampler.MANY == 2**24
    monkeypatch.setattr(sampler, "MANY", 1_000)

    def order(length, epoch=0):
        return sampler.permutation(length, seed=0, epoch=epoch, shuffle=True)

    assert isinstance(order(999), torch.Tensor)
    assert isinstance(order(1_000), ShuffledRange)
    assert not torch.equal(order(1_000)[:], order(1_000, epoch=1)[:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_thousand_million_samples_open_anywhere(workers):
    data = Loader(Huge(), num_workers=workers)
    for position in (0, HUGE // 2, HUGE - 8):
        opened = source(data).open(2, position)
        wanted = sampler.permutation(HUGE, seed=0, epoch=2, shuffle=True)[position : position + 4]
        x, _ = next(opened).batch
        assert torch.equal(x[:, 0].long(), wanted % 7)
        assert torch.equal(x[:, 6].long(), wanted % 13)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_accumulation_and_grouping_read_each_sample_once(monkeypatch, world):
    monkeypatch.setattr(sampler, "MANY", 10)
    parts = [ids(numbered(31), rank=rank, num_replicas=world) for rank in range(world)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(31))
    assert [i for turn in zip(*parts) for batch in turn for i in batch] == ShuffledRange(
        31, sampler.mix(0, 0)
    )[:].tolist()
    lengths = [1 + i % 5 for i in range(31)]
    grouped = Loader(numbered(31), group_by_length=lengths)
    assert sorted(i for batch in ids(grouped) for i in batch) == list(range(31))


def test_a_run_of_a_thousand_million_samples_resumes_to_the_same_bits(tmp_path):
    class OfHuge(Tiny):
        def train_data(self):
            return Huge()

    class StopAt(Hook):
        may_request = True

        def on_step_end(self, run, step):
            if run.progress.step == 3:
                run.stop("enough")

    def trained(folder, **options):
        task = OfHuge()
        quiet(steps=6, batch_size=8, run_dir=tmp_path / folder, checkpoint=True, **options).run(
            task
        )
        return torch.cat([p.detach().flatten() for p in task.parameters()])

    whole = trained("whole")
    trained("parts", hooks=[StopAt()])
    assert torch.equal(trained("parts", resume="auto"), whole)
