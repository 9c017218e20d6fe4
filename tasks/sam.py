"""Sharpness-aware minimisation, as a custom step.

    pip install 'loopkit-torch[examples]'
    python -m tasks.sam

The script learns digits twice, with plain steps and with ``SamStep``. 40 % of the training labels
are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import TensorDataset

from loopkit import Fit, Run, StepLoop
from tasks.digits import Digits


class SamStep(StepLoop):
    """Sharpness-aware minimisation (Foret et al. 2021): updates w by the gradient at w + rho g/|g|.

    Args:
        rho: the distance to climb, as a Euclidean norm over all parameters.
    """

    def __init__(self, rho: float = 0.05) -> None:
        self.rho = rho

    def run(self, run: Run, batches: Any) -> Mapping[str, Any]:
        """Climb along the gradient, compute the gradient there, restore the weights and update."""
        self.backward(run, batches, log=False)
        weights = [p.detach() for p in run.task.parameters() if p.grad is not None]
        grads = [p.grad for p in run.task.parameters() if p.grad is not None]
        here = [w.clone() for w in weights]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_add_(weights, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))
        run.task.zero_grad()
        out = self.backward(run, batches, reuse_rng=True)
        torch._foreach_copy_(weights, here)
        self.update(run)
        return out


class NoisyDigits(Digits):
    """Digits with many wrong labels, which a sharp minimum would memorise.

    Args:
        wrong: the fraction of the training labels that are random.
        rho: the distance that ``SamStep`` climbs; 0 means plain steps.
    """

    def __init__(self, wrong: float = 0.4, rho: float = 0.2) -> None:
        super().__init__()
        self.wrong, self.rho = wrong, rho

    def loops(self) -> Mapping[str, StepLoop]:
        return {"step": SamStep(self.rho)} if self.rho else {}

    def train_data(self) -> TensorDataset:
        images, labels = super().train_data().tensors
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(len(labels), generator=generator) < self.wrong
        return TensorDataset(
            images, torch.where(drawn, torch.randint(10, labels.shape, generator=generator), labels)
        )


def main() -> None:
    """Train twice from the same weights, and compare on images with true labels."""
    for name, rho in (("AdamW", 0.0), ("AdamW under SamStep(0.2)", 0.2)):
        torch.manual_seed(0)
        result = Fit(epochs=40, eval_every="10 epochs").run(NoisyDigits(rho=rho))
        print(f"{name}: accuracy {result.metrics['eval/accuracy']:.3f}, files in {result.run_dir}")


if __name__ == "__main__":
    main()
