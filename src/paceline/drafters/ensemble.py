"""The members of an ensemble draft for the whole of it."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.abilities import Ability
from paceline.core import Exactness, Floats, Request, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings, ModelDrafter
from paceline.engines.base import Cached
from paceline.engines.ensemble import EnsembleEngine, EnsembleSequence
from paceline.errors import MethodError
from paceline.registry import Source, drafters


@drafters.register("ensemble", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class Ensemble(DraftSettings):
    """Draft with one member of an ensemble, and verify with all of them.

    For models that run as one, `--model 'A@0.7|B@0.3'`. A member drafts on its own part of the
    ensemble's sequence: there is no further cache. `member=turns` lets them take turns, as in the
    paper, which favours none; if one is much smaller, name it. The output is that of decoding the
    ensemble plainly. The tree grows as that of `model`.

    State: as `model`. Cost of a proposal: up to `depth` passes of a member.
    Good for: ensembles, for which plain decoding runs every member at every token.

    Based on Fu et al., Speculative Ensemble, arXiv 2502.01662.

    Attributes:
        member: number of the member that drafts, counted from 0, or `turns`. Default turns.
        depth: as of `model`. Default 4: members are large.
        threshold: as of `model`. Default 0.5: a pass costs a good part of the ensemble's.
        width, stop, rate: as of `model`.
    """

    source = Source(authors="Fu et al.", title="Speculative Ensemble", arxiv="2502.01662")
    catalogue = (229,)
    missing = {229: "reuse of the rows that the drafting member computed; they are run again"}
    examples = ("ensemble", "ensemble:member=1,depth=2")
    needs = frozenset({Ability.ENSEMBLE})

    member: str = "turns"
    depth: int = 4
    threshold: float = 0.5

    def build(self, target: Target) -> Drafter:
        """Return a drafter on the members of the target's engine.

        Raises:
            MethodError: it is no ensemble, or has no such member.
        """
        engine = target.engine
        if not isinstance(engine, EnsembleEngine):
            raise MethodError("the drafter ensemble needs an ensemble; give the model as 'A|B'")
        count = len(engine.members)
        known = self.member.isascii() and self.member.isdecimal() and int(self.member) < count
        if not known and self.member != "turns":
            raise MethodError(
                f"ensemble:member is {self.member!r}, expected 0 to {count - 1}, or turns"
            )
        return _Ensemble(self, engine)


class _Ensemble(ModelDrafter):
    origins = ("ensemble",)
    _method: Ensemble

    def __init__(self, method: Ensemble, engine: EnsembleEngine) -> None:
        super().__init__(method, engine.config.vocab_size)
        self._engine = engine
        self._sequence: EnsembleSequence | None = None
        self._turn = 0 if method.member == "turns" else int(method.member)

    def begin(self, request: Request) -> None:
        super().begin(request)
        self._sequence = None

    def attach(self, sequence: Cached) -> None:
        if isinstance(sequence, EnsembleSequence):
            self._sequence = sequence

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        if self._method.member == "turns":
            self._turn = len(context) % len(self._engine.members)
        return self.grow(context, budget)

    def room(self, context: Tokens) -> int:
        if self._sequence is None or self._sequence.length != len(context) - 1:
            return -1
        return self._engine.config.context - len(context)

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        assert self._sequence is not None
        member, part = self._engine.members[self._turn], self._sequence.parts[self._turn]
        return member.forward([(part, tree)])[-fresh:]
