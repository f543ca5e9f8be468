"""The log: JSON objects or plain lines, without prompts unless they are enabled."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

_OWN = "paceline.serving"


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, with the fields of `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as one line for people: time, level, event and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = getattr(record, "fields", {})
        parts = [f"{name}={_shown(value)}" for name, value in fields.items()]
        level = record.levelname.lower() if record.levelno != logging.INFO else ""
        line = " ".join(filter(None, [time, level, _shown(record.getMessage(), True), *parts]))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: object, words: bool = False) -> str:
    """Return a value without control characters; text with blanks in quotes, unless `words`."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    plain = text.isprintable() and not set(text) & {'"', "\\"}
    if plain and (words or (text and " " not in text)):
        return text
    return json.dumps(text) if isinstance(value, str) else text


FORMATS = ("auto", "text", "json")


def formatter(name: str) -> logging.Formatter:
    """Return the formatter of a log: `text`, `json`, or `auto`: text on a terminal, else JSON."""
    as_text = name == "text" or (name == "auto" and sys.stderr.isatty())
    return TextFormatter() if as_text else JsonFormatter()


def log_to_stderr(name: str = "auto") -> None:
    """Log to stderr: this package's records from `info` on, others from `warning` on.

    Args:
        name: one of `FORMATS`, see `formatter`.
    """
    handler = _Stderr()
    handler.setFormatter(formatter(name))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(_OWN).setLevel(logging.INFO)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, not to the one of its construction."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
