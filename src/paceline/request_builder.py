"""What a user asks for, turned into a `Request`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypedDict

from paceline.control.base import ControlMethod, bind
from paceline.control.grammar import Grammar
from paceline.control.guides.base import GuideMethod, guided, parse_guides
from paceline.control.guides.guide_models import GuideModels
from paceline.control.keywords import Keywords
from paceline.control.sampler_spec import SamplerSpec
from paceline.control.structured.output_parser import followed
from paceline.control.structured.tools import Choice, Tools
from paceline.control.temperature import TEMPERATURE, Temperature
from paceline.core import Floats, Request
from paceline.drafters.base import Drafter
from paceline.engines.base import Engine
from paceline.engines.ensemble import EnsembleEngine
from paceline.errors import MethodError, RequestError
from paceline.models import Model
from paceline.models.tokenizer import Tokenizer
from paceline.models.vocabulary import Vocabulary
from paceline.watermarks.base import Watermark, parse_watermark

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
_NO_TOOLS = ("auto", "none")  # choices that need none
Controls = str | Mapping[str, object] | Sequence[ControlMethod]
Guides = str | GuideMethod | Sequence[str | GuideMethod]


class RequestOptions(TypedDict, total=False):
    """RequestOptions of a request, as `LM.request` explains them."""

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


class RequestBuilder:
    """Builds a `Request` from user options.

    Args:
        model: checkpoint whose defaults hold for options that are not given.
        tokenizer: of that checkpoint.
        engine: runs the model.
        drafter: tells whether it can use a prediction.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, engine: Engine, drafter: Drafter
    ) -> None:
        self.model, self.tokenizer, self.engine, self.drafter = model, tokenizer, engine, drafter

    def build(
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
            controls: besides temperature; as `SamplerSpec.parse` or `SamplerSpec.of` read them, or
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
        temperature = sampling.temperature
        temperature = defaults.temperature if temperature is None else temperature
        offered = Tools.of(tools, tool_choice) if tools or tool_choice not in _NO_TOOLS else None
        template = self.tokenizer.template if offered else None
        grammars, parser = followed(schema, grammar, offered, template)
        tokens, continues = self.encode(prompt, offered)
        request = Request(
            prompt=tuple(tokens),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_tokens=frozenset() if ignore_eos else frozenset(defaults.stop_tokens),
            stop_strings=tuple(stop),
            prediction=self._predicted(prediction),
            walk=walk,
            continues=continues,
            parser=parser,
        )
        scaling = (Temperature(temperature),) if temperature > 0 else ()
        bound = (*sampling.methods, *scaling, *grammars, *_keywords(keywords))
        request = self._steered(self._bound(request, bound), guide)
        if watermark is None:
            return request
        mark = parse_watermark(watermark) if isinstance(watermark, str) else watermark
        return mark.mark(request)

    def without_sampling(self, options: RequestOptions) -> RequestOptions:
        """Return `options` for a strategy that draws nothing.

        Temperature and samplers of the checkpoint's defaults are left out where `options` name
        none.
        """
        deterministic = options.copy()
        if deterministic.get("temperature") is None:
            deterministic["temperature"] = 0.0
        if deterministic.get("controls") is None:
            samplers = SamplerSpec.of(self.model.defaults.samplers()).methods
            kept = [control for control in samplers if control.order < TEMPERATURE]
            deterministic["controls"] = kept
        return deterministic

    def _bound(self, request: Request, controls: Sequence[ControlMethod]) -> Request:
        room = self.engine.config.context - len(request.prompt)
        lead = any(isinstance(control, Keywords) for control in controls)
        if lead and 0 < room < request.max_new_tokens:
            # They must come before the end of the context, too.
            request = replace(request, max_new_tokens=room)
        return bind(controls, request, self.vocabulary)

    def _steered(self, request: Request, guide: Guides) -> Request:
        chosen = [guide] if isinstance(guide, str | GuideMethod) else guide
        methods = [
            guide
            for item in chosen
            for guide in (parse_guides(item) if isinstance(item, str) else [item])
        ]
        return guided(request, methods, self.guide_models) if methods else request

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens and what they add to a text."""
        return Vocabulary(self.engine.config.vocab_size, self.tokenizer, self._head)

    @cached_property
    def guide_models(self) -> GuideModels:
        """Models of guides; opened on first use and kept."""
        return GuideModels(self.engine, self.tokenizer)

    def _head(self) -> Floats:
        if isinstance(self.engine, EnsembleEngine):
            raise MethodError("an ensemble has no output head of its own; take one model")
        if self.model.config.logit_softcap:
            raise MethodError("this model bends its logits (softcap), so its head does not say all")
        weights = self.model.weights
        return weights.dense("head" if "head" in weights else "embed")

    def _predicted(self, prediction: str | Sequence[int] | None) -> tuple[int, ...]:
        if prediction is None:
            return ()
        if not self.drafter.uses_prediction:
            raise RequestError(
                f"the drafter {' and '.join(self.drafter.origins)} has no use for a prediction; "
                "take one that follows it, e.g. predicted_output"
            )
        if isinstance(prediction, str):
            return tuple(self.tokenizer.encode(prediction, special=False))
        return tuple(int(token) for token in prediction)

    def encode(self, prompt: Prompt, tools: Tools | None) -> tuple[list[int], bool]:
        """The prompt's tokens, and whether the output goes on in its text; a chat's does not."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), True
        messages = [item for item in prompt if isinstance(item, dict)]
        if messages and tools:
            return tools.encode(messages, self.tokenizer), False
        if messages:
            return self.tokenizer.encode_chat(messages), False
        return [int(token) for token in prompt if not isinstance(token, dict)], True


def _sampling(controls: Controls, temperature: float | None) -> SamplerSpec:
    """What was asked for; a temperature in both places must be the same."""
    if isinstance(controls, str):
        spec = SamplerSpec.parse(controls)
    elif isinstance(controls, Mapping):
        spec = SamplerSpec.of(controls)
    else:
        spec = SamplerSpec(methods=tuple(controls))
    values = [value for value in (temperature, spec.temperature) if value is not None]
    if len(set(values)) > 1:
        raise RequestError(f"temperature is {values[0]:g} and {values[1]:g}; give one of them")
    return SamplerSpec(values[0] if values else None, spec.methods)


def _keywords(given: Keywords | str | Sequence[str] | None) -> list[Keywords]:
    if given is None:
        return []
    if isinstance(given, str):
        return [Keywords(given)]
    return [given if isinstance(given, Keywords) else Keywords.of(given)]
