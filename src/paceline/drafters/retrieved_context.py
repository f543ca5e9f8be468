"""A draft model that reads only those pieces of a long prompt that its end asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.core import Exactness, Floats, Request, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings, ModelDrafter
from paceline.drafters.draft_model.retrieval import best_pieces
from paceline.engines import open_like
from paceline.engines.base import Engine
from paceline.engines.follower import Follower
from paceline.errors import MemoryFullError, MethodError
from paceline.models import Model, load
from paceline.models.tokenizer import same_tokens
from paceline.registry import Source, check_range, drafters

_QUERY = 64  # last tokens of a prompt that pieces are retrieved for
_LONG = 1 << 20


@drafters.register("retrieved_context", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class RetrievedContext(DraftSettings):
    """Draft from retrieved pieces of a long prompt, and verify with all of it.

    The draft reads the first `sinks` tokens of the prompt, the `pieces` best pieces of `chunk`
    tokens, the last `tail` tokens, and all that was generated. Pieces are ranked by BM25 for the
    last 64 tokens of the prompt, where its question usually stands, and keep their order. The draft
    has keys and values of its own, at positions without gaps, so that its context may be shorter
    than the prompt. It is another checkpoint with the same tokens (`path`), or the model itself.

    The model itself reads all its weights in a draft pass, so that it pays only where reading the
    cache takes several times as long: without `path`, prompts below `least` times what the draft
    reads are not drafted for. With `path` a short prompt is read whole. The tree grows as that of
    `model`.

    State: as `model`. Memory: the draft's keys and values, and with `path` its weights. Cost of a
    proposal: up to `depth` passes of the draft with a short cache; what the draft reads of the
    prompt comes before the first.
    Good for: questions about prompts of many thousand tokens.

    Based on Chen et al., RAPID, arXiv 2502.20330, which retrieves by embeddings.

    Attributes:
        path: folder or hub id of the draft. Default none: the model itself.
        format: weight format of the draft, e.g. int8. Default auto: as stored.
        sinks: tokens at the beginning of the prompt. Default 32: a template's first words.
        chunk: tokens of a piece. Default 128.
        pieces: most pieces. Default 6.
        tail: tokens at the end of the prompt. Default 256.
        least: without `path`, how many times longer than what is read a prompt must be. Default 4.
        depth: as of `model`. Default 4: each pass may read all weights.
        threshold: as of `model`. Default 0.5: a pass may cost a good part of the model's.
        width, stop, rate: as of `model`.
    """

    source = Source(authors="Chen et al.", title="RAPID", arxiv="2502.20330")
    catalogue = (176,)
    missing = {176: "shifting the model's distribution towards the draft's, which changes outputs"}
    examples = ("retrieved_context", "retrieved_context:sinks=1,chunk=2,pieces=2,tail=4,least=1.0")

    path: str = ""
    format: str = "auto"
    sinks: int = 32
    chunk: int = 128
    pieces: int = 6
    tail: int = 256
    least: float = 4.0
    depth: int = 4
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, _LONG, self.name, sinks=self.sinks, pieces=self.pieces)
        check_range(1, _LONG, self.name, chunk=self.chunk, tail=self.tail)
        check_range(1.0, _LONG, self.name, least=self.least)
        if self.path and self.least != type(self).least:
            raise MethodError(f"{self.name}:path reads short prompts whole; leave least out")
        if not self.path and self.format != type(self).format:
            raise MethodError(f"{self.name}:format is that of another checkpoint; name its path")

    def build(self, target: Target) -> Drafter:
        """Return a drafter on the target's engine, or load the draft into one like it.

        Raises:
            MethodError: there is no engine, or the draft has other tokens.
            ModelError: the draft cannot be read.
        """
        if self.path:
            model = load(self.path)
            _check_tokens(model, target)
            return _RetrievedContext(self, open_like(target.engine, model, self.format), target)
        if target.engine is None:
            raise MethodError(
                f"{self.name} drafts with the target's own engine, and none was given; name a path"
            )
        return _RetrievedContext(self, target.engine, target)

    @property
    def read(self) -> int:
        """Most tokens of a prompt that the draft reads."""
        return self.sinks + self.chunk * self.pieces + self.tail

    def chosen(self, prompt: Tokens) -> Tokens:
        """Return the positions of `prompt` [S] that the draft reads, increasing."""
        length = len(prompt)
        if length <= self.read:
            return np.arange(length, dtype=np.int32)
        end = length - self.tail
        between = prompt[self.sinks : end]
        parts = [np.arange(self.sinks)]
        for piece in best_pieces(between, prompt[-_QUERY:], self.chunk, self.pieces):
            start = self.sinks + piece * self.chunk
            parts.append(np.arange(start, min(start + self.chunk, end)))
        return np.concatenate([*parts, np.arange(end, length)]).astype(np.int32)


class _RetrievedContext(ModelDrafter):
    origins = ("retrieved_context",)
    _method: RetrievedContext

    def __init__(self, method: RetrievedContext, engine: Engine, target: Target) -> None:
        super().__init__(method, target.vocab_size)
        self._follower = Follower(engine)
        self._chosen: Tokens | None = None  # of the request's prompt
        self._prompt = 0  # its length

    @property
    def engines(self) -> Sequence[Engine]:
        return [self._follower.engine]

    def fork(self) -> Drafter | None:
        other = super().fork()
        assert isinstance(other, _RetrievedContext)
        other._follower, other._chosen = Follower(self._follower.engine), None
        return other

    def begin(self, request: Request) -> None:
        super().begin(request)
        self._chosen, self._follower.paced = None, False

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        self._follower.paced = max_tokens is not None
        own = self._own(context)
        return 0 if own is None else self._follower.follow(own, max_tokens)

    def ready(self, context: Tokens) -> bool:
        own = self._own(context)
        return own is None or not self._follower.behind(own)

    def release(self) -> None:
        self._follower.reset()

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        try:
            return self.grow(context, budget)
        except MemoryFullError:  # the pass can do without a draft
            return TokenTree.root(int(context[-1]))

    def room(self, context: Tokens) -> int:
        own = self._own(context)
        return -1 if own is None else self._follower.room(own)

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        own = self._own(context)
        assert own is not None
        return self._follower.run(own, tree)[-fresh:]

    def reset(self) -> None:
        self.release()
        super().reset()

    def _own(self, context: Tokens) -> Tokens | None:
        """Return what the draft reads of a text; None if that is not worth drafting from.

        The first text of a request is its prompt.
        """
        if self._chosen is None or len(context) < self._prompt:
            self._chosen, self._prompt = self._method.chosen(context), len(context)
        method = self._method
        if not method.path and self._prompt < method.least * method.read:
            return None
        return np.concatenate([context[self._chosen], context[self._prompt :]])


def _check_tokens(model: Model, target: Target) -> None:
    theirs = target.tokenizer
    if theirs is None:
        same = model.config.vocab_size == target.vocab_size
    else:
        same = same_tokens(model.tokenizer, theirs)
    if not same:
        raise MethodError(
            f"the draft {model.name} has other tokens than the target; retrieved_context needs one "
            "with the same, or no path"
        )
