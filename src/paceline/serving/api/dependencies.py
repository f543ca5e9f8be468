"""What routes share: the service, its limits, and who asks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from paceline.serving.api import formatting
from paceline.serving.api.collect import ChoiceCollector
from paceline.serving.api.errors import NotFoundError
from paceline.serving.api.parse import RequestLimits
from paceline.serving.messages import Job, JobEvent
from paceline.serving.rate_limits import Departures
from paceline.serving.service import Service

if TYPE_CHECKING:
    from paceline.lm import LM


@dataclass
class Dependencies:
    """What routes need.

    Attributes:
        service: runs requests.
        name: what the model is called.
        limits: what may be asked for.
        departures: how soon places come free.
    """

    service: Service
    name: str
    limits: RequestLimits = field(default_factory=RequestLimits)
    departures: Departures = field(default_factory=Departures)

    @property
    def lm(self) -> LM:
        """The model."""
        return self.service.worker.lm

    def retry(self) -> int:
        """Seconds after which one who is sent away now should try again."""
        return self.departures.wait(self.service.load.waiting)

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            NotFoundError: it is not here.
        """
        if name is not None and name != self.name:
            raise NotFoundError(f"there is no model {name!r} here, only {self.name!r}")


def _context(request: Request) -> Dependencies:
    context: Dependencies = request.app.state.context
    return context


Here = Annotated[Dependencies, Depends(_context)]


async def opened(here: Dependencies, request: Request, jobs: Sequence[Job]) -> ChoiceCollector:
    """The answers to a request, handed in.

    Raises:
        PacelineError: as `Service.stream`.
    """
    answering = ChoiceCollector(here.service, jobs)
    await answering.open()
    request.state.answers = answering.answers
    return answering


def told(piece: dict[str, Any], trace: bool, event: JobEvent, lm: LM) -> dict[str, Any]:
    """A piece of a stream, with what went wrong, or with its pass where it is looked at."""
    if event.finish == "error":
        piece["error"] = {"message": event.error, "type": "server_error"}
    if trace and event.tokens:
        piece["paceline"] = formatting.traced(event, lm)
    return piece


def client_of(request: Request, user: str | None = None) -> str:
    """Whose request it is: that of a key, else of the user it names, else of an address."""
    key: str | None = getattr(request.state, "key", None)
    return key or user or (request.client.host if request.client else "")


def named(kind: str) -> str:
    """A name for a request that no other has."""
    return f"{kind}-{secrets.token_hex(12)}"
