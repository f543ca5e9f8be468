"""BABILong: the facts of a simple story, hidden in the text of books."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from paceline.measuring.evaluation.long_context import LongContexts
from paceline.measuring.evaluation.long_tasks import ContextBuilder, LongContext
from paceline.measuring.evaluation.story_tasks import STORIES


class StoryContexts(LongContexts):
    """Stories in texts, whose facts stand apart from each other, in their order.

    Kinds: `place` asks where people are (one fact), `thing` where things are (two facts: who has
    it, and where they went), `before` where these were before (three facts), `presence` whether
    people are in a room. Earlier facts about the same people and things distract. Kuratov et al.,
    In Search of Needles in a 10M Haystack, arXiv 2402.10790, section 2; the stories are our own.

    Args:
        folder, limit, length, prefix, seed: as of `LongContexts`.
    """

    name = "babilong"
    kinds: ClassVar[tuple[str, ...]] = tuple(STORIES)

    def built(
        self, builder: ContextBuilder, kind: str, text: str, rng: np.random.Generator
    ) -> LongContext:
        """See `LongContexts`."""
        story = STORIES[kind](rng)
        asked = [(each.text, each.lead, each.answer) for each in story.questions]
        return builder.story(text, story.facts, asked, rng)
