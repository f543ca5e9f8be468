"""Trains heads on what the model that they are for answers.

The model answers prompts, and the hidden states behind its tokens are kept on the way. A head then
learns the model's own distributions of the tokens that follow, over the tokens that occur in a
batch. A tenth of the answers is held out; the parameters that are best there are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens, generated_counts
from paceline.drafters.heads.base import Head, HeadBatch, HeadTarget, head_target, save_head
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import Pending, write_json, write_safetensors
from paceline.models.trace import Trace, read_trace, write_trace
from paceline.registry import check_range
from paceline.training.self_text import answers_with_hidden

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.lm import LM

Progress = Callable[[int], None]
_JOB, _ANSWERS, _HIDDEN, _STATE = "job.json", "answers.safetensors", "hidden.safetensors", "state"
_HELD = 10  # one of so many answers is held out
_JUDGED = 1024  # positions of them that are judged at most
_EVERY = 50  # steps between judgements, after which the state is kept, too
_PATIENCE = 6  # judgements without a better one that end the training
_FREQUENT = 8192  # frequent tokens that are kept with a head


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
    """

    trace: Trace
    hidden: NDArray[np.float16]
    starts: NDArray[np.int64]
    depth: int

    def batch(self, chosen: NDArray[np.int64]) -> tuple[HeadBatch, NDArray[np.int64]]:
        """Return the batch of some positions [N], and the tokens [U] of its columns of logits."""
        import torch

        at = self.starts[chosen]
        following = at[:, None] + 1 + np.arange(self.depth + 1)
        tokens = self.trace.tokens[following].astype(np.int64)
        rows = following[:, :-1]
        likeliest = self.trace.top_tokens[rows].astype(np.int64)
        used = np.union1d(likeliest, tokens[:, 1:])
        batch = HeadBatch(
            torch.from_numpy(self.hidden[at].astype(np.float32)),
            torch.from_numpy(tokens),
            torch.from_numpy(np.searchsorted(used, likeliest)),
            torch.from_numpy(self.trace.top_probs[rows]),
        )
        return batch, used


class HeadTraining:
    """Trains a head of a model; progress is kept beside the target folder.

    Args:
        lm: the model.
        head: architecture and settings.
        out: folder to write; `out.work` holds answers and state until it is done.
        recipe: how.

    Raises:
        MethodError: the engine gives no hidden states.
        RequestError: something else was begun there.
    """

    def __init__(self, lm: LM, head: Head, out: Path, recipe: HeadRecipe) -> None:
        if Ability.HIDDEN not in lm.engine.abilities:
            raise MethodError(f"the engine {lm.engine.name} gives no hidden states to train on")
        self._lm, self._head, self._out, self._recipe = lm, head, out, recipe
        self._work = out.with_name(out.name + ".work")
        job = {"model": lm.model.fingerprint(), "head": head.spec(), **asdict(recipe)}
        job.pop("minutes")  # more of them may be given to go on
        self._begin(job)

    def write(self, prompts: Iterable[list[int]], progress: Progress) -> None:
        """Let the model answer, unless its answers are there; `progress` gets new tokens."""
        if (self._work / _HIDDEN).is_file():
            progress(self._recipe.tokens)
            return
        engine, recipe = self._lm.engine, self._recipe
        stops = frozenset(self._lm.model.defaults.stop_tokens)
        trace, hidden = answers_with_hidden(
            engine, recipe.tokens, prompts, stops, seed=recipe.seed, progress=progress
        )
        write_trace(self._work / _ANSWERS, trace)
        pending = Pending(hidden.shape, lambda: hidden, "F16")
        write_safetensors(self._work / _HIDDEN, {"hidden": pending})

    def learn(self, progress: Progress) -> dict[str, float]:
        """Train on the answers and write the head; return its card.

        Args:
            progress: is called with numbers of new steps.

        Raises:
            RequestError: the answers are too short for the head's depth.
            ModelError: a file is damaged or cannot be written.
        """
        trained, held = self._positions()
        loop = _Loop(self._head, head_target(self._lm.model), trained, held, self._recipe)
        state = self._work / f"{_STATE}.safetensors"
        if state.is_file():
            loop.load({name: stored.values for name, stored in read_file(state).items()})
        progress(loop.steps)
        while not loop.done:
            progress(loop.run(_EVERY))
            _write_tensors(state, loop.state())
        counts = generated_counts(trained.trace, self._lm.model.config.vocab_size)
        assert counts is not None
        card = loop.card(FrequentTokens(4096, len(counts), counts).tokens)
        order = np.argsort(-counts, kind="stable")[:_FREQUENT]
        frequent = [int(token) for token in order if counts[token] > 0]
        target, fingerprint = loop.target, self._lm.model.fingerprint()
        save_head(self._out, self._head, loop.best, target, fingerprint, card, frequent)
        with suppress(OSError):
            shutil.rmtree(self._work)
        return card

    @property
    def total_steps(self) -> int:
        """Steps of all epochs, at most."""
        return -(-self._recipe.tokens // self._recipe.batch) * self._recipe.epochs

    def _begin(self, job: dict[str, Any]) -> None:
        path = self._work / _JOB
        if path.is_file():
            try:
                same = json.loads(path.read_text(encoding="utf-8")) == job
            except ValueError:
                same = False
            if not same:
                raise RequestError(
                    f"{self._work} belongs to another training; delete it, or give the settings "
                    "that it was begun with"
                )
            return
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"cannot write {self._work}: {error.strerror or error}") from None
        write_json(path, job)

    def _positions(self) -> tuple[Positions, Positions]:
        """Return the positions to learn from, and those to judge by.

        Raises:
            RequestError: there are too few.
        """
        trace = read_trace(self._work / _ANSWERS, self._lm.model.config.vocab_size)
        hidden = read_file(self._work / _HIDDEN)["hidden"].values
        if len(hidden) != len(trace):
            raise ModelError(f"{self._work} is damaged; delete it")
        texts = list(trace.texts())
        held = max(1, len(texts) // _HELD)
        depth = self._head.depth
        parts = []
        for chosen in (texts[held:], texts[:held]):
            inside = [np.arange(text.start, text.stop - depth - 1) for text in chosen]
            starts = np.concatenate([np.zeros(0, np.int64), *inside]).astype(np.int64)
            parts.append(Positions(trace, hidden, starts, depth))
        if not all(len(part.starts) for part in parts):
            raise RequestError(
                f"the answers are too short or too few for a head of depth {depth}; give more "
                "tokens, or prompts with longer answers"
            )
        return parts[0], parts[1]


class _Loop:
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
        judged = np.random.default_rng(recipe.seed).permutation(len(held.starts))[:_JUDGED]
        self._judged, used = held.batch(np.sort(judged))
        self._judged_target = self._reduced(used)  # rows of all tokens that it is judged by
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
            for length in range(1, self._head.depth + 1):
                path = batch.tokens[:, :length]
                logits = self._head.logits(self.best, target, batch.hidden, path)
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
        return -(-len(self._trained.starts) // self._recipe.batch)

    def _chosen(self, steps: int) -> Iterator[NDArray[np.int64]]:
        """Yield the positions of the next steps; each epoch has an order of its own."""
        size, length = self._recipe.batch, self._steps_of_epoch
        epoch, order = -1, np.zeros(0, np.int64)
        for step in range(self.steps, self.steps + steps):
            if step // length != epoch:
                epoch = step // length
                random = np.random.default_rng([self._recipe.seed, epoch])
                order = random.permutation(len(self._trained.starts))
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
        loss = self._head.loss(self._parameters, self._reduced(used), batch)
        torch.autograd.backward(loss)
        self._optimizer.step()
        self.steps += 1

    def _judge(self) -> float:
        """Return the loss on held-out positions, in nats a token."""
        import torch

        with torch.inference_mode():
            return float(self._head.loss(self._parameters, self._judged_target, self._judged))

    def _reduced(self, tokens: NDArray[np.int64]) -> HeadTarget:
        import torch

        rows = self.target.unembedding[torch.from_numpy(tokens)]
        return replace(self.target, unembedding=rows)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
    pending = {
        name: Pending(array.shape, partial(np.asarray, array), kinds[array.dtype])
        for name, array in arrays.items()
    }
    write_safetensors(path, pending)
