"""Two hand-written training loops: the usual one, and the fastest one that we could write."""

from __future__ import annotations

import sys
from time import perf_counter

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.job import CLIP, LOG_EVERY, LR, Job


def naive(job: Job) -> None:
    """Run the usual loop: AdamW with its defaults, and ``loss.item()`` in each step.

    With everything on, it also has tqdm, TensorBoard and ``clip_grad_norm_``.
    """
    model, optimizer = job.model, job.optimizer(fused=None)
    if not job.full:
        for batch in job.data:
            loss = model(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        return
    from tensorboardX import SummaryWriter
    from tqdm import tqdm

    scheduler, writer = job.scheduler(optimizer), SummaryWriter(str(job.folder))
    bar = tqdm(job.data)
    for step, batch in enumerate(bar, start=1):
        loss = model(**batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.item())
        if step % LOG_EVERY == 0:
            writer.add_scalar("train/loss", loss.item(), step)
            writer.add_scalar("lr", scheduler.get_last_lr()[0], step)
    writer.close()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        job.folder / "checkpoint.pt",
    )


def with_tqdm(job: Job) -> None:
    """Run the best loop with tqdm around it, which gets the loss every 50 steps."""
    from tqdm import tqdm

    model, optimizer = job.model, job.optimizer()
    parameters = list(model.parameters())
    bar = tqdm(job.data)
    for step, batch in enumerate(bar, start=1):
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        if step % LOG_EVERY == 0:
            bar.set_postfix(loss=loss.item())


def best(job: Job) -> None:
    """Run the fastest loop: fused AdamW, and losses kept as tensors.

    With everything on, it clips with one norm and one product, and draws its bar at 10 Hz.
    """
    model, optimizer = job.model, job.optimizer()
    parameters = list(model.parameters())
    if not job.full:
        losses, hooks = [], [job.hook] * job.hooks
        for batch in job.data:
            loss = model(**batch)
            loss.backward()
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            losses.append(loss.detach())
            for hook in hooks:
                hook()
        return
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(job.folder))
    group = optimizer.param_groups[0]
    kept: list[torch.Tensor] = []
    drawn = 0.0
    for step, batch in enumerate(job.data, start=1):
        loss = model(**batch)
        loss.backward()
        grads = [p.grad for p in parameters]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, torch.clamp(CLIP / (norm + 1e-6), max=1.0))
        group["lr"] = LR * job.factor(step - 1)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        kept.append(loss.detach())
        if step % LOG_EVERY == 0:
            writer.add_scalar("train/loss", torch.stack(kept).mean().item(), step)
            writer.add_scalar("lr", group["lr"], step)
            kept.clear()
        if perf_counter() - drawn > 0.1:
            sys.stderr.write(f"\rstep {step}/{job.steps}")
            drawn = perf_counter()
    writer.close()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        job.folder / "checkpoint.pt",
    )
