"""Drafts with a trained exit: the target's first layers, and a head that mends their states."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.drafters.draft_model.base import DraftSettings
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens
from paceline.drafters.draft_model.self_draft import SelfDrafter
from paceline.engines.base import Engine
from paceline.engines.view import View
from paceline.errors import MethodError

if TYPE_CHECKING:
    from paceline.drafters.heads.base import ExitHead, HeadTarget, Parameters

_ONE = np.zeros(1, np.int32)  # the only token whose logits the engine computes: none is needed


class ExitDrafter(SelfDrafter):
    """Grows trees by passes of the first layers.

    Args:
        method: the settings.
        engine: the target's.
        head: the trained exit.
        parameters: its tensors.
        target: the model.
        frequent: the tokens that may be proposed; None for all.

    Raises:
        MethodError: the model has no layer behind the exit.
    """

    origins = ("head",)

    def __init__(
        self,
        method: DraftSettings,
        engine: Engine,
        head: ExitHead,
        parameters: Parameters,
        target: HeadTarget,
        frequent: FrequentTokens | None,
    ) -> None:
        super().__init__(method, engine, frequent)
        check_exit(head.layers, engine)
        self._head, self._parameters, self._whole = head, parameters, target
        self._target, self._rows = target, self.ids  # with the rows of `ids` only
        self._layers = View(layers=exit_layers(head), tokens=_ONE)

    def view(self, context: Tokens) -> View | None:
        """Return the first layers."""
        return self._layers

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        """Run the first layers over a tree, and the head over its last nodes."""
        import torch

        super().run(context, tree, fresh)
        states = torch.from_numpy(self.engine.hidden()[-fresh:])
        if self._rows is not self.ids and self.ids is not None:
            self._rows = self.ids
            rows = self._whole.unembedding[torch.from_numpy(self.ids).long()]
            self._target = replace(self._whole, unembedding=rows)
        paths = torch.from_numpy(tree.tokens[-fresh:, None].astype(np.int64))
        with torch.inference_mode():
            logits = self._head.logits(self._parameters, self._target, states, paths)
        return np.asarray(logits.float().numpy(), np.float32)


def exit_layers(head: ExitHead) -> Tokens:
    """Return the layers before an exit, int32."""
    return np.arange(head.layers, dtype=np.int32)


def check_exit(layers: int, engine: Engine) -> None:
    """Refuse an exit behind the last layer.

    Raises:
        MethodError: as said.
    """
    count = len(engine.config.layers)
    if layers >= count:
        raise MethodError(
            f"the exit is behind layer {layers} of {count}; give layers={count // 3} or another "
            "number below"
        )
