"""What the routes share: the service, its limits, and the identity of clients."""

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
        service: runs the requests.
        name: of the model.
        limits: what a request may ask for.
        departures: estimates when a request can be admitted.
    """

    service: Service
    name: str
    limits: RequestLimits = field(default_factory=RequestLimits)
    departures: Departures = field(default_factory=Departures)

    @property
    def lm(self) -> LM:
        """Return the model."""
        return self.service.worker.lm

    def retry(self) -> int:
        """Return the seconds after which a refused client should try again."""
        return self.departures.wait(self.service.load.waiting)

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            NotFoundError: `name` is not the model served here.
        """
        if name is not None and name != self.name:
            raise NotFoundError(f"there is no model {name!r} here, only {self.name!r}")


def _dependencies(request: Request) -> Dependencies:
    context: Dependencies = request.app.state.context
    return context


Here = Annotated[Dependencies, Depends(_dependencies)]


async def submit_jobs(here: Dependencies, request: Request, jobs: Sequence[Job]) -> ChoiceCollector:
    """Submit the jobs of a request and return their choices.

    Raises:
        PacelineError: see `Service.stream`.
    """
    collector = ChoiceCollector(here.service, jobs)
    await collector.open()
    request.state.choices = collector.choices
    return collector


def with_details(piece: dict[str, Any], trace: bool, event: JobEvent, lm: LM) -> dict[str, Any]:
    """Return a piece of a stream with its error, if it failed, and its pass, if traced."""
    if event.finish == "error":
        piece["error"] = {"message": event.error, "type": "server_error"}
    if trace and event.tokens:
        piece["paceline"] = formatting.traced(event, lm)
    return piece


def client_of(request: Request, user: str | None = None) -> str:
    """Return the client's name: its API key's, else the user it names, else its address."""
    key: str | None = getattr(request.state, "key", None)
    return key or user or (request.client.host if request.client else "")


def new_id(kind: str) -> str:
    """Return a unique id for a request."""
    return f"{kind}-{secrets.token_hex(12)}"
