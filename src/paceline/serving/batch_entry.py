"""A request's entry in a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from paceline.core import Floats, TokenTree
from paceline.decoding.session import Session
from paceline.decoding.walk import WalkResult
from paceline.serving.messages import JobEvent, logprobs

_NONE = TokenTree.root(0)


@dataclass(eq=False)
class BatchEntry:
    """What a run does in a pass.

    Attributes:
        id: names the request.
        run: the request.
        budget: most nodes beyond the root; None leaves it to the governor.
        tree: what is run for it.
        walked: what was drawn.
        texts: that each token made certain.
        said: tokens of the output before.
        seconds: that its guesses cost.
        late: its drafter was not ready to guess, which says nothing about its guesses.
        error: what went wrong with this request alone.
    """

    id: str
    run: Session
    budget: int | None = None
    tree: TokenTree = _NONE
    walked: WalkResult | None = None
    texts: list[str] = field(default_factory=list)
    said: int = 0
    seconds: float = 0.0
    late: bool = False
    error: Exception | None = None

    def event(self, logits: Floats, wanted: int | None) -> JobEvent:
        """What its owner is told after its walk over logits [N, V], with so many log chances."""
        assert self.walked is not None
        drafter, path = self.run.drafter, self.walked.path
        tokens = self.run.output.tokens[self.said :]
        names = [drafter.origins[self.tree.origin[node]] for node in path[1:]]
        return JobEvent(
            self.id,
            "".join(self.texts),
            tokens,
            [*names, None][: len(tokens)],
            [] if wanted is None else logprobs(logits[path[: len(tokens)]], tokens, wanted),
            self.tree,
            path,
            self.texts,
            drafter.origins,
            monotonic(),
            passes=1,
        )
