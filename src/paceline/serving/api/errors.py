"""What goes wrong, in OpenAI's shape: one sentence, and the right status."""

from __future__ import annotations

import logging
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from paceline.errors import PacelineError
from paceline.serving.messages import FAILED
from paceline.serving.scheduler import BusyError
from paceline.serving.service import StoppingError

_log = logging.getLogger(__name__)
_STOPPING = 5  # seconds until another may stand in for a server that stops
_ALWAYS = ("/health", "/ready")
_STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
_REFUSALS = {
    "400": "Something in the request cannot be.",
    "401": "There is no such API key.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "429": "Too much was asked for; Retry-After says when to try again.",
    "500": "A bug; the log says more.",
    "503": "The server is about to stop.",
}
_SHAPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class NotFoundError(PacelineError):
    """Something that is not here was named."""


class FailedError(PacelineError):
    """A bug of ours; the log has it."""


class LeftError(PacelineError):
    """Who asked is gone."""


def refusal(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    wait: float | None = None,
) -> JSONResponse:
    """An error as OpenAI's clients read it; `wait` seconds are the time to try again."""
    error = {"message": printable(message), "type": kind, "param": param, "code": code}
    headers = {} if wait is None else {"Retry-After": str(ceil(wait))}
    return JSONResponse({"error": error}, status, headers=headers)


def printable(text: str) -> str:
    """The text as UTF-8 can hold it: what a client sent may have half characters."""
    return text.encode(errors="backslashreplace").decode()


def install(app: FastAPI) -> None:
    """Let the application answer errors so."""

    @app.exception_handler(PacelineError)
    async def wrong(request: Request, error: PacelineError) -> JSONResponse:
        if isinstance(error, StoppingError):
            return refusal(503, str(error), "server_error", wait=_STOPPING)
        if isinstance(error, BusyError):
            wait = request.app.state.context.retry()
            return refusal(429, str(error), "rate_limit_error", wait=wait)
        if isinstance(error, NotFoundError):
            return refusal(404, str(error), "not_found_error", "model")
        if isinstance(error, FailedError):
            return refusal(500, str(error), "server_error")
        if isinstance(error, LeftError):
            return refusal(499, str(error))  # nobody reads it, but the log
        return refusal(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(printable(str(part)) for part in first["loc"] if part != "body")
        said = first["msg"]
        if first["type"] == "extra_forbidden":
            said = "is no parameter of this server"
        elif first["type"] == "json_invalid":
            said = f"is no JSON: {first.get('ctx', {}).get('error', said)}"
            place = "the body"
        return refusal(400, f"{place or 'the body'}: {said}", param=place or None)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return refusal(500, FAILED, "server_error")


def describe(app: FastAPI) -> None:
    """Let the application's OpenAPI document tell its refusals, and its streams."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = original()
            for path, operations in found["paths"].items():
                for method, operation in operations.items():
                    _describe(operation["responses"], path, method)
        return app.openapi_schema or found

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(answers: dict[str, Any], path: str, method: str) -> None:
    answers.pop("422", None)  # it is 400 here
    for status, about in _REFUSALS.items():
        content = {"application/json": {"schema": _SHAPE}}
        if path not in _ALWAYS:
            answers.setdefault(status, {"description": about, "content": content})
    if method == "post" and path in _STREAMS:
        answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
