"""Draft the tokens that the request's controls force."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.capabilities import ForcesTokens
from paceline.core import Exactness, Request, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target
from paceline.registry import Source, drafters


@drafters.register("forced", Exactness.EXACT)
@dataclass(frozen=True)
class Forced(DraftMethod):
    """Draft the only continuation that the controls allow, with probability 1.

    After `{"name":` a grammar may know the next tokens without the model; a forced first token is
    known, too. Nothing is learnt.

    State: none. Cost of a proposal: none without such a control.
    Good for: JSON with a schema, templates, choices; alone, or as a member of `blend`.
    """

    source = Source(note="ours; after jump-forward decoding, Zheng et al., SGLang, 2312.07104")
    examples = ("forced",)

    def build(self, target: Target) -> Drafter:
        """Return a drafter that asks the controls."""
        return _Forced()


class _Forced(Drafter):
    origins = ("forced",)
    certain = True

    def __init__(self) -> None:
        self._controls: list[ForcesTokens] = []

    def begin(self, request: Request) -> None:
        self._controls = [c for c in request.controls if isinstance(c, ForcesTokens)]

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        root = int(context[-1])
        if self._controls and budget:
            history = context.tolist()
            for control in self._controls:
                tokens = control.forced(history)
                if tokens:
                    return TokenTree.chain([root, *tokens[:budget]])
        return TokenTree.root(root)

    def reset(self) -> None:
        self._controls = []
