"""A request's entry in the batch of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from paceline.core import TokenTree
from paceline.decoding.session import Session
from paceline.decoding.walk import WalkResult
from paceline.engines.screened import Logits, ScreenedLogits
from paceline.serving.messages import JobEvent, logprobs

_NONE = TokenTree.root(0)


@dataclass(eq=False)
class BatchEntry:
    """One request's part of a forward pass.

    Attributes:
        id: of the request.
        run: the request's session.
        budget: maximum nodes beyond the root; None leaves the size to the governor.
        tree: the nodes that are run for the request.
        walked: the result of the walk over the tree.
        texts: text that each new token made certain.
        said: output tokens before this pass.
        seconds: time that drafting and learning took.
        late: the drafter was not ready to propose, which says nothing about its proposals.
        error: what failed for this request alone.
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

    def event(self, logits: Logits, top_logprobs: int | None) -> JobEvent:
        """Return the event for the client after the walk.

        Args:
            logits: of the tree's nodes, [N, V]; not screened where log-probabilities are asked for.
            top_logprobs: number of most likely tokens to report at each position; None reports no
                log-probabilities.
        """
        assert self.walked is not None
        drafter, path = self.run.drafter, self.walked.path
        tokens = self.run.output.tokens[self.said :]
        names = [drafter.origins[self.tree.origin[node]] for node in path[1:]]
        return JobEvent(
            self.id,
            "".join(self.texts),
            tokens,
            [*names, None][: len(tokens)],
            []
            if top_logprobs is None or isinstance(logits, ScreenedLogits)
            else logprobs(logits[path[: len(tokens)]], tokens, top_logprobs),
            self.tree,
            path,
            self.texts,
            drafter.origins,
            monotonic(),
            passes=1,
        )
