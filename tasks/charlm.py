"""A small GPT that learns to write Python, character by character, from the standard library.

python -m tasks.charlm                   # about a minute on one CPU core
python -m tasks.charlm --resume auto     # after Ctrl-C or kill -9: ends with the same weights
loopkit fit tasks/charlm.py --width 128 --steps 3000
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from loopkit import Checkpoint, Fit, Task
from loopkit.errors import DataError, LoopkitError
from loopkit.hooks.curves import Curves
from loopkit.optim import AdamW, OptimizerSpec, cosine


class Block(nn.Module):
    """A transformer block with layer norm before attention and before the two-layer network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return x + self.mlp(self.norm2(x))


class CharLM(Task):
    """Predicts the next character of source code.

    Args:
        layers: transformer blocks.
        width: size of the vectors between them.
        heads: attention heads per block; they divide the width.
        context: number of earlier characters that the model sees.
        lr: peak learning rate.
        folder: where the ``*.py`` files are; None for this Python's standard library.
    """

    def __init__(
        self,
        layers: int = 2,
        width: int = 96,
        heads: int = 4,
        context: int = 64,
        lr: float = 3e-3,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.context, self.lr, self.folder = context, lr, folder
        self.letters, self.places = nn.Embedding(128, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.letters.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Map character codes (batch, time) to logits of each next one (batch, time, 128)."""
        x = self.letters(text) + self.places.weight[: text.shape[1]]
        return self.norm(self.blocks(x)) @ self.letters.weight.T

    def train_step(self, batch: Sequence[Tensor]) -> Tensor:
        text = batch[0].long()
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def eval_step(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"loss": self.train_step(batch)}

    def optimizers(self) -> OptimizerSpec:
        return AdamW(
            lr=self.lr,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            schedule=cosine(warmup="10%", floor=0.05),
        )

    def train_data(self) -> TensorDataset:
        return TensorDataset(self._windows(held_out=False))

    def eval_data(self) -> TensorDataset:
        windows = self._windows(held_out=True)
        # About 512 windows give the loss to about 0.01.
        return TensorDataset(windows[:: len(windows) // 512 or 1])

    def _windows(self, *, held_out: bool) -> Tensor:
        """Return all windows of context + 1 characters, uint8. Every tenth file is for evaluation."""
        folder = Path(self.folder or sysconfig.get_path("stdlib"))
        files = [
            file for i, file in enumerate(sorted(folder.glob("*.py"))) if (i % 10 == 9) == held_out
        ]
        # With tabs, a level of indentation is one character, and the model need not count blanks.
        text = b"\n\n".join(file.read_bytes() for file in files).replace(b"    ", b"\t")
        if len(text) <= self.context:
            raise DataError(
                f"{folder} holds too little Python: {len(files)} of its *.py files have "
                f"{len(text)} characters. Give another folder, or a smaller context"
            )
        codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).clamp(max=127)
        return codes.unfold(0, self.context + 1, self.context)

    @torch.no_grad()
    def write(self, start: str, length: int, temperature: float = 0.7, seed: int = 0) -> str:
        """Continue the text ``start``. The same weights and seed give the same text."""
        device = self.letters.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        text = torch.tensor([list(start.encode("ascii"))], device=device)
        for _ in range(length):
            odds = F.softmax(self(text[:, -self.context :])[:, -1] / temperature, -1)
            text = torch.cat([text, torch.multinomial(odds, 1, generator=generator)], 1)
        return bytes(text[0].tolist()).decode("ascii").replace("\t", "    ")


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers. It is equal only if every bit is equal."""
    state = module.state_dict().items()
    return hashlib.sha256(
        b"".join(name.encode() + t.cpu().numpy().tobytes() for name, t in state)
    ).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print text that the model writes, and say where the files are."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.charlm", description="Teach a small GPT to write Python."
    )
    parser.add_argument(
        "--steps", type=int, default=1200, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="where the files go (default: the next runs/charlm/<n>)"
    )
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="auto continues the newest run; or give a checkpoint"
    )
    args = parser.parse_args(arguments)
    # A model this small gains little from a second thread, and loses much on a busy machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task, plots = CharLM(), [Curves()] if find_spec("matplotlib") else []
    try:
        result = Fit(
            steps=args.steps,
            batch_size=24,
            clip_norm=1.0,
            eval_first=True,
            eval_every="20%",
            log_every="20 steps",
            checkpoint=Checkpoint(every="5%"),
            resume=args.resume or None,
            run_dir=args.run_dir,
            hooks=plots,
        ).run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if result.status == "interrupted":
        again = (
            f"python -m tasks.charlm --steps {args.steps} --run-dir {result.run_dir} --resume auto"
        )
        print(f"Interrupted after step {result.step}. To resume: {again}")
        return 130
    print(f"\nIt writes:\n\n{task.write('def ', 400)}\n")
    print(f"validation loss  {result.metrics['eval/loss']:.3f} after {result.step} steps")
    print(f"weights          sha256 {fingerprint(task)}")
    print(f"checkpoint       {result.checkpoint}")
    curves = (
        f"{result.run_dir}/curves.png" if plots else "pip install loopkit-torch[plots] draws them"
    )
    print(f"curves           {curves}")
    print(f"TensorBoard      tensorboard --logdir {result.run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
