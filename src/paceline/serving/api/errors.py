"""Errors in OpenAI's format: one sentence, and the matching status code."""

from __future__ import annotations

import logging
from math import ceil, inf
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from paceline.errors import PacelineError, TooLongError
from paceline.serving.api.body_faults import fault_of, printable
from paceline.serving.api.error_forms import family_of
from paceline.serving.messages import FAILED
from paceline.serving.scheduler import BusyError
from paceline.serving.service import StoppingError

_log = logging.getLogger(__name__)
# Clients know this sentence of OpenAI's, and shorten the conversation.
_LONGEST = "This model's maximum context length is {} tokens."
_STOPPING = 5  # seconds after which another server may have taken over
_ALWAYS = ("/health", "/ready")
_STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_LINES = ("/api/chat", "/api/generate")  # stream as lines of JSON
_OFFERED = (
    "chat/completions, completions, responses, messages and models under /v1, tokenize, "
    "detokenize, and Ollama's chat, generate, tags, ps, show and version under /api"
)
_REFUSALS = {
    "400": "Something in the request is invalid.",
    "401": "Unknown API key.",
    "404": "Unknown model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "Too many requests; see Retry-After.",
    "500": "A bug; see the log.",
    "503": "The server is shutting down.",
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
    """A name that does not exist here was given."""


class FailedError(PacelineError):
    """A bug; the log has it."""


class LeftError(PacelineError):
    """The client closed the connection."""


def refusal(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    wait: float | None = None,
) -> JSONResponse:
    """Return an error response in OpenAI's format.

    Args:
        status: of HTTP.
        message: one sentence.
        kind: OpenAI's error type.
        param: the field at fault.
        code: OpenAI's error code.
        wait: seconds after which the client may try again.
    """
    error = {"message": printable(message), "type": kind, "param": param, "code": code}
    headers = {} if wait is None else {"Retry-After": str(ceil(wait))}
    return JSONResponse({"error": error}, status, headers=headers)


def error_body(error: Exception) -> dict[str, Any]:
    """Return the error event of a stream that fails on its way; a bug goes to the log."""
    known = isinstance(error, PacelineError)
    if not known:
        _log.error("a stream failed", exc_info=error)
    message = printable(str(error)) if known else FAILED
    kind = "invalid_request_error" if known else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def install(app: FastAPI) -> None:
    """Let the application answer exceptions with these errors."""

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
            return refusal(499, str(error))  # nobody reads it; for the log
        if isinstance(error, TooLongError):
            here = request.app.state.context
            longest = min(here.limits.prompt_tokens or inf, here.lm.engine.config.context)
            message = f"{error}. {_LONGEST.format(longest)}"
            return refusal(400, message, code="context_length_exceeded")
        return refusal(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        location, reason = fault_of(error.errors(), error.body)
        return refusal(400, f"{location or 'the body'}: {reason}", param=location or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        reason = str(error.detail)
        if error.status_code == 404:
            path = request.url.path
            reason = f"there is no {printable(path)!r:.80} here; this server has {_OFFERED}"
        return refusal(error.status_code, reason)

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return refusal(500, FAILED, "server_error")


def describe(app: FastAPI) -> None:
    """Add refusals and streams to the application's OpenAPI document."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    _describe(operation["responses"], path, method)
        return app.openapi_schema or document

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(answers: dict[str, Any], path: str, method: str) -> None:
    answers.pop("422", None)  # invalid bodies get 400 here
    for status, about in _REFUSALS.items():
        content = {"application/json": {"schema": _shape(path)}}
        if path not in _ALWAYS:
            answers.setdefault(status, {"description": about, "content": content})
    if method == "post" and path in _STREAMS:
        answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    if method == "post" and path in _LINES:
        answers["200"]["content"]["application/x-ndjson"] = {"schema": {"type": "string"}}


def _shape(path: str) -> dict[str, Any]:
    """Return the schema of a path's errors."""
    family = family_of(path)
    if family is None:
        return _SHAPE
    text = {"type": "string"}
    if family == "ollama":
        return {"type": "object", "required": ["error"], "properties": {"error": text}}
    properties = {"type": text, "message": text}
    error = {"type": "object", "required": ["type", "message"], "properties": properties}
    return {
        "type": "object",
        "required": ["type", "error"],
        "properties": {"type": {"const": "error"}, "error": error},
    }
