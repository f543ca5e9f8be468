"""The front door: a checkpoint, an engine and a drafter, ready to generate."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Unpack

from paceline import registry
from paceline.attention.base import Pattern
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Output, Request, Tokens
from paceline.decoding.governor import Governor
from paceline.decoding.loop import Generation
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.superposed import Superposed
from paceline.decoding.text_stream import text_of
from paceline.drafters.base import DraftMethod, Target
from paceline.drafters.history.state_file import read_learnt, write_learnt
from paceline.engines.ensemble import EnsembleEngine
from paceline.errors import MethodError, RequestError
from paceline.loading import open_budget, open_model
from paceline.models.vocabulary import Vocabulary
from paceline.request_builder import Controls, Guides, Prompt, RequestBuilder, RequestOptions

__all__ = ["LM", "Completion", "Controls", "Guides", "Prompt", "RequestOptions"]


class Completion(NamedTuple):
    """One of several continuations.

    Attributes:
        text: without a stop token at its end.
        score: logarithm of the chance that the model gives all its tokens.
        tokens: token ids.
    """

    text: str
    score: float
    tokens: tuple[int, ...]


class LM:
    """A language model on this machine.

        lm = LM("path/to/checkpoint")
        print(lm.generate("Once upon a time").text)

    Args:
        model: a folder, a hub id, or None for the small embedded model; `A:weight=0.7+B:weight=0.3`
            are several with the same tokens, whose weighted mean is decoded.
        engine: `native` (CPU), `reference` (torch), or `auto`: native unless a device is named.
        drafter: `NAME[:key=value,...]` or a `DraftMethod`; `blend` mixes several. What it learns
            is kept from request to request until `reset()`.
        budget: most nodes of a draft tree beyond its root, or `auto`: as many as pay for
            themselves by this machine's measured cost, down to plain decoding.
        threads: of the native engine; None takes the cores this process may use.
        device: of the reference engine, e.g. `cuda`.
        format: of the weights: `fp32`, `bf16`, `fp16`, `int8`, `int4`, `ternary`; `auto` is the
            checkpoint's. `:head=FORMAT` after it is that of embedding and head.
        kv_format: of the native engine's cached keys and values: `fp32`, `fp16`, `int8`; `auto` is
            `fp32`.
        attention: `NAME[:key=value,...]` or a `Pattern`: which cached positions are read; lossy,
            and of the reference engine only. None reads all.

    Raises:
        ModelError, MethodError: what is wrong and what to do, in one sentence.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        engine: str = "auto",
        drafter: str | DraftMethod = "blend",
        budget: int | str = "auto",
        threads: int | None = None,
        device: str | None = None,
        format: str = "auto",  # noqa: A002 (its name everywhere)
        kv_format: str = "auto",
        attention: str | Pattern | None = None,
    ) -> None:
        start = perf_counter()
        self.drafter_method = (
            registry.drafters.parse(drafter) if isinstance(drafter, str) else drafter
        )
        loaded = open_model(
            model,
            engine,
            threads=threads,
            device=device,
            weight_format=format,
            kv_format=kv_format,
            attention=attention,
        )
        self.model, self.engine = loaded.model, loaded.engine
        self.tokenizer = self.model.tokenizer
        vocab_size = self.engine.config.vocab_size
        one = None if isinstance(self.engine, EnsembleEngine) else self.model
        self.draft_target = Target(vocab_size, self.engine, self.tokenizer, loaded.trace, one)
        self.budget = open_budget(budget, self.engine)
        self.drafter = self.drafter_method.build(self.draft_target)
        self.request_builder = RequestBuilder(self.model, self.tokenizer, self.engine, self.drafter)
        self._load_seconds = perf_counter() - start

    @property
    def guide_models(self) -> GuideModels:
        """Models that guides run, opened on first use."""
        return self.request_builder.guide_models

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens and the text of each."""
        return self.request_builder.vocabulary

    def request(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """Build the `Request` that `generate` would run."""
        return self.request_builder.build(prompt, **options)

    def stream(self, request: Request) -> Generation:
        """Start a request; iterate over the result for its text."""
        text = text_of(request, self.tokenizer)
        generation = Generation(self.engine, self.drafter, request, self.budget, text)
        generation.output.seconds.load = self._load_seconds + self.guide_models.seconds
        return generation

    def generate(
        self,
        prompt: Prompt,
        *,
        strategy: str | Strategy | None = None,
        **options: Unpack[RequestOptions],
    ) -> Output:
        """The whole answer to `prompt`; the options are those of `request` and `search`."""
        if strategy is not None:
            return self.search(prompt, strategy, **options)[0]
        return self.stream(self.request(prompt, **options)).run()

    def search(
        self, prompt: Prompt, strategy: str | Strategy, **options: Unpack[RequestOptions]
    ) -> list[SearchOutput]:
        """The outputs of a search, best first, e.g. `search("Once", "beam:width=8,returned=3")`.

        Args:
            prompt: as of `request`.
            strategy: `NAME[:key=value,...]` or a `Strategy`. Those that draw nothing take none of
                the checkpoint's defaults that sample: temperature, top_k, top_p, min_p.
            options: those of `request`.

        Raises:
            RequestError, MethodError: the strategy cannot follow the request.
        """
        method = registry.strategies.parse(strategy) if isinstance(strategy, str) else strategy
        if not method.draws:
            options = self.request_builder.without_sampling(options)

        def rebind(seed: int) -> Request:
            again = options.copy()
            again["seed"] = seed
            return self.request(prompt, **again)

        request = self.request(prompt, **options)
        task = Task(
            self.engine,
            request,
            lambda: text_of(request, self.tokenizer),
            rebind,
            self.drafter,
            lambda: self.drafter.fork() or self.drafter_method.build(self.draft_target),
            self.budget,
            self._known_texts,
        )
        outputs: list[SearchOutput] = method.run(task)
        for output in outputs:
            output.seconds.load = self._load_seconds
        return outputs

    def complete(
        self,
        prompt: Prompt,
        n: int = 3,
        *,
        max_new_tokens: int = 10,
        method: str = "beam",
        alpha: float | None = None,
    ) -> list[Completion]:
        """Several continuations of `prompt`, likeliest first. Lossy: there may be likelier ones.

        Args:
            prompt: as for `request`.
            n: how many.
            max_new_tokens: upper limit of each; the model's stop tokens end one before.
            method: `beam`, n nodes a pass; or `superposed`, one node a pass and, with small models,
                far less likely continuations; see `decoding/strategies/superposed.py`.
            alpha: of `superposed`: weight, 0 to 1, of n-grams of the prompt and of what
                `paceline warm` kept. None is 0.

        Raises:
            MethodError, RequestError: what is wrong and what to do.
        """
        if method not in ("beam", "superposed"):
            raise MethodError(f"the method is {method!r}, expected beam or superposed")
        if method == "beam" and alpha is not None:
            raise RequestError("beam search uses no n-grams; leave alpha out, or take superposed")
        room = self.engine.config.context - len(self.request_builder.encode(prompt, None)[0])
        if not 1 <= max_new_tokens <= max(room, 1):
            raise RequestError(
                f"continuations of {max_new_tokens} tokens are asked for, expected 1 to {room}: "
                f"the model sees {self.engine.config.context} tokens, the prompt among them"
            )
        strategy = (
            Beam(width=n, returned=n, length_penalty=0.0)
            if method == "beam"
            else Superposed(width=n, returned=n, alpha=alpha or 0.0)
        )
        found = self.search(prompt, strategy, max_new_tokens=max_new_tokens, controls=())
        return [Completion(one.text, one.score, tuple(one.tokens)) for one in found]

    def _known_texts(self) -> list[Tokens]:
        """Return the texts that `paceline warm` recorded for this model."""
        trace = self.draft_target.trace
        return [trace.tokens[text] for text in trace.texts()] if trace else []

    def reset(self) -> None:
        """Forget what the drafter and the governor learnt."""
        self.drafter.reset()
        if isinstance(self.budget, Governor):
            self.budget = Governor(self.budget.cost)

    def save_learnt(self, path: str | Path) -> None:
        """Keep what the drafter learnt in a safetensors file.

        Raises:
            ModelError: the file cannot be written.
        """
        write_learnt(Path(path), self.drafter.state())

    def load_learnt(self, path: str | Path) -> None:
        """Let the drafter go on from what `save_learnt` kept.

        Raises:
            ModelError: the file cannot be read.
            MethodError: it is of another drafter, other settings or another vocabulary.
        """
        try:
            self.drafter.load(read_learnt(Path(path)))
        except MethodError as error:
            raise MethodError(f"{path}: {error}") from None
