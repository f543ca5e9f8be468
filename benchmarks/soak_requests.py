"""The requests of the soak's polite users, and what plain decoding alone answers to each."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paceline
from paceline import LM
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.text_stream import text_of
from paceline.scoring import score_tokens

OPENINGS = ("Once upon a time", "The sea", "A little dog", "One day, a girl named Lily", "He said:")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Lily", "Tom", "the dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "maxLength": 12}},
                "required": [key],
                "additionalProperties": False,
            },
        },
    }
    for name, key in (("find_toy", "toy"), ("go_to", "place"))
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}assistant:"
)
POLICIES = (  # some evict again and again within an answer
    "sliding_window:budget=24,every=8",
    "h2o:budget=24,recent=8,every=8",
    "snapkv:budget=32,recent=8,every=16",
    "keydiff:budget=24,recent=8,every=8",
    "sirllm:budget=32,recent=8,every=8",
    "random:budget=24,recent=8,every=16",
    False,
)
CLOSE = 1e-4  # nats between log-probabilities of one token in two passes


@dataclass
class Answer:
    """One choice as its client reads it.

    Attributes:
        text: of the completion, or content of the message.
        calls: name and arguments of each tool call.
        tokens: ids, where they are asked for.
        logprobs: of prompt and tokens with `echo`, else of the tokens.
        finish: the reason; empty before the end.
    """

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish: str = ""

    def add(self, choice: Mapping[str, Any]) -> None:
        """Add what a choice of a document says, whole or a piece of a stream."""
        message = choice.get("message") or choice.get("delta") or {}
        self.text += choice.get("text") or message.get("content") or ""
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        self.calls += [(each["name"], each["arguments"]) for each in functions]
        self.tokens += choice.get("token_ids") or ()
        logprobs = choice.get("logprobs") or {}
        self.logprobs += logprobs.get("token_logprobs") or ()
        self.logprobs += [each["logprob"] for each in logprobs.get("content") or ()]
        self.finish = choice["finish_reason"] or self.finish


def folder_with_template(model: str | None, folder: Path) -> str:
    """Return a model that takes conversations: the model itself, or its files with a template."""
    with LM(model) as lm:
        if lm.tokenizer.template is not None and model is not None:
            return model
    source = Path(model) if model else Path(paceline.__file__).parent / "embedded"
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def random_request(rng: random.Random, policies: bool = False) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request that a well-behaved client may send.

    With `policies` three of four name a KV policy, and ask for no log-probabilities.
    """
    body: dict[str, Any] = {
        "max_tokens": rng.choice((1, 7, 30, 119)),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "seed": rng.randrange(20),
        "n": rng.choice((1, 1, 1, 3)),
        "stream": rng.random() < 0.5,
    }
    kind = rng.choice(("plain", "plain", "logprobs", "echo", "schema", "tools", "chat"))
    if policies and rng.random() < 0.75:
        kind = rng.choice(("plain", "schema", "chat"))
        body["kv_policy"] = rng.choice(POLICIES)
    opening = rng.choice(OPENINGS)
    if kind in ("plain", "echo") or (kind in ("logprobs", "schema") and rng.random() < 0.5):
        body["prompt"] = opening
        if kind == "schema":
            body["json_schema"] = SCHEMA
        if kind == "echo":
            body["echo"] = True
        if kind == "logprobs" or (kind == "echo" and not body["stream"]):
            body |= {"logprobs": rng.choice((0, 3)), "return_token_ids": True}
        return "/v1/completions", body
    body["messages"] = [{"role": "user", "content": opening}]
    if kind == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    elif kind == "tools":
        body |= {"tools": TOOLS, "tool_choice": rng.choice(("auto", "required", "go_to"))}
        if body["tool_choice"] == "go_to":
            body["tool_choice"] = {"type": "function", "function": {"name": "go_to"}}
    elif kind == "logprobs":
        body |= {"logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    return "/v1/chat/completions", body


def alone(lm: LM, body: Mapping[str, Any], place: int) -> Answer:
    """Return what plain decoding answers, with the scores of its tokens where they are asked for.

    Args:
        lm: the model.
        body: of the request.
        place: of the choice.
    """
    choice = body.get("tool_choice")
    request = lm.request(
        body.get("prompt") or body["messages"],
        max_new_tokens=body["max_tokens"],
        temperature=body["temperature"],
        seed=body["seed"] + place,
        schema=SCHEMA if "json_schema" in body or "response_format" in body else None,
        tools=body.get("tools"),
        tool_choice=choice["function"]["name"] if isinstance(choice, dict) else choice,
        kv_policy=body.get("kv_policy"),
    )
    drafter = lm.drafter_method.build(lm.draft_target)
    text = text_of(request, lm.tokenizer)
    output = Generation(lm.engine, drafter, request, Fixed(0), text).run()
    answer = Answer(output.text)
    if request.parser and "tools" in body:
        parsed = request.parser(output.text)
        answer.text = output.text if parsed.content is None else parsed.content
        answer.calls = [(call.name, _arguments(call.arguments)) for call in parsed.tool_calls]
    if body.get("echo"):
        answer.text = lm.tokenizer.decode(request.prompt) + answer.text
    if body.get("return_token_ids"):
        answer.tokens = output.tokens
        scores = score_tokens(lm.engine, [*request.prompt, *output.tokens]).logprobs
        answer.logprobs = list(scores if body.get("echo") else scores[len(request.prompt) :])
    return answer


def differ(got: Answer, expected: Answer) -> str:
    """Return how two answers differ; empty if they do not."""
    for name in ("text", "tokens"):
        if getattr(got, name) != getattr(expected, name):
            return f"{name} {getattr(got, name)!r:.80}, not {getattr(expected, name)!r:.80}"
    if [(name, json.loads(text)) for name, text in got.calls] != [
        (name, json.loads(text)) for name, text in expected.calls
    ]:
        return f"calls {got.calls!r:.80}, not {expected.calls!r:.80}"
    return _compare(got.logprobs, expected.logprobs)


def _compare(got: Sequence[float | None], expected: Sequence[float | None]) -> str:
    if len(got) != len(expected):
        return f"{len(got)} log-probabilities, not {len(expected)}"
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        if (a is None) != (b is None) or (a is not None and b is not None and abs(a - b) > CLOSE):
            return f"log-probability {place} is {a}, not {b}"
    return ""


def _arguments(given: Any) -> str:
    return given if isinstance(given, str) else json.dumps(given)
