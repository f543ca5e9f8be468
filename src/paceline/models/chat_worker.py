"""The process in which chat templates are rendered, with limits of time, memory and output.

A template is a program of strangers, and jinja2's sandbox bounds neither what it computes nor what
it builds: `{{ 'x' * 3000000000 }}` is valid. Run as a script, this file reads the template and then
requests from standard input, each a line of JSON, and answers each with a status byte, the length
of a text in 8 bytes, and the text in UTF-8. Imported, it makes the environment that parses
templates.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST_OUTPUT = 1 << 24  # characters, several times the longest contexts
CPU_SECONDS = 2.0  # of one rendering; real templates take milliseconds
MEMORY = 1 << 30  # bytes of address space of the process
TEXT, REFUSED, TOO_LONG, TOO_LARGE = b"T", b"R", b"L", b"M"  # status bytes
_LONGEST_ERROR = 500  # characters


class _Generation(Extension):
    """The tag `{% generation %}`, which marks an answer for training; renders its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that templates written for transformers expect."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialise as templates written for transformers expect: not escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(source: str, template: list[jinja2.Template], values: dict[str, Any]) -> bytes:
    """Return status and text of one rendering; the template is compiled with the first."""
    # The timer counts the time that this process computes; its signal ends the process.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        if not template:
            template.append(make_environment().from_string(source))
        parts, size = [], 0
        for part in template[0].generate(**values):
            parts.append(part)
            size += len(part)
            if size > LARGEST_OUTPUT:
                return TOO_LONG
        return TEXT + "".join(parts).encode("utf-8", "surrogatepass")
    except MemoryError:
        return TOO_LARGE
    except Exception as error:  # whatever a template raises
        text = str(error) or type(error).__name__
        return REFUSED + text[:_LONGEST_ERROR].encode("utf-8", "replace")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(read: BinaryIO, write: BinaryIO) -> None:
    """Answer requests until the input ends."""
    source = json.loads(read.readline())
    template: list[jinja2.Template] = []
    write.write(TEXT + bytes(8))
    write.flush()
    for line in read:
        answer = _answer(source, template, json.loads(line))
        write.write(answer[:1] + (len(answer) - 1).to_bytes(8, "little") + answer[1:])
        write.flush()


if __name__ == "__main__":
    _limit_memory()
    serve(sys.stdin.buffer, sys.stdout.buffer)
