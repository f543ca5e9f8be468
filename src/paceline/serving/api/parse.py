"""Turns request bodies into jobs for the worker."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from paceline.compatibility import Side, check
from paceline.control.grammar import Grammar
from paceline.control.guides.base import GuideMethod
from paceline.core import Parsed, Parser, Request
from paceline.errors import RequestError, TooLongError
from paceline.models.infill import encode_infill, infill_stops
from paceline.registry import drafters
from paceline.request_options import RequestOptions
from paceline.serving.api.choices import ChoicePlan, check_differ, plan_choices
from paceline.serving.api.logprobs import token_bytes
from paceline.serving.api.reasoning import reasoning_form
from paceline.serving.api.sampling import sampling
from paceline.serving.api.schemas import (
    AllowedToolsChoice,
    ChatBody,
    CompletionBody,
    Message,
    ResponseFormat,
    SamplingBody,
    StructuredOutputs,
    TextPart,
)
from paceline.serving.messages import Job
from paceline.serving.operator_policy import OperatorPolicy, negative
from paceline.serving.prompt_scores import PromptScores
from paceline.watermarks.base import Watermark

if TYPE_CHECKING:
    from paceline.lm import LM


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may ask for.

    Attributes:
        new_tokens: maximum tokens of an answer; None: the context.
        prompt_tokens: maximum tokens of a prompt; None: the context.
        default_tokens: if the body gives no number; None allows the rest of the context.
        drafters: what `speculation.drafter` may name.
        answers: maximum answers to one request, over all its prompts.
        steering: the operator's watermark and guides.
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
    """Return the jobs for each prompt of a body; the one that scores the prompt comes last.

    Raises:
        PacelineError: something in the body is invalid.
    """
    prompts = _prompts(body.prompt)
    plan = plan_choices(body, len(prompts), limits.answers)
    options = _options(lm, body, limits, plan, _grammar(body, None))
    if body.suffix:
        prompts = [_between(lm, prompt, body, limits) for prompt in prompts]
        ends = () if body.ignore_eos else infill_stops(lm.tokenizer)
        options["stop_token_ids"] = [*(body.stop_token_ids or ()), *ends]
    if body.logprobs is not None or body.prompt_logprobs is not None:
        token_bytes(lm)
    nothing = body.max_tokens == 0
    options["max_new_tokens"] = _max_tokens(
        lm, None if nothing else body.max_tokens, limits, options["watermark"]
    )
    echoed = body.echo and body.logprobs is not None
    scored = nothing or echoed or body.prompt_logprobs is not None
    _check_scores(body, scored)
    if nothing and plan != ChoicePlan(1):
        raise RequestError("max_tokens is 0, expected n, best_of and a search to be left out")
    jobs_by_prompt = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            _check_text(lm, "the prompt", prompt, limits)
            if not body.add_special_tokens or body.split_special_tokens:
                prompt = lm.tokenizer.encode(
                    prompt, body.add_special_tokens, body.split_special_tokens
                )
        make = partial(lm.request, prompt, **options)
        name = f"{job_id}-{index}"
        jobs = [] if nothing else _jobs(name, make, plan, body, client, limits, body.logprobs)
        if scored:
            likely = max(body.logprobs or 0, body.prompt_logprobs or 0)
            jobs.append(_scoring_job(name, lm, prompt, body, likely, client, limits))
        jobs_by_prompt.append(jobs)
    return jobs_by_prompt


def chat_jobs(lm: LM, body: ChatBody, job_id: str, client: str, limits: RequestLimits) -> list[Job]:
    """Return the jobs for a conversation.

    Raises:
        PacelineError: something in the body is invalid.
    """
    if body.max_tokens and body.max_completion_tokens:
        raise RequestError("max_tokens and max_completion_tokens are both given; give one")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true")
    messages = [message_of(message) for message in body.messages]
    text = "".join(str(message.get("content", "")) for message in messages)
    _check_text(lm, "the conversation", text, limits)
    plan = plan_choices(body, 1, limits.answers)
    options = _options(lm, body, limits, plan, _grammar(body, body.response_format))
    if body.tools:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if template_settings := _template_settings(body):
        options["chat_template_kwargs"] = template_settings
    if body.tool_choice is not None:
        choice = body.tool_choice
        if isinstance(choice, AllowedToolsChoice):
            allowed = {tool.function.name for tool in choice.allowed_tools.tools}
            options["tools"] = _some_tools(options.get("tools", []), allowed)
            options["tool_choice"] = choice.allowed_tools.mode
        else:
            options["tool_choice"] = choice if isinstance(choice, str) else choice.function.name
    requested = body.max_completion_tokens or body.max_tokens
    max_tokens = _max_tokens(lm, requested, limits, options["watermark"])
    make: Callable[..., Request] = partial(
        lm.request, messages, max_new_tokens=max_tokens, **options
    )
    if body.parallel_tool_calls is False:
        make = partial(_calling_once, make)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if logprobs is not None or body.prompt_logprobs is not None:
        token_bytes(lm)
    jobs = _jobs(job_id, make, plan, body, client, limits, logprobs)
    if body.include_reasoning:
        free = options["grammar"] is None and options.get("tool_choice") in (None, "auto", "none")
        form = reasoning_form(lm.tokenizer, jobs[0].request.prompt) if free else "tags"
        jobs = [replace(job, reasoning=form) for job in jobs]
    _check_scores(body, body.prompt_logprobs is not None)
    if body.prompt_logprobs is not None:
        prompt = list(jobs[0].request.prompt)
        likely = body.prompt_logprobs
        jobs.append(_scoring_job(job_id, lm, prompt, body, likely, client, limits))
    return jobs


def _between(
    lm: LM, prompt: str | list[int], body: CompletionBody, limits: RequestLimits
) -> list[int]:
    """Return the tokens after which the model writes what is between prompt and suffix."""
    if body.echo:
        raise RequestError("echo is true, but with a suffix the answer stands between two texts")
    if not isinstance(prompt, str):
        raise RequestError("suffix needs a prompt of text, found token ids")
    for what, text in (("the prompt", prompt), ("the suffix", body.suffix or "")):
        _check_text(lm, what, text, limits)
    special, split = body.add_special_tokens, body.split_special_tokens
    return encode_infill(lm.tokenizer, prompt, body.suffix or "", special, split)


def _template_settings(body: ChatBody) -> dict[str, Any]:
    """Return the variables of the chat template, of whichever field.

    Raises:
        RequestError: a field is given twice.
    """
    settings = dict(body.chat_template_kwargs or {})
    for name in ("add_generation_prompt", "continue_final_message"):
        value = getattr(body, name)
        if value is not None and settings.setdefault(name, value) != value:
            raise RequestError(f"{name} is given twice, and differs; give it once")
    return settings


def _some_tools(tools: list[dict[str, Any]], allowed: set[str]) -> list[dict[str, Any]]:
    known = {tool["function"]["name"] for tool in tools}
    if unknown_names := sorted(allowed - known):
        raise RequestError(f"tool_choice allows {unknown_names[0]!r:.80}, which is none of tools")
    return [tool for tool in tools if tool["function"]["name"] in allowed]


def _scoring_job(
    name: str,
    lm: LM,
    prompt: str | list[int],
    body: SamplingBody,
    likely: int,
    client: str,
    limits: RequestLimits,
) -> Job:
    """Return a job that reports the log-probabilities of a prompt."""
    request = lm.request(prompt, max_new_tokens=1, controls={}, temperature=0.0)
    _check_prompt("the prompt", len(request.prompt), limits)
    deadline = None if body.timeout is None else monotonic() + body.timeout
    strategy = PromptScores(likely)
    return Job(f"{name}-prompt", request, client, body.priority, deadline, strategy=strategy)


def _calling_once(make: Callable[..., Request], seed: int) -> Request:
    """Return a request of whose tool calls only the first counts."""
    request = make(seed=seed)
    parser = request.parser
    if parser is None:
        return request

    def first(text: str) -> Parsed:
        parsed = parser(text)
        return parsed._replace(tool_calls=parsed.tool_calls[:1])

    return replace(request, parser=Parser(first, parser.scanner))


def message_of(message: Message) -> dict[str, Any]:
    """Return a message as chat templates take it."""
    fields = message.model_dump(exclude_none=True)
    if message.content is not None:
        fields["content"] = _joined(message.content)
    return fields


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


def _max_tokens(
    lm: LM, requested: int | None, limits: RequestLimits, mark: Watermark | None
) -> int:
    """Return the maximum tokens of an answer."""
    if requested is not None and limits.new_tokens is not None and requested > limits.new_tokens:
        raise RequestError(f"max_tokens is {requested}, expected {limits.new_tokens} or less")
    if requested is not None:
        return requested
    tokens = limits.default_tokens or lm.engine.config.context
    longest = mark.longest if mark else None
    return min(tokens, limits.new_tokens or tokens, longest or tokens)


def _check_text(lm: LM, what: str, text: str, limits: RequestLimits) -> None:
    """Refuse a text that is too long however it is tokenized, before that takes time and memory."""
    maximum, who = lm.engine.config.context, "the model sees"
    if limits.prompt_tokens is not None and limits.prompt_tokens < maximum:
        maximum, who = limits.prompt_tokens, "this server takes"
    size = len(text.encode(errors="replace"))
    if size > (maximum + 1) * lm.vocabulary.longest:
        raise TooLongError(f"{what} has {size} bytes, and {who} {maximum} tokens; shorten it")


def _options(
    lm: LM,
    body: CompletionBody | ChatBody,
    limits: RequestLimits,
    plan: ChoicePlan,
    grammar: Grammar | None,
) -> dict[str, Any]:
    """Return the options of `LM.request` that all prompts of a body share."""
    prediction = _joined(body.prediction.content) if body.prediction else None
    if prediction is not None:
        _check_text(lm, "the prediction", prediction, replace(limits, prompt_tokens=None))
    searched = plan.strategy is not None
    builder = lm.request_builder
    policy = limits.steering.kv_policy_of(body.kv_policy)
    defaults = builder.default_penalties() if searched else lm.model.defaults.samplers()
    options = {
        **sampling(body, defaults),
        "grammar": grammar,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or (),
        "stop_token_ids": body.stop_token_ids,
        "include_stop": body.include_stop_str_in_output,
        "keep_special": not body.skip_special_tokens,
        "split_special": body.split_special_tokens,
        "ignore_eos": body.ignore_eos,
        "prediction": prediction,
        "guide": _guides(lm, body, limits),
        "watermark": limits.steering.watermark_of(body.watermark),
        "kv_policy": False if body.kv_policy is False else policy,
        "documents": _documents(lm, body, limits),
        "recompute": body.recompute,
    }
    return dict(builder.without_sampling(cast(RequestOptions, options))) if searched else options


def _guides(lm: LM, body: SamplingBody, limits: RequestLimits) -> list[GuideMethod]:
    """Return the guides that the body names, and its own guidance."""
    names = [body.guide] if isinstance(body.guide, str) else body.guide or []
    guides, own = limits.steering.guides_of(names), body.guidance
    if own is None:
        return guides
    _check_text(lm, "guidance.negative", own.negative, limits)
    _check_prompt("guidance.negative", len(lm.tokenizer.encode(own.negative)), limits)
    return [*guides, negative(own.negative, own.scale, own.stop)]


def _documents(lm: LM, body: SamplingBody, limits: RequestLimits) -> list[str | dict[str, str]]:
    """Return the documents of a body, whose size was checked."""
    documents: list[str | dict[str, str]] = [
        each if isinstance(each, str) else {"text": each.text, "title": each.title or ""}
        for each in body.documents or []
    ]
    for number, each in enumerate(documents, 1):
        text = each if isinstance(each, str) else each["title"] + each["text"]
        _check_text(lm, f"document {number}", text, limits)
    return documents


def _check_scores(body: SamplingBody, scored: bool) -> None:
    """Refuse scores of a prompt that has documents."""
    if body.documents and scored:
        check({Side.DOCUMENTS: "documents", Side.PROMPT_SCORES: "scores of the prompt"})


def _check_prompt(what: str, tokens: int, limits: RequestLimits) -> None:
    if limits.prompt_tokens is not None and tokens > limits.prompt_tokens:
        raise TooLongError(
            f"{what} has {tokens} tokens, expected {limits.prompt_tokens} or fewer; shorten it"
        )


def _grammar(body: SamplingBody, form: ResponseFormat | None) -> Grammar | None:
    """Return the grammar that a body gives, under whichever of its names."""
    named = body.structured_outputs or StructuredOutputs()
    schemas = [body.guided_json, body.json_schema, named.json_, _response_schema(form)]
    if named.json_object:
        schemas.append({"type": "object"})
    grammars = [Grammar.schema(schema) for schema in schemas if schema is not None]
    grammars += [
        Grammar(text) for text in (body.guided_regex, body.regex, named.regex) if text is not None
    ]
    grammars += [
        Grammar.choice(choices)
        for choices in (body.guided_choice, named.choice)
        if choices is not None
    ]
    grammars += [
        Grammar(text, "lark") for text in (body.guided_grammar, named.grammar) if text is not None
    ]
    if len(grammars) > 1:
        raise RequestError(
            "several grammars are given; give one of response_format, structured_outputs, regex, "
            "json_schema and guided_*"
        )
    return grammars[0] if grammars else None


def _response_schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the schema that a response format stands for; None for text."""
    if form is None:
        return None
    if form.json_schema is not None and form.type != "json_schema":
        raise RequestError(f"response_format {form.type} takes no json_schema; leave one out")
    if form.type == "json_object":
        return form.schema_ or {"type": "object"}
    if form.type == "json_schema":
        schema = form.json_schema.schema_ if form.json_schema else form.schema_
        if schema is None:
            raise RequestError("response_format json_schema needs json_schema with a schema")
        return schema
    return None


def _jobs(
    name: str,
    make: Callable[..., Request],
    plan: ChoicePlan,
    body: SamplingBody,
    client: str,
    limits: RequestLimits,
    logprobs: int | None,
) -> list[Job]:
    """Return the same request with successive seeds; each has controls of its own."""
    speculation = body.speculation
    drafter = speculation.drafter if speculation else None
    if drafter is not None and drafters.current_name(drafter) not in limits.drafters:
        known = ", ".join(limits.drafters)
        raise RequestError(f"speculation.drafter is {drafter!r}, this server has {known}")
    seed = secrets.randbits(32) if body.seed is None else body.seed
    deadline = None if body.timeout is None else monotonic() + body.timeout

    def make_jobs() -> Iterator[Job]:
        for index in range(plan.requests):
            request = make(seed=seed + index)
            _check_prompt("the prompt", len(request.prompt), limits)
            yield Job(
                id=f"{name}-{index}",
                request=request,
                client=client,
                priority=body.priority,
                deadline=deadline,
                drafter=speculation.drafter if speculation else None,
                budget=speculation.budget if speculation else None,
                logprobs=0 if logprobs is None and plan.compared else logprobs,
                strategy=plan.strategy,
                after=f"{name}-0" if index else None,
            )

    jobs = list(make_jobs())
    if plan.compared:
        check_differ(jobs[0].request, plan.requests)
    return jobs
