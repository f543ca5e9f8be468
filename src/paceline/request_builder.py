"""Builds a `Request` from a prompt and user options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, Unpack, cast

from paceline.arguments import check_items, check_tokens, wrong
from paceline.compatibility import Side, check
from paceline.control.base import ControlMethod, bind
from paceline.control.guides.base import GuideMethod, guided, parse_guides
from paceline.control.guides.guide_models import GuideModels
from paceline.control.keywords import Keywords
from paceline.control.min_length import MinLength
from paceline.control.sampler_spec import SamplerSpec
from paceline.control.structured.output_parser import followed
from paceline.control.structured.tools import Choice, Tools
from paceline.control.temperature import TEMPERATURE, Temperature
from paceline.core import Floats, Request
from paceline.documents.assembly import Documents
from paceline.documents.chunk_cache import ChunkCache
from paceline.documents.prompt import around_messages, around_text, around_tokens, sink_of
from paceline.drafters.base import Drafter
from paceline.engines.base import Engine
from paceline.engines.ensemble import EnsembleEngine
from paceline.errors import MethodError, RequestError
from paceline.kvcache.base import Policy
from paceline.models import Model
from paceline.models.infill import encode_infill, infill_stops
from paceline.models.tokenizer import Tokenizer
from paceline.models.vocabulary import Vocabulary
from paceline.registry import controls
from paceline.request_options import Prompt, RequestOptions, read_options
from paceline.watermarks.base import parse_watermark

_NO_TOOLS = ("auto", "none")  # choices that need none


class RequestBuilder:
    """Builds a `Request` from user options.

    Args:
        model: checkpoint whose defaults hold for options that are not given.
        tokenizer: of that checkpoint.
        engine: runs the model.
        drafter: tells whether it can use a prediction.
        kv_policy: of requests that name none.

    Attributes:
        chunks: keeps the keys and values of documents.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        engine: Engine,
        drafter: Drafter,
        kv_policy: Policy | None = None,
    ) -> None:
        self.model, self.tokenizer, self.engine, self.drafter = model, tokenizer, engine, drafter
        self.kv_policy = kv_policy
        self.chunks = ChunkCache()

    def build(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """Return the `Request` that a prompt and options ask for.

        Args:
            prompt: text, token ids, or chat messages with `role` and `content`.
            options: see `RequestOptions`.

        Raises:
            RequestError, MethodError: what was found, what is expected.
        """
        return self.build_checked(prompt, *read_options(options))

    def build_checked(
        self, prompt: Prompt, values: Mapping[str, Any], samplers: Mapping[str, object]
    ) -> Request:
        """Return the `Request` of a prompt and of options that `read_options` has read.

        Raises:
            RequestError, MethodError: as `build`.
        """
        defaults = self.model.defaults
        spec = self._sampling(values["controls"], samplers, values["temperature"])
        temperature = defaults.temperature if spec.temperature is None else spec.temperature
        offered = _tools(values["tools"], values["tool_choice"])
        template = self.tokenizer.template if offered else None
        grammars, parser = followed(values["schema"], values["grammar"], offered, template)
        stops, split = list(values["stop_token_ids"]), values["split_special"]
        documents: Documents | None = None
        settings = values["chat_template_kwargs"]
        if values["documents"]:
            if values["suffix"] is not None:
                check({Side.DOCUMENTS: "documents", Side.INFILL: "a suffix"})
            before, after, continues = self._encode_around(prompt, offered, settings, split)
            documents, tokens = self._place(values["documents"], before, after, values["recompute"])
        elif values["recompute"]:
            raise RequestError("recompute is a share of documents, and there are none; give some")
        elif values["suffix"] is None:
            tokens, continues = self.encode(prompt, offered, settings, split)
        else:
            tokens, continues = self._encode_between(prompt, values["suffix"], split), True
            stops += [] if values["ignore_eos"] else infill_stops(self.tokenizer)
        request = Request(
            prompt=tuple(tokens),
            max_new_tokens=values["max_new_tokens"],
            temperature=temperature,
            seed=values["seed"],
            stop_tokens=self._stop_tokens(stops, values["ignore_eos"]),
            stop_strings=tuple(values["stop"]),
            stop_after=max((m.tokens for m in spec.methods if isinstance(m, MinLength)), default=0),
            include_stop=values["include_stop"],
            keep_special=values["keep_special"],
            prediction=self._predicted(values["prediction"]),
            walk=values["walk"],
            continues=continues,
            parser=parser,
            kv_policy=self._kv_policy(values["kv_policy"]),
            documents=documents,
        )
        scaling = (Temperature(temperature),) if temperature > 0 else ()
        keywords = () if values["keywords"] is None else (values["keywords"],)
        request = self._bound(request, (*spec.methods, *scaling, *grammars, *keywords))
        request = self._guided(request, values["guide"])
        mark = values["watermark"]
        mark = parse_watermark(mark) if isinstance(mark, str) else mark
        return request if mark is None else mark.mark(request)

    def without_sampling(self, options: RequestOptions) -> RequestOptions:
        """Return `options` for a strategy that draws nothing.

        Temperature and samplers of the checkpoint's defaults are left out where `options` name
        none.
        """
        deterministic = options.copy()
        if deterministic.get("temperature") is None:
            deterministic["temperature"] = 0.0
        if deterministic.get("controls") is None:
            given = cast(Mapping[str, object], options)
            deterministic["controls"] = {
                name: value
                for name, value in self.default_penalties().items()
                if given.get(name) is None
            }
        return deterministic

    def default_penalties(self) -> dict[str, float]:
        """Return the checkpoint's controls that hold for strategies that draw nothing."""
        return {
            name: value
            for name, value in self.model.defaults.samplers().items()
            if controls.find(name).order < TEMPERATURE
        }

    def _stop_tokens(self, given: Sequence[object], ignore_eos: bool) -> frozenset[int]:
        """Return the tokens that end an output: the request's, and the checkpoint's."""
        size = self.engine.config.vocab_size
        own = check_tokens("stop_token_ids", given, size) if given else ()
        return frozenset(own) | (
            frozenset() if ignore_eos else frozenset(self.model.defaults.stop_tokens)
        )

    def _encode_between(self, prompt: Prompt, suffix: str, split_special: bool) -> list[int]:
        if not isinstance(prompt, str):
            raise wrong("the prompt with a suffix", prompt, "text")
        return encode_infill(self.tokenizer, prompt, suffix, split_special=split_special)

    def _kv_policy(self, requested: Policy | Literal[False] | None) -> Policy | None:
        """Return the policy of a request: its own, none if it says so, or the default."""
        if requested is None:
            return self.kv_policy
        return requested or None

    def _sampling(
        self,
        given: str | Mapping[str, object] | Sequence[ControlMethod] | None,
        samplers: Mapping[str, object],
        temperature: float | None,
    ) -> SamplerSpec:
        """Join `controls`, samplers by name and the checkpoint's defaults.

        A default holds unless its control is named; none holds where `controls` is empty, or a
        sequence of controls.

        Raises:
            RequestError: two temperatures are given, and differ.
        """
        named_values = {name: value for name, value in samplers.items() if value is not None}
        defaults = self.model.defaults.samplers()
        if given is None:
            merged = {**defaults, **samplers}  # None turns a default off
            spec = SamplerSpec.of({k: v for k, v in merged.items() if v is not None})
            named_values = {}
        elif isinstance(given, str | Mapping):
            spec = SamplerSpec.parse(given) if isinstance(given, str) else SamplerSpec.of(given)
            said = {*samplers, *(method.name for method in spec.methods)}
            # An empty one turns the checkpoint's samplers off.
            rest = {k: v for k, v in defaults.items() if given and k not in said}
            spec = replace(spec, methods=(*SamplerSpec.of(rest).methods, *spec.methods))
        else:
            spec = SamplerSpec(methods=tuple(given))
        named = SamplerSpec.of(named_values)
        values = [value for value in (temperature, spec.temperature) if value is not None]
        if len(set(values)) > 1:
            raise RequestError(f"temperature is {values[0]:g} and {values[1]:g}; give one of them")
        return SamplerSpec(values[0] if values else None, (*spec.methods, *named.methods))

    def _bound(self, request: Request, controls: Sequence[ControlMethod]) -> Request:
        room = self.engine.config.context - len(request.prompt)
        lead = any(isinstance(control, Keywords) for control in controls)
        if lead and 0 < room < request.max_new_tokens:
            # They must come before the end of the context, too.
            request = replace(request, max_new_tokens=room)
        return bind(controls, request, self.vocabulary)

    def _guided(self, request: Request, guides: Sequence[str | GuideMethod]) -> Request:
        methods = [
            method
            for item in guides
            for method in (parse_guides(item) if isinstance(item, str) else [item])
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
        if "head.bias" in weights:
            raise MethodError("this model adds a bias to its logits, so its head does not say all")
        return weights.dense("head" if "head" in weights else "embed")

    def _predicted(self, prediction: str | Sequence[object] | None) -> tuple[int, ...]:
        if prediction is None:
            return ()
        if not self.drafter.uses_prediction:
            drafter = f"the drafter {' and '.join(self.drafter.origins)}"
            check({Side.PREDICTION: "a prediction", Side.PREDICTION_FREE_DRAFTER: drafter})
        if isinstance(prediction, str):
            return tuple(self.tokenizer.encode(prediction, special=False))
        return check_tokens("the prediction", prediction, self.engine.config.vocab_size)

    def encode(
        self,
        prompt: Prompt,
        tools: Tools | None = None,
        template_settings: Mapping[str, Any] | None = None,
        split_special: bool = False,
    ) -> tuple[list[int], bool]:
        """Return the prompt's tokens, and whether the output's text continues the prompt's.

        The answer to chat messages begins anew, unless it continues the last one; that to other
        prompts continues them.

        Raises:
            RequestError: the prompt is neither text nor token ids nor messages, or the chat
                template refuses the messages.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, split_special=split_special), True
        items = check_items("the prompt", prompt, "text, token ids or chat messages")
        if not any(isinstance(item, Mapping) for item in items):
            return list(check_tokens("the prompt", items, self.engine.config.vocab_size)), True
        messages = check_messages(items)
        continues = bool((template_settings or {}).get("continue_final_message"))
        if tools:
            given = (messages, self.tokenizer, template_settings, split_special)
            return tools.encode(*given), continues
        encode = self.tokenizer.encode_chat
        ids = encode(messages, settings=template_settings, split_special=split_special)
        return ids, continues

    def _place(
        self, texts: Sequence[str], before: list[int], after: list[int], recompute: float
    ) -> tuple[Documents, list[int]]:
        """Return documents between two parts of a prompt, and the tokens of it all."""
        if not after:
            raise RequestError("the prompt behind the documents is empty; give at least one token")
        sink = sink_of(self.tokenizer)
        parts = [self.tokenizer.encode(text, False, split_special=True) for text in texts]
        before = before or list(sink)
        sizes = tuple(map(len, parts))
        documents = Documents(len(before), sizes, sink, recompute, self.chunks)
        return documents, [*before, *(token for part in parts for token in part), *after]

    def _encode_around(
        self,
        prompt: Prompt,
        tools: Tools | None,
        settings: Mapping[str, Any] | None,
        split_special: bool,
    ) -> tuple[list[int], list[int], bool]:
        """Return a prompt's tokens before and behind documents; the rest as `encode`."""
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            return *around_text(tokenizer, prompt, split_special), True
        items = check_items("the prompt", prompt, "text, token ids or chat messages")
        if not any(isinstance(item, Mapping) for item in items):
            tokens = check_tokens("the prompt", items, self.engine.config.vocab_size)
            return *around_tokens(tokenizer, list(tokens)), True

        def encode(messages: Sequence[Mapping[str, Any]], mark: str) -> list[list[int]]:
            offered, given = tools.offered(messages, tokenizer) if tools else (messages, ())
            return tokenizer.encode_chat_parts(offered, given, settings, split_special, mark)

        continues = bool((settings or {}).get("continue_final_message"))
        return *around_messages(check_messages(items), encode), continues


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Return chat messages as a list.

    Raises:
        RequestError: one is no mapping with a `role`.
    """
    items = check_items("messages", messages, _MESSAGES)
    if not items:
        raise wrong("messages", messages, _MESSAGES)
    for item in items:
        if not isinstance(item, Mapping):
            raise wrong("a message", item, 'a dict such as {"role": "user", "content": "Hi"}')
        if not isinstance(item.get("role"), str):
            raise wrong("the role of a message", item.get("role"), "text such as user")
    return [dict(item) for item in items]


_MESSAGES = 'a list such as [{"role": "user", "content": "Hi"}]'


def _tools(tools: Sequence[Mapping[str, Any]], choice: Choice) -> Tools | None:
    return Tools.of(tools, choice) if tools or choice not in _NO_TOOLS else None
