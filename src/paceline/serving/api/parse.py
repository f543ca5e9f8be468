"""From a body to what the worker is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from paceline.control.grammar import Grammar
from paceline.control.guides.base import GuideMethod
from paceline.core import Parsed, Request
from paceline.errors import RequestError
from paceline.registry import drafters
from paceline.request_builder import RequestOptions
from paceline.serving.api.choices import ChoicePlan, check_differ, plan_choices
from paceline.serving.api.sampling import sampling
from paceline.serving.api.schemas import (
    ChatBody,
    CompletionBody,
    Message,
    ResponseFormat,
    SamplingBody,
    TextPart,
)
from paceline.serving.messages import Job
from paceline.serving.operator_policy import OperatorPolicy, negative
from paceline.watermarks.base import Watermark

if TYPE_CHECKING:
    from paceline.lm import LM


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may ask for.

    Attributes:
        new_tokens: most tokens of an answer.
        prompt_tokens: most tokens of a prompt.
        default_tokens: where the body names no number; None takes what is left of the context.
        drafters: what `speculation.drafter` may name.
        answers: most answers to one request, over all its prompts.
        steering: what marks and steers answers.
    """

    new_tokens: int | None = None
    prompt_tokens: int | None = None
    default_tokens: int | None = None
    drafters: Sequence[str] = (
        "plain",
        "lookup",
        "recycle",
        "suffix",
        "lookahead_trie",
        "predicted_output",
        "blend",
    )
    answers: int = 128
    steering: OperatorPolicy = field(default_factory=OperatorPolicy)


def completion_jobs(
    lm: LM, body: CompletionBody, job_id: str, client: str, limits: RequestLimits
) -> list[list[Job]]:
    """The answers wanted to each prompt.

    Raises:
        PacelineError: something in the body cannot be.
    """
    prompts = _prompts(body.prompt)
    wanted = plan_choices(body, len(prompts), limits.answers)
    options = _options(lm, body, limits, wanted, _grammar(body, None))
    options["max_new_tokens"] = _most(lm, body.max_tokens, limits, options["watermark"])
    asked = []
    for place, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            _check_text(lm, "the prompt", prompt, limits)
        make = partial(lm.request, prompt, **options)
        name = f"{job_id}-{place}"
        asked.append(_answers(name, make, wanted, body, client, limits, body.logprobs))
    return asked


def chat_jobs(lm: LM, body: ChatBody, job_id: str, client: str, limits: RequestLimits) -> list[Job]:
    """The answers wanted to a conversation.

    Raises:
        PacelineError: something in the body cannot be.
    """
    if body.max_tokens and body.max_completion_tokens:
        raise RequestError("max_tokens and max_completion_tokens are both given; give one")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true")
    messages = [message_of(message) for message in body.messages]
    said = "".join(str(message.get("content", "")) for message in messages)
    _check_text(lm, "the conversation", said, limits)
    wanted = plan_choices(body, 1, limits.answers)
    options = _options(lm, body, limits, wanted, _grammar(body, body.response_format))
    if body.tools:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if body.tool_choice is not None:
        choice = body.tool_choice
        options["tool_choice"] = choice if isinstance(choice, str) else choice.function.name
    wished = body.max_completion_tokens or body.max_tokens
    most = _most(lm, wished, limits, options["watermark"])
    make: Callable[..., Request] = partial(lm.request, messages, max_new_tokens=most, **options)
    if body.parallel_tool_calls is False:
        make = partial(_calling_once, make)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _answers(job_id, make, wanted, body, client, limits, logprobs)


def _calling_once(make: Callable[..., Request], seed: int) -> Request:
    """A request of whose calls the first counts."""
    request = make(seed=seed)
    parser = request.parser
    if parser is None:
        return request

    def first(text: str) -> Parsed:
        parsed = parser(text)
        return parsed._replace(tool_calls=parsed.tool_calls[:1])

    return replace(request, parser=first)


def message_of(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    found = message.model_dump(exclude_none=True)
    if message.content is not None:
        found["content"] = _joined(message.content)
    return found


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list; give at least one prompt")
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def _most(lm: LM, wished: int | None, limits: RequestLimits, mark: Watermark | None) -> int:
    """Tokens of an answer at most."""
    if wished is not None and limits.new_tokens is not None and wished > limits.new_tokens:
        raise RequestError(f"max_tokens is {wished}, this server gives {limits.new_tokens} at most")
    if wished is not None:
        return wished
    found = limits.default_tokens or lm.engine.config.context
    longest = mark.longest if mark else None
    return min(found, limits.new_tokens or found, longest or found)


def _check_text(lm: LM, what: str, text: str, limits: RequestLimits) -> None:
    """Refuse, before it takes time and memory, what is too long however it is divided."""
    most, who = lm.engine.config.context, "the model sees"
    if limits.prompt_tokens is not None and limits.prompt_tokens < most:
        most, who = limits.prompt_tokens, "this server takes"
    size = len(text.encode(errors="replace"))
    if size > (most + 1) * lm.vocabulary.longest:
        raise RequestError(f"{what} has {size} bytes, and {who} {most} tokens; shorten it")


def _options(
    lm: LM,
    body: CompletionBody | ChatBody,
    limits: RequestLimits,
    wanted: ChoicePlan,
    grammar: Grammar | None,
) -> dict[str, Any]:
    """The options of `LM.request` that all prompts of a body share."""
    expected = _joined(body.prediction.content) if body.prediction else None
    if expected is not None:
        _check_text(lm, "the prediction", expected, replace(limits, prompt_tokens=None))
    found = {
        **sampling(body),
        "grammar": grammar,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or (),
        "ignore_eos": body.ignore_eos,
        "prediction": expected,
        "guide": _guides(lm, body, limits),
        "watermark": limits.steering.watermark_of(body.watermark),
    }
    if wanted.strategy is None:
        return found
    return dict(lm.request_builder.without_sampling(cast(RequestOptions, found)))


def _guides(lm: LM, body: SamplingBody, limits: RequestLimits) -> list[GuideMethod]:
    """The guides that the body names, and its own guidance."""
    names = [body.guide] if isinstance(body.guide, str) else body.guide or []
    found, own = limits.steering.guides_of(names), body.guidance
    if own is None:
        return found
    _check_text(lm, "guidance.negative", own.negative, limits)
    _check_prompt("guidance.negative", len(lm.tokenizer.encode(own.negative)), limits)
    return [*found, negative(own.negative, own.scale, own.stop)]


def _check_prompt(what: str, tokens: int, limits: RequestLimits) -> None:
    if limits.prompt_tokens is not None and tokens > limits.prompt_tokens:
        raise RequestError(
            f"{what} has {tokens} tokens, and this server takes {limits.prompt_tokens} at most"
        )


def _grammar(body: SamplingBody, form: ResponseFormat | None) -> Grammar | None:
    found = []
    if body.guided_json is not None:
        found.append(Grammar.schema(body.guided_json))
    if body.guided_regex is not None:
        found.append(Grammar(body.guided_regex))
    if body.guided_choice is not None:
        found.append(Grammar.choice(body.guided_choice))
    if body.guided_grammar is not None:
        found.append(Grammar(body.guided_grammar, "lark"))
    if form and form.json_schema is not None and form.type != "json_schema":
        raise RequestError(f"response_format {form.type} takes no json_schema; leave one out")
    if form and form.type == "json_object":
        found.append(Grammar.schema({"type": "object"}))
    if form and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise RequestError("response_format json_schema needs json_schema with a schema")
        found.append(Grammar.schema(form.json_schema.schema_))
    if len(found) > 1:
        raise RequestError("several grammars are given; give one of response_format and guided_*")
    return found[0] if found else None


def _answers(
    name: str,
    make: Callable[..., Request],
    wanted: ChoicePlan,
    body: SamplingBody,
    client: str,
    limits: RequestLimits,
    logprobs: int | None,
) -> list[Job]:
    """The same request with seeds that follow each other; controls are each answer's own."""
    wish = body.speculation
    drafter = wish.drafter if wish else None
    if drafter is not None and drafters.current_name(drafter) not in limits.drafters:
        known = ", ".join(limits.drafters)
        raise RequestError(f"speculation.drafter is {drafter!r}, this server has {known}")
    seed = secrets.randbits(32) if body.seed is None else body.seed
    deadline = None if body.timeout is None else monotonic() + body.timeout

    def jobs() -> Iterator[Job]:
        for place in range(wanted.requests):
            request = make(seed=seed + place)
            _check_prompt("the prompt", len(request.prompt), limits)
            yield Job(
                id=f"{name}-{place}",
                request=request,
                client=client,
                priority=body.priority,
                deadline=deadline,
                drafter=wish.drafter if wish else None,
                budget=wish.budget if wish else None,
                logprobs=0 if logprobs is None and wanted.compared else logprobs,
                strategy=wanted.strategy,
                after=f"{name}-0" if place else None,
            )

    found = list(jobs())
    if wanted.compared:
        check_differ(found[0].request, wanted.requests)
    return found
