"""The vocabulary of Paceline: whoever has read this file can read any other.

Axes, named once: B batch, N tree nodes, S cached positions, H heads, D head size, V vocabulary,
K top tokens, A accepted nodes.

All speculation is one walk. A drafter guesses a `TokenTree`, the engine runs the model once over
it, and the walk draws one token at each node it visits. What happened is a `Step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from operator import ge
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from paceline.kvcache.base import Policy

Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
State = dict[str, NDArray[Any]]  # what a drafter learnt, as named arrays; safetensors can hold it


class Parsed(NamedTuple):
    """What a text says beyond its characters.

    Attributes:
        value: the value or object of the request's schema; None where the text is cut short.
        tool_calls: the whole calls in the text, each a `control.structured.tools.ToolCall`.
    """

    value: Any
    tool_calls: list[Any]


Parser = Callable[[str], Parsed]


class Exactness(Enum):
    """What a method promises about the output, compared with plain decoding and the same seed."""

    EXACT = "exact"  # the same tokens
    DISTRIBUTION = "distribution"  # the same law, other tokens
    LOSSY = "lossy"  # another output, with a measured loss


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """Guesses for the next tokens. Node 0 is the last committed token; a child follows its parent.

    Attributes:
        tokens: int32 [N], token of each node.
        parents: int32 [N], `parents[0] == -1` and `0 <= parents[i] < i`.
        scores: float32 [N] in [0, 1], estimated chance that a node is accepted given its parent is.
        origin: int16 [N], which of the drafter's `origins` guessed the node; -1 for the root.

    Raises:
        ValueError: an invariant is broken, or two siblings hold the same token.
    """

    tokens: Tokens
    parents: Tokens
    scores: Floats
    origin: NDArray[np.int16]

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not n or not (len(self.parents) == len(self.scores) == len(self.origin) == n):
            raise ValueError("a tree needs a root, and tokens, parents, scores, origin of one size")
        if self.parents[0] != -1:
            raise ValueError(f"parents[0] is {self.parents[0]}, expected -1 (the root)")
        if n == 1:
            return
        above, below = self.parents[1:].tolist(), self.tokens[1:].tolist()
        if min(above) < 0 or any(map(ge, above, range(1, n))):
            raise ValueError("every node but the root needs a parent before it")
        if len(set(zip(above, below, strict=True))) < n - 1:
            raise ValueError("two siblings hold the same token")

    @classmethod
    def root(cls, token: int) -> TokenTree:
        """The tree of one node: plain decoding."""
        return cls.chain([token])

    @classmethod
    def chain(cls, tokens: ArrayLike, score: float = 1.0, origin: int = 0) -> TokenTree:
        """A tree without branches over `tokens` [N]."""
        n = len(ids := np.asarray(tokens, np.int32))
        scores, origins = np.full(n, score, np.float32), np.full(n, origin, np.int16)
        scores[:1], origins[:1] = 1.0, -1
        return cls(ids, np.arange(-1, n - 1, dtype=np.int32), scores, origins)

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that holds `token`, or None."""
        found = ((self.parents == node) & (self.tokens == token)).nonzero()[0]
        return int(found[0]) if len(found) else None

    def keep(self, kept: NDArray[np.bool_]) -> TokenTree:
        """The nodes of the mask `kept` [N]; with every node its parent must be kept."""
        if kept.all():
            return self
        parents = (kept.cumsum(dtype=np.int32) - 1)[self.parents[kept]]
        parents[:1] = -1
        return TokenTree(self.tokens[kept], parents, self.scores[kept], self.origin[kept])

    def cut(self, depth: int) -> TokenTree:
        """The tree without the nodes deeper than `depth`."""
        return self if depth >= len(self) - 1 else self.keep(self.depths() <= depth)

    def depths(self) -> Tokens:
        """Distance of every node from the root, int32 [N]."""
        depths = [0]
        for parent in self.parents[1:].tolist():
            depths.append(depths[parent] + 1)
        return np.array(depths, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass and what was made of it.

    Attributes:
        context: int32 [S], every committed token up to and including the root of `tree`.
        tree: what was guessed.
        top_tokens: int32 [N, K], likeliest successors of every node, rejected ones too, best first.
        top_probs: float32 [N, K], their probabilities at temperature 1, before any control.
        path: int32 [A], the accepted nodes from the root on, `path[0] == 0`.
        drawn: int32 [A], the token drawn at each node of `path`: `drawn[:-1]` are the tokens of
            `path[1:]`, `drawn[-1]` is the next root.
        hidden: float32 [N, D], the hidden states that the output head was given, for drafters with
            `needs_hidden`; None for others, and during the prompt.
    """

    context: Tokens
    tree: TokenTree
    top_tokens: Tokens
    top_probs: Floats
    path: Tokens
    drawn: Tokens
    hidden: Floats | None = None

    def __post_init__(self) -> None:
        if self.top_tokens.shape != self.top_probs.shape or len(self.top_tokens) != len(self.tree):
            raise ValueError("top_tokens and top_probs need one row for each of the tree's nodes")
        if not len(self.path) or self.path[0] != 0 or len(self.path) != len(self.drawn):
            raise ValueError("a path starts at the root and has one drawn token for each node")


class Control(Protocol):
    """Edits the distribution at a visited node; pure. May also be a `control.base.Filtering`."""

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Return the edited logits [V]; `history` is the prompt and all tokens drawn so far.

        The input must not be written to. `-inf` forbids a token; one must stay allowed.
        """


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for.

    Attributes:
        prompt: token ids, at least one.
        continues: the output's text goes on where the prompt's ends; otherwise it begins anew.
        max_new_tokens: upper limit of the output, in tokens.
        temperature: 0 is greedy.
        seed: keys the noise of every draw, with the position.
        controls: applied in order to the logits of each visited node.
        stop_tokens: end the output and are part of `Output.tokens`, not of `Output.text`.
        stop_strings: end the output; neither they nor what follows is part of the text.
        prediction: what the output is expected to be, for drafters that follow it.
        walk: `gumbel`, or `rejection`: the same law, other tokens; see `decoding/rejection.py`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    controls: tuple[Control, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    prediction: tuple[int, ...] = ()
    walk: str = "gumbel"
    continues: bool = False
    parser: Parser | None = None  # of the output, for schemas and tools
    kv_policy: Policy | None = None  # bounds the rows of the cache; lossy
    noise: Callable[[int], int | None] | None = None  # a watermark's; see `noise.noise_of`


@dataclass(slots=True)
class Seconds:
    """Where the wall time of one request went, in seconds; from `draft` on, parts of `decode`."""

    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    draft: float = 0.0  # proposing, and learning from passes
    forward: float = 0.0
    walk: float = 0.0  # draws, and keeping the rows of the accepted nodes
    guide: float = 0.0  # passes of guides; those over the prompt are part of `prefill`


@dataclass(slots=True)
class Output:
    """What a request gave.

    Attributes:
        tokens: the new tokens.
        text: the tokens as text, without stop tokens and stop strings.
        finish: `stop`, `length` (max_new_tokens), `context` (model's limit) or `interrupted`.
        passes: forward passes after the prefill.
        nodes: tree nodes in those passes, roots included.
        accepted: tokens accepted from each origin of the drafter.
        margins: distance between the two best perturbed logits at each token, when asked for.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    passes: int = 0
    nodes: int = 0
    accepted: dict[str, int] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    parser: Parser | None = None

    @property
    def parsed(self) -> Any:
        """The value or object of the request's schema; None without one, or where it is cut."""
        return self.parser(self.text).value if self.parser else None

    @property
    def tool_calls(self) -> list[Any]:
        """Calls of the request's tools, each a `control.tools.ToolCall`; whole ones only."""
        return self.parser(self.text).tool_calls if self.parser else []

    @property
    def tokens_per_pass(self) -> float:
        """New tokens for each forward pass after the prefill; plain decoding has 1."""
        return len(self.tokens) / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens for each second of decoding; prefill and load apart."""
        return len(self.tokens) / self.seconds.decode if self.seconds.decode else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """T(n): measured seconds of one forward pass over n nodes."""

    nodes: tuple[int, ...]  # increasing sizes that were measured
    seconds: tuple[float, ...]  # median time at each size

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.nodes, self.nodes[1:], strict=False))
        if not self.nodes or len(self.nodes) != len(self.seconds) or not rising:
            raise ValueError("a cost curve needs increasing sizes and one time for each")

    def at(self, n: int) -> float:
        """Seconds of a pass over `n` nodes, interpolated; constant outside the measured range."""
        return float(np.interp(n, self.nodes, self.seconds))
