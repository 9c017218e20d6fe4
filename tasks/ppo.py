"""Proximal policy optimization: a network learns to balance a pole on a cart, by trying.

    python -m tasks.ppo                    # about half a minute on one CPU core
    python -m tasks.ppo --resume auto      # after Ctrl-C or kill -9: ends with the same weights
    loopkit fit tasks/ppo.py --games 64 --epochs 200

One epoch is one pass over what the games gave since the policy last played. The games, their random
generator and what they gave are buffers of the task. So checkpoints hold them, and a resume continues
the same games.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from loopkit import Checkpoint, Fit, Loader, Task
from loopkit.errors import LoopkitError
from loopkit.optim import Adam, OptimizerSpec, linear

SOLVED = 475.0  # mean return of 100 games, of at most 500


class CartPoles(nn.Module):
    """Several games at once: push a cart left or right so that the pole on it does not fall.

    Dynamics, masses and limits are those of Barto, Sutton and Anderson (1983), "Neuronlike adaptive
    elements that can solve difficult learning control problems", without friction, as in the games
    that are called CartPole-v1. A state is [position in m, speed in m/s, angle in rad, rad/s].

    Args:
        count: the number of games.
        seed: of the random generator that draws starts and actions.
    """

    observations, actions, longest = 4, 2, 500

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("generator_state", generator.get_state())
        self.register_buffer("state", torch.zeros(count, self.observations))
        self.register_buffer("age", torch.zeros(count, dtype=torch.int64))
        self.state.copy_(self.starts())

    def uniform(self, *shape: int) -> Tensor:
        """Return new random numbers from 0 to 1. What is drawn next is kept in the buffers."""
        generator = torch.Generator()
        generator.set_state(self.generator_state.cpu())
        drawn = torch.rand(*shape, generator=generator)
        self.generator_state.copy_(generator.get_state())
        return drawn.to(self.state)

    def starts(self) -> Tensor:
        """Return states (count, 4) of new games: each number is uniform within 0.05 of 0."""
        return self.uniform(*self.state.shape) / 10 - 0.05

    def move(self, state: Tensor, action: Tensor) -> Tensor:
        """Return the states (n, 4) after 0.02 s, by Euler's method. Action 1 pushes right, 0 left."""
        _, speed, angle, turning = state.unbind(-1)
        force = 20.0 * action.to(state.dtype) - 10.0  # N
        sine, cosine = angle.sin(), angle.cos()
        # The cart weighs 1 kg, and the pole 0.1 kg. Half of the pole is 0.5 m long.
        pull = (force + 0.05 * turning.square() * sine) / 1.1
        bend = (9.8 * sine - cosine * pull) / (0.5 * (4 / 3 - 0.1 * cosine.square() / 1.1))
        push = pull - 0.05 * bend * cosine / 1.1
        return state + 0.02 * torch.stack([speed, push, turning, bend], -1)

    def fell(self, state: Tensor) -> Tensor:
        """Return which games (n,) are lost: the cart is 2.4 m away, or the pole leans 12 degrees."""
        return (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > math.radians(12))

    def draw(self, odds: Tensor) -> Tensor:
        """Return an action (count,) for each game, by the probabilities (count, actions)."""
        below = odds.cumsum(-1) < self.uniform(len(odds), 1)
        return below.sum(-1).clamp(max=self.actions - 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make a move in each game. Games that end start again.

        Returns:
            Rewards (n,), states (n, 4) before a new start, and which games fell and which were cut
            at the longest length, both (n,).
        """
        after = self.move(self.state, action)
        fell = self.fell(after)
        cut = (self.age + 1 >= self.longest) & ~fell
        over = fell | cut
        self.state.copy_(torch.where(over[:, None], self.starts(), after))
        self.age.add_(1).masked_fill_(over, 0)
        return torch.ones_like(after[:, 0]), after, fell, cut


class Rollouts(Dataset[dict[str, Tensor]]):
    """What the games gave. A sample is one game's last moves: tensors with a row for each move.

    Args:
        task: plays a new rollout when an epoch is announced that needs one.
    """

    def __init__(self, task: PPO) -> None:
        self.task = task

    def set_epoch(self, epoch: int) -> None:
        """Play, if the rollout in the buffers was learned from in as many epochs as it should."""
        self.task.play(epoch // self.task.passes)

    def __len__(self) -> int:
        return self.task.games

    def __getitem__(self, game: int) -> dict[str, Tensor]:
        return {name: values[game] for name, values in self.task.rollout.named_buffers()}


class PPO(Task):
    """Learns by proximal policy optimization with the clipped objective (Schulman et al. 2017).

    Args:
        games: games that are played at once. Each rank plays them all, and learns from its part.
        moves: moves of each game in a rollout.
        passes: epochs over each rollout.
        hidden: units of the two hidden layers.
        lr: learning rate at the start; it falls linearly.
        clip: how far the ratio of new to old probabilities may go from 1.
        discount: the factor by which a reward counts less for each move later.
        trace: the lambda of generalised advantage estimation (Schulman et al. 2016).
        entropy: the weight of the entropy in the loss.
        seed: of the games.
    """

    def __init__(
        self,
        games: int = 32,
        moves: int = 64,
        passes: int = 8,
        hidden: int = 64,
        lr: float = 3e-3,
        clip: float = 0.2,
        discount: float = 0.99,
        trace: float = 0.95,
        entropy: float = 0.005,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.games, self.moves, self.passes = games, moves, passes
        self.lr, self.clip, self.entropy = lr, clip, entropy
        self.discount, self.trace = discount, trace
        self.world = self.make_games(games, seed)
        inputs, actions = self.world.observations, self.world.actions

        def network(outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(inputs, hidden),
                nn.Tanh(),
                nn.Linear(hidden, hidden),
                nn.Tanh(),
                nn.Linear(hidden, outputs),
            )

        self.policy, self.value = network(actions), network(1)
        nn.init.orthogonal_(self.policy[-1].weight, 0.01)  # the first policy is nearly random
        self.rollout = nn.Module()
        for name in ("logp", "advantage", "target"):
            self.rollout.register_buffer(name, torch.zeros(games, moves))
        self.rollout.register_buffer("state", torch.zeros(games, moves, inputs))
        self.rollout.register_buffer("action", torch.zeros(games, moves, dtype=torch.int64))
        self.register_buffer("played", torch.tensor(-1))  # the number of the last rollout

    def make_games(self, count: int, seed: int) -> CartPoles:
        """Return the games. A derived class may return others with the same attributes."""
        return CartPoles(count, seed)

    def forward(self, state: Tensor) -> Tensor:
        """Map states (..., observations) to logits of the actions (..., actions)."""
        logits: Tensor = self.policy(state)
        return logits

    @torch.no_grad()
    def play(self, number: int) -> None:
        """Play rollout ``number``, unless it is the one in the buffers."""
        if self.played == number:
            return
        world, kept = self.world, dict(self.rollout.named_buffers())
        after, reward, fell, over = [], [], [], []
        for move in range(self.moves):
            kept["state"][:, move] = world.state
            odds = self(world.state).log_softmax(-1)
            action = world.draw(odds.exp())
            kept["action"][:, move] = action
            kept["logp"][:, move] = odds.gather(-1, action[:, None])[:, 0]
            given, state, lost, cut = world.step(action)
            for found, new in zip((reward, after, fell, over), (given, state, lost, lost | cut)):
                found.append(new)
        values = self.value(kept["state"]).squeeze(-1)
        later = self.value(torch.stack(after, 1)).squeeze(-1)
        advantage = torch.zeros_like(values[:, 0])
        for move in reversed(range(self.moves)):
            # A game that fell gives nothing later. One that was cut would have continued.
            hoped = self.discount * later[:, move] * ~fell[move]
            surprise = reward[move] + hoped - values[:, move]
            advantage = surprise + self.discount * self.trace * advantage * ~over[move]
            kept["advantage"][:, move] = advantage
        kept["target"].copy_(kept["advantage"] + values)
        # Over the whole rollout, so that it does not depend on batches and ranks.
        deviation = kept["advantage"].std() + 1e-8
        kept["advantage"].sub_(kept["advantage"].mean()).div_(deviation)
        self.played.fill_(number)

    def train_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        odds = self(batch["state"]).log_softmax(-1)
        logp = odds.gather(-1, batch["action"][..., None])[..., 0]
        ratio = (logp - batch["logp"]).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * batch["advantage"], clipped * batch["advantage"]).mean()
        error = (self.value(batch["state"])[..., 0] - batch["target"]).square().mean()
        entropy = -(odds.exp() * odds).sum(-1).mean()
        loss = 0.5 * error - gain - self.entropy * entropy
        return {"loss": loss, "entropy": entropy, "clipped": (ratio != clipped).float().mean()}

    def eval_step(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Play games from the given starts to their ends, each move the likeliest one."""
        returns = self.returns(batch[0], lambda state: self(state).argmax(-1))
        return {"return": returns.mean()}

    def returns(self, state: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of rewards (n,) of games that begin at ``state`` (n, 4)."""
        total, alive = torch.zeros_like(state[:, 0]), torch.ones_like(state[:, 0])
        for _ in range(self.world.longest):
            state = self.world.move(state, choose(state))
            total += alive
            alive *= ~self.world.fell(state)
        return total

    def predict_step(self, batch: Sequence[Tensor]) -> Tensor:
        return self(batch[0]).argmax(-1)

    def optimizers(self) -> OptimizerSpec:
        return Adam(lr=self.lr, eps=1e-5, schedule=linear())

    def train_data(self) -> Rollouts:
        return Rollouts(self)

    def eval_data(self) -> Loader:
        return Loader(TensorDataset(self.make_games(100, seed=1).state), batch_size=50)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and compare the moves that were learned with random ones."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.ppo", description="Learn to balance a pole."
    )
    parser.add_argument(
        "--rollouts", type=int, default=40, help="how often to play (default: %(default)s)"
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="where the files go (default: the next runs/ppo/<n>)"
    )
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="auto continues the newest run; or give a checkpoint"
    )
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    task = PPO()
    try:
        result = Fit(
            epochs=args.rollouts * task.passes,
            batch_size=4,
            eval_every=f"{5 * task.passes} epochs",
            checkpoint=Checkpoint(every="100 steps", best="eval/return:max", load_best=True),
            resume=args.resume or None,
            run_dir=args.run_dir,
        ).run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (starts,) = task.eval_data().dataset[:]
    random = task.returns(starts, lambda state: torch.randint(task.world.actions, (len(state),)))
    found = result.best["value"]
    print(
        f"mean return of 100 games, of at most 500: {found:.0f}; of random moves {random.mean():.0f}"
    )
    print(f"solved, which takes {SOLVED:.0f}" if found >= SOLVED else f"not solved: {SOLVED:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
