"""Answers a file of requests, many of them in each forward pass.

A line has the format of OpenAI's batches (`custom_id`, `method`, `url`, `body`), or is a body
alone.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from paceline.errors import PacelineError, RequestError
from paceline.serving.api import chat, completions, formatting
from paceline.serving.api.body_faults import fault_of
from paceline.serving.api.errors import NotFoundError
from paceline.serving.api.formatting import Choice
from paceline.serving.api.parse import RequestLimits, chat_jobs, completion_jobs
from paceline.serving.api.sampling import fields_in_sampler
from paceline.serving.api.schemas import ChatBody, CompletionBody
from paceline.serving.messages import FAILED, JobEvent
from paceline.serving.operator_policy import OperatorPolicy
from paceline.serving.worker import Worker

MAX_LINE_BYTES = 1 << 24

_log = logging.getLogger(__name__)
_AHEAD = 8  # lines read ahead for each request that may run
_Body = CompletionBody | ChatBody
_KINDS: dict[object, type[_Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}


class InputLine(NamedTuple):
    """A line of the input: its number, from 1, and at most `MAX_LINE_BYTES + 1` bytes."""

    number: int
    text: bytes


def read_lines(path: Path, after: int = 0, offset: int = 0) -> Iterator[InputLine]:
    """Yield the non-blank lines of a file one at a time.

    Args:
        path: the file.
        after: number of the line that ends at `offset`.
        offset: bytes to skip.
    """
    with path.open("rb") as file:
        file.seek(offset)
        number = after
        while text := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = text
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            if text.strip():
                yield InputLine(number, text)


class InputSummary(NamedTuple):
    """The number of non-blank lines of an input, and a digest of all its bytes."""

    lines: int
    digest: str


def summarize_input(path: Path) -> InputSummary:
    """Read a file once, to count its lines and compute its digest.

    Raises:
        RequestError: it cannot be read, or has no line.
    """
    digest, count = blake2b(digest_size=16), 0
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        count = sum(1 for _ in read_lines(path))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    if not count:
        raise RequestError(f"{path} has no line")
    return InputSummary(count, digest.hexdigest())


@dataclass(frozen=True)
class BatchSettings:
    """Settings that all lines share.

    Attributes:
        name: the model's name; a line that names another model is refused.
        max_new_tokens: for lines that give no number; None allows the rest of the context.
        seed: for lines that give none.
        sampling: fields such as `temperature` and `top_p`, each for lines that do not give it,
            in `sampler` neither.
    """

    name: str
    max_new_tokens: int | None = None
    seed: int = 0
    sampling: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _PendingLine:
    """A line whose requests are running."""

    number: int
    custom_id: str
    body: _Body | None = None
    prompts: int = 1
    choices: list[Choice] = field(default_factory=list)
    error: dict[str, str] | None = None

    @property
    def done(self) -> bool:
        return all(choice.last for choice in self.choices)


def run_batch(
    worker: Worker, lines: Iterable[InputLine], settings: BatchSettings
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the output of each line, in the order of the input.

    A line that cannot be run gets an `error`; no line depends on another. Lines are read as earlier
    ones finish.
    """
    waiting: deque[_PendingLine] = deque()
    open_: dict[str, tuple[_PendingLine, Choice]] = {}
    source = iter(lines)
    more = True
    while more or waiting:
        while more and len(waiting) < _AHEAD * worker.scheduler.max_running:
            line = next(source, None)
            more = line is not None
            if line is not None:
                waiting.append(pending := _start_line(worker, line, settings))
                open_ |= {choice.job.id: (pending, choice) for choice in pending.choices}
        if not worker.idle:
            for event in worker.step():
                _note(worker, event, open_)
        while waiting and waiting[0].done:
            first = waiting.popleft()
            yield first.number, _shown(first, worker, settings)


def _note(worker: Worker, event: JobEvent, open_: dict[str, tuple[_PendingLine, Choice]]) -> None:
    if event.id not in open_:
        return
    pending, choice = open_[event.id]
    choice.add(event)
    if event.finish is None:
        return
    del open_[event.id]
    if event.finish == "error" and pending.error is None:
        pending.error = {"code": "failed", "message": event.error}
        for other in pending.choices:
            for cancelled in worker.cancel(other.job.id):
                _note(worker, cancelled, open_)


def _start_line(worker: Worker, line: InputLine, settings: BatchSettings) -> _PendingLine:
    """Parse a line and submit its requests, or record the error."""
    pending = _PendingLine(line.number, f"line-{line.number}")
    try:
        row = {name: each for name, each in _row(line.text).items() if each is not None}
        pending.custom_id = _text(row.pop("custom_id", pending.custom_id), "custom_id")
        pending.body = _body(row)
        _submit(worker, pending, pending.body, settings)
    except PacelineError as error:
        pending.choices.clear()
        pending.error = {"code": "invalid_request", "message": str(error)}
    return pending


def _submit(worker: Worker, pending: _PendingLine, body: _Body, settings: BatchSettings) -> None:
    if body.stream or body.trace:
        raise RequestError("a batch supports neither stream nor trace; leave both out")
    if body.model not in (None, settings.name):
        raise NotFoundError(f"there is no model {body.model!r} here, only {settings.name!r}")
    if body.seed is None:
        body.seed = settings.seed
    in_sampler = fields_in_sampler(body)
    for field_, value in settings.sampling.items():
        if field_ not in in_sampler and getattr(body, field_) is None:
            setattr(body, field_, value)
    steering = OperatorPolicy(kv_policy_choice=True)  # whose lines they are chooses
    limits = RequestLimits(default_tokens=settings.max_new_tokens, steering=steering)
    name = f"line-{pending.number}"
    if isinstance(body, ChatBody):
        jobs_by_prompt = [chat_jobs(worker.lm, body, name, "", limits)]
    else:
        jobs_by_prompt = completion_jobs(worker.lm, body, name, "", limits)
    pending.prompts = len(jobs_by_prompt)
    jobs = [job for each in jobs_by_prompt for job in each]
    try:
        for index, job in enumerate(jobs):
            worker.submit(job)
            pending.choices.append(Choice(job, index))
    except PacelineError:
        for choice in pending.choices:
            worker.cancel(choice.job.id)
        raise


def _row(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_LINE_BYTES:
        raise RequestError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise RequestError("the line is not JSON in UTF-8") from None
    if not isinstance(row, dict):
        raise RequestError("the line is not a JSON object")
    return row


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r:.80}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} has a lone surrogate; send valid Unicode") from None
    return value


def _body(row: dict[str, Any]) -> _Body:
    """Parse the request of a line.

    Raises:
        RequestError: it is not a request for an endpoint of this server.
    """
    if "url" in row or "body" in row:
        url, method = row.pop("url", None), row.pop("method", "POST")
        body = row.pop("body", None)
        if url not in _KINDS or method != "POST":
            known = " or ".join(map(str, _KINDS))
            raise RequestError(
                f"the line requests {method!r:.20} {url!r:.80}, expected POST {known}"
            )
        if row:
            raise RequestError(
                f"the line has the field {next(iter(row))!r:.80} besides url and body; remove it"
            )
        kind = _KINDS[url]
    elif "prompt" in row or "messages" in row:
        body, kind = row, ChatBody if "messages" in row else CompletionBody
    else:
        raise RequestError(
            "the line has none of url and body, prompt, or messages; give one of them"
        )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        faults = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        location, reason = fault_of(faults, body)
        raise RequestError(f"{location or 'body'}: {reason}") from None


def _shown(pending: _PendingLine, worker: Worker, settings: BatchSettings) -> dict[str, Any]:
    """Return the output of a finished line; its error, where the reply cannot be made."""
    if pending.error is None:
        try:
            return _replied(pending, worker, settings)
        except Exception as error:  # a bug must neither stop the others nor come back on resuming
            _log.exception("line %d failed", pending.number)
            message = str(error) if isinstance(error, PacelineError) else FAILED
            pending.error = {"code": "failed", "message": message}
    return {"custom_id": pending.custom_id, "response": None, "error": pending.error}


def _replied(pending: _PendingLine, worker: Worker, settings: BatchSettings) -> dict[str, Any]:
    output: dict[str, Any] = {
        "custom_id": pending.custom_id,
        "response": None,
        "error": None,
    }
    name, lm = f"line-{pending.number}", worker.lm
    if pending.body is not None:
        choices = formatting.expand_searches(pending.choices)
        if isinstance(pending.body, ChatBody):
            heading = formatting.head(name, "chat.completion", settings.name)
            body = chat.reply(pending.body, heading, choices, lm)
        else:
            heading = formatting.head(name, "text_completion", settings.name)
            body = completions.reply(pending.body, heading, choices, pending.prompts, lm)
        output["response"] = {"status_code": 200, "request_id": name, "body": body}
    return output
