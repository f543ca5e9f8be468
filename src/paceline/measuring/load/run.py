"""Load tests of a server: requests at a rate or from a number of users, and their latencies.

An open loop sends requests at Poisson arrivals whatever the server does, and measures every latency
from when the request was due, not from when it was sent: a stall is charged to all requests that
arrive during it ("coordinated omission" leaves them out). In a closed loop every user waits for an
answer before asking again; its rate adapts to a slow server, so it measures throughput better than
latency.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np

from paceline.errors import PacelineError, RequestError
from paceline.measuring.load.client import BrokenError, HttpResponse, ServerAddress, request

_PAUSE = 0.1  # seconds that a user waits after an error
_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Traffic:
    """The load. One of `rate` and `users` is given, and an end.

    Attributes:
        rate: requests per second, arriving independently of each other (a Poisson process).
        users: number of users who each send again once they are answered.
        requests: largest number of requests.
        seconds: no request is sent after this time; those in flight are waited for.
        seed: of the arrivals.
    """

    rate: float | None = None
    users: int | None = None
    requests: int | None = None
    seconds: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse settings that describe no load.

        Raises:
            RequestError: neither or both of rate and users, or no end.
        """
        if (self.rate is None) == (self.users is None):
            raise RequestError("give one of a rate (open loop) and a number of users (closed loop)")
        if self.requests is None and self.seconds is None:
            raise RequestError("the load has no end; give a number of requests or of seconds")


@dataclass
class Reply:
    """The outcome of a request; times are on the event loop's clock, in seconds.

    Attributes:
        due: when it was to be sent.
        sent: when it was sent.
        done: when it ended.
        pieces: when each piece of text arrived.
        tokens: of the answer, as the server counts them; None if it does not.
        error: status or kind of a failure; empty if there is none.
        detail: the server's message about it.
    """

    due: float
    sent: float = 0.0
    done: float = 0.0
    pieces: list[float] = field(default_factory=list)
    tokens: int | None = None
    error: str = ""
    detail: str = ""

    @property
    def count(self) -> int:
        """Tokens of the answer; pieces if the server does not count tokens."""
        return len(self.pieces) if self.tokens is None else self.tokens

    @property
    def first(self) -> float:
        """Time to the first text, in seconds."""
        return (self.pieces[0] if self.pieces else self.done) - self.due

    @property
    def each(self) -> float | None:
        """Seconds per token after the first; None without any."""
        if self.count < 2 or not self.pieces:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.count - 1)


Send = Callable[[int, float], Coroutine[Any, Any, Reply]]  # number of the request, when it is due


async def drive(send: Send, traffic: Traffic) -> list[Reply]:
    """Send all requests; return their replies in the order of their numbers when all have ended.

    Raises:
        RequestError: as `Traffic.check`.
    """
    traffic.check()
    numbers = islice(count(), traffic.requests)
    start = asyncio.get_running_loop().time()
    if traffic.rate is not None:
        return await _open(send, numbers, start, traffic, traffic.rate)
    return await _closed(send, numbers, start, traffic, traffic.users or 1)


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yield the seconds at which requests arrive: a Poisson process."""
    draw = np.random.default_rng(seed)
    at = 0.0
    while True:
        at += float(draw.exponential(1 / rate))
        yield at


async def _open(
    send: Send, numbers: Iterator[int], start: float, traffic: Traffic, rate: float
) -> list[Reply]:
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number, at in zip(numbers, arrivals(rate, traffic.seed), strict=False):
            if traffic.seconds is not None and at >= traffic.seconds:
                break
            await asyncio.sleep(max(start + at - loop.time(), 0.0))
            tasks.append(group.create_task(send(number, start + at)))
    return [task.result() for task in tasks]


async def _closed(
    send: Send, numbers: Iterator[int], start: float, traffic: Traffic, users: int
) -> list[Reply]:
    loop = asyncio.get_running_loop()
    replies: dict[int, Reply] = {}

    async def user() -> None:
        while traffic.seconds is None or loop.time() - start < traffic.seconds:
            number = next(numbers, None)
            if number is None:
                return
            replies[number] = await send(number, loop.time())
            if replies[number].error:
                await asyncio.sleep(_PAUSE)

    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())
    return [replies[number] for number in sorted(replies)]


def sender(server: ServerAddress, bodies: Callable[[int], dict[str, Any]], timeout: float) -> Send:
    """Return a function that sends bodies and follows their streams.

    Args:
        server: where to send them.
        bodies: gives the body of each number; one with `messages` is a conversation.
        timeout: seconds after which a request is given up.
    """

    async def send(number: int, due: float) -> Reply:
        loop = asyncio.get_running_loop()
        reply = Reply(due, loop.time())
        body = bodies(number)
        path = "/chat/completions" if "messages" in body else "/completions"
        try:
            async with asyncio.timeout(timeout), request(server, path, body) as answer:
                await _follow(answer, reply)
        except TimeoutError:
            reply.error = "timeout"
        except BrokenError as error:
            reply.error, reply.detail = "broken", str(error)
        except OSError as error:
            reply.error, reply.detail = "connection", error.strerror or str(error)
        reply.done = loop.time()
        return reply

    return send


async def _follow(answer: HttpResponse, reply: Reply) -> None:
    """Record when the pieces of a stream arrive.

    Raises:
        BrokenError: it ends too early, or is not a stream of completions.
    """
    loop = asyncio.get_running_loop()
    if answer.status != 200:
        reply.error, reply.detail = str(answer.status), await _message(answer)
        return
    finished = False
    async for line in answer.lines:
        now = loop.time()
        if not line.startswith(b"data:"):
            continue
        if line[5:].strip() == b"[DONE]":
            finished = True
            break
        piece = _piece(line[5:])
        if "error" in piece:
            reply.error, reply.detail = "in the stream", str(piece["error"])
            return
        if isinstance(usage := piece.get("usage"), dict):
            reply.tokens = usage.get("completion_tokens", reply.tokens)
        for choice in piece.get("choices") or ():
            shown = choice.get("delta") or choice
            finished = finished or choice.get("finish_reason") is not None
            if shown.get("text") or shown.get("content") or shown.get("tool_calls"):
                reply.pieces.append(now)
    if not finished:
        raise BrokenError("the stream ends too early")


def _piece(text: bytes) -> dict[str, Any]:
    try:
        piece = json.loads(text)
    except (ValueError, RecursionError):
        piece = None
    choices = piece.get("choices") if isinstance(piece, dict) else None
    if not isinstance(piece, dict) or not all(isinstance(each, dict) for each in choices or ()):
        raise BrokenError("a piece of the stream is not a completion")
    return piece


async def _message(answer: HttpResponse) -> str:
    """Read the message of a refusal."""
    try:
        body = await answer.json()
        return str(body["error"]["message"])
    except (BrokenError, LookupError, TypeError):
        return ""


async def first_model(server: ServerAddress) -> str:
    """Return the name of a server's first model.

    Raises:
        PacelineError: it does not answer, or names none.
    """
    where = f"{server.host}:{server.port}{server.path}/models"
    try:
        async with asyncio.timeout(30), request(server, "/models") as answer:
            body = await answer.json()
        if answer.status != 200:
            raise PacelineError(f"{where} answers with {answer.status}; name the model")
        return str(body["data"][0]["id"])
    except (BrokenError, LookupError, TypeError):
        raise PacelineError(f"{where} names no model; name it") from None
    except TimeoutError:
        raise PacelineError(f"{where} does not answer") from None
    except OSError as error:
        raise PacelineError(f"cannot reach {where}: {error.strerror or error}") from None


def summary(
    replies: Sequence[Reply], slo_ttft: float | None = None, slo_tpot: float | None = None
) -> dict[str, Any]:
    """Return latencies, throughput, and the number of answers that met the targets.

    Args:
        replies: at least one.
        slo_ttft: largest time to the first token, in seconds; None sets no target.
        slo_tpot: largest time for each further token, in seconds; None sets no target.
    """
    good = [reply for reply in replies if not reply.error]
    start, end = min(reply.due for reply in replies), max(reply.done for reply in replies)
    seconds = max(end - start, 1e-9)
    tokens = sum(reply.count for reply in good)
    each = [reply.each for reply in good if reply.each is not None]
    gaps = [gap for reply in good for gap in np.diff(reply.pieces).tolist()]
    document: dict[str, Any] = {
        "requests": len(replies),
        "completed": len(good),
        "errors": dict(sorted(Counter(reply.error for reply in replies if reply.error).items())),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_counted_by": "server" if all(r.tokens is not None for r in good) else "pieces",
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(good) / seconds,
        "ttft": _percentiles([reply.first for reply in good]),
        "tpot": _percentiles(each),
        "gap": _percentiles(gaps),
        "latency": _percentiles([reply.done - reply.due for reply in good]),
        "late": max(reply.sent - reply.due for reply in replies),
    }
    if slo_ttft is not None or slo_tpot is not None:
        kept = sum(_in_time(reply, slo_ttft, slo_tpot) for reply in good)
        document["slo"] = {
            "ttft": slo_ttft,
            "tpot": slo_tpot,
            "kept": kept,
            "share": kept / len(replies),
            "goodput": kept / seconds,
        }
    return document


def _in_time(reply: Reply, ttft: float | None, tpot: float | None) -> bool:
    return (ttft is None or reply.first <= ttft) and (tpot is None or (reply.each or 0.0) <= tpot)


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean, maximum and percentiles, in seconds; None of no values."""
    if not values:
        return None
    shares = np.quantile(values, list(_SHARES.values())).tolist()
    ends = {"mean": float(np.mean(values)), "max": max(values)}
    return ends | dict(zip(_SHARES, shares, strict=True))
