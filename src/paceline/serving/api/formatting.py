"""Formats the worker's events as OpenAI's responses, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from time import time
from typing import TYPE_CHECKING, Any

from paceline.core import Parsed
from paceline.errors import RequestError
from paceline.serving.api.reasoning import Separated, separate
from paceline.serving.messages import Job, JobEvent, Logprob

if TYPE_CHECKING:
    from paceline.lm import LM

# `finish` of an event -> finish_reason of OpenAI.
FINISH = {
    "stop": "stop",
    "length": "length",
    "context": "length",
    "deadline": "timeout",
    "cancelled": "cancelled",
    "error": "error",
}


@dataclass
class Choice:
    """A choice of a response as it grows.

    Attributes:
        job: that produces it.
        index: among the choices.
        text: so far, as are `tokens` and `logprobs`.
        last: the last event, None before it.
        prompt_logprobs: of the prompt's tokens, where they are echoed.
        begun: when the first token came, in seconds of `time.monotonic`; None before.
    """

    job: Job
    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    last: JobEvent | None = None
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    begun: float | None = None
    _parsed: Parsed | None = field(default=None, init=False, repr=False)
    _scan: Callable[[str], int] | None = field(default=None, init=False, repr=False)

    def add(self, event: JobEvent) -> None:
        """Append an event."""
        if self.begun is None and event.tokens:
            self.begun = event.at
        self.text += event.text
        self._parsed = None
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        if event.finish is not None:
            self.last = event

    @property
    def finish(self) -> str | None:
        """OpenAI's finish reason, None before the end; `tool_calls` if it ended with some."""
        if self.last is None or self.last.finish is None:
            return None
        reason = FINISH[self.last.finish]
        return "tool_calls" if reason == "stop" and self.parsed.tool_calls else reason

    @property
    def reasoning(self) -> str:
        """The reasoning before the content; before the end, what is certain of it."""
        return self._separated.reasoning

    @property
    def _separated(self) -> Separated:
        return separate(self.text, self.job.reasoning, self.last is not None)

    @property
    def parsed(self) -> Parsed:
        """The finished text behind the reasoning, with its tool calls taken out; parsed once."""
        if self._parsed is None:
            parser = self.job.request.parser
            try:
                self._parsed = parser(self._separated.rest) if parser else Parsed(None, [])
            except RequestError:  # a model of pydantic's rejects the value; the text remains
                self._parsed = Parsed(None, [])
        return self._parsed

    @property
    def content(self) -> str:
        """The text without reasoning and tool calls; before the end, what is certain of it."""
        parser, text = self.job.request.parser, self._separated.rest
        if parser is None:
            return text
        if self.last is None:
            self._scan = self._scan or parser.scanner()
            return text[: self._scan(text)]
        content = self.parsed.content
        return text if content is None else content

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tool calls of a finished text, in OpenAI's format."""
        found = self.parsed.tool_calls
        return [_tool_call(call, self, index) for index, call in enumerate(found)]

    @property
    def likelihood(self) -> float:
        """Return the mean log-probability of the tokens."""
        return sum(each.logprob or 0.0 for each in self.logprobs) / max(len(self.logprobs), 1)


def expand_searches(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices, with each search replaced by its outputs."""
    return [each for choice in choices for each in _outputs(choice)]


def _outputs(choice: Choice) -> list[Choice]:
    if choice.last is None or not choice.last.outputs or choice.logprobs:
        return [choice]  # also what scores a prompt
    several, cached = [], choice.last.cached
    for index, output in enumerate(choice.last.outputs):
        if index:  # count the work and the prompt once
            output, cached = replace(output, passes=0, nodes=0), len(choice.job.request.prompt)
        last = replace(choice.last, output=output, finish=output.finish, cached=cached)
        several.append(Choice(choice.job, index, output.text, output.tokens, last=last))
    return several


def best(choices: Sequence[Choice], prompts: int, n: int) -> list[Choice]:
    """Return the `n` most likely choices of each prompt, most likely first if there were more."""
    each = len(choices) // prompts
    if each == n or choices[0].job.strategy:
        return list(choices)
    groups = (choices[start : start + each] for start in range(0, len(choices), each))
    return [a for group in groups for a in sorted(group, key=lambda a: -a.likelihood)[:n]]


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the token counts; a prompt with several choices counts once."""
    prompts: dict[str, Choice] = {}
    for choice in choices:
        prompts.setdefault(choice.job.id.rpartition("-")[0], choice)
    read = sum(len(choice.job.request.prompt) for choice in prompts.values())
    written = sum(len(choice.tokens) for choice in choices)
    hits = dict.fromkeys(("accepted", "rejected"), 0)
    for choice in choices:
        expected = len(choice.job.request.prediction)
        if expected and choice.last and choice.last.output:
            accepted = choice.last.output.accepted.get("predicted_output", 0)
            hits["accepted"] += accepted
            hits["rejected"] += max(expected - accepted, 0)
    cached = sum(a.last.cached for a in prompts.values() if a.last)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": hits["accepted"],
            "rejected_prediction_tokens": hits["rejected"],
        },
    }


def speculation(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return what drafting did for the choices."""
    outputs = [choice.last.output for choice in choices if choice.last and choice.last.output]
    passes = sum(output.passes for output in outputs)
    accepted: dict[str, int] = {}
    for output in outputs:
        for name, count in output.accepted.items():
            accepted[name] = accepted.get(name, 0) + count
    tokens = sum(len(output.tokens) for output in outputs)
    return {
        "passes": passes,
        "nodes": sum(output.nodes for output in outputs),
        "tokens_per_pass": round(tokens / passes, 3) if passes else 0.0,
        "accepted": accepted,
    }


def traced(event: JobEvent, lm: LM) -> dict[str, Any]:
    """Return a pass in detail: its tokens with the drafter that proposed each, and its tree.

    `texts` are what each token made certain; joined, they are the answer. `at` is the end of the
    pass in seconds of this server's clock. For a slow reader several `passes` are merged into one;
    the tree is then that of the last one.
    """
    details: dict[str, Any] = {
        "tokens": event.tokens,
        "texts": event.texts,
        "origins": event.origins,
        "at": round(event.at, 6),
        "passes": event.passes,
    }
    if event.tree is not None:
        names = [*event.sources, None]  # the root's origin is -1
        details["tree"] = {
            "tokens": [lm.tokenizer.decode([int(token)]) for token in event.tree.tokens],
            "parents": event.tree.parents.tolist(),
            "scores": [round(float(score), 4) for score in event.tree.scores],
            "origins": [names[origin] for origin in event.tree.origin],
            "path": event.path,
        }
    return details


def head(job_id: str, kind: str, model: str) -> dict[str, Any]:
    """Return the fields that every response, and every piece of a stream, begins with."""
    return {"id": job_id, "object": kind, "created": int(time()), "model": model}


def message(choice: Choice) -> dict[str, Any]:
    """Return the assistant's message."""
    calls, content = choice.calls, choice.content
    fields: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.reasoning:
        fields["reasoning_content"] = choice.reasoning
    if calls:
        fields["content"] = content or None
        fields["tool_calls"] = calls
    return fields


def _tool_call(call: Any, choice: Choice, index: int) -> dict[str, Any]:
    """Return a tool call, with an id of its own."""
    arguments = call.arguments
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{choice.job.id}_{index}",
        "type": "function",
        "function": {"name": call.name, "arguments": text},
    }


async def sse(pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield pieces as server-sent events, ending with OpenAI's `[DONE]`."""
    async for piece in pieces:
        yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"
