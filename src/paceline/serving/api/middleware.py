"""In front of all routes: who asks, how much, how long, and what is written down about it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.serving.api.errors import LeftError, refusal
from paceline.serving.api.formatting import Choice
from paceline.serving.api_keys import ApiKeys
from paceline.serving.messages import FAILED
from paceline.serving.metrics import RequestMetrics
from paceline.serving.rate_limits import RateLimits

if TYPE_CHECKING:
    from paceline.lm import LM

_log = logging.getLogger(__name__)
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_OPEN = re.compile("/|/health|/ready|/playground/.*")  # without a key; pages ask with one


@dataclass(frozen=True)
class Rules:
    """What the guard lets through.

    Attributes:
        keys: who may ask; empty lets everybody.
        rates: how much.
        max_body: bytes.
        body_seconds: for a body to arrive.
        write_seconds: for a reader to take a piece.
        log_prompts: prompts and answers are written to the log.
    """

    keys: ApiKeys = field(default_factory=lambda: ApiKeys(()))
    rates: RateLimits = field(default_factory=RateLimits)
    max_body: int = 10**6
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    log_prompts: bool = False


class RequestGuard:
    """See the module's text.

    Args:
        app: what is behind.
        rules: what is let through.
        metrics: are told of every request.
        draining: whether the server is about to stop.
        lm: turns prompts into text for the log; None where no answers are known.
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: Rules,
        metrics: RequestMetrics,
        draining: Callable[[], bool],
        lm: LM | None = None,
    ) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._draining, self._lm = draining, lm

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Exchange(scope, send, self._rules.write_seconds, self._draining)
        try:
            refused = self._refused(scope, visit) or await self._pass_on(scope, receive, visit)
            if refused:
                await refused(scope, receive, visit.send)
        except LeftError:
            pass
        except Exception as error:
            if visit.cut:
                return
            visit.failed = True
            _log.exception("a request failed", extra={"told": {"request": visit.id}})
            if visit.status:
                raise ConnectionAbortedError from error  # the server closes the connection
            await refusal(500, FAILED, "server_error")(scope, receive, visit.send)
        finally:
            self._write_down(scope, visit)

    def _refused(self, scope: Scope, visit: _Exchange) -> Response | None:
        """Refuse who has no key, or asks too often."""
        if self._rules.keys and not _OPEN.fullmatch(scope["path"]):
            visit.client = self._rules.keys.name_of(_bearer(scope))
            if visit.client is None:
                said = "there is no such API key here; send one as 'Authorization: Bearer KEY'"
                found = refusal(401, said, code="invalid_api_key")
                found.headers["WWW-Authenticate"] = "Bearer"
                return found
            scope["state"]["key"] = visit.client
        if scope["method"] != "POST":
            return None
        wait = self._rules.rates.admit(visit.payer, monotonic())
        if not wait:
            return None
        said = f"too much was asked for in a minute; try again in {ceil(wait)} s"
        return refusal(429, said, "rate_limit_error", code="rate_limit_exceeded", wait=wait)

    async def _pass_on(self, scope: Scope, receive: Receive, visit: _Exchange) -> Response | None:
        """Let a request through when its body is there, or say why not."""
        try:
            async with asyncio.timeout(self._rules.body_seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            return _closing(refusal(408, f"no body came in {self._rules.body_seconds:g} s"))
        if body is None:
            said = f"the body has more than {self._rules.max_body} bytes; send less"
            return _closing(refusal(413, said))
        if _SURROGATE.search(body) and not _is_unicode(body):
            return refusal(400, "the body has half of a character, a lone surrogate; send UTF-8")
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, again, visit.send)
        return None

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where it is too large."""
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if int(told) > self._rules.max_body:  # digits: the server has checked it
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise LeftError("the client left before its body was there")
            body += message.get("body", b"")
            if len(body) > self._rules.max_body:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    def _write_down(self, scope: Scope, visit: _Exchange) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = visit.status if visit.status or visit.failed else 499  # nobody was there
        self._metrics.requests.labels(route, status).inc()
        told: dict[str, Any] = {
            "request": visit.id,
            "client": visit.client,
            "address": visit.address,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(monotonic() - visit.start, 4),
        }
        if visit.cut:
            told["cut"] = f"nothing was read for {self._rules.write_seconds:g} s"
        answers = scope["state"].get("answers", ())
        tokens = sum(_tokens(answer) for answer in answers)
        self._rules.rates.charge(visit.payer, tokens, monotonic())
        if answers:
            told["answers"] = [dict(self._told(answer)) for answer in answers]
        _log.info("request", extra={"told": told})

    def _told(self, answer: Choice) -> Iterator[tuple[str, Any]]:
        yield "id", answer.job.id
        yield "prompt_tokens", len(answer.job.request.prompt)
        yield "tokens", len(answer.tokens)
        yield "finish", answer.finish or "cancelled"
        if answer.last:
            yield "cached", answer.last.cached
        if self._rules.log_prompts and self._lm:
            yield "prompt", self._lm.tokenizer.decode(list(answer.job.request.prompt))
            yield "text", answer.text


class _Exchange:
    """A request on its way through, and what it is sent."""

    def __init__(
        self, scope: Scope, send: Send, seconds: float, draining: Callable[[], bool]
    ) -> None:
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self.id = given if _ID.fullmatch(given) else secrets.token_hex(12)
        self.start, self.status = monotonic(), 0
        self.failed = self.cut = False  # by a bug; because it did not read
        self.client: str | None = None
        self.address: str = (scope["client"] or ("",))[0]
        self._send, self._seconds, self._draining = send, seconds, draining
        self._state = scope.setdefault("state", {})
        self._state["request"] = self.id

    @property
    def payer(self) -> str:
        """Whose rates count: the key's, or else the address's."""
        return self.client or self.address

    async def send(self, message: Message) -> None:
        """Send with the request's id, and not for ever: who does not read is cut off."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.id.encode())]
            if self._draining():
                message["headers"].append((b"connection", b"close"))
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self.cut = True
            if transport := self._state.get("transport"):
                transport.abort()
                await asyncio.sleep(0)  # until the server knows
            raise


def _is_unicode(body: bytes) -> bool:
    """Whether all texts of a JSON document can be written as UTF-8."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (ValueError, RecursionError):
        pass  # it is no JSON; who reads it will say so
    return True


def _tokens(answer: Choice) -> int:
    """What was read and written for an answer; what was known from before is free."""
    cached = answer.last.cached if answer.last else 0
    return len(answer.job.request.prompt) - cached + len(answer.tokens)


def _bearer(scope: Scope) -> bytes:
    kind, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return bytes(key).strip() if kind.lower() == b"bearer" else b""


def _closing(response: Response) -> Response:
    """What is left of the body is not read."""
    response.headers["Connection"] = "close"
    return response
