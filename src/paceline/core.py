"""The types that every other module speaks; read this file first.

Speculative decoding here is one loop. A drafter proposes a `TokenTree` of likely next tokens. The
engine runs the model over all its nodes in one forward pass. The walk starts at the root and draws
one token from the model's own distribution at each node it visits: if a child holds that token, it
steps into the child, otherwise it stops. The drawn tokens are committed, and the drafter is shown
the `Step`. The draw never depends on the drafter, so the output is that of plain decoding.

A `Request` says what to generate, a `Control` edits the distribution at a node, and the result is
an `Output`.

Axes of arrays, named here once: B batch, N tree nodes, S cached positions, H heads, D head size,
V vocabulary, K top tokens, A accepted nodes.
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
    from paceline.documents.assembly import Documents
    from paceline.kvcache.base import Policy

Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
State = dict[str, NDArray[Any]]  # what a drafter has learned, as arrays that safetensors can hold


class Parsed(NamedTuple):
    """An output's text, parsed.

    Attributes:
        value: the value or object that the request's schema describes; None if there is no schema,
            or if the text was cut short.
        tool_calls: the complete tool calls in the text, `control.structured.tools.ToolCall` each.
        content: the text without the tool calls; None: the whole text.
    """

    value: Any
    tool_calls: list[Any]
    content: str | None = None


@dataclass(frozen=True, slots=True)
class Parser:
    """Reads the value of a schema and tool calls out of an output's text.

    Attributes:
        parse: reads a finished text.
        scanner: returns a function for one text as it grows, which returns how many of its
            characters are content, whatever may follow; all of them by default.
    """

    parse: Callable[[str], Parsed]
    scanner: Callable[[], Callable[[str], int]] = lambda: len

    def __call__(self, text: str) -> Parsed:
        """Parse a finished text."""
        return self.parse(text)


class Exactness(Enum):
    """What a method guarantees about the output, compared with plain decoding at the same seed."""

    EXACT = "exact"  # the same tokens
    DISTRIBUTION = "distribution"  # other tokens, drawn from the same distribution
    LOSSY = "lossy"  # another distribution; the loss is measured


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """Drafted continuations. Node 0, the root, is the last committed token; children follow it.

    Attributes:
        tokens: int32 [N], token of each node.
        parents: int32 [N], `parents[0] == -1` and `0 <= parents[i] < i`.
        scores: float32 [N] in [0, 1], estimated probability that a node is accepted, given that its
            parent is.
        origin: int16 [N], index into the drafter's `origins` of what drafted the node; -1 for the
            root.

    Raises:
        ValueError: the arrays do not form such a tree, or two siblings hold the same token.
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
    def trusted(
        cls, tokens: Tokens, parents: Tokens, scores: Floats, origin: NDArray[np.int16]
    ) -> TokenTree:
        """Return the tree of arrays that are known to form one: nothing is checked."""
        tree = object.__new__(cls)
        for name, array in zip(cls.__slots__, (tokens, parents, scores, origin), strict=True):
            object.__setattr__(tree, name, array)
        return tree

    @classmethod
    def root(cls, token: int) -> TokenTree:
        """Return the tree of one node, which is plain decoding."""
        return cls.trusted(np.array((token,), np.int32), *_ROOT)

    @classmethod
    def chain(cls, tokens: ArrayLike, score: float = 1.0, origin: int = 0) -> TokenTree:
        """Return a tree without branches; `tokens` [N] begins with the root."""
        n = len(ids := np.asarray(tokens, np.int32))
        scores, origins = np.full(n, score, np.float32), np.full(n, origin, np.int16)
        scores[:1], origins[:1] = 1.0, -1
        return cls(ids, np.arange(-1, n - 1, dtype=np.int32), scores, origins)

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, node: int, token: int) -> int | None:
        """Return the child of `node` that holds `token`, or None."""
        children = ((self.parents == node) & (self.tokens == token)).nonzero()[0]
        return int(children[0]) if len(children) else None

    def keep(self, kept: NDArray[np.bool_]) -> TokenTree:
        """Return the nodes in the mask `kept` [N]; with a node its parent must be kept."""
        if kept.all():
            return self
        parents = (kept.cumsum(dtype=np.int32) - 1)[self.parents[kept]]
        parents[:1] = -1
        return TokenTree(self.tokens[kept], parents, self.scores[kept], self.origin[kept])

    def cut(self, depth: int) -> TokenTree:
        """Return the tree without the nodes deeper than `depth`."""
        return self if depth >= len(self) - 1 else self.keep(self.depths() <= depth)

    def depths(self) -> Tokens:
        """Return the distance of every node from the root, int32 [N]."""
        depths = [0]
        for parent in self.parents[1:].tolist():
            depths.append(depths[parent] + 1)
        return np.array(depths, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass over a tree, and which of its nodes were accepted.

    Attributes:
        context: int32 [S], every committed token up to and including the root of `tree`.
        tree: what was drafted.
        top_tokens: int32 [N, K], most likely successors of every node, best first; rejected nodes
            have them, too.
        top_probs: float32 [N, K], their probabilities at temperature 1, before any control.
        path: int32 [A], the accepted nodes from the root down, `path[0] == 0`.
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


# Parents, scores and origins of all trees of one node, which share them.
_ROOT = np.array([-1], np.int32), np.array([1.0], np.float32), np.array([-1], np.int16)
for _array in _ROOT:
    _array.flags.writeable = False


class Control(Protocol):
    """Edits the distribution at a visited node. Optional abilities: `control/capabilities.py`."""

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Return the edited logits [V].

        A pure function of its arguments: it may be called several times for one position, and must
        not write to its inputs.

        Args:
            logits: float32 [V], from the model or the control before; `-inf` forbids a token. At
                least one token must stay allowed.
            history: the prompt and all tokens drawn so far.
        """


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: upper limit of the output, in tokens.
        temperature: divides the logits before a draw; 0 is greedy decoding.
        seed: keys the noise of every draw, together with the position.
        controls: edit the logits of each visited node, in this order.
        stop_tokens: end the output; they are part of `Output.tokens`, not of `Output.text`.
        stop_strings: end the output; neither they nor what follows is part of the text.
        stop_after: stop strings that are complete within so many new tokens end nothing.
        include_stop: the stop string that ends the output is part of its text.
        keep_special: special tokens are part of the output's text, except the one that ends it.
        prediction: token ids that the output is expected to resemble, for drafters that use them.
        walk: `gumbel`, or `rejection`: other tokens from the same distribution; see
            `decoding/rejection.py`.
        continues: whether the output continues the prompt's text; otherwise it begins a new text,
            as an answer does, and a leading space is dropped where the tokenizer adds one.
        parser: reads the value of a schema and tool calls out of the output's text.
        kv_policy: bounds the rows of the KV cache; lossy. None keeps all rows.
        documents: parts of the prompt that are computed apart from the rest; lossy. None: none.
        noise: a watermark's replacement for the seed's noise, by position; see `noise.noise_of`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    controls: tuple[Control, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    stop_after: int = 0
    include_stop: bool = False
    keep_special: bool = False
    prediction: tuple[int, ...] = ()
    walk: str = "gumbel"
    continues: bool = False
    parser: Parser | None = None
    kv_policy: Policy | None = None
    documents: Documents | None = None
    noise: Callable[[int], int | None] | None = None

    @property
    def own_cache(self) -> bool:
        """Whether keys and values depend on more than the tokens, so that no other may use them."""
        return self.kv_policy is not None or self.documents is not None


@dataclass(slots=True)
class Seconds:
    """Wall time of one request, in seconds; `draft` and what follows are parts of `decode`."""

    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    draft: float = 0.0  # proposing trees, and learning from passes
    forward: float = 0.0
    walk: float = 0.0  # draws, and committing the accepted nodes
    guide: float = 0.0  # passes of guides; over the prompt they are part of `prefill`


@dataclass(slots=True, repr=False)
class Output:
    """The result of a request; `print(output)` prints its text.

    Attributes:
        tokens: the new token ids.
        text: the tokens as text, without stop tokens and stop strings.
        finish: why it ended: `stop`, `length` (`max_new_tokens`), `context` (the model's limit) or
            `interrupted`.
        stopped_by: the stop string that ended it; empty if none did.
        passes: forward passes after the prefill.
        nodes: tree nodes in those passes, roots included.
        accepted: number of accepted tokens by origin of the drafter.
        margins: distance of the two best perturbed logits at each token, where it was requested.
        seconds: where the time went.
        cached_tokens: tokens of the prompt that were read from the prefix cache on disk, or whose
            documents' chunks were stored.
        parser: the request's.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    stopped_by: str = ""
    passes: int = 0
    nodes: int = 0
    accepted: dict[str, int] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    cached_tokens: int = 0
    parser: Parser | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:60] + "..."
        return (
            f"{type(self).__name__}({text!r}, {len(self.tokens)} tokens, finish={self.finish!r}, "
            f"{self.tokens_per_pass:.2f} tokens/pass)"
        )

    @property
    def parsed(self) -> Any:
        """Value of the request's schema; None without a schema, or if the text was cut short."""
        return self.parser(self.text).value if self.parser else None

    @property
    def tool_calls(self) -> list[Any]:
        """Complete calls of the request's tools, each a `control.structured.tools.ToolCall`."""
        return self.parser(self.text).tool_calls if self.parser else []

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per forward pass after the prefill; 1 in plain decoding."""
        return len(self.tokens) / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, without prefill and load."""
        return len(self.tokens) / self.seconds.decode if self.seconds.decode else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """T(n): measured seconds of one forward pass over n nodes.

    Attributes:
        nodes: sizes that were measured, increasing.
        seconds: median time at each size.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.nodes, self.nodes[1:], strict=False))
        if not self.nodes or len(self.nodes) != len(self.seconds) or not rising:
            raise ValueError("a cost curve needs increasing sizes and one time for each")

    def at(self, n: int) -> float:
        """Return the seconds of a pass over `n` nodes, interpolated; constant outside the range."""
        return float(np.interp(n, self.nodes, self.seconds))
