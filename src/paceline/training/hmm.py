"""Distillation of a language model into a hidden Markov model; it can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.control.lexical.hmm import Hmm, blank, write_hmm
from paceline.core import Tokens
from paceline.engines.base import Engine
from paceline.errors import ModelError, RequestError
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import Pending, write_safetensors
from paceline.models.model import Model
from paceline.training.baum_welch import improve
from paceline.training.self_text import selftext

_TEXTS = 64  # texts between two checkpoints
Progress = Callable[[int], None]


@dataclass(frozen=True)
class HmmRecipe:
    """Settings of a distillation.

    Attributes:
        states: number of hidden states. More fit the model better; a round costs their square.
        samples: number of texts that the model writes, at temperature 1; more if some end early.
        length: maximum tokens of a text.
        rounds: number of rounds of expectation-maximisation.
        seed: of the texts and of the initial HMM.
    """

    states: int = 64
    samples: int = 2000
    length: int = 128
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value < 1:
                raise RequestError(f"{name} is {value}, expected 1 or more")

    @property
    def tokens(self) -> int:
        """Total number of tokens to write."""
        return self.samples * self.length


@dataclass
class _HmmWork:
    """State so far: the concatenated texts, and the HMM after some rounds."""

    tokens: Tokens
    starts: Tokens
    hmm: Hmm | None = None
    rounds: int = 0
    likelihood: float = float("nan")


class Distillation:
    """Distils a language model into an HMM in a file.

    The state is kept in a file with the suffix `.work` until the HMM is complete, and the same
    settings resume from it.

    Args:
        engine: runs the model.
        model: gives the tokenizer and defaults.
        out: path of the safetensors file to write.
        recipe: the settings.

    Raises:
        ModelError: the kept state belongs to other settings, or is damaged.
    """

    def __init__(self, engine: Engine, model: Model, out: Path, recipe: HmmRecipe) -> None:
        self._engine, self._model, self._out, self._recipe = engine, model, out, recipe
        self._side = out.with_name(out.name + ".work")
        self._mark = json.dumps({"model": model.fingerprint(), **asdict(recipe)}).encode()
        self._work = _resume(self._side, self._mark, engine.config.vocab_size)

    def write(self, progress: Progress = lambda count: None) -> None:
        """Let the model write the texts; `progress` is called with numbers of new tokens."""
        work, recipe, model = self._work, self._recipe, self._model
        progress(len(work.tokens))
        while len(work.tokens) < recipe.tokens:
            trace = selftext(
                self._engine,
                min(_TEXTS * recipe.length, recipe.tokens - len(work.tokens)),
                model.tokenizer.encode(""),
                frozenset(model.defaults.stop_tokens),
                1.0,
                recipe.seed * recipe.tokens + len(work.tokens),
                progress,
                recipe.length,
            )
            work.starts = np.concatenate([work.starts, trace.starts + np.int32(len(work.tokens))])
            work.tokens = np.concatenate([work.tokens, trace.tokens])
            self._keep()

    def learn(self, progress: Progress = lambda count: None) -> tuple[Hmm, float]:
        """Learn from the texts and write the file; `progress` is called with numbers of rounds.

        Returns:
            the HMM, and the mean log-likelihood of a token before the last round, in nats.

        Raises:
            ModelError: the file cannot be written.
        """
        work, recipe = self._work, self._recipe
        size = self._engine.config.vocab_size
        counts = np.bincount(work.tokens, minlength=size).astype(np.float64)
        hmm = work.hmm or blank(recipe.states, counts, recipe.seed)
        progress(work.rounds)
        texts = np.split(work.tokens, work.starts[1:])
        for rounds in range(work.rounds, recipe.rounds):
            hmm, work.likelihood = improve(hmm, texts)
            work.hmm, work.rounds = hmm, rounds + 1
            self._keep()
            progress(1)
        write_hmm(self._out, hmm, self._model.tokenizer)
        with suppress(OSError):
            self._side.unlink()
        return hmm, work.likelihood

    def _keep(self) -> None:
        work = self._work
        arrays: dict[str, tuple[str, NDArray[Any]]] = {
            "mark": ("U8", np.frombuffer(self._mark, np.uint8)),
            "tokens": ("I32", work.tokens),
            "starts": ("I32", work.starts),
            "rounds": ("I32", np.array([work.rounds], np.int32)),
            "likelihood": ("F64", np.array([work.likelihood])),
        }
        if work.hmm is not None:
            for name in ("initial", "transition", "emission"):
                arrays[name] = ("F64", getattr(work.hmm, name))
        pending = {name: _pending(kind, array) for name, (kind, array) in arrays.items()}
        write_safetensors(self._side, pending)


def _pending(kind: str, array: NDArray[Any]) -> Pending:
    return Pending(array.shape, lambda: array, kind)


def _resume(path: Path, mark: bytes, vocabulary: int) -> _HmmWork:
    if not path.exists():
        return _HmmWork(np.zeros(0, np.int32), np.zeros(0, np.int32))
    arrays = {name: np.array(stored.values) for name, stored in read_file(path).items()}
    try:
        if arrays["mark"].tobytes() != mark:
            raise ModelError(
                f"{path} belongs to other settings or another model; "
                "delete it, or give the settings that it was begun with"
            )
        work = _HmmWork(arrays["tokens"], arrays["starts"], None, int(arrays["rounds"][0]))
        if work.rounds:
            work.likelihood = float(arrays["likelihood"][0])
            work.hmm = Hmm(arrays["initial"], arrays["transition"], arrays["emission"])
        if not (work.tokens.min() >= 0 and work.tokens.max() < vocabulary):
            raise ValueError
    except (KeyError, IndexError, ValueError):
        raise ModelError(f"{path} is damaged; delete it") from None
    return work
