"""The contract of an exit policy: which parts of which layers each node of a pass runs.

A decision depends on a node's own path alone: on its position, and on the states that it went
through. So trees, chunks and batches cannot change it, and with a policy on, every drafter gives
the output of plain decoding with that policy. Prompts run everything, all but their last token.

What is left out of a layer passes the state on as it was. A layer's keys and values are always
computed, of whatever state reaches it, so that later nodes find every position in the cache.

Axes: N nodes, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.abilities import Ability
from paceline.registry import Method

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.gated_block import ExitPass


class Gate(ABC):
    """The decisions of a policy for one pass; the engine asks layer by layer.

    Args:
        nodes: those of the pass.
    """

    def __init__(self, nodes: ExitPass) -> None:
        self.nodes = nodes

    @abstractmethod
    def attention(self, layer: int) -> Tensor:
        """Return which nodes run the attention of a layer, bool [N]."""

    def mlp(self, layer: int) -> Tensor:
        """Return which nodes run the MLP of a layer, bool [N]; asked after `attention`."""
        return self.attention(layer)

    def note(self, layer: int, before: Tensor, middle: Tensor, after: Tensor) -> None:
        """See the states of a layer, [N, D]: its input, behind its attention, and its output."""


@dataclass(frozen=True)
class ExitPolicy(Method, ABC):
    """Settings of an exit policy: its fields."""

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.TORCH})

    @abstractmethod
    def gate(self, nodes: ExitPass) -> Gate:
        """Return what decides for the nodes of a pass."""
