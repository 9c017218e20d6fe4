"""A run ends with the weights of a hand-written loop, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from tests.support import Tiny, digest, points, quiet

STEPS, BATCH = 50, 8


def factor(step: int) -> float:
    return step / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / (STEPS - 5)))


class OwnOptimizer(Tiny):
    """Tiny with torch's own optimizer and scheduler over one group, and a plain DataLoader."""

    def optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def train_data(self):
        return DataLoader(points(BATCH * 40), BATCH, shuffle=True)


def by_hand(accumulate: int, clip: float | None, autocast: bool) -> tuple[str, list[str]]:
    model = OwnOptimizer()
    loader = model.train_data()
    torch.manual_seed(0)
    optimizer, scheduler = model.optimizers()
    losses, step = [], 0
    while step < STEPS:
        group = []
        for x, y in loader:
            group.append((x, y))
            if len(group) < accumulate:
                continue
            for x, y in group:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(model.net(x), y)
                (loss / accumulate if accumulate > 1 else loss).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()).hex())
            group, step = [], step + 1
            if step == STEPS:
                break
    return digest(model.state_dict()), losses


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_weights_after_50_steps_are_bit_equal_to_a_hand_written_loops(accumulate, clip, autocast):
    expected, losses = by_hand(accumulate, clip, autocast)
    task, seen = OwnOptimizer(), []
    fit = quiet(
        steps=STEPS,
        accumulate=accumulate,
        clip_norm=clip,
        rng="stream",
        precision="bf16" if autocast else "fp32",
        eval_every="7 steps",
    )
    fit.on("step_end", lambda run, out: seen.append(float(out["loss"]).hex()))
    fit.run(task)
    assert seen == losses
    assert digest(task.state_dict()) == expected


def test_the_hand_written_loop_itself_depends_on_what_is_compared():
    assert (
        len({by_hand(1, None, False)[0], by_hand(1, 0.5, False)[0], by_hand(4, None, False)[0]})
        == 3
    )


def test_a_schedule_of_ours_equals_the_same_torch_scheduler():
    class Ours(OwnOptimizer):
        def optimizers(self):
            from loopkit.optim import AdamW, cosine

            return AdamW(lr=self.lr, weight_decay=0.1, no_decay=(), schedule=cosine(warmup=5))

    theirs, ours = OwnOptimizer(), Ours()
    for task in (theirs, ours):
        quiet(steps=STEPS, epochs=100, rng="stream", eval_every="never").run(task)
    assert digest(ours.state_dict()) == digest(theirs.state_dict())
