"""Other models, and the same model on other texts, for guides."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from paceline.control.guides.guide_stream import GuideStream
from paceline.core import Request
from paceline.engines import open_like
from paceline.engines.base import Engine
from paceline.errors import MethodError, RequestError
from paceline.models import load
from paceline.models.tokenizer import Tokenizer, same_tokens


class GuideModels:
    """Opens models for guides, and streams that follow a request's text.

    Args:
        engine: runs the guided model; other models get engines of its kind, which are kept.
        tokenizer: of the guided model.

    Attributes:
        seconds: time spent on opening checkpoints.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.seconds = 0.0
        self._engines: dict[str, Engine] = {}

    @property
    def loaded(self) -> list[Engine]:
        """Engines of the models that were opened."""
        return list(self._engines.values())

    def open(self, source: str) -> Engine:
        """Return the engine of a checkpoint, which is opened once.

        Raises:
            ModelError: it cannot be loaded.
            MethodError: its tokenizer differs from the guided model's.
        """
        if source not in self._engines:
            start = perf_counter()
            model = load(source)
            if not same_tokens(model.tokenizer, self.tokenizer):
                raise MethodError(
                    f"the guide {source} has other tokens than the model to be guided; "
                    "take one with the same tokenizer"
                )
            self._engines[source] = open_like(self.engine, model)
            self.seconds += perf_counter() - start
        return self._engines[source]

    def stream(self, source: str, request: Request) -> GuideStream:
        """Return a stream of a checkpoint over the request's own text."""
        return self.open_stream(self.open(source), request)

    def conditioned(self, source: str, code: str, request: Request) -> GuideStream:
        """Return a stream of a checkpoint over BOS, `code` and then the request's text."""
        begin = self.tokenizer.encode("")
        if not begin or list(request.prompt[: len(begin)]) != begin:
            begin = []
        own = [*begin, *self.tokenizer.encode(code, special=False)]
        return self.open_stream(self.open(source), request, own, len(begin))

    def open_stream(
        self, engine: Engine, request: Request, begin: Sequence[int] = (), instead: int = 0
    ) -> GuideStream:
        """Return a stream over `begin` in place of the first `instead` tokens of the prompt.

        Raises:
            RequestError: the engine's context is too small for the longest output.
        """
        max_tokens = min(request.max_new_tokens, self.engine.config.context - len(request.prompt))
        longest = len(begin) - instead + len(request.prompt) + max_tokens - 1  # the last is not run
        if longest > engine.config.context:
            raise RequestError(
                f"a guide sees {engine.config.context} tokens, and this request may come to "
                f"{longest} for it; ask for fewer new tokens, or shorten its texts"
            )
        return GuideStream(engine, self.engine.config.vocab_size, begin, instead)
