"""Hidden Markov models of a language model's output, and their look-ahead for keywords."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline.control.lexical.keyword_automaton import KeywordAutomaton
from paceline.errors import ModelError, RequestError
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import write_arrays
from paceline.models.tokenizer import Tokenizer

Doubles = NDArray[np.float64]
_LARGEST = 1 << 26  # floats of a table: 512 MB


@dataclass(frozen=True, eq=False)
class Hmm:
    """A hidden Markov model with Z states and V tokens. Rows sum to 1, and no entry is 0.

    Attributes:
        initial: float64 [Z], probability of each state at the first token.
        transition: float64 [Z, Z], probability of the next state (column) after a state (row).
        emission: float64 [Z, V], probability of each token in a state.
    """

    initial: Doubles
    transition: Doubles
    emission: Doubles

    def predict(self, state: Doubles, token: int) -> Doubles:
        """Return P(next state | tokens) [Z], from the distribution before `token`."""
        seen = state * self.emission[:, token]
        after: Doubles = (seen / seen.sum()) @ self.transition
        return after

    def outlook(self, automaton: KeywordAutomaton, length: int) -> Doubles:
        """Return the probability that all keywords will occur, [length + 1, S, Z].

        Element (r, s, z): within r more tokens, from the automaton's state s and the hidden state z
        of the last token (Zhang et al., arXiv 2304.07438, section 4.1, for any automaton).

        Raises:
            RequestError: the table would be too large.
        """
        states, hidden = len(automaton.next), len(self.initial)
        if (length + 1) * states * hidden > _LARGEST:
            raise RequestError(
                f"{states} states of the keywords, {hidden} of the HMM and {length} tokens need "
                f"a table of {(length + 1) * states * hidden >> 17} MB, expected at most 512; "
                "give fewer keywords, their order, an HMM with fewer states or fewer new tokens"
            )
        source, target, weight, ending = self._edges(automaton)
        first = np.flatnonzero(np.r_[True, source[1:] != source[:-1]])
        table = np.zeros((length + 1, states, hidden))
        table[0] = automaton.ends[:, None]
        for rest in range(length):
            emitted = np.add.reduceat(weight * table[rest, target], first, axis=0) + ending
            table[rest + 1] = np.minimum(emitted @ self.transition.T, 1.0)
            table[rest + 1, 0] = 1.0
        return table

    def _edges(
        self, automaton: KeywordAutomaton
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Doubles, Doubles]:
        """Return the automaton's edges under the emission probabilities.

        Returns:
            source and target states [E], sorted by source; P(a token of the edge | z) [E, Z]; and
            P(a stop token, where the text may end | z) [S, Z].
        """
        known = automaton.kind >= 0
        kinds = np.zeros((automaton.next.shape[1], len(self.initial)))
        np.add.at(kinds, automaton.kind[known], self.emission[:, known].T)
        stop = self.emission[:, ~known].sum(1)
        sources, targets, weights = [], [], []
        for state, row in enumerate(automaton.next):
            nexts, index = np.unique(row, return_inverse=True)
            weight = np.zeros((len(nexts), len(self.initial)))
            np.add.at(weight, index, kinds)
            sources.append(np.full(len(nexts), state))
            targets.append(nexts.astype(np.int64))
            weights.append(weight)
        ending = np.where(automaton.ends[:, None], stop, 0.0)
        return np.concatenate(sources), np.concatenate(targets), np.concatenate(weights), ending


def write_hmm(path: Path, hmm: Hmm, tokenizer: Tokenizer) -> None:
    """Write an HMM to a file, which appears under its name only when complete.

    Raises:
        ModelError: the file cannot be written.
    """
    arrays = {
        "initial": hmm.initial,
        "transition": hmm.transition,
        "emission": hmm.emission,
    }
    mark = np.frombuffer(tokenizer.fingerprint(), np.uint8)
    named = {name: ("F32", array) for name, array in arrays.items()}
    write_arrays(path, {**named, "tokenizer": ("U8", mark)})


def read_hmm(path: str, tokenizer: Tokenizer, size: int) -> Hmm:
    """Read an HMM that `write_hmm` wrote.

    Raises:
        ModelError: the file is missing or damaged, or of another vocabulary.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ModelError(f"cannot read the HMM in {path}: it is not a file")
    try:
        changed = Path(path).stat().st_mtime_ns
    except OSError as error:
        raise ModelError(f"cannot read the HMM in {path}: {error.strerror}") from None
    hmm, mark = _read(path, changed)
    if mark != tokenizer.fingerprint() or hmm.emission.shape[1] != size:
        raise ModelError(
            f"{path} has another vocabulary; make one of this model with `paceline distil-hmm`"
        )
    return hmm


@lru_cache(maxsize=4)
def _read(path: str, changed: int) -> tuple[Hmm, bytes]:
    arrays = {name: stored.values for name, stored in read_file(Path(path)).items()}
    wrong = ModelError(f"{path} is not an HMM; make one with `paceline distil-hmm`")
    names = ("initial", "transition", "emission")
    if not {*names, "tokenizer"} <= set(arrays) or arrays["tokenizer"].shape != (32,):
        raise wrong
    tables = [_rows(arrays[name]) for name in names]
    states = len(tables[0]) if tables[0] is not None and tables[0].ndim == 1 else 0
    if not states or any(array is None for array in tables):
        raise wrong
    initial, transition, emission = (array for array in tables if array is not None)
    if transition.shape != (states, states) or emission.ndim != 2 or len(emission) != states:
        raise wrong
    return Hmm(initial, transition, emission), arrays["tokenizer"].tobytes()


def _rows(array: NDArray[np.generic]) -> Doubles | None:
    """Return rows of probabilities, normalised; None if they do not sum to 1 up to rounding."""
    if array.dtype != np.float32 or not array.size:
        return None
    values = array.astype(np.float64)
    sums = values.sum(-1, keepdims=True)
    if not ((values > 0).all() and (np.abs(sums - 1) < 1e-3).all()):
        return None
    normalised: Doubles = values / sums
    return normalised


def blank(states: int, counts: Sequence[float] | Doubles, seed: int) -> Hmm:
    """Return a random HMM to start learning from, whose states are near the mean distribution.

    Args:
        states: number of hidden states.
        counts: [V], occurrences of each token in the training texts; one is added to each.
        seed: of the random differences between states.
    """
    generator = np.random.default_rng(seed)
    transition = generator.gamma(1.0, size=(states, states)) + 0.1
    emission = (np.asarray(counts, np.float64) + 1) * (
        generator.gamma(1.0, size=(states, len(counts))) + 0.01
    )
    return Hmm(
        np.full(states, 1 / states),
        transition / transition.sum(1, keepdims=True),
        emission / emission.sum(1, keepdims=True),
    )
