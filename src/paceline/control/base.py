"""What the files of this folder share: the contract of a control, and where it stands in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.core import Control, Floats, Request, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class ControlMethod(ABC):
    """Settings of a control: its fields. `bind` makes of them what edits logits.

    Attributes:
        order: controls are applied from the lowest up: biases 10, penalties 20, what is forbidden
            or forced 30, temperature 40, truncation 60.
        paths: its settings that name places on this machine: a server's clients may not set them.
        paper: where it is from.
        catalogue: its numbers in the catalogue of methods.
    """

    order: ClassVar[int]
    paths: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    catalogue: ClassVar[tuple[int, ...]] = ()

    @abstractmethod
    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """The control for one request.

        Raises:
            PacelineError: the request or the model lacks something, in one sentence.
        """


@dataclass(frozen=True)
class Stateless(ControlMethod):
    """A method that is its own control: it needs to know nothing of the request."""

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Itself."""
        return self

    @abstractmethod
    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Return edited logits [V]; see `core.Control`."""


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """The tokens from below the root of a tree to each node."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        found.append((*found[parent], token))
    return found


@runtime_checkable
class Forcing(Protocol):
    """A control that may leave no choice; the drafter `forced` asks it."""

    def forced(self, history: list[int]) -> list[int]:
        """The tokens that must come next after `history`; empty where there is a choice."""
        ...


@runtime_checkable
class Filtering(Protocol):
    """A control that knows which guesses are in vain; they are dropped before a pass."""

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """Which nodes of `tree` can be drawn, bool [N]; with a node its parent. Always the root.

        `history` ends with the root. Of a node that cannot be drawn nothing is said.
        """
        ...


@runtime_checkable
class Judging(Protocol):
    """A control that knows of texts that can never be part of an output."""

    name: str

    def writes(self, text: str) -> bool:
        """Whether `text` can stand behind a boundary of words in some output."""
        ...


@runtime_checkable
class Demanding(Protocol):
    """A control that wants texts in the output: it is told of those that may forbid them."""

    def meet(self, judges: Sequence[Judging]) -> None:
        """Look whether what is wanted can be had.

        Raises:
            RequestError: it cannot.
        """
        ...


@runtime_checkable
class Looking(Protocol):
    """A control that runs a model: once over each tree, not once at each node.

    `apply` then finds its row. Asked about a text that was not looked at, it runs it by itself: a
    caller who needs further rows of the last pass must have copied them, for guides may share the
    engine.
    """

    def begin(self, sequence: Cached) -> None:
        """A request starts. `sequence` follows the loop; it may be viewed in `look` only."""
        ...

    def behind(self, context: Tokens) -> int:
        """Tokens that a text of its own lacks; 0 where they can ride with the next tree."""
        ...

    def follow(self, context: Tokens, most: int | None = None) -> int:
        """Read `context` [S] but its last token, or up to `most` tokens more; how many were read.

        Whoever does not call it leaves that to `look`.
        """
        ...

    def holds(self, length: int) -> Sequence[tuple[Engine, int]]:
        """The positions of each text of its own, and in which engine, for `length` tokens."""
        ...

    def look(self, context: Tokens, tree: TokenTree) -> None:
        """`tree`, whose root is `context[-1]`, is about to be run; it may not be kept."""
        ...

    def release(self) -> None:
        """The request has ended, or was interrupted: give all sequences back."""
        ...


@runtime_checkable
class Branching(Looking, Control, Protocol):
    """A guide that can follow several texts, each by a fork of its own: searches need it.

    Attributes:
        grows: a text may only be asked about after all that it begins with, one token apart.
    """

    grows: bool

    def fork(self, context: Tokens, target: Cached | None) -> Self:
        """Another, to go its own way from what this one has read of `context` [S].

        `target` holds the context but its last token; where it is None, `begin` comes.
        """
        ...

    def law(self, logits: Floats, history: list[int]) -> Floats:
        """As `apply`; but where that depends on the temperature, as if it were 1.

        What searches compare are chances, not draws.
        """
        ...


@runtime_checkable
class Continuing(Filtering, Protocol):
    """A control that knows what must follow a guess; it is guessed, too."""

    def continued(
        self, history: list[int], tree: TokenTree
    ) -> tuple[NDArray[np.bool_], dict[int, list[int]]]:
        """As `allows`; and by node the tokens that must follow it, where `tree` has not the first.

        Never of the root: what must follow that is the drafter's to say.
        """
        ...


Mask = NDArray[np.uint32]  # a bit for each token [V / 32], lowest first; none beyond V


@runtime_checkable
class Masking(Protocol):
    """A control that says at once which tokens may come next; drafts grow by it."""

    def masks(self, history: list[int]) -> Callable[[Sequence[int]], Mask | None]:
        """Of tokens that come after `history`: the mask behind them; None where nothing is said.

        Nothing follows what cannot be drawn, nor a stop token. Ask before other questions.
        """
        ...

    def known(self, history: list[int], tree: TokenTree) -> dict[int, Mask]:
        """By node of `tree`, whose root `history` ends with, the masks that were asked for."""
        ...


@runtime_checkable
class Following(Protocol):
    """A control that follows one growing text: asked about another in between it would err."""

    follows: bool


@runtime_checkable
class Settling(Protocol):
    """A control that leaves the seed little to say: samples of one prompt are hardly different."""

    settles: bool


M = TypeVar("M", bound=ControlMethod)


def chain(methods: Iterable[M]) -> tuple[M, ...]:
    """The methods in the order in which they are applied.

    Raises:
        MethodError: one is there twice.
    """
    found = tuple(sorted(methods, key=lambda method: method.order))
    kinds = [type(method) for method in found]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise MethodError(f"{getattr(kind, 'name', kind.__name__)} is given twice; give one")
    return found


def bind(methods: Iterable[ControlMethod], request: Request, vocabulary: Vocabulary) -> Request:
    """`request` with the controls of `methods`, in their order.

    Raises:
        PacelineError: one cannot be had.
    """
    controls = tuple(method.bind(request, vocabulary) for method in chain(methods))
    judges = [control for control in controls if isinstance(control, Judging)]
    for control in controls:
        if isinstance(control, Demanding):
            control.meet(judges)
    return replace(request, controls=controls)


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Probabilities of `logits` [V]; a forbidden token has 0."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def surprise(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log of `probabilities` [V], in nats; infinite where they are 0."""
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = -np.log(probabilities)
    return found


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Shannon entropy of `probabilities` [V], in nats."""
    some = probabilities[probabilities > 0]
    return float(-(some * np.log(some)).sum())


def forbid(logits: Floats, tokens: ArrayLike) -> Floats:
    """`logits` [V] without the tokens of an index array or mask."""
    edited = logits.copy()
    edited[np.asarray(tokens)] = -np.inf
    return edited


def keep_only(logits: Floats, kept: np.ndarray) -> Floats:
    """`logits` [V] with every token forbidden but those in the mask or index array `kept`."""
    edited = np.full_like(logits, -np.inf)
    edited[kept] = logits[kept]
    return edited


def shared(a: list[int], b: list[int]) -> int:
    """How many first items are the same."""
    if b[: len(a)] == a:
        return len(a)
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def require(condition: bool, name: str, found: float, expected: str) -> None:
    """Refuse a setting in one sentence.

    Raises:
        RequestError: unless `condition`; a NaN never meets one.
    """
    if not condition:
        raise RequestError(f"{name} is {found}, expected {expected}")
