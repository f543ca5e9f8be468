"""Plain decoding: no draft at all."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.core import Exactness, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target
from paceline.registry import Source, drafters


@drafters.register("plain", Exactness.EXACT)
@dataclass(frozen=True)
class Plain(DraftMethod):
    """Generate one token a pass; the baseline that everything else is measured against.

    The tree is its root, whatever the budget: pass, walk and commit are those of plain decoding.
    Nothing is kept or learnt.

    State: none. Cost of a proposal: the making of one node.
    Good for: the baseline, and machines on which a second row costs as much as a second pass.
    """

    source = Source()
    examples = ("plain",)

    def build(self, target: Target) -> Drafter:
        """Return a drafter that proposes nothing."""
        return _Plain()


class _Plain(Drafter):
    origins = ("plain",)
    drafts = False

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        return TokenTree.root(int(context[-1]))
