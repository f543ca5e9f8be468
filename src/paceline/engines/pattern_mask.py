"""What an attention pattern hides in a pass of the reference engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.engines.choose_blocks import choose_blocks
from paceline.engines.choose_clusters import choose_clusters, cluster_keys
from paceline.engines.choose_runs import choose_runs
from paceline.engines.collaborators import AttentionPattern
from paceline.engines.few_read import RUN, FewRead, HeadRead
from paceline.engines.read_memory import ReadMemory
from paceline.engines.reference_cache import ReferenceCache
from paceline.models.config import ModelConfig


@dataclass(frozen=True)
class PatternMask:
    """Hides what a pattern leaves out.

    Attributes:
        config: the model's shape.
        pattern: says what is read.
        reads: one of `HeadRead` for each KV head of each layer; None while the pattern itself runs
            the model to say so.
    """

    config: ModelConfig
    pattern: AttentionPattern
    reads: Sequence[Sequence[int]] | None

    @property
    def memory(self) -> ReadMemory | None:
        """Return what a new sequence remembers for the pattern; None: nothing."""
        rule = self.pattern.few_read
        if rule is None or not rule.remembers:
            return None
        return ReadMemory(keeps_queries=rule.summary == "representatives")

    @property
    def query_floats(self) -> int:
        """Numbers of the queries that are kept of each position."""
        memory = self.memory
        if memory is None or not memory.keeps_queries:
            return 0
        return sum(layer.heads * layer.head_dim for layer in self.config.layers)

    def of_layer(
        self, sequence: ReferenceCache, index: int, mask: Tensor, at: Tensor, chain: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what makes the mask [H, N, S] of queries [H, N, D] and keys [G, S, D].

        Args:
            sequence: holds the rows.
            index: of the layer.
            mask: float32 [N, S], what the model itself hides.
            at: int64 [N], positions of the queries.
            chain: the pass is a chain.
        """
        held = torch.cat([torch.arange(sequence.length, device=at.device), at])

        def hide(queries: Tensor, keys: Tensor) -> Tensor:
            queries = queries * self.config.attention_scale
            read = self._read(sequence, index, queries, keys, at, held, chain)
            if read is None:
                return mask
            return mask.masked_fill(~read, -torch.inf) if read.dtype == torch.bool else mask + read

        return hide

    def _read(
        self,
        sequence: ReferenceCache,
        index: int,
        queries: Tensor,
        keys: Tensor,
        at: Tensor,
        held: Tensor,
        chain: bool,
    ) -> Tensor | None:
        """Return which rows are read, bool [H, N, S], or what is added to scores; None: all."""
        layer, prompt = self.config.layers[index], sequence.prompt
        if (blocks := self.pattern.sparse_prefill) is not None:
            if index < blocks.dense or layer.window is not None:
                return None
            softcap = self.config.attention_softcap
            heads = blocks.of_layers(self.config)[index]
            return choose_blocks(blocks, queries, keys, at, held, prompt, softcap, heads)
        rule = self.pattern.few_read
        if rule is None:
            return self.pattern.mask(index, queries, keys, at, held, chain)
        if self.reads is None or layer.sinks:  # behind sinks and a window nothing is left to choose
            return None
        reads, memory = self.reads[index], sequence.memory
        if rule.clusters:
            if prompt < RUN or int(at.max()) < prompt:
                return None
            read = self._clustered(rule, sequence, index, queries, keys, at, held)
        else:
            asked = None
            if memory is not None:
                memory.note(index, queries)
                asked = memory.all_queries(index)
            read = choose_runs(
                rule, queries, keys, at, held, chain, layer.window, reads, asked=asked
            )
        return read | (at < prompt)[:, None]

    def _clustered(
        self,
        rule: FewRead,
        sequence: ReferenceCache,
        index: int,
        queries: Tensor,
        keys: Tensor,
        at: Tensor,
        held: Tensor,
    ) -> Tensor:
        """Return which rows are read by clusters of the prompt, which are made once."""
        memory, fixed = sequence.memory, sequence.prompt // RUN * RUN
        assert memory is not None
        assert self.reads is not None
        clusters = memory.clusters.get(index)
        if clusters is None or clusters.prompt != fixed:
            clusters = cluster_keys(rule, keys[:, :fixed])
            if fixed <= sequence.length:
                memory.clusters[index] = clusters
        read = choose_clusters(rule, queries, clusters, at, held, self.config.layers[index].window)
        return whole_heads(read, self.reads[index])


def whole_heads(read: Tensor, reads: Sequence[int]) -> Tensor:
    """Return the rows [H, N, S] that are read where some KV heads read everything."""
    kinds = torch.tensor(list(reads), device=read.device)
    return read | (kinds.repeat_interleave(len(read) // len(reads)) == HeadRead.ALL)[:, None, None]
