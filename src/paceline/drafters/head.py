"""Draft with a trained head; `heads/` has the architectures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.compatibility import check_needs
from paceline.core import Exactness, Floats, Request, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings, ModelDrafter
from paceline.drafters.draft_model.exit_drafter import ExitDrafter
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens, generated_counts
from paceline.drafters.draft_model.lookahead_drafter import LookaheadDrafter
from paceline.drafters.heads.base import ContextHead, ExitHead, InputHead
from paceline.errors import MethodError
from paceline.registry import Source, check_range, drafters

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import HeadTarget, LoadedHead

_LEVEL, _EXIT = 0.02, 0.4  # thresholds by default: of heads alone, and of passes of first layers


@drafters.register("head", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class TrainedHead(DraftSettings):
    """Draft with a head that was trained on this model's hidden states.

    The target's hidden state behind the last committed token is known from the last pass. The head
    gives the probabilities of the tokens after the next one; the tree grows best-first by path
    probability, as that of `model`. Only the most frequent tokens are proposed (FR-Spec): those of
    the text that the head was trained on, or else of the trace of `paceline warm`, and of the
    requests so far, their prompts included. The first pass after the prompt has no hidden state yet
    and drafts nothing.

    State: the calibration of the head's probabilities, as `model`, and counts of tokens. Cost of a
    proposal: one evaluation of the head a level, over `vocabulary` rows of the model's output
    matrix.
    Good for: models whose head was trained on the kind of text that they write.

    Attributes:
        path: folder of the head, `head.json` and `head.safetensors`, or of published Medusa heads,
            `config.json` and `medusa_lm_head.safetensors`.
        vocabulary: number of tokens that may be proposed; 0: all. Default 4096.
        width: nodes expanded at each level. Default 4.
        depth: most levels; the head's own depth is a limit, too. Default 8.
        stop: `confidence`, `bandit` or `depth`, as of `model`.
        threshold: of `confidence`. Default 0.02: a level costs little; 0.4 where each level is a
            pass of the first layers.
        rate: learning rate of the calibration. Default 0.02.
    """

    source = Source(note="grows trees with any architecture of `drafters/heads`")
    needs = frozenset({Ability.HIDDEN, Ability.TORCH})

    path: str
    vocabulary: int = 4096
    threshold: float = _LEVEL

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 1 << 24, "head", vocabulary=self.vocabulary)

    def build(self, target: Target) -> Drafter:
        """Load the head for `target`."""
        engine, model = target.engine, target.model
        if engine is None or model is None or Ability.HIDDEN not in engine.abilities:
            raise MethodError(
                "head needs an engine that returns hidden states, and one model; "
                "use native or reference, and no ensemble"
            )
        if find_spec("torch") is None:
            raise MethodError("head needs torch; install paceline[torch]")
        from paceline.drafters.draft_model.published_heads import is_published, read_published
        from paceline.drafters.heads.base import head_target, load_head

        about = head_target(model)
        folder = Path(self.path)
        loaded = (read_published if is_published(folder) else load_head)(folder, about)
        frequent = self._frequent(loaded.frequent, target)
        if isinstance(loaded.head, InputHead):
            what = "a head of trained inputs"
            check_needs(what, {Ability.MIXTURES}, engine.name, engine.abilities)
            return LookaheadDrafter(self, engine, loaded.head, loaded.parameters, frequent)
        if not isinstance(loaded.head, ExitHead):
            return _TrainedHead(self, loaded, about, frequent)
        check_needs(
            "a head behind the first layers", {Ability.LAYERS}, engine.name, engine.abilities
        )
        own = self.stop == "confidence" and self.threshold == _LEVEL
        method = replace(self, threshold=_EXIT) if own else self
        return ExitDrafter(method, engine, loaded.head, loaded.parameters, about, frequent)

    def _frequent(self, trained: Tokens, target: Target) -> FrequentTokens | None:
        """Return the tokens that may be proposed; None if these are all."""
        size = target.vocab_size
        if not 0 < self.vocabulary < size:
            return None
        counts = generated_counts(target.trace, size)
        if counts is None:
            counts = np.zeros(size)
        counts[trained] += np.linspace(2, 1, len(trained))  # most frequent first
        return FrequentTokens(self.vocabulary, size, counts)


class _TrainedHead(ModelDrafter):
    origins = ("head",)
    needs_hidden = True
    top_k = 1  # `observe` is called, though it reads the hidden states only

    def __init__(
        self,
        method: DraftSettings,
        loaded: LoadedHead,
        target: HeadTarget,
        frequent: FrequentTokens | None,
    ) -> None:
        super().__init__(method, target.vocab_size, frequent=frequent)
        self._head, self._parameters, self._whole = loaded.head, loaded.parameters, target
        self._target, self._rows = target, self.ids  # with the rows of `ids` only
        self._reduced = loaded.parameters  # likewise
        self._hidden: Floats | None = None  # [D], behind the token before the next root
        self._position = 0  # length of the context whose root follows it
        self._memory: Tensor | None = None  # [M, E], rows of committed tokens, the last one too

    def begin(self, request: Request) -> None:
        super().begin(request)
        self._hidden = self._memory = None

    def observe(self, step: Step) -> None:
        super().observe(step)
        if step.hidden is not None:
            self._remember(step.hidden[step.path], step)
            self._hidden = step.hidden[step.path[-1]].copy()
            self._position = len(step.context) + len(step.drawn)

    def _remember(self, hidden: Floats, step: Step) -> None:
        """Keep rows of the accepted tokens for a head that reads earlier states."""
        import torch

        if not isinstance(self._head, ContextHead):
            return
        with torch.inference_mode():
            drawn = torch.from_numpy(step.drawn.astype(np.int64))
            states = torch.from_numpy(hidden)
            rows = self._head.encode(self._parameters, self._whole, states, drawn)
            if self._memory is not None and self._position == len(step.context):
                rows = torch.cat([self._memory, rows])
        self._memory = rows[-self._head.window - 1 :]

    def _logits(self, paths: NDArray[np.int64]) -> Floats:
        """Return the logits [N, U] of the tokens behind paths [N, L] of one length."""
        import torch

        with torch.inference_mode():
            hidden = torch.from_numpy(self._hidden)[None].expand(len(paths), -1)
            given = (self._reduced, self._target, hidden, torch.from_numpy(paths))
            if isinstance(self._head, ContextHead) and self._memory is not None:
                logits = self._head.logits(*given, self._memory[:-1])
            else:
                logits = self._head.logits(*given)
        return np.asarray(logits.float().numpy(), np.float32)

    def room(self, context: Tokens) -> int:
        known = self._hidden is not None and self._position == len(context)
        return self._head.depth - 1 if known else -1

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        import torch

        if self._rows is not self.ids:
            rows_of = torch.from_numpy(self.ids).long()
            self._rows = self.ids
            self._target = replace(self._whole, unembedding=self._whole.unembedding[rows_of])
            self._reduced = self._head.columns(self._parameters, rows_of)
        rows = np.empty((fresh, len(self._target.unembedding)), np.float32)
        depths = tree.depths()[-fresh:]
        for depth in np.unique(depths).tolist():  # paths of one length are run together
            places = np.flatnonzero(depths == depth)
            paths = np.empty((len(places), depth + 1), np.int64)
            for row, place in enumerate(places):
                node = len(tree) - fresh + int(place)
                for level in range(depth, -1, -1):
                    paths[row, level] = tree.tokens[node]
                    node = int(tree.parents[node])
            rows[places] = self._logits(paths)
        return rows
