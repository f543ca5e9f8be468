"""Checks in front of all routes: API keys, rates, sizes and timeouts; writes the access log."""

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
from paceline.serving.api.strict import HEADER, Reading, reading
from paceline.serving.api_keys import ApiKeys
from paceline.serving.messages import FAILED
from paceline.serving.metrics import RequestMetrics
from paceline.serving.rate_limits import RateLimits

if TYPE_CHECKING:
    from paceline.lm import LM

_log = logging.getLogger(__name__)
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_OPEN = re.compile("/|/health|/ready|/playground/.*")  # need no key


@dataclass(frozen=True)
class Rules:
    """What the guard lets through.

    Attributes:
        keys: who may use the API; empty admits everybody.
        rates: of each client.
        max_body: maximum bytes of a body.
        body_seconds: maximum time for a body to arrive.
        write_seconds: maximum time for a client to read a piece of a response.
        log_prompts: write prompts and answers to the log.
        unknown_fields: of bodies: `refuse` them, or ignore them and `warn` in a header.
    """

    keys: ApiKeys = field(default_factory=lambda: ApiKeys(()))
    rates: RateLimits = field(default_factory=RateLimits)
    max_body: int = 10**6
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    log_prompts: bool = False
    unknown_fields: str = "refuse"


class RequestGuard:
    """ASGI middleware that applies the rules.

    Args:
        app: the application behind it.
        rules: to apply.
        metrics: count every request.
        draining: returns whether the server is shutting down.
        lm: decodes prompts for the log; None where no choices are known.
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
        exchange = _Exchange(scope, send, self._rules.write_seconds, self._draining)
        try:
            with reading(self._rules.unknown_fields == "warn") as exchange.body:
                refused = self._refused(scope, exchange) or await self._pass_on(
                    scope, receive, exchange
                )
            if refused:
                await refused(scope, receive, exchange.send)
        except LeftError:
            pass
        except Exception as error:
            if exchange.cut:
                return
            exchange.failed = True
            _log.exception("a request failed", extra={"fields": {"request": exchange.id}})
            if exchange.status:
                raise ConnectionAbortedError from error  # the server then closes the connection
            await refusal(500, FAILED, "server_error")(scope, receive, exchange.send)
        finally:
            self._log_request(scope, exchange)

    def _refused(self, scope: Scope, exchange: _Exchange) -> Response | None:
        """Refuse requests with an unknown key, or above the rate limit."""
        if self._rules.keys and not _OPEN.fullmatch(scope["path"]):
            exchange.client = self._rules.keys.name_of(_bearer(scope))
            if exchange.client is None:
                reason = "the API key is unknown; send a valid one as 'Authorization: Bearer KEY'"
                response = refusal(401, reason, "authentication_error", code="invalid_api_key")
                response.headers["WWW-Authenticate"] = "Bearer"
                return response
            scope["state"]["key"] = exchange.client
        if scope["method"] != "POST":
            return None
        wait = self._rules.rates.admit(exchange.payer, monotonic())
        if not wait:
            return None
        reason = f"the rate limit is exceeded; try again in {ceil(wait)} s"
        return refusal(429, reason, "rate_limit_error", code="rate_limit_exceeded", wait=wait)

    async def _pass_on(
        self, scope: Scope, receive: Receive, exchange: _Exchange
    ) -> Response | None:
        """Pass a request on once its body has arrived; return the refusal otherwise."""
        try:
            async with asyncio.timeout(self._rules.body_seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            return _closing(
                refusal(408, f"the body did not arrive within {self._rules.body_seconds:g} s")
            )
        if body is None:
            reason = f"the body has more than {self._rules.max_body} bytes; send less"
            return _closing(refusal(413, reason))
        if _SURROGATE.search(body) and not _is_unicode(body):
            return refusal(400, "the body has a lone surrogate; send valid UTF-8")
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, again, exchange.send)
        return None

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body; None if it is too large."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > self._rules.max_body:  # the server has checked that it is a number
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise LeftError("the client left before its body had arrived")
            body += message.get("body", b"")
            if len(body) > self._rules.max_body:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    def _log_request(self, scope: Scope, exchange: _Exchange) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = (
            exchange.status if exchange.status or exchange.failed else 499
        )  # the client had left
        self._metrics.requests.labels(route, status).inc()
        fields: dict[str, Any] = {
            "request": exchange.id,
            "client": exchange.client,
            "address": exchange.address,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(monotonic() - exchange.start, 4),
        }
        if exchange.cut:
            fields["cut"] = f"the client read nothing for {self._rules.write_seconds:g} s"
        if ignored := exchange.body.header():
            fields["ignored"] = ignored
        choices = scope["state"].get("choices", ())
        tokens = sum(_tokens(choice) for choice in choices)
        self._rules.rates.charge(exchange.payer, tokens, monotonic())
        if choices:
            fields["answers"] = [dict(self._choice_fields(choice)) for choice in choices]
        _log.info("request", extra={"fields": fields})

    def _choice_fields(self, choice: Choice) -> Iterator[tuple[str, Any]]:
        yield "id", choice.job.id
        yield "prompt_tokens", len(choice.job.request.prompt)
        yield "tokens", len(choice.tokens)
        yield "finish", choice.finish or "cancelled"
        if choice.last:
            yield "cached", choice.last.cached
        if self._rules.log_prompts and self._lm:
            yield "prompt", self._lm.tokenizer.decode(list(choice.job.request.prompt))
            yield "text", choice.text


class _Exchange:
    """A request and its response on their way through."""

    def __init__(
        self, scope: Scope, send: Send, seconds: float, draining: Callable[[], bool]
    ) -> None:
        requested = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self.id = requested if _ID.fullmatch(requested) else secrets.token_hex(12)
        self.start, self.status = monotonic(), 0
        self.failed = self.cut = False  # because of a bug; because the client did not read
        self.body = Reading()
        self.client: str | None = None
        self.address: str = (scope["client"] or ("",))[0]
        self._send, self._seconds, self._draining = send, seconds, draining
        self._state = scope.setdefault("state", {})
        self._state["request"] = self.id

    @property
    def payer(self) -> str:
        """Return whose rates apply: the name of the key, or else the address."""
        return self.client or self.address

    async def send(self, message: Message) -> None:
        """Send a message with the request id; abort the connection if nobody reads it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.id.encode())]
            if ignored := self.body.header():
                message["headers"].append((HEADER.lower().encode(), ignored.encode()))
            if self._draining():
                message["headers"].append((b"connection", b"close"))
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self.cut = True
            if transport := self._state.get("transport"):
                transport.abort()
                await asyncio.sleep(0)  # let the server notice
            raise


def _is_unicode(body: bytes) -> bool:
    """Return whether all strings of a JSON document can be written as UTF-8."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (ValueError, RecursionError):
        pass  # not JSON; the route will say so
    return True


def _tokens(choice: Choice) -> int:
    """Return the tokens read and written for a choice; cached ones are free."""
    cached = choice.last.cached if choice.last else 0
    return len(choice.job.request.prompt) - cached + len(choice.tokens)


def _bearer(scope: Scope) -> bytes:
    headers = dict(scope["headers"])
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return bytes(key).strip()
    return bytes(headers.get(b"x-api-key", b"")).strip()  # as Anthropic's clients send it


def _closing(response: Response) -> Response:
    """Let the connection be closed, since the rest of the body is not read."""
    response.headers["Connection"] = "close"
    return response
