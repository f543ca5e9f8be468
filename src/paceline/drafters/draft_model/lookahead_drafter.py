"""Drafts with trained inputs behind the last token: one pass of the model looks several ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.drafters.draft_model.base import DraftSettings
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens
from paceline.drafters.draft_model.self_draft import SelfDrafter
from paceline.engines.base import Engine
from paceline.engines.view import View

if TYPE_CHECKING:
    from paceline.drafters.heads.base import InputHead, Parameters


class LookaheadDrafter(SelfDrafter):
    """Grows a tree from the logits of one pass, whose rows are for all nodes of a depth.

    Args:
        method: the settings.
        engine: the target's; it can run mixtures.
        head: the trained inputs.
        parameters: its tensors.
        frequent: the tokens that may be proposed; None for all.
    """

    origins = ("head",)

    def __init__(
        self,
        method: DraftSettings,
        engine: Engine,
        head: InputHead,
        parameters: Parameters,
        frequent: FrequentTokens | None,
    ) -> None:
        super().__init__(method, engine, frequent)
        mix = parameters["mix"].numpy()
        self._mixed = head.mixed_tokens(engine.config.vocab_size)
        self._mix = np.zeros((len(mix) + 1, mix.shape[1] + 1), np.float32)
        self._mix[0, 0], self._mix[1:, 1:] = 1.0, mix
        self._rows = np.empty((0, 0), np.float32)  # of the last pass, one for each depth

    def view(self, context: Tokens) -> View | None:
        """Return all of the model."""
        return View()

    def room(self, context: Tokens) -> int:
        """See `ModelDrafter`; the pass's whole chain must fit in the model's context."""
        later = len(self._mix) - 1
        return later if super().room(context) >= later else -1

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        """Run the pass at the root, and return the rows of the depths of the last nodes."""
        if len(tree) == 1:
            assert self._sequence is not None
            chain = np.empty(self._mix.shape, np.int32)
            chain[:, 0], chain[:, 1:] = tree.tokens[0], self._mixed
            rows = self.engine.forward_mixed(self._sequence, chain, self._mix)
            self._rows = np.array(rows if self.ids is None else rows[:, self.ids])
        return self._rows[tree.depths()[-fresh:]]
