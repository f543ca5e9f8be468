"""Trains heads on what the model that they are for answers.

The model answers prompts, and the hidden states behind its tokens are kept on the way. A head then
learns the model's own distributions of the tokens that follow, over the tokens that occur in a
batch. A tenth of the answers is held out; the parameters that are best there are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.abilities import Ability
from paceline.compatibility import check_needs
from paceline.drafters.draft_model.exit_drafter import check_exit, exit_layers
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens, generated_counts
from paceline.drafters.heads.base import ExitHead, Head, head_target, save_head
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import Pending, write_json, write_safetensors
from paceline.models.trace import read_trace, write_trace
from paceline.training.head_loop import HeadLoop, HeadRecipe, Positions
from paceline.training.self_text import answers_with_hidden

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.lm import LM

Progress = Callable[[int], None]
_JOB, _ANSWERS, _HIDDEN, _STATE = "job.json", "answers.safetensors", "hidden.safetensors", "state"
_HELD = 10  # one of so many answers is held out
_EVERY = 50  # steps between judgements, after which the state is kept, too
_FREQUENT = 8192  # frequent tokens that are kept with a head


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
        if isinstance(head, ExitHead):
            name = f"the head {head.name}"
            check_needs(name, {Ability.LAYERS}, lm.engine.name, lm.engine.abilities)
            check_exit(head.layers, lm.engine)
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
            engine,
            recipe.tokens,
            prompts,
            stops,
            seed=recipe.seed,
            progress=progress,
            layers=exit_layers(self._head) if isinstance(self._head, ExitHead) else None,
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
        loop = HeadLoop(self._head, head_target(self._lm.model), trained, held, self._recipe)
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
            parts.append(Positions(trace, hidden, starts, depth, self._head.lead))
        if not all(len(part.starts) for part in parts):
            raise RequestError(
                f"the answers are too short or too few for a head of depth {depth}; give more "
                "tokens, or prompts with longer answers"
            )
        return parts[0], parts[1]


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
    pending = {
        name: Pending(array.shape, partial(np.asarray, array), kinds[array.dtype])
        for name, array in arrays.items()
    }
    write_safetensors(path, pending)
