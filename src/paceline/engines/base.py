"""The engine contract: run a model over token trees, and cache the rows of the accepted nodes.

An engine never sees a drafter; a drafter reaches an engine only through `drafters.base.Target`.
Only `decoding/` and `serving/` commit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.abilities import Ability
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.collaborators import AttentionPattern, LayerExits, PageLender
from paceline.engines.pages import PAGE, Memory
from paceline.engines.part import Part
from paceline.engines.screened import Logits
from paceline.engines.view import View
from paceline.errors import MethodError, RequestError
from paceline.models.config import ModelConfig

# What an engine cannot do where an attention pattern reads some positions only.
WITHOUT_PATTERNS = frozenset(
    {Ability.EVICT, Ability.ATTENTION_MASS, Ability.STORED_PAGES, Ability.APPEND_ROWS}
)

# Whose logits a pass returns: of every tree, of none, or of those marked in a list.
Rows = Literal["all", "none"] | Sequence[bool]


def wanted(rows: Rows, batch: Sized) -> list[bool]:
    """Return for each tree of a batch whether its logits are wanted.

    Raises:
        RequestError: `rows` is of another length.
    """
    if isinstance(rows, str):
        return [rows == "all"] * len(batch)
    if len(rows) != len(batch):
        raise RequestError(f"rows says what is wanted of {len(rows)} trees, not {len(batch)}")
    return list(rows)


class Cached(Protocol):
    """One sequence's keys and values inside an engine. Opaque but for its length.

    A row is the key and value of one position in one head. Until `Engine.evict` drops some, every
    committed position has a row in every head.
    """

    @property
    def length(self) -> int:
        """Number of positions committed so far, evicted ones too: the next position."""
        ...


class Engine(ABC):
    """Runs one model.

    Attributes:
        name: `native` or `reference`.
        config: the model's shape.
        format: how the weights are stored, e.g. `fp32`.
        kv_format: how keys and values are cached.
        invariant: every logit is bit-identical for any tree, batch, chunk and number of threads.
            Otherwise outputs may differ where two logits are equal within `tolerance`.
        tolerance: largest change of the difference of two logits that rounding may cause.
        abilities: what the engine can do besides plain passes: the parts of a `View` that
            `forward` supports, `MIXTURES` for `forward_mixed`, `HIDDEN` for `hidden`, `EVICT` and
            `ATTENTION_MASS` for the operations of those names, `STORED_PAGES` for `read_page` and
            `append_page`, `APPEND_ROWS` for `append_rows`.
        part: layers that `forward_part` runs; None: the whole model.
        remote_layers: number of layers that other processes run, for whose answers a pass waits.
        passes_in_flight: how many passes `begin` may have under way at once; 1: it is not offered.
        pattern: which cached positions are read; None: all that the model's own windows show.
        exits: which layers each token runs; None: all.
        shared: lends `kv_limit` where several engines share one; None: it is this engine's own.
        threads: how many threads share a pass; None: the engine does not count them.
        device: torch device, e.g. `cuda:0`; None: the engine has no choice of one.
        weight_bytes: size of the matrices, which every pass reads; None: the engine does not know.
        shared_bytes: those of them that are another layer's, and are in memory once.
        streamed_bytes: size of the weights that each pass reads from a file; 0: all are in memory.
        weights_memory: most bytes of weights in memory where some stream; None: all are there.
        open_pages: upper limit of the pages that a sequence takes besides those of its positions.
        screens_drafts: `forward_screened` is for passes with drafts, too; otherwise only for plain
            decoding, as a draw for each visited node costs more than the smaller reading saves.
        head_share: bytes that recent passes read for the head, over its size; see
            `forward_screened`.
    """

    name: str
    config: ModelConfig
    format: str
    kv_format: str
    invariant: bool
    tolerance: float
    abilities: frozenset[Ability] = frozenset()
    part: Part | None = None
    remote_layers: int = 0
    passes_in_flight: int = 1
    pattern: AttentionPattern | None = None
    exits: LayerExits | None = None
    shared: PageLender | None = None
    threads: int | None = None
    device: str | None = None
    weight_bytes: int | None = None
    shared_bytes: int = 0
    streamed_bytes: int = 0
    weights_memory: int | None = None
    open_pages: int = 0
    screens_drafts: bool = False
    head_share: float = 1.0

    @property
    def memory(self) -> Memory:
        """Counts of the pages of keys and values.

        Raises:
            MethodError: this engine does not count them.
        """
        raise MethodError(f"the {self.name} engine does not count its memory")

    @property
    def kv_limit(self) -> int | None:
        """Upper limit in bytes of the pages of all sequences; None: no limit. Can be set.

        Passes and forks that would need more raise `MemoryFullError`.

        Raises:
            MethodError: the engine knows no limit, the limit is below a page, or there are more.
        """
        memory = self.memory
        return None if memory.limit is None else memory.limit * memory.page_bytes

    @kv_limit.setter
    def kv_limit(self, limit: int | None) -> None:
        size = self.memory.page_bytes
        if limit is not None and limit < size:
            raise MethodError(
                f"a limit of {limit} bytes holds no page of keys and values; expected {size} bytes "
                f"({PAGE} positions) at least"
            )
        self._limit_pages(None if limit is None else limit // size)

    def _lent(self, pages: int) -> bool:
        """Whether the limit was raised for a pass that lacks so many pages; it may lack more."""
        return self.shared is not None and self.shared.lend(self, pages)

    def _limit_pages(self, pages: int | None) -> None:
        raise MethodError(f"the {self.name} engine has no limit of memory")

    def pages(self, sequence: Cached) -> Sequence[int]:
        """Return an identifier of each page of a sequence, in order of position.

        Two sequences that share a page give the same identifier; no other page has it.
        """
        raise MethodError(f"the {self.name} engine does not count its memory")

    @abstractmethod
    def open(self) -> Cached:
        """Open a new, empty sequence."""

    @abstractmethod
    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """Run the model once over every node of every tree.

        Node i of a tree sits at position `sequence.length + depth(i)` and sees the committed
        positions and its own ancestors. A sequence may appear once in a batch. Nothing is
        committed: a second `forward` on a sequence forgets the first.

        With a `view` the pass uses that part of the model, the same for every tree of the batch.
        Such a pass is for drafting: it leaves no trace in later ones and, unless the view is of
        tokens alone, cannot be committed.

        Returns:
            logits, float32 [sum of N, V] of the trees that `rows` wants, in the order of the batch.
            With a view of tokens they are the columns, and V is their number. Valid until the next
            `forward`.

        Raises:
            RequestError: a token is outside the vocabulary, the context is full, or the view does
                not fit the model or the sequence.
            MemoryFullError: more pages are needed than `kv_limit` leaves. Nothing was changed:
                other sequences can be released, and the same pass run again.
        """

    def begin(self, batch: Sequence[tuple[Cached, TokenTree]], rows: Rows = "all") -> object:
        """Begin a pass as `forward` runs it, and return at once.

        Until `finish`, its sequences may only be forked and released. Others may be used, and be in
        further passes, at most `passes_in_flight` in all.

        Returns:
            what `finish` takes.

        Raises:
            RequestError: as `forward`; a sequence is in a pass under way; or see
                `passes_in_flight`.
        """
        raise RequestError(f"the engine {self.name} runs one pass at a time; use `forward`")

    def finish(self, started: object, kept: Sequence[bool] | None = None) -> Floats:
        """Wait for a pass, and return its logits as `forward` does. It is over then, or has failed.

        Args:
            started: what `begin` returned, once.
            kept: for each tree of the batch, whether it is still of use; released sequences are
                not. None: all that are not released. Logits of others are left out.

        Raises:
            RequestError, MemoryFullError: as `forward`; none of the pass can be committed then.
        """
        raise RequestError(f"the engine {self.name} runs one pass at a time; use `forward`")

    def abandon(self, started: object) -> None:
        """Give up a pass that `begin` returned, without waiting; its sequences are free again."""

    def forward_screened(
        self, batch: Sequence[tuple[Cached, TokenTree]], rows: Rows = "all"
    ) -> Logits:
        """Run a pass as `forward` does, of whose logits only those of likely tokens are needed.

        Returns:
            the logits, or screened ones where the engine can read its head in part and that pays.
        """
        return self.forward(batch, rows)

    def rows(self, sequence: Cached, layer: int) -> Tokens:
        """Return the positions of the rows that a layer holds.

        Returns:
            int32 [H_kv, R], increasing in every head, R being the rows of the head that holds
            most. Heads that hold fewer begin with -1: whatever is given by row has padding there.
        """
        heads = self.config.layers[layer].kv_heads
        return np.tile(np.arange(sequence.length, dtype=np.int32), (heads, 1))

    def row_count(self, sequence: Cached) -> int:
        """Return how many rows the head with most holds: what the sequence's memory depends on."""
        return sequence.length

    def set_prompt(self, sequence: Cached, length: int) -> None:
        """Say that the positions below `length` are those of a prompt.

        They read all that came before, whatever the attention pattern is, if it is one that reads
        few positions to decode; under one with a `sparse_prefill` they alone choose what they read.
        Call it before they are run. Forks go on with it.
        """

    def prompt_chunk(self, sequence: Cached, size: int) -> int:
        """Return how many of the next tokens a pass takes where about `size` are asked for.

        That is `size`, unless the attention pattern chooses what whole blocks of a prompt read:
        then a pass ends where a block does, and takes one at least.
        """
        return size

    def prompt_positions(self, sequence: Cached) -> int:
        """Return how many positions, from the first on, a prompt would have given alike."""
        return sequence.length

    def track_attention(self, sequence: Cached) -> None:
        """Sum the attention that each row of a sequence receives, from now on.

        It costs the scores of every committed position once more. Forks go on with the sums.

        Raises:
            RequestError: the sequence holds positions already, or the engine lacks the ability.
        """
        raise RequestError(f"the engine {self.name} does not sum attention")

    def attention_mass(self, sequence: Cached, layer: int) -> NDArray[np.float64]:
        """Return the attention that each row of a layer received from all committed positions.

        A position's weights over its columns, its own included, sum to 1 in every query head; a
        row's mass is the sum over positions and over the query heads of its group. It is summed
        in the order of positions, and as invariant as logits are.

        Returns:
            float64 [H_kv, R], as `rows`.

        Raises:
            RequestError: the sequence does not track attention.
        """
        raise RequestError(f"the engine {self.name} does not sum attention")

    def keys_values(self, sequence: Cached, layer: int) -> tuple[Floats, Floats]:
        """Return the keys, rotated, and the values of a layer's rows, as the cache rounds them.

        Returns:
            two arrays float32 [H_kv, R, D], in the order of `rows`.

        Raises:
            RequestError: the engine lacks the ability `KEYS`.
        """
        raise RequestError(f"the engine {self.name} does not return cached keys and values")

    def track_queries(self, sequence: Cached, window: int) -> None:
        """Keep the queries of a sequence's last `window` committed positions, from now on.

        Forks go on with them. They take `query_pages` of the engine's memory.

        Raises:
            RequestError: the sequence holds positions already, the window is not between 1 and the
                model's context, or the engine lacks the ability `QUERIES`.
        """
        raise RequestError(f"the engine {self.name} does not keep queries")

    def recent_queries(self, sequence: Cached, layer: int) -> Floats:
        """Return the queries of the last positions, rotated and times the scale of attention.

        Products with keys are the scores of attention, before a soft cap. They are as invariant as
        logits are.

        Returns:
            float32 [H, W, D] for W positions, the tracked window or all that are committed.

        Raises:
            RequestError: the sequence does not track queries.
        """
        raise RequestError(f"the engine {self.name} does not keep queries")

    def query_pages(self, positions: int) -> int:
        """Return how many pages the tracked queries of so many positions take."""
        return 0

    def prompt_pages(self, positions: int) -> int:
        """Return how many pages a prompt of so many positions takes besides those of its rows.

        They are taken in the first pass over a token behind it, by attention patterns that cluster
        its keys.
        """
        return 0

    def track_surprisal(self, sequence: Cached) -> None:
        """Keep the surprisal of every token that is committed to a sequence, from now on.

        Every pass then computes logits, those of prompts too. Forks go on with them.

        Raises:
            RequestError: the sequence holds positions already, or the engine lacks the ability
                `SURPRISAL`.
        """
        raise RequestError(f"the engine {self.name} does not keep the surprisal of tokens")

    def surprisal(self, sequence: Cached) -> NDArray[np.float64]:
        """Return the negative log-probability of each committed token, in nats.

        It is that of the model itself, without temperature or controls, given the tokens before
        and the rows that the cache held then. It is as invariant as logits are.

        Returns:
            float64 [S] of all positions, evicted ones too; 0 of the first.

        Raises:
            RequestError: the sequence does not track surprisal.
        """
        raise RequestError(f"the engine {self.name} does not keep the surprisal of tokens")

    def evict(self, sequence: Cached, kept: Sequence[ArrayLike]) -> None:
        """Drop all rows but `kept`, for good, and give the memory of the pages that empty back.

        What is run later attends to the rows that are held, in order of position. Positions stay
        what they are: `length` does not change, and the next token is rotated by it. Other
        sequences that share pages do not change. A pass that was not committed is forgotten. From
        then on `truncate` refuses to cut positions that were committed before the last eviction,
        except for all of them, and a view cannot name positions.

        Args:
            sequence: its committed rows are dropped.
            kept: for each layer the indices of rows to keep, as `rows` counts them, increasing,
                [H_kv, K], or [K] for all heads alike. Layers may keep different numbers, and so
                may heads: -1 before the others stands for no row. A page holds rows of all
                layers, so that memory depends on the head that keeps most.

        Raises:
            RequestError: the indices do not fit, or the engine lacks the ability.
            MemoryFullError: pages that are shared must be copied, and there is no room. Nothing
                was changed.
        """
        raise RequestError(f"the engine {self.name} cannot evict rows of its cache")

    def read_page(self, sequence: Cached, page: int) -> NDArray[np.uint8]:
        """Return a copy of the keys and values of a full page of a sequence.

        Args:
            sequence: no rows of it were evicted.
            page: index; all its `PAGE` positions are committed.

        Returns:
            uint8 [`Memory.page_bytes`], in a form that this engine alone understands.

        Raises:
            RequestError: there is no such page, or the engine lacks the ability `STORED_PAGES`.
        """
        raise RequestError(f"the engine {self.name} does not hand out cached keys and values")

    def append_page(self, sequence: Cached, page: NDArray[np.uint8]) -> None:
        """Commit `PAGE` positions by what `read_page` gave for the same text.

        Args:
            sequence: its length is a multiple of `PAGE`.
            page: uint8 [`Memory.page_bytes`]. What it holds is not checked: anything else than
                what `read_page` gave for these positions gives wrong logits.

        Raises:
            RequestError: the page does not fit, or the engine lacks the ability `STORED_PAGES`.
            MemoryFullError: there is no room. Nothing was changed but a pass that was not
                committed, which is forgotten.
        """
        raise RequestError(f"the engine {self.name} does not take cached keys and values")

    def append_rows(self, sequence: Cached, rows: Sequence[tuple[Floats, Floats]]) -> None:
        """Commit N positions by their keys and values instead of their tokens.

        Args:
            sequence: no rows of it were evicted, and it tracks neither attention nor queries.
            rows: keys, rotated for the positions from `length` on, and values of each layer, two
                arrays float32 [H_kv, N, D]; the cache rounds them to its format. What they hold
                is not checked.

        Raises:
            RequestError: the rows do not fit, the context is full, or the engine lacks the ability
                `APPEND_ROWS`.
            MemoryFullError: there is no room. Nothing was changed but a pass that was not
                committed, which is forgotten.
        """
        raise RequestError(f"the engine {self.name} does not take keys and values")

    def hidden(self) -> Floats:
        """Return the hidden states after the last norm of the last `forward`.

        float32 [sum of N, hidden size], one row for each row of logits. As invariant as they are.

        Raises:
            RequestError: the last forward had no rows, or the engine lacks the ability.
        """
        raise RequestError(f"the engine {self.name} gives no hidden states")

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Run a chain of nodes, each the weighted sum of the embeddings of several tokens.

        Otherwise as `forward`: the chain is a tree that can be committed. A node of one token with
        weight 1, others having weight 0, is to the bit a plain node.

        Args:
            sequence: holds what comes before.
            tokens: int32 [N, K].
            weights: float32 [N, K]; those of a node usually sum to 1.

        Returns:
            logits, float32 [N, V], valid until the next pass.

        Raises:
            RequestError: as `forward`, or the engine has not the ability `mixtures`.
        """
        raise RequestError(f"the engine {self.name} cannot mix tokens; use native or reference")

    def forward_part(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        states: Floats | None,
        rows: Rows = "all",
    ) -> Floats:
        """Run the layers of `part` over every node of every tree; otherwise as `forward`.

        Args:
            batch: sequences of this part, and whole trees.
            states: float32 [sum of N, hidden], what the part before returned for the same batch;
                None for the first part.
            rows: whose logits the last part returns.

        Returns:
            the last part's logits [sum of N, V] as `forward`; any other part's hidden states
            float32 [sum of N, hidden] of all trees. Valid until the next pass.

        Raises:
            RequestError, MemoryFullError: as `forward`; the engine runs whole models only, or
                `states` are missing or of another shape.
        """
        raise RequestError(f"this {self.name} engine runs a whole model, not a part of its layers")

    def check_whole(self) -> None:
        """Refuse an engine that holds a part of a model.

        Raises:
            RequestError: as said.
        """
        if self.part is not None:
            raise RequestError(f"this engine holds {self.part} only, which `forward_part` runs")

    @abstractmethod
    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of `path`, node indices [A] of the last `forward`, root first.

        Each is the parent of the next. The sequence grows by A. Once for each `forward`, which
        must have had no view, or one of tokens alone.
        """

    @abstractmethod
    def truncate(self, sequence: Cached, length: int) -> None:
        """Forget all positions from `length` on.

        Raises:
            RequestError: there are fewer; or `length` is no `cut_point`; or rows before it were
                evicted, or received attention from positions behind it that `attention_mass`
                counts, so that nothing but 0 would give back what was there.
        """

    def cut_point(self, sequence: Cached, length: int) -> int:
        """Return the largest length, at most `length`, that `truncate` can cut a sequence to.

        That is `length` itself unless the cache rounds positions in groups, as int4 and int3 do: a
        group that was rounded does not come back, so that cuts before its end are at multiples of
        32. Cuts of a prompt that was read under a `sparse_prefill` are at multiples of 64.
        """
        return length

    def rewind(self, sequence: Cached, tokens: Tokens) -> None:
        """Cut a sequence to `tokens` [S], which it begins with.

        Positions behind the nearest `cut_point` are computed again.

        Raises:
            RequestError, MemoryFullError: as `truncate` and `forward`.
        """
        kept = self.cut_point(sequence, len(tokens))
        self.truncate(sequence, kept)
        self.extend(sequence, tokens[kept:])

    @abstractmethod
    def fork(self, sequence: Cached) -> Cached:
        """Return a sequence with the same committed positions; afterwards the two are independent.

        Raises:
            MemoryFullError: the engine copies pages, and more are needed than `kv_limit` leaves.
        """

    @abstractmethod
    def release(self, sequence: Cached) -> None:
        """Give the memory back; the sequence must not be used again. Twice is harmless."""

    def start(
        self,
        tokens: Tokens,
        observe: Callable[[int, TokenTree, Floats], None] | None = None,
        chunk: int = 256,
        prompt: bool = False,
    ) -> Cached:
        """Open a sequence and commit `tokens` [S], run in chunks of `chunk` positions.

        Logits are computed only for `observe(offset, tree, logits)`, called once for each chunk.
        With `prompt` they are those of a prompt, see `set_prompt`.
        """
        sequence = self.open()
        try:
            if prompt:
                self.set_prompt(sequence, len(tokens))
            self.extend(sequence, tokens, observe, chunk)
        except BaseException:
            self.release(sequence)
            raise
        return sequence

    def extend(
        self,
        sequence: Cached,
        tokens: Tokens,
        observe: Callable[[int, TokenTree, Floats], None] | None = None,
        chunk: int = 256,
    ) -> None:
        """Commit `tokens` [S] to a sequence, as `start` does, in steps of `prompt_chunk`."""
        offset = 0
        while offset < len(tokens):
            size = self.prompt_chunk(sequence, chunk)
            tree = TokenTree.chain(tokens[offset : offset + size])
            logits = self.forward([(sequence, tree)], "all" if observe else "none")
            if observe:
                observe(offset, tree, logits)
            self.commit(sequence, np.arange(len(tree), dtype=np.int32))
            offset += len(tree)

    def check(self, sequence: Cached, tree: TokenTree, view: View | None = None) -> None:
        """Refuse tokens outside the vocabulary, and trees and views that do not fit.

        Raises:
            RequestError: as said.
        """
        if view:
            if view.positions is not None and self.row_count(sequence) < sequence.length:
                raise RequestError(
                    "rows of this sequence were evicted, so that a view cannot choose positions"
                )
            view.check(len(self.config.layers), sequence.length, self.config.vocab_size)
        low, high = int(tree.tokens.min()), int(tree.tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            found = low if low < 0 else high
            raise RequestError(
                f"token {found} is outside the vocabulary of {self.config.vocab_size}"
            )
        deepest = sequence.length + int(tree.depths().max()) + 1
        if deepest > self.config.context:
            raise RequestError(
                f"position {deepest} is beyond the model's context of {self.config.context} tokens"
            )

    def check_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> None:
        """Refuse mixtures of the wrong shape, tokens outside the vocabulary, and a full context.

        Raises:
            RequestError: as said.
        """
        right = tokens.dtype == np.int32 and weights.dtype == np.float32
        if not (right and tokens.ndim == 2 and tokens.shape == weights.shape and tokens.size):
            raise RequestError(
                f"mixtures need int32 tokens and float32 weights of one shape [N, K]; found "
                f"{tokens.dtype} {list(tokens.shape)} and {weights.dtype} {list(weights.shape)}"
            )
        if not np.isfinite(weights).all():
            raise RequestError("a weight of a mixture is not finite")
        for ends in (tokens.min(1), tokens.max(1)):
            self.check(sequence, TokenTree.chain(ends))
