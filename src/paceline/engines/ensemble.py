"""Several models as one: the weighted mean of their distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.core import Floats, TokenTree
from paceline.engines.base import Cached, Engine, Rows
from paceline.engines.view import View
from paceline.errors import MethodError, ModelError, RequestError
from paceline.method_spec import MethodSpec, parse_specs


@dataclass(eq=False)
class EnsembleSequence:
    """One sequence of each member, all of the same tokens."""

    parts: list[Cached]

    @property
    def length(self) -> int:
        """Positions that are committed."""
        return self.parts[0].length


class EnsembleEngine(Engine):
    """Runs every member; p is the weighted mean of their probabilities at temperature 1.

    Its logits are the logarithms of that mean. It is batch-invariant where all members are. The
    members may draft for it: see the drafter `ensemble`.

    Args:
        members: engines of models with the same tokens.
        weights: one for each, above 0; their sum does not matter.

    Raises:
        ModelError: the vocabularies are not of one size.
        MethodError: fewer than two members, or weights that are none.
    """

    name = "ensemble"

    def __init__(self, members: Sequence[Engine], weights: Sequence[float]) -> None:
        sizes = [member.config.vocab_size for member in members]
        if len(members) < 2 or len(weights) != len(members):
            raise MethodError("an ensemble needs two models or more, and a weight for each")
        if len(set(sizes)) > 1:
            raise ModelError(
                f"the models of an ensemble need the same tokens; found {sizes} tokens"
            )
        if not all(0 < weight < np.inf for weight in weights):
            raise MethodError(f"the weights of an ensemble are {list(weights)}, expected above 0")
        self.members = tuple(members)
        context = min(member.config.context for member in members)
        self.config = replace(members[0].config, context=context)
        self.format = "+".join(member.format for member in members)
        self.kv_format = "+".join(member.kv_format for member in members)
        self.invariant = all(member.invariant for member in members)
        self.tolerance = max(member.tolerance for member in members)
        self._shares = np.log(np.array(weights, np.float64) / sum(weights))

    @property
    def threads(self) -> int | None:  # type: ignore[override]  # an attribute there
        """Number of threads that share a pass of the first member."""
        return self.members[0].threads

    def open(self) -> Cached:
        """Open an empty sequence in every member."""
        return EnsembleSequence([member.open() for member in self.members])

    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """Run every tree in every member; see `Engine.forward`. There are no views."""
        if view is not None:
            raise RequestError("an ensemble has no views; its members have")
        for sequence, tree in batch:
            self.check(sequence, tree)
        found = []
        for index, member in enumerate(self.members):
            entries = [(_own(sequence).parts[index], tree) for sequence, tree in batch]
            found.append(member.forward(entries, rows).astype(np.float64))
        # Row by row: the same bits however many rows there are.
        mixed = [self._mixed([logits[row] for logits in found]) for row in range(len(found[0]))]
        return np.stack(mixed) if mixed else np.empty((0, self.config.vocab_size), np.float32)

    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of `path` in every member."""
        for member, part in zip(self.members, _own(sequence).parts, strict=True):
            member.commit(part, path)

    def truncate(self, sequence: Cached, length: int) -> None:
        """Forget all positions from `length` on."""
        for member, part in zip(self.members, _own(sequence).parts, strict=True):
            member.truncate(part, length)

    def cut_point(self, sequence: Cached, length: int) -> int:
        """Return a length that every member can cut to; see `Engine.cut_point`."""
        parts = _own(sequence).parts
        while True:  # ends at 0, if not before
            points = [
                m.cut_point(part, length) for m, part in zip(self.members, parts, strict=True)
            ]
            if min(points) == length:
                return length
            length = min(points)

    def set_prompt(self, sequence: Cached, length: int) -> None:
        """Say what is a prompt; see `Engine.set_prompt`."""
        for member, part in zip(self.members, _own(sequence).parts, strict=True):
            member.set_prompt(part, length)

    def prompt_positions(self, sequence: Cached) -> int:
        """Return how much a prompt would have given alike; see `Engine.prompt_positions`."""
        parts = zip(self.members, _own(sequence).parts, strict=True)
        return min(member.prompt_positions(part) for member, part in parts)

    def prompt_chunk(self, sequence: Cached, size: int) -> int:
        """Return how many tokens a pass takes; members have one pattern, or none."""
        return self.members[0].prompt_chunk(_own(sequence).parts[0], size)

    def fork(self, sequence: Cached) -> Cached:
        """Return an independent copy of the committed positions."""
        parts = zip(self.members, _own(sequence).parts, strict=True)
        return EnsembleSequence([member.fork(part) for member, part in parts])

    def release(self, sequence: Cached) -> None:
        """Give the memory of every member back."""
        for member, part in zip(self.members, _own(sequence).parts, strict=True):
            member.release(part)

    def _mixed(self, rows: list[NDArray[np.float64]]) -> Floats:
        """Return the logarithm of the weighted mean of the softmaxes of logits [V]."""
        logs = [
            share + row - row.max() - np.log(np.exp(row - row.max()).sum())
            for share, row in zip(self._shares, rows, strict=True)
        ]
        mixed: NDArray[np.float64] = np.logaddexp.reduce(np.stack(logs))
        return mixed.astype(np.float32)


def _own(sequence: Cached) -> EnsembleSequence:
    if not isinstance(sequence, EnsembleSequence):
        raise RequestError("this sequence belongs to another engine")
    return sequence


def parse_ensemble(text: str) -> list[tuple[str, float]]:
    """Parse models and weights, `A:weight=0.7+B:weight=0.3`; a model without a weight has 1.

    `A@0.7|B@0.3` and `A|B` are the earlier spelling. A path with a `+` stands in JSON quotes.

    Raises:
        ModelError: a model is missing.
        MethodError: a weight is no number.
    """
    if ":weight=" in text:
        return [_weighted(spec, text) for spec in parse_specs(text)]
    if "|" not in text:
        return [(text, 1.0)]
    pairs = []
    for item in text.split("|"):
        source, _, weight = item.rpartition("@") if "@" in item else (item, "", "1")
        pairs.append(_weighted(MethodSpec(source, {"weight": weight}), text))
    return pairs


def _weighted(spec: MethodSpec, text: str) -> tuple[str, float]:
    if not spec.name:
        raise ModelError(f"the ensemble {text!r} lacks a model; write A:weight=0.7+B:weight=0.3")
    other = [key for key in spec.settings if key != "weight"]
    if other:
        raise MethodError(f"{other[0]!r} in {text!r} is no setting of a model, expected weight")
    weight = spec.settings.get("weight", "1")
    try:
        return spec.name, float(weight)
    except ValueError:
        raise MethodError(f"{weight!r} in {text!r} is no weight, expected a number") from None
