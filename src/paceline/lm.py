"""The front door: a checkpoint, an engine and a drafter, ready to generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from paceline import registry
from paceline.control.base import ControlMethod, bind
from paceline.control.grammar import Grammar
from paceline.control.guides.base import GuideMethod, guided, parse_guide
from paceline.control.guides.beside import Beside
from paceline.control.keywords import Keywords
from paceline.control.reading import followed
from paceline.control.sampling import Sampling
from paceline.control.temperature import TEMPERATURE, Temperature
from paceline.control.tools import Choice, Tools
from paceline.core import Floats, Output, Request
from paceline.decoding.completions import completions
from paceline.decoding.governor import Budget, Fixed, Governor
from paceline.decoding.loop import Generation
from paceline.decoding.strategies.base import Found, Strategy, Task
from paceline.decoding.text import TextStream
from paceline.drafters.base import DraftMethod, Target
from paceline.drafters.learnt import read_learnt, write_learnt
from paceline.drafters.trace import known_trace
from paceline.engines import open_engine
from paceline.engines.base import Engine
from paceline.engines.ensemble import EnsembleEngine, parse_ensemble
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models import Model, load
from paceline.models.detokenize import Detokenizer
from paceline.models.tokenizer import same_tokens
from paceline.models.vocabulary import Vocabulary
from paceline.watermarks.base import Watermark, parse_watermark

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
_NO_TOOLS = ("auto", "none")  # choices that need none
Controls = str | Mapping[str, object] | Sequence[ControlMethod]
Guides = str | GuideMethod | Sequence[str | GuideMethod]


class Options(TypedDict, total=False):
    """Options of a request, as `LM.request` explains them."""

    max_new_tokens: int
    temperature: float | None
    seed: int
    controls: Controls | None
    schema: object
    grammar: Grammar | str | None
    keywords: Keywords | str | Sequence[str] | None
    guide: Guides
    tools: Sequence[Mapping[str, Any]]
    tool_choice: Choice
    stop: Sequence[str]
    ignore_eos: bool
    prediction: str | Sequence[int] | None
    walk: str
    watermark: Watermark | str | None


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
        self.method = registry.drafters.parse(drafter) if isinstance(drafter, str) else drafter
        parts = parse_ensemble(model) if isinstance(model, str) else [(model, 1.0)]
        models = [load(source) for source, _ in parts]
        self.model = models[0]
        self.tokenizer = self.model.tokenizer
        engines = [
            open_engine(
                each,
                engine,
                threads=threads,
                device=device,
                weight_format=format,
                kv_format=kv_format,
            )
            for each in models
        ]
        self.engine: Engine = engines[0]
        trace = None
        if len(models) > 1:
            _check_tokens(models)
            self.engine = EnsembleEngine(engines, [weight for _, weight in parts])
        else:
            trace = known_trace(self.model, self.engine.config.vocab_size)
        self.target = Target(self.engine.config.vocab_size, self.engine, self.tokenizer, trace)
        self.budget = self._open_budget(budget)
        self.drafter = self.method.build(self.target)
        self.load_seconds = perf_counter() - start

    def request(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        seed: int = 0,
        controls: Controls | None = None,
        schema: object = None,
        grammar: Grammar | str | None = None,
        keywords: Keywords | str | Sequence[str] | None = None,
        guide: Guides = (),
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: Choice = "auto",
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        prediction: str | Sequence[int] | None = None,
        walk: str = "gumbel",
        watermark: Watermark | str | None = None,
    ) -> Request:
        """Turn what a user gives into a `Request`.

        Args:
            prompt: text, chat messages (`role`, `content`) or token ids.
            max_new_tokens: upper limit of the output.
            temperature: 0 is greedy; None takes the checkpoint's default.
            seed: the same seed gives the same output, whatever the drafter.
            controls: besides temperature; as `Sampling.parse` or `Sampling.of` read them, or
                methods. None takes the checkpoint's defaults.
            schema: a JSON schema that the output follows: a mapping, text, or a pydantic model.
            grammar: what else it follows: Lark rules, `Grammar(regex)`, `Grammar.choice(texts)`.
            keywords: words that the output has, in any order, as a list or as `dog;ice cream`;
                `Keywords` has more settings.
            guide: other models or other texts that steer it: `NAME:key=value,...` or a
                `GuideMethod`, or several whose order is defined.
            tools: functions that the model may call, as OpenAI's API takes them; chat messages
                offer them to the model, other prompts have to do so themselves.
            tool_choice: `auto`, `none`, `required` (the output is calls) or the name of a tool.
            stop: strings that end the output.
            ignore_eos: go on past the checkpoint's stop tokens.
            prediction: what the output is expected to be, as text or token ids: a draft, a
                template, the document to edit. It makes the output no different, only faster.
            walk: `gumbel` draws what plain decoding draws; `rejection`, for draft models, by the
                same law but other tokens.
            watermark: `key=SECRET,kind=KIND,...`, or a `Watermark`: text that the key recognises.

        Raises:
            RequestError: a number out of range, or a prediction that the drafter cannot use.
        """
        defaults = self.model.defaults
        sampling = _sampling(defaults.samplers() if controls is None else controls, temperature)
        heat = defaults.temperature if sampling.temperature is None else sampling.temperature
        heated = (Temperature(heat),) if heat > 0 else ()
        offered = Tools.of(tools, tool_choice) if tools or tool_choice not in _NO_TOOLS else None
        template = self.tokenizer.template if offered else None
        grammars, reading = followed(schema, grammar, offered, template)
        request = Request(
            prompt=tuple(self._encode(prompt, offered)),
            max_new_tokens=max_new_tokens,
            temperature=heat,
            seed=seed,
            stop_tokens=frozenset() if ignore_eos else frozenset(defaults.stop_tokens),
            stop_strings=tuple(stop),
            prediction=self._predicted(prediction),
            walk=walk,
            reading=reading,
        )
        texts: list[ControlMethod] = [*grammars]
        if isinstance(keywords, str):
            texts.append(Keywords(keywords))
        elif keywords is not None:
            texts.append(keywords if isinstance(keywords, Keywords) else Keywords.of(keywords))
        bound = (*sampling.methods, *heated, *texts)
        room = self.engine.config.context - len(request.prompt)
        if 0 < room < max_new_tokens and any(isinstance(each, Keywords) for each in bound):
            # They must come before the end of the context, too.
            request = replace(request, max_new_tokens=room)
        request = bind(bound, request, self.vocabulary)
        chosen = [guide] if isinstance(guide, str | GuideMethod) else guide
        methods = [parse_guide(item) if isinstance(item, str) else item for item in chosen]
        if methods:
            request = guided(request, methods, self.beside)
        if watermark is None:
            return request
        mark = parse_watermark(watermark) if isinstance(watermark, str) else watermark
        return mark.mark(request)

    def stream(self, request: Request) -> Generation:
        """Start a request; iterate over the result for its text."""
        text = TextStream(Detokenizer(self.tokenizer), request.stop_strings)
        generation = Generation(self.engine, self.drafter, request, self.budget, text)
        generation.output.seconds.load = self.load_seconds + self.beside.seconds
        return generation

    def generate(
        self, prompt: Prompt, *, strategy: str | Strategy | None = None, **options: Unpack[Options]
    ) -> Output:
        """The whole answer to `prompt`; the options are those of `request` and `search`."""
        if strategy is not None:
            return self.search(prompt, strategy, **options)[0]
        return self.stream(self.request(prompt, **options)).run()

    def search(
        self, prompt: Prompt, strategy: str | Strategy, **options: Unpack[Options]
    ) -> list[Found]:
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
            options = self.undrawn(options)

        def rebind(seed: int) -> Request:
            again = options.copy()
            again["seed"] = seed
            return self.request(prompt, **again)

        task = Task(
            self.engine,
            self.request(prompt, **options),
            lambda: TextStream(Detokenizer(self.tokenizer), tuple(options.get("stop", ()))),
            rebind,
            self.drafter,
            lambda: self.drafter.beside() or self.method.build(self.target),
            self.budget,
        )
        outputs: list[Found] = method.run(task)
        for output in outputs:
            output.seconds.load = self.load_seconds
        return outputs

    def undrawn(self, options: Options) -> Options:
        """The options without those of the checkpoint's defaults that sample."""
        found = options.copy()
        if found.get("temperature") is None:
            found["temperature"] = 0.0
        if found.get("controls") is None:
            samplers = Sampling.of(self.model.defaults.samplers()).methods
            found["controls"] = [control for control in samplers if control.order < TEMPERATURE]
        return found

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
                far less likely continuations; see `decoding/superposed.py`.
            alpha: of `superposed`: weight, 0 to 1, of n-grams of the prompt and of what
                `paceline warm` kept. None is 0.

        Raises:
            MethodError, RequestError: what is wrong and what to do.
        """
        ids = np.array(self._encode(prompt, None), np.int32)
        trace, stops = self.target.trace, frozenset(self.model.defaults.stop_tokens)
        found = completions(
            self.engine,
            ids,
            n,
            max_new_tokens,
            method=method,
            alpha=alpha,
            stop_tokens=stops,
            known=[trace.tokens[text] for text in trace.texts()] if trace else [],
        )
        return [Completion(self._text(one.tokens, stops), one.score, one.tokens) for one in found]

    def _text(self, tokens: Sequence[int], stops: frozenset[int]) -> str:
        text = Detokenizer(self.tokenizer)
        return "".join([text.push(t) for t in tokens if t not in stops]) + text.flush()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens and what they add to a text."""
        return Vocabulary(self.engine.config.vocab_size, self.tokenizer, self._head)

    @cached_property
    def beside(self) -> Beside:
        """The models of guides, kept once they are opened."""
        return Beside(self.engine, self.tokenizer)

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

    def _head(self) -> Floats:
        if isinstance(self.engine, EnsembleEngine):
            raise MethodError("an ensemble has no output head of its own; take one model")
        if self.model.config.logit_softcap:
            raise MethodError("this model bends its logits (softcap), so its head does not say all")
        weights = self.model.weights
        return weights["head" if "head" in weights else "embed"]

    def _open_budget(self, budget: int | str) -> Budget:
        if isinstance(budget, int):
            return Fixed(budget)
        if budget != "auto":
            raise RequestError(f"the budget is {budget!r}, expected a number of nodes or auto")
        from paceline.measuring.costfile import known_cost

        return Governor(known_cost(self.engine))

    def _predicted(self, prediction: str | Sequence[int] | None) -> tuple[int, ...]:
        if prediction is None:
            return ()
        if not self.drafter.uses_prediction:
            raise RequestError(
                f"the drafter {' and '.join(self.drafter.origins)} has no use for a prediction; "
                "take one that follows it, e.g. phrases"
            )
        if isinstance(prediction, str):
            return tuple(self.tokenizer.encode(prediction, special=False))
        return tuple(int(token) for token in prediction)

    def _encode(self, prompt: Prompt, tools: Tools | None) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        messages = [item for item in prompt if isinstance(item, dict)]
        if messages and tools:
            return tools.encode(messages, self.tokenizer)
        if messages:
            return self.tokenizer.encode_chat(messages)
        return [int(token) for token in prompt if not isinstance(token, dict)]


def _sampling(controls: Controls, temperature: float | None) -> Sampling:
    """What was asked for; a temperature in both places must be the same."""
    if isinstance(controls, str):
        found = Sampling.parse(controls)
    elif isinstance(controls, Mapping):
        found = Sampling.of(controls)
    else:
        found = Sampling(methods=tuple(controls))
    heats = [heat for heat in (temperature, found.temperature) if heat is not None]
    if len(set(heats)) > 1:
        raise RequestError(f"temperature is {heats[0]:g} and {heats[1]:g}; give one of them")
    return Sampling(heats[0] if heats else None, found.methods)


def _check_tokens(models: list[Model]) -> None:
    first, *others = models
    for other in others:
        if not same_tokens(first.tokenizer, other.tokenizer):
            raise ModelError(
                f"{first.path.name} and {other.path.name} have other tokens; an ensemble needs "
                "models with the same tokenizer"
            )
