"""The optimisation of a head: positions of kept answers, Adam, and the best parameters so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.drafters.heads.base import Head, HeadBatch, HeadTarget
from paceline.errors import ModelError
from paceline.models.trace import Trace
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

_JUDGED = 1024  # positions of held-out answers that are judged at most
_PATIENCE = 6  # judgements without a better one that end the training


@dataclass(frozen=True)
class HeadRecipe:
    """How a head is trained.

    Attributes:
        tokens: of the model's answers, at least 1,000.
        minutes: of training at most, over all runs; the answers come on top.
        epochs: passes over the answers at most.
        batch: positions of a step.
        rate: learning rate of Adam at the beginning; it falls to 0 over the epochs.
        dropout: share of the hidden state that is left out in training.
        seed: of answers, order and dropout.
    """

    tokens: int = 100_000
    minutes: float = 10.0
    epochs: int = 6
    batch: int = 256
    rate: float = 2e-3
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(1000, 1 << 30, "training", tokens=self.tokens)
        check_range(1, 1 << 20, "training", epochs=self.epochs, batch=self.batch)
        check_range(0.0, 1e5, "training", minutes=self.minutes)
        check_range(0.0, 0.9, "training", dropout=self.dropout)
        check_range(0.0, 1.0, "training", rate=self.rate)


@dataclass(frozen=True)
class Positions:
    """Positions of a trace that a head learns from or is judged by.

    Attributes:
        trace: answers.
        hidden: [T, D], the states behind its tokens.
        starts: int64 [P], tokens whose states the head is given.
        depth: tokens that it predicts.
        lead: where its paths begin, see `Head`.
    """

    trace: Trace
    hidden: NDArray[np.float16]
    starts: NDArray[np.int64]
    depth: int
    lead: int = 1

    def batch(self, chosen: NDArray[np.int64]) -> tuple[HeadBatch, NDArray[np.int64]]:
        """Return the batch of some positions [N], and the tokens [U] of its columns of logits."""
        import torch

        at = self.starts[chosen]
        following = at[:, None] + self.lead + np.arange(self.depth + 1)
        tokens = self.trace.tokens[following].astype(np.int64)
        rows = following[:, :-1]
        likeliest = self.trace.top_tokens[rows].astype(np.int64)
        used = np.union1d(likeliest, tokens[:, 1:])
        batch = HeadBatch(
            torch.from_numpy(self.hidden[at].astype(np.float32)),
            torch.from_numpy(tokens),
            torch.from_numpy(np.searchsorted(used, likeliest)),
            torch.from_numpy(self.trace.top_probs[rows]),
            torch.from_numpy(at),
        )
        return batch, used

    def order(self, random: np.random.Generator, run: int) -> NDArray[np.int64]:
        """Return all positions in a random order, in runs of neighbours; the last may be twice."""
        count = len(self.starts)
        runs = random.permutation(-(-count // run)) * run
        if run == 1:
            return runs
        return (runs[:, None] + np.arange(run) + random.integers(run)).ravel() % count


class HeadLoop:
    """Adam over shuffled positions, with the best parameters so far."""

    def __init__(
        self,
        head: Head,
        target: HeadTarget,
        trained: Positions,
        held: Positions,
        recipe: HeadRecipe,
    ) -> None:
        import torch

        self._head, self.target, self._recipe = head, target, recipe
        self._trained = trained
        self.best = head.initial(target, recipe.seed)
        self._parameters = {
            name: tensor.clone().requires_grad_() for name, tensor in self.best.items()
        }
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=recipe.rate)
        judged = held.order(np.random.default_rng(recipe.seed), head.run)[:_JUDGED]
        self._judged, used = held.batch(np.sort(judged) if head.run == 1 else judged)
        self._judged_columns = used  # tokens that it is judged by
        self._judged_target = self._reduced(used)
        self.steps, self._seconds, self._waited = 0, 0.0, 0
        self._least = self._judge()

    @property
    def done(self) -> bool:
        """Whether the time is up, all epochs are over, or nothing has become better for long."""
        late = self._seconds >= self._recipe.minutes * 60
        return late or self.steps >= self._last or self._waited >= _PATIENCE

    def run(self, steps: int) -> int:
        """Make up to `steps` steps and judge; return their number."""
        start, first = perf_counter(), self.steps
        for chosen in self._chosen(min(steps, self._last - first)):
            self._step(chosen)
        loss = self._judge()
        self._waited = 0 if loss < self._least else self._waited + 1
        if loss < self._least:
            self._least = loss
            self.best = {name: each.detach().clone() for name, each in self._parameters.items()}
        self._seconds += perf_counter() - start
        return self.steps - first

    def card(self, frequent: NDArray[np.int32]) -> dict[str, float]:
        """Return what is known of the training, and how often the head is right by depth.

        Args:
            frequent: tokens that it may propose.
        """
        import torch

        batch = self._judged
        rows = torch.from_numpy(frequent).long()
        target = replace(self.target, unembedding=self.target.unembedding[rows])
        card: dict[str, float] = {
            "positions": len(self._trained.starts),
            "steps": self.steps,
            "seconds": round(self._seconds, 1),
            "held_out_nats": round(self._least, 4),
        }
        right = torch.ones(len(batch.tokens), dtype=torch.bool)
        expected = 1.0
        with torch.inference_mode():
            parameters = self._head.columns(self.best, rows)
            guesses = self._head.batch_logits(parameters, target, batch)
            for length, logits in enumerate(guesses, 1):
                hit = rows[logits.argmax(-1)] == batch.tokens[:, length]
                card[f"right_at_{length}"] = round(float(hit.float().mean()), 4)
                right &= hit
                expected += float(right.float().mean())
        card["chain_tokens_per_pass"] = round(expected, 3)
        return card

    def state(self) -> dict[str, Tensor]:
        """Return all that is needed to go on, by name."""
        import torch

        numbers = [self.steps, self._seconds, self._waited, self._least]
        state = {"loop": torch.tensor(numbers, dtype=torch.float64)}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            state |= {
                f"best.{name}": self.best[name],
                f"now.{name}": parameter.detach(),
                f"mean.{name}": moments["exp_avg"],
                f"square.{name}": moments["exp_avg_sq"],
            }
        return state

    def load(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state` returned.

        Raises:
            ModelError: it belongs to another head.
        """
        import torch

        try:
            steps, self._seconds, self._waited, self._least = state["loop"].tolist()
            self.steps, self._waited = int(steps), int(self._waited)
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    own = [
                        torch.tensor(np.array(state[f"{kind}.{name}"]))
                        for kind in ("best", "now", "mean", "square")
                    ]
                    self.best[name] = own[0]
                    parameter.copy_(own[1])
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.steps)),
                        "exp_avg": own[2],
                        "exp_avg_sq": own[3],
                    }
        except (KeyError, ValueError, RuntimeError):
            raise ModelError("the state of an interrupted training is damaged") from None

    @property
    def _last(self) -> int:
        return self._steps_of_epoch * self._recipe.epochs

    @property
    def _steps_of_epoch(self) -> int:
        return -(-len(self._trained.starts) // self._size)

    @property
    def _size(self) -> int:
        """Positions of a step: whole runs."""
        run = self._head.run
        return max(run, self._recipe.batch // run * run)

    def _chosen(self, steps: int) -> Iterator[NDArray[np.int64]]:
        """Yield the positions of the next steps; each epoch has an order of its own."""
        size, length = self._size, self._steps_of_epoch
        epoch, order = -1, np.zeros(0, np.int64)
        for step in range(self.steps, self.steps + steps):
            if step // length != epoch:
                epoch = step // length
                random = np.random.default_rng([self._recipe.seed, epoch])
                order = self._trained.order(random, self._head.run)
            yield order[step % length * size :][:size]

    def _step(self, chosen: NDArray[np.int64]) -> None:
        import torch
        from torch.nn import functional as F

        batch, used = self._trained.batch(chosen)
        torch.manual_seed(self._recipe.seed * self._last + self.steps)
        batch = replace(batch, hidden=F.dropout(batch.hidden, self._recipe.dropout))
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.rate * (1 - self.steps / self._last)
        self._optimizer.zero_grad()
        parameters = self._head.columns(self._parameters, torch.from_numpy(used))
        loss = self._head.loss(parameters, self._reduced(used), batch)
        torch.autograd.backward(loss)
        self._optimizer.step()
        self.steps += 1

    def _judge(self) -> float:
        """Return the loss on held-out positions, in nats a token."""
        import torch

        with torch.inference_mode():
            columns = torch.from_numpy(self._judged_columns)
            parameters = self._head.columns(self._parameters, columns)
            return float(self._head.loss(parameters, self._judged_target, self._judged))

    def _reduced(self, tokens: NDArray[np.int64]) -> HeadTarget:
        import torch

        rows = self.target.unembedding[torch.from_numpy(tokens)]
        return replace(self.target, unembedding=rows)
