"""What goes wrong, in OpenAI's shape: one sentence, and the right status."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from paceline.errors import PacelineError
from paceline.serving.scheduler import BusyError

_log = logging.getLogger(__name__)


class NotFoundError(PacelineError):
    """Something that is not here was named."""


def refusal(
    status: int, message: str, kind: str, param: str | None = None, **headers: str
) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    error = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": error}, status, headers=headers)


def install(app: FastAPI) -> None:
    """Let the application answer errors so."""

    @app.exception_handler(PacelineError)
    async def wrong(_: Request, error: PacelineError) -> JSONResponse:
        if isinstance(error, BusyError):
            return refusal(429, str(error), "rate_limit_error", **{"Retry-After": "1"})
        if isinstance(error, NotFoundError):
            return refusal(404, str(error), "not_found_error", "model")
        return refusal(400, str(error), "invalid_request_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        said = first["msg"]
        if first["type"] == "extra_forbidden":
            said = "is no parameter of this server"
        elif first["type"] == "json_invalid":
            said = f"is no JSON: {first.get('ctx', {}).get('error', said)}"
            place = "the body"
        return refusal(
            400, f"{place or 'the body'}: {said}", "invalid_request_error", place or None
        )

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail), "invalid_request_error")

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return refusal(500, "the server failed; its log says more", "server_error")
