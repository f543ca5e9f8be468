"""The front door: a checkpoint, an engine and a drafter, ready to generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Unpack

import numpy as np

from paceline import registry
from paceline.control.guides.guide_models import GuideModels
from paceline.core import Output, Request
from paceline.decoding.completions import completions
from paceline.decoding.governor import Governor
from paceline.decoding.loop import Generation
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.text_stream import text_of
from paceline.drafters.base import DraftMethod, Target
from paceline.drafters.history.state_file import read_learnt, write_learnt
from paceline.engines.ensemble import EnsembleEngine
from paceline.errors import MethodError
from paceline.loading import open_budget, open_model
from paceline.models.detokenize import Detokenizer
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
        model: a folder, a hub id, or None for the small embedded model; `A|B` or `A@0.7|B@0.3`
            are several with the same tokens, whose weighted mean is decoded.
        engine: `native` (CPU), `reference` (torch), or `auto`: native unless a device is named.
        drafter: `NAME[:key=value,...]` or a `DraftMethod`; `blend` mixes several. What it learns
            is kept from request to request until `reset()`.
        budget: most nodes of a draft tree beyond its root, or `auto`: as many as pay for
            themselves by this machine's measured cost, down to plain decoding.
        threads: of the native engine; None takes the cores this process may use.
        device: of the reference engine, e.g. `cuda`.
        format: of the weights: `fp32`, `bf16`, `fp16`, `int8`, `int4`, `ternary`; `auto` is the
            checkpoint's. `,head=FORMAT` after it is that of embedding and head.
        kv_format: of the native engine's cached keys and values: `fp32`, `fp16`, `int8`; `auto` is
            `fp32`.

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
        ids, continues = self.request_builder.encode(prompt, None)
        trace, stops = self.draft_target.trace, frozenset(self.model.defaults.stop_tokens)
        found = completions(
            self.engine,
            np.array(ids, np.int32),
            n,
            max_new_tokens,
            method=method,
            alpha=alpha,
            stop_tokens=stops,
            known=[trace.tokens[text] for text in trace.texts()] if trace else [],
        )
        before = ids if continues else ()
        texts = [self._text(before, [t for t in one.tokens if t not in stops]) for one in found]
        return [
            Completion(text, one.score, one.tokens) for text, one in zip(texts, found, strict=True)
        ]

    def _text(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        text = Detokenizer(self.tokenizer, before)
        return "".join([text.push(token) for token in tokens]) + text.flush()

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
