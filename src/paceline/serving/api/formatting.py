"""From the worker's events to OpenAI's answers, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from time import time
from typing import TYPE_CHECKING, Any

from paceline.decoding.text_stream import pieces_of
from paceline.serving.messages import Job, JobEvent, Logprob

if TYPE_CHECKING:
    from paceline.lm import LM

# Why an answer ends -> what OpenAI calls it.
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
    """One choice as it grows.

    Attributes:
        job: what was asked for.
        index: of the choice.
    """

    job: Job
    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    last: JobEvent | None = None

    def add(self, event: JobEvent) -> None:
        """What came next."""
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        if event.finish is not None:
            self.last = event

    @property
    def finish(self) -> str | None:
        """As OpenAI calls it; `tool_calls` where the answer has some."""
        if self.last is None or self.last.finish is None:
            return None
        calls = self.job.request.parser and self.calls
        return "tool_calls" if calls else FINISH[self.last.finish]

    @property
    def calls(self) -> list[Any]:
        """Whole tool calls in the text."""
        parser = self.job.request.parser
        return list(parser(self.text).tool_calls) if parser else []

    @property
    def likelihood(self) -> float:
        """Mean log probability of the tokens."""
        return sum(each.logprob for each in self.logprobs) / max(len(self.logprobs), 1)


def found(answers: Sequence[Choice]) -> list[Choice]:
    """The answers, with all outputs of those that are searches."""
    return [each for answer in answers for each in _outputs(answer)]


def _outputs(answer: Choice) -> list[Choice]:
    if answer.last is None or not answer.last.found:
        return [answer]
    several, read = [], answer.last.cached
    for place, output in enumerate(answer.last.found):
        if place:  # the work and the prompt count once
            output, read = replace(output, passes=0, nodes=0), len(answer.job.request.prompt)
        last = replace(answer.last, output=output, finish=output.finish, cached=read)
        several.append(Choice(answer.job, place, output.text, output.tokens, last=last))
    return several


def best(answers: Sequence[Choice], prompts: int, n: int) -> list[Choice]:
    """The `n` likeliest answers to each prompt, the likeliest first where there is a choice."""
    each = len(answers) // prompts
    if each == n or answers[0].job.strategy:
        return list(answers)
    groups = (answers[place : place + each] for place in range(0, len(answers), each))
    return [a for group in groups for a in sorted(group, key=lambda a: -a.likelihood)[:n]]


def usage(answers: Sequence[Choice]) -> dict[str, Any]:
    """What was read and written; the prompts of several choices count once each."""
    prompts: dict[str, Choice] = {}
    for answer in answers:
        prompts.setdefault(answer.job.id.rpartition("-")[0], answer)
    read = sum(len(answer.job.request.prompt) for answer in prompts.values())
    written = sum(len(answer.tokens) for answer in answers)
    hits = dict.fromkeys(("accepted", "rejected"), 0)
    for answer in answers:
        expected = len(answer.job.request.prediction)
        if expected and answer.last and answer.last.output:
            accepted = answer.last.output.accepted.get("predicted_output", 0)
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


def speculation(answers: Sequence[Choice]) -> dict[str, Any]:
    """What drafting did for the answers."""
    outputs = [answer.last.output for answer in answers if answer.last and answer.last.output]
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
    """A pass, looked at closely: its tokens with who guessed each, and its tree.

    `texts` are what each token made certain: joined, they are the answer. `at` is when the pass was
    over, in seconds of this server's clock. For a slow reader several `passes` come as one: then
    the tree is the last one's.
    """
    found: dict[str, Any] = {
        "tokens": event.tokens,
        "texts": event.texts,
        "origins": event.origins,
        "at": round(event.at, 6),
        "passes": event.passes,
    }
    if event.tree is not None:
        names = [*event.sources, None]  # the root's origin is -1
        found["tree"] = {
            "tokens": [lm.tokenizer.decode([int(token)]) for token in event.tree.tokens],
            "parents": event.tree.parents.tolist(),
            "scores": [round(float(score), 4) for score in event.tree.scores],
            "origins": [names[origin] for origin in event.tree.origin],
            "path": event.path,
        }
    return found


def completion_logprobs(answer: Choice, lm: LM) -> dict[str, Any] | None:
    """The older shape, of completions."""
    if answer.job.logprobs is None:
        return None
    pieces, offsets, at = [], [], 0
    detokenizer = pieces_of(answer.job.request, lm.tokenizer)
    for each in answer.logprobs:
        offsets.append(at)
        piece = detokenizer.push(each.token)
        at += len(piece)
        pieces.append(lm.tokenizer.decode([each.token]))
    return {
        "tokens": pieces,
        "token_logprobs": [each.logprob for each in answer.logprobs],
        "top_logprobs": [
            {lm.tokenizer.decode([token]): logprob for token, logprob in each.top}
            for each in answer.logprobs
        ],
        "text_offset": offsets,
    }


def chat_logprobs(told: Sequence[Logprob], lm: LM) -> dict[str, Any]:
    """The newer shape, of conversations."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        piece = lm.tokenizer.decode([token])
        return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}

    return {
        "content": [
            one(each.token, each.logprob) | {"top_logprobs": [one(*top) for top in each.top]}
            for each in told
        ]
    }


def head(job_id: str, kind: str, model: str) -> dict[str, Any]:
    """What every answer and every piece of one begins with."""
    return {"id": job_id, "object": kind, "created": int(time()), "model": model}


def message(answer: Choice) -> dict[str, Any]:
    """An assistant's turn."""
    calls = answer.calls
    found: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if calls:
        found["content"] = None
        found["tool_calls"] = [tool_call(call, answer, place) for place, call in enumerate(calls)]
    return found


def tool_call(call: Any, answer: Choice, place: int) -> dict[str, Any]:
    """A call, with a name of its own."""
    arguments = call.arguments
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{answer.job.id}_{place}",
        "type": "function",
        "function": {"name": call.name, "arguments": text},
    }


async def sse(pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events, closed as OpenAI does."""
    async for piece in pieces:
        yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"
