"""Errors in the formats of other APIs: middleware that rewrites them on those APIs' paths."""

from __future__ import annotations

import json
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Status -> Anthropic's error type; other statuses below 500 are invalid requests.
_ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def family_of(path: str) -> Literal["anthropic", "ollama"] | None:
    """Return whose API a path belongs to; None: OpenAI's, or our own."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else None


def anthropic_error(message: str, status: int) -> dict[str, Any]:
    """Return an error as Anthropic's API writes it."""
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class ErrorForms:
    """ASGI middleware that writes OpenAI's errors as the API of the path does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        family = family_of(scope["path"]) if scope["type"] == "http" else None
        if family is None:
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = bytearray()

        async def rewrite(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
                return
            if start is None:
                await send(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body", False):
                return
            content = _rewritten(bytes(body), start["status"], family)
            kept = [each for each in start["headers"] if each[0].lower() != b"content-length"]
            length = (b"content-length", str(len(content)).encode())
            await send({**start, "headers": [*kept, length]})
            await send({**message, "body": content})

        await self._app(scope, receive, rewrite)


def _rewritten(body: bytes, status: int, family: Literal["anthropic", "ollama"]) -> bytes:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body  # none of our errors
    error = {"error": message} if family == "ollama" else anthropic_error(message, status)
    return json.dumps(error, ensure_ascii=False).encode()
