"""The playground at `/`: a page that sends requests to this server only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.routing import NoMatchFound

from paceline.core import Exactness
from paceline.engines.base import Engine
from paceline.errors import MethodError
from paceline.serving.api.dependencies import Here
from paceline.serving.api.errors import NotFoundError

if TYPE_CHECKING:
    from paceline.lm import LM

router = APIRouter()

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_KINDS = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
_PAGE = files("paceline.serving.playground") / "page"
_FILES = {file.name: file for file in _PAGE.iterdir()}
_FILES["report.css"] = files("paceline.measuring.report") / "page.css"  # shared style


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the page."""
    return _file_response("index.html")


@router.get("/playground/{name}", include_in_schema=False)
async def part(name: str) -> Response:
    """Return a file of the page."""
    if name not in _FILES:
        raise NotFoundError(f"the playground has no file {name!r}")
    return _file_response(name)


@router.get("/v1/playground", include_in_schema=False)
async def facts(here: Here, request: Request) -> dict[str, Any]:
    """Return what the page shows; below `/v1`, where a key may be required.

    `memory` is the size of weights, keys and values now, in bytes; `machine` is whether there is a
    picture of the machine.
    """
    method, engine = here.lm.drafter_method, here.lm.engine
    return {
        "model": here.name,
        "format": engine.format,
        "memory": _memory(engine),
        "context": here.lm.engine.config.context,
        "chat": here.lm.tokenizer.template is not None,
        "drafter": getattr(method, "name", type(method).__name__),
        "drafters": list(here.limits.drafters),
        "machine": _has_machine(request.app),
        "exact": getattr(method, "exactness", None) is Exactness.EXACT,
    }


def machine_router(picture: Callable[[LM], Mapping[str, Any]]) -> APIRouter:
    """Return the route of what this machine can do with the model.

    Args:
        picture: returns it for JSON; it may take seconds, and raise PacelineError.
    """
    router = APIRouter()

    @router.get("/v1/machine")
    def machine_picture(here: Here) -> dict[str, Any]:
        """Return what this machine can do with the model: its formats, their bytes and speeds.

        The first call measures the memory bandwidth, in about a second. Speeds are those of plain
        passes that were measured, by this server or by `paceline plan`; others are null.
        """
        return dict(picture(here.lm))

    return router


def _has_machine(app: FastAPI) -> bool:
    """Return whether an application has the route of `machine_router`."""
    try:
        return bool(app.url_path_for("machine_picture"))
    except NoMatchFound:
        return False


def _memory(engine: Engine) -> int | None:
    """Return the bytes of weights and of keys and values now; None if the engine counts none."""
    try:
        pages = engine.memory
    except MethodError:
        return engine.weights_memory or engine.weight_bytes
    return (engine.weights_memory or engine.weight_bytes or 0) + pages.used * pages.page_bytes


def _file_response(name: str) -> Response:
    kind = _KINDS[name.rpartition(".")[2]]
    text = _FILES[name].read_text(encoding="utf-8")
    return Response(text, headers=_HEADERS, media_type=kind)
