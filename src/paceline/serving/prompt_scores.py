"""The log-probabilities of a prompt's tokens, as a search that writes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paceline.core import Floats, TokenTree
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.errors import RequestError
from paceline.scoring import check_finite
from paceline.serving.messages import Logprob, logprobs


@dataclass(slots=True)
class PromptScore(SearchOutput):
    """An output without tokens.

    Attributes:
        logprobs: of each token of the prompt; the first, before which there is nothing, has None.
    """

    logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True)
class PromptScores(Strategy):
    """Read a prompt, and report how probable its tokens are.

    Attributes:
        top: number of most likely tokens to report at each position.
    """

    top: int = 0

    def check(self, task: Task) -> None:
        """Refuse a prompt that is empty, or longer than the context."""
        size, context = len(task.request.prompt), task.engine.config.context
        if not 0 < size <= context:
            raise RequestError(
                f"the prompt has {size} tokens, expected 1 to {context}, which the model sees"
            )

    def run(self, task: Task) -> list[SearchOutput]:
        """Return one output without tokens; see `Strategy`.

        Raises:
            ModelError: the model's logits are not finite.
        """
        self.check(task)
        prompt, engine = task.request.prompt, task.engine
        ids = np.array(prompt, np.int32)
        scores = [Logprob(prompt[0], None, [])]

        def observe(offset: int, tree: TokenTree, logits: Floats) -> None:
            after = prompt[offset + 1 : offset + 1 + len(tree)]
            scores.extend(logprobs(logits[: len(after)], after, self.top))

        sequence = engine.open()
        try:
            if len(ids) > 1:
                engine.extend(sequence, ids[:-1], observe)
        finally:
            engine.release(sequence)
        check_finite([score.logprob for score in scores if score.logprob is not None])
        return [PromptScore(logprobs=scores)]
