"""On one CUDA device: the numbers of SingleDevice, exact resume, and no wait within steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopkit import DDP, FSDP, Checkpoint, DeepSpeed, Hook, Loader
from loopkit.data.micro_batches import MicroBatches
from loopkit.data.transfer import CudaPrefetcher
from loopkit.strategies.dtensor import full_tensor
from tests.contract.tasks import TokenClassifier
from tests.data.test_batches import Frozen, Graphs
from tests.support import Noisy, Tiny, digest, quiet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LOG_EVERY, STEPS = 5, 15
OPTIONS = {"accelerator": "cuda", "batch_size": 4, "eval_every": "never", "log_every": LOG_EVERY}
STRATEGIES = {
    "single": lambda: "single",
    "ddp": DDP,
    "fsdp": FSDP,
    "deepspeed": lambda: DeepSpeed(stage=2),
}


class Strict(Hook):
    """Has torch raise at any wait of the host for the device between two logs."""

    may_request = False

    def __init__(self) -> None:
        self.steps = 0

    def on_step_start(self, run: Any, batches: Any) -> None:
        due = (run.progress.step + 1) % LOG_EVERY == 0 or run.progress.step + 1 in (1, STEPS)
        torch.cuda.set_sync_debug_mode("default" if due else "error")
        self.steps += not due

    def on_step_end(self, run: Any, out: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def forgiving():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "extra", [{}, {"clip_norm": 1.0}, {"accumulate": 2}, {"precision": "bf16"}]
)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_the_host_waits_for_nothing_between_two_logs(strategy, extra):
    strict = Strict()
    task = TokenClassifier(count=400)
    quiet(strategy=STRATEGIES[strategy](), steps=STEPS, hooks=[strict], **OPTIONS, **extra).run(
        task
    )
    assert strict.steps == STEPS - STEPS // LOG_EVERY - 1


def test_a_wait_in_user_code_is_caught_by_that_test():
    class Waits(TokenClassifier):
        def train_step(self, batch: Any) -> Any:
            out = super().train_step(batch)
            out["loss"].item()
            return out

    with pytest.raises(RuntimeError, match="synchroniz"):
        quiet(strategy="single", steps=STEPS, hooks=[Strict()], **OPTIONS).run(Waits(count=400))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_one_device_gives_the_numbers_of_single(strategy):
    weights = []
    for made in ("single", STRATEGIES[strategy]()):
        task = TokenClassifier()
        quiet(strategy=made, epochs=2, clip_norm=0.5, **{**OPTIONS, "eval_every": "1 epoch"}).run(
            task
        )
        weights.append({name: full_tensor(t).detach() for name, t in task.state_dict().items()})
    assert all(t.is_cuda for t in weights[0].values())
    assert max(float((weights[1][n] - t).abs().max()) for n, t in weights[0].items()) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16-true"])
def test_it_learns_and_resumes_to_the_same_bits(tmp_path, precision):
    options = {
        **OPTIONS,
        "precision": precision,
        "checkpoint": Checkpoint(every="4 steps"),
        "deterministic": True,
    }
    whole_run, first, rest = Tiny(), Tiny(), Tiny()
    result = quiet(steps=12, run_dir=tmp_path / "whole", **options).run(whole_run)
    quiet(steps=7, run_dir=tmp_path / "run", **options).run(first)
    quiet(steps=12, run_dir=tmp_path / "run", resume="auto", **options).run(rest)
    assert digest(rest.state_dict()) == digest(whole_run.state_dict())
    assert result.history[-1]["train/loss"] < 1.2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_copied_ahead_are_those_of_the_cpu(workers):
    class Loaded(Tiny):
        def train_data(self) -> Any:
            return Loader(Noisy(64), num_workers=workers)

    seen: dict[str, list[torch.Tensor]] = {"cuda": [], "cpu": []}
    for accelerator, batches in seen.items():
        fit = quiet(epochs=1, **{**OPTIONS, "accelerator": accelerator})
        fit.on(
            "step_start",
            lambda run, groups, kept=batches: kept.extend(batch[0].cpu() for batch in groups),
        )
        fit.run(Loaded())
    assert len(seen["cuda"]) == len(seen["cpu"]) == 16
    assert all(torch.equal(a, b) for a, b in zip(seen["cuda"], seen["cpu"]))


def test_a_model_made_late_under_fsdp_lies_on_the_device():
    from tests.contract.fsdp_jobs import Late

    task = Late()
    quiet(strategy=FSDP(), epochs=1, **OPTIONS).run(task)
    assert {parameter.device.type for parameter in task.parameters()} == {"cuda"}


@pytest.mark.parametrize("kind", ["graphs", "frozen", "packed", "records stream"])
def test_batches_of_any_kind_are_copied_ahead(kind):
    class Records(Graphs):
        def record_stream(self, stream: Any) -> None:
            marked.append(self)
            self.x.record_stream(stream)

    def make(value: float) -> Any:
        x = torch.full((1000, 256), value)
        kinds = {"graphs": Graphs, "frozen": Frozen, "records stream": Records}
        return kinds[kind](x=x) if kind in kinds else torch.nn.utils.rnn.pack_sequence([x, x[:5]])

    marked: list[Any] = []
    prefetch = CudaPrefetcher(torch.device("cuda"), torch.bfloat16)
    groups = [MicroBatches() for _ in range(20)]
    for number, group in enumerate(groups):
        group.append(make(float(number)))
    for number, group in enumerate(prefetch(iter(groups))):
        tensor = group[0].data if kind == "packed" else group[0].x
        assert (tensor.device.type, tensor.dtype) == ("cuda", torch.bfloat16)
        assert float(tensor.float().mean()) == number
    assert len(marked) == (20 if kind == "records stream" else 0)
