"""The options of a request: their names, types, defaults and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from paceline import registry
from paceline.arguments import (
    check_flag,
    check_integer,
    check_items,
    check_number,
    check_text,
    check_texts,
    plain_setting,
    wrong,
)
from paceline.control.base import ControlMethod
from paceline.control.grammar import Grammar
from paceline.control.guides.base import GuideMethod
from paceline.control.keywords import Keywords
from paceline.control.structured.function_schema import function_tool
from paceline.control.structured.tools import Choice
from paceline.documents.prompt import document_texts
from paceline.errors import MethodError, RequestError, unknown
from paceline.kvcache.base import Policy, parse_policy
from paceline.watermarks.base import Watermark

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
Prompts = list[str] | list[list[int]] | list[list[dict[str, Any]]]
Controls = str | Mapping[str, object] | ControlMethod | Sequence[ControlMethod]
Guides = str | GuideMethod | Sequence[str | GuideMethod]
Tool = Mapping[str, Any] | Callable[..., Any]


class RequestOptions(TypedDict, total=False):
    """Options of a request; None takes the default.

    The samplers at the end are controls by their names, set by their first setting. Any other
    registered control can be given so, too: `paceline methods control` lists them. What is given
    by name takes the place of the checkpoint's default of that name, and of no other. `top_k=0`,
    `top_p=1`, `min_p=0` and a penalty that changes nothing switch a default off.

    Attributes:
        max_new_tokens: upper limit of the output, in tokens. Default 256.
        temperature: 0 is greedy. Default: the checkpoint's, which is 0 unless it asks for sampling.
        seed: the same seed gives the same output, whatever the drafter. Default 0.
        controls: samplers and constraints: text as `--sampler` takes it, a mapping such as
            `{"min_p": 0.05, "dry.base": 2}`, or methods. A default of the checkpoint holds unless
            its control is named; `{}` switches all of them off, as a list of methods does.
        schema: JSON schema that the output follows: a mapping, text, or a pydantic model.
        grammar: another grammar that it follows: Lark rules, `Grammar(regex)`, or
            `Grammar.choice(texts)`.
        keywords: words that the output must contain, in any order, as a list or as
            `dog;ice cream`; `Keywords` has more settings.
        guide: other models or other texts that steer the output: `NAME:key=value,...`, a
            `GuideMethod`, or several whose order is defined.
        tools: functions that the model may call: Python functions, or schemas as OpenAI's API
            takes them. Chat messages offer them to the model; other prompts have to do so
            themselves. `Output.tool_calls` has the calls.
        chat_template_kwargs: further variables of the chat template, e.g.
            `{"enable_thinking": False}`.
        tool_choice: `auto`, `none`, `required` (the output is calls) or the name of a tool.
        suffix: text behind what is written: the model fills in the middle between prompt and
            suffix. The prompt is text, and the model one that has tokens for it.
        stop: a string, or several, that end the output and are no part of it.
        stop_token_ids: tokens that end the output besides the checkpoint's, also with `ignore_eos`.
        include_stop: the text includes the stop string that ended it. Default False.
        keep_special: special tokens that the model writes are part of the text, except the stop
            token that ends it. Default False.
        split_special: special tokens in a prompt, or in the messages of users, tools and systems,
            are text: nobody can end a turn by writing the token that ends it. Default False, as in
            transformers.
        ignore_eos: keep generating after the checkpoint's stop tokens. Default False.
        prediction: expected output, as text or token ids: a draft, a template, the document to
            edit. It makes the output faster, never different.
        walk: `gumbel` draws the tokens of plain decoding; `rejection`, for draft models, draws
            from the same distribution, but other tokens. Default `gumbel`.
        watermark: `key=SECRET,kind=KIND,...`, or a `Watermark`, that a detector with the key finds.
        kv_policy: `NAME[:key=value,...]` or a `Policy`, which bounds the cache of keys and values;
            lossy. `False` keeps all rows. Default: that of the `LM`.
        documents: texts that stand before the prompt, or before the last user's message of a
            conversation: strings, or mappings with `text` and `title`. Each is computed once,
            apart from the others, and reused by later requests; lossy, as documents then do not
            see each other. Special tokens in them are text.
        recompute: share of each document's tokens, 0 to 1, that are computed again behind the
            documents before it: those that depend most on them. Default 0.
        top_k: keep the k most probable tokens.
        top_p: keep the most probable tokens whose probabilities sum to p.
        min_p: drop tokens with less than p times the largest probability.
        typical: keep the tokens of typical information whose probabilities sum to this.
        repetition_penalty: divide the positive logits of tokens that were there by this.
        frequency_penalty: subtract this for each time that the output has the token.
        presence_penalty: subtract this once if the output has the token.
        no_repeat_ngram: no run of so many tokens comes twice.
        min_length: no end before so many tokens.
        logit_bias: added to the logits of tokens, by token id.
        bad_words: texts that the output must not contain.
    """

    max_new_tokens: int | None
    temperature: float | None
    seed: int | None
    controls: Controls | None
    schema: object
    grammar: Grammar | str | None
    keywords: Keywords | str | Sequence[str] | None
    guide: Guides | None
    tools: Sequence[Tool] | None
    chat_template_kwargs: Mapping[str, Any] | None
    tool_choice: Choice | None
    suffix: str | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    keep_special: bool | None
    split_special: bool | None
    ignore_eos: bool | None
    prediction: str | Sequence[int] | None
    walk: str | None
    watermark: Watermark | str | None
    kv_policy: Policy | str | Literal[False] | None
    documents: Sequence[str | Mapping[str, str]] | None
    recompute: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    no_repeat_ngram: int | None
    min_length: int | None
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str | int | Sequence[int]] | None


# Values that switch a sampler off, where the method itself refuses them or would do nothing.
_OFF: dict[str, tuple[float, ...]] = {
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "typical": (1,),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "no_repeat_ngram": (0,),
    "min_length": (0,),
}


def several_prompts(prompt: object) -> list[Any] | None:
    """Return the prompts of a list of prompts; None if `prompt` is one prompt itself."""
    if isinstance(prompt, np.ndarray) and prompt.ndim:
        prompt = prompt.tolist()
    if not isinstance(prompt, list | tuple) or not prompt:
        return None
    alone = any(not isinstance(item, str | list | tuple | np.ndarray) for item in prompt)
    return None if alone else list(prompt)


def held_prompt(prompt: Prompt) -> Any:
    """Return a prompt that can be read twice."""
    return list(prompt) if isinstance(prompt, Iterator) else prompt


def read_options(options: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, object]]:
    """Check options and split them.

    Returns:
        every option of `RequestOptions` but the samplers, with the default where none is given;
        and the samplers that are given by name, None where one is switched off.

    Raises:
        RequestError, MethodError: an option is unknown, or its value of the wrong type.
    """
    values: dict[str, Any] = dict(_DEFAULTS)
    samplers: dict[str, object] = {}
    for name, value in options.items():
        if name in _DEFAULTS:
            if value is not None:
                values[name] = _CHECKS[name](name, value)
        elif name in (controls := registry.controls.methods()):
            if value is not None:
                setting = plain_setting(name, value)
                off = isinstance(setting, int | float) and setting in _OFF.get(name, ())
                samplers[name] = None if off else setting
        else:
            named = {each for each, kind in controls.items() if not kind.hidden}
            raise MethodError(unknown("option", name, named | _DEFAULTS.keys()))
    return values, samplers


def _controls(name: str, value: object) -> Any:
    if isinstance(value, Mapping):
        names = [check_text(f"a name in {name}", key) for key in value]
        return {key: plain_setting(f"{name}.{key}", value[key]) for key in names}
    if isinstance(value, str):
        return value
    items = [value] if isinstance(value, ControlMethod) else check_items(name, value, _SAMPLERS)
    for item in items:
        if not isinstance(item, ControlMethod):
            raise wrong(f"an item of {name}", item, "a control; give names and values as a mapping")
    return items


_SAMPLERS = "text such as top_p=0.9, a mapping, or controls"


def _one_of(kind: type, expected: str) -> Callable[[str, object], Any]:
    def check(name: str, value: object) -> Any:
        return value if isinstance(value, kind) else check_text(name, value, expected)

    return check


def _keywords(name: str, value: object) -> Keywords:
    if isinstance(value, Keywords):
        return value
    return Keywords(value) if isinstance(value, str) else Keywords.of(check_texts(name, value))


def _guides(name: str, value: object) -> list[str | GuideMethod]:
    if isinstance(value, str | GuideMethod):
        return [value]
    items = check_items(name, value, "text such as cfg:negative=TEXT, or a list of guides")
    return [_GUIDE(f"an item of {name}", item) for item in items]


_GUIDE = _one_of(GuideMethod, "text such as cfg:negative=TEXT, or a guide")


def _tools(name: str, value: object) -> list[Mapping[str, Any]]:
    items = check_items(name, value, "a list of functions")
    return [function_tool(item) if callable(item) else item for item in items]


def _template_settings(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a mapping of the template's variables")
    for key in value:
        if key in _OWN:
            raise RequestError(f"{name} sets {key}, which the request itself gives; leave it out")
        check_text(f"a name in {name}", key)
    return value


_OWN = ("messages", "tools", "bos_token", "eos_token")


def _tool_choice(name: str, value: object) -> Any:
    return value if isinstance(value, Mapping) else check_text(name, value)


def _kv_policy(name: str, value: object) -> Policy | Literal[False]:
    if value is False or isinstance(value, Policy):
        return value
    return parse_policy(check_text(name, value, "NAME:key=value,..., a Policy, or False"))


def _share(name: str, value: object) -> float:
    share = check_number(name, value)
    if not 0 <= share <= 1:
        raise RequestError(f"{name} is {share:g}, expected 0 to 1")
    return share


def _stop(name: str, value: object) -> tuple[str, ...]:
    texts = check_texts(name, value)
    if "" in texts:
        raise RequestError(f"{name} has an empty string, expected texts that end the output")
    return texts


def _prediction(name: str, value: object) -> Any:
    return value if isinstance(value, str) else check_items(name, value, "text or token ids")


def _token_ids(name: str, value: object) -> list[object]:
    return check_items(name, value, "token ids")


def _at_least_one(name: str, value: object) -> int:
    return check_integer(name, value, low=1)


def _seed(name: str, value: object) -> int:
    return check_integer(name, value, high=(1 << 64) - 1)


def _anything(name: str, value: object) -> object:
    return value


_DEFAULTS: dict[str, object] = {
    "max_new_tokens": 256,
    "temperature": None,
    "seed": 0,
    "controls": None,
    "schema": None,
    "grammar": None,
    "keywords": None,
    "guide": (),
    "tools": (),
    "chat_template_kwargs": None,
    "tool_choice": "auto",
    "suffix": None,
    "stop": (),
    "stop_token_ids": (),
    "include_stop": False,
    "keep_special": False,
    "split_special": False,
    "ignore_eos": False,
    "prediction": None,
    "walk": "gumbel",
    "watermark": None,
    "kv_policy": None,
    "documents": (),
    "recompute": 0.0,
}
_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "max_new_tokens": _at_least_one,
    "temperature": check_number,
    "seed": _seed,
    "controls": _controls,
    "schema": _anything,
    "grammar": _one_of(Grammar, "Lark rules or a Grammar"),
    "keywords": _keywords,
    "guide": _guides,
    "tools": _tools,
    "chat_template_kwargs": _template_settings,
    "tool_choice": _tool_choice,
    "suffix": check_text,
    "stop": _stop,
    "stop_token_ids": _token_ids,
    "include_stop": check_flag,
    "keep_special": check_flag,
    "split_special": check_flag,
    "ignore_eos": check_flag,
    "prediction": _prediction,
    "walk": check_text,
    "watermark": _one_of(Watermark, "key=SECRET,... or a Watermark"),
    "kv_policy": _kv_policy,
    "documents": document_texts,
    "recompute": _share,
}
