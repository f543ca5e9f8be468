"""Checks of a learned state before a drafter restores it, and the state of native tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from paceline.core import State, Tokens
from paceline.errors import MethodError

ROWS = ("keys", "counts", "written", "tokens", "probs")  # arrays with one entry a slot of a table

Ranges = Mapping[str, tuple[float, float]]


def checked(
    method: str, state: State, like: State, ranges: Ranges, rows: Collection[str] = ()
) -> State:
    """Return `state`, checked: the arrays of `like`, with possible values.

    Args:
        method: whose state it should be, as messages name it.
        state: named arrays, e.g. from a file.
        like: arrays with the expected names, dtypes and shapes.
        ranges: lowest and highest value of some arrays. Floats are always expected to be finite.
        rows: arrays whose first axis may have any length, the same for all of them.

    Raises:
        MethodError: says what was found and what was expected.
    """
    for name in sorted(state.keys() ^ like.keys()):
        verb = "lacks" if name in like else "has"
        raise MethodError(f"this state is not of {method}: it {verb} {name}; reset it")
    length = max((len(state[name]) for name in rows if state[name].ndim), default=0)
    for name, array in like.items():
        found = state[name]
        shape = (length, *array.shape[1:]) if name in rows else array.shape
        if found.dtype != array.dtype or found.shape != shape:
            raise MethodError(
                f"this state is of {method} with other settings or another vocabulary: {name} is "
                f"{found.dtype} {found.shape}, expected {array.dtype} {shape}; reset it"
            )
        low, high = ranges.get(name, (-np.inf, np.inf))
        possible = (found >= low) & (found <= high) & np.isfinite(found)
        if not possible.all():
            limits = f"{low} to {high}" if name in ranges else "finite numbers"
            raise MethodError(
                f"this state of {method} holds impossible {name}, expected {limits}; reset it"
            )
    return state


def check_successors(method: str, tokens: Tokens) -> None:
    """Refuse rows of successors [n, K] that name a token twice; -1 stands for none.

    Raises:
        MethodError: a row does.
    """
    ordered = np.sort(tokens, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise MethodError(f"this state of {method} holds impossible successors, twice; reset it")


def table_state(arrays: State, clock: int) -> State:
    """Return the state of a native table: its slots in use, and its other arrays whole."""
    used = np.flatnonzero(arrays["keys"])
    state = {name: array[used] if name in ROWS else array.copy() for name, array in arrays.items()}
    return state | {"rows": used, "clock": np.array([clock], np.uint32)}


def load_table(
    method: str,
    state: State,
    arrays: State,
    vocab_size: int,
    reset: Callable[[], None],
    ranges: Ranges | None = None,
) -> int:
    """Check what `table_state` returned and write it into a table.

    Args:
        method: as for `checked`.
        state: of a table with the same settings.
        arrays: views of the table's memory.
        vocab_size: every token is below it.
        reset: empties the table; called once the state has been checked.
        ranges: of arrays besides the tokens.

    Returns:
        the clock of the state.

    Raises:
        MethodError: the state is of another table, or holds impossible values.
    """
    rows = ("rows", *ROWS)
    like = arrays | {"rows": np.empty(0, np.int64), "clock": np.empty(1, np.uint32)}
    limits = {"tokens": (-1, vocab_size - 1), "rows": (0, len(arrays["keys"]) - 1)}
    checked(method, state, like, limits | dict(ranges or {}), rows)
    check_successors(method, state["tokens"])
    if (np.diff(state["rows"]) <= 0).any():
        raise MethodError(f"this state of {method} holds impossible rows, out of order; reset it")
    reset()
    for name, array in arrays.items():
        array[state["rows"] if name in ROWS else slice(None)] = state[name]
    return int(state["clock"][0])
