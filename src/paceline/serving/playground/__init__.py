"""The playground at `/`: a page that sends requests to this server only."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response

from paceline.core import Exactness
from paceline.engines.base import Engine
from paceline.errors import MethodError
from paceline.serving.api.dependencies import Here
from paceline.serving.api.errors import NotFoundError

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
async def facts(here: Here) -> dict[str, Any]:
    """Return what the page shows; below `/v1`, where a key may be required.

    `memory` is the size of weights, keys and values now, in bytes.
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
        "exact": getattr(method, "exactness", None) is Exactness.EXACT,
    }


def _memory(engine: Engine) -> int | None:
    """Return the bytes of weights and of keys and values now; None if the engine counts none."""
    try:
        pages = engine.memory
    except MethodError:
        return engine.weight_bytes
    return (engine.weight_bytes or 0) + pages.used * pages.page_bytes


def _file_response(name: str) -> Response:
    kind = _KINDS[name.rpartition(".")[2]]
    text = _FILES[name].read_text(encoding="utf-8")
    return Response(text, headers=_HEADERS, media_type=kind)
