"""The log: one JSON object a line, without prompts unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

_OWN = "paceline.serving"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; what `extra={"told": {...}}` has comes with it."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        found |= getattr(record, "told", {})
        if record.exc_info:
            found["trace"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def log_to_stderr() -> None:
    """Let everything be logged so: ours from `info` on, that of others from `warning` on."""
    handler = _Stderr()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(_OWN).setLevel(logging.INFO)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at that moment, not to what it was."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
