"""Self-speculation: a part of the target drafts for all of it, with the same keys and values."""

from __future__ import annotations

from abc import abstractmethod

from paceline.abilities import Ability
from paceline.compatibility import Side, check, check_needs
from paceline.core import Floats, Request, Tokens, TokenTree
from paceline.drafters.base import Target
from paceline.drafters.draft_model.base import DraftSettings, ModelDrafter
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens
from paceline.engines.base import Cached, Engine
from paceline.engines.sides import engine_sides
from paceline.engines.view import View
from paceline.errors import MethodError


class SelfDrafter(ModelDrafter):
    """Drafts with views of the target's engine on the request's own sequence.

    Args:
        method: the settings.
        engine: the target's; it can run the views.
        frequent: the tokens that may be proposed; None for all.
    """

    def __init__(
        self, method: DraftSettings, engine: Engine, frequent: FrequentTokens | None = None
    ) -> None:
        super().__init__(method, engine.config.vocab_size, frequent=frequent)
        self.engine = engine
        self._sequence: Cached | None = None

    @abstractmethod
    def view(self, context: Tokens) -> View | None:
        """Return the part of the model that drafts after `context`; None if it should not."""

    def begin(self, request: Request) -> None:
        """See `Drafter`."""
        super().begin(request)
        self._sequence = None

    def attach(self, sequence: Cached) -> None:
        """See `Drafter`."""
        self._sequence = sequence

    def room(self, context: Tokens) -> int:
        """See `ModelDrafter`."""
        if self._sequence is None or self._sequence.length != len(context) - 1:
            return -1
        self._view = self.view(context)
        return -1 if self._view is None else self.engine.config.context - len(context)

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        """See `ModelDrafter`."""
        assert self._sequence is not None
        return self.engine.forward([(self._sequence, tree)], view=self._view)[-fresh:]


def viewable(target: Target, method: str, part: str) -> Engine:
    """Return the target's engine, which can leave out `part` of the model.

    Raises:
        MethodError: it cannot, or there is none.
    """
    engine = target.engine
    if engine is None:
        raise MethodError(f"{method} drafts with the target's own engine, and none was given")
    if part == Ability.POSITIONS:
        check({Side.POSITION_DRAFTER: f"the drafter {method}", **engine_sides(engine)})
    check_needs(f"the drafter {method}", {Ability(part)}, engine.name, engine.abilities)
    return engine
