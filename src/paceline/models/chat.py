"""Chat templates: a checkpoint's jinja2 program that turns messages into text.

Templates are rendered in a process of their own, sandboxed and with limits; see `chat_worker`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import jinja2
from jinja2 import nodes

from paceline.errors import ModelError, RequestError, one_line
from paceline.models import chat_worker
from paceline.models.chat_messages import (
    as_templates_expect,
    calls_as_text,
    to_continue,
    up_to_end,
    with_content,
)

_LONGEST_SOURCE = 1 << 20  # characters
_START_SECONDS = 60.0  # until the process is ready, on a busy machine
_WALL_SECONDS = 20.0  # of one rendering, where the process gets little of a busy machine
_ADVICE = "give the model another template"


class ChatTemplate:
    """A chat template.

    Args:
        source: the program.
        tool_use: the program for conversations that offer tools; None: the same.

    Attributes:
        source: the program, the one for tools where there are two.
        takes_tools: whether it reads `tools`.

    Raises:
        ModelError: it is not valid jinja2, or too long.
    """

    def __init__(self, source: str, tool_use: str | None = None) -> None:
        self._without_tools = None if tool_use is None else ChatTemplate(source)
        source = source if tool_use is None else tool_use
        if len(source) > _LONGEST_SOURCE:
            raise ModelError(
                f"the chat template has {len(source)} characters, more than {_LONGEST_SOURCE}"
            )
        environment = chat_worker.make_environment()
        try:
            # Only parsed: to compile it, or to ask jinja2 for its variables, would compute
            # constant expressions, however large.
            tree = environment.parse(source)
            self.takes_tools = any(
                node.name == "tools" and node.ctx == "load" for node in tree.find_all(nodes.Name)
            )
            for kind, known in (
                (nodes.Filter, environment.filters),
                (nodes.Test, environment.tests),
            ):
                for node in tree.find_all(kind):
                    if node.name not in known:
                        raise jinja2.TemplateError(f"it has no {kind.__name__} {node.name!r:.80}")
        except (jinja2.TemplateError, RecursionError) as error:
            reason = one_line(error)
            raise ModelError(f"the chat template is not valid jinja2: {reason:.400}") from None
        self.source = source
        self._lock = Lock()
        self._running: _TemplateProcess | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of `messages`, up to where the answer begins.

        Args:
            messages: `role` and `content` of each turn; content that is null or absent is empty.
            special: special tokens by role, e.g. `bos_token`.
            tools: offered to the model.
            settings: further variables of the template, e.g. `enable_thinking`. As in
                transformers, `continue_final_message` ends the text with the last message's.

        Raises:
            RequestError: the template refuses them, or exceeds a limit.
        """
        if self._without_tools is not None and not tools:
            return self._without_tools.render(messages, special, (), settings)
        if settings and settings.get("continue_final_message"):
            text = self.render(to_continue(messages), special, tools, _unanswered(settings))
            return up_to_end(text)
        values = {
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": True,
            **special,
            **(settings or {}),
        }
        expected = as_templates_expect(messages, "developer" in self.source)
        if "tool_calls" not in self.source:
            expected = calls_as_text(expected, "tool" in self.source)
        try:
            return self._rendered({**values, "messages": expected})
        except RequestError:
            if all("content" in message for message in expected):
                raise
        # Many templates add texts up, and fail where one has no content.
        return self._rendered({**values, "messages": with_content(expected)})

    def _rendered(self, values: Mapping[str, Any]) -> str:
        try:
            line = json.dumps(values).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages hold what is not JSON: {error!s:.200}") from None
        with self._lock:
            if self._running is None:
                self._running = _TemplateProcess(self.source)
            try:
                status, text = self._running.ask(line)
            except _EndedError as error:
                self._running = None
                raise RequestError(f"the chat template {error}; {_ADVICE}") from None
        if status == chat_worker.TEXT:
            return text.decode("utf-8", "surrogatepass")
        raise RequestError(_refusal(status, text.decode("utf-8", "replace")))


def _refusal(status: bytes, text: str) -> str:
    if status == chat_worker.TOO_LONG:
        return (
            f"the chat template writes more than {chat_worker.LARGEST_OUTPUT} characters; {_ADVICE}"
        )
    if status == chat_worker.TOO_LARGE:
        return f"the chat template needs more than {chat_worker.MEMORY >> 20} MB; {_ADVICE}"
    return f"the chat template refuses these messages: {' '.join(text.split())}"


def _unanswered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a text that ends with the last message.

    Raises:
        RequestError: a new answer is asked for as well.
    """
    if settings.get("add_generation_prompt"):
        raise RequestError("add_generation_prompt and continue_final_message are both true")
    left = {name: each for name, each in settings.items() if name != "continue_final_message"}
    return left | {"add_generation_prompt": False}


class _EndedError(Exception):
    """The process has ended, or was ended, without an answer."""


class _TemplateProcess:
    """A process that renders one template."""

    def __init__(self, source: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", chat_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
        self._finalizer = weakref.finalize(self, _stop, self._process)
        self._send(json.dumps(source).encode() + b"\n", time.monotonic() + _START_SECONDS)
        self._receive(time.monotonic() + _START_SECONDS)

    def ask(self, line: bytes) -> tuple[bytes, bytes]:
        """Return status and text for a request.

        Raises:
            _EndedError: the process took too long or ended; it is of no more use.
        """
        end = time.monotonic() + _WALL_SECONDS
        self._send(line, end)
        return self._receive(end)

    def _send(self, line: bytes, end: float) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            raise self._ended(end) from None

    def _receive(self, end: float) -> tuple[bytes, bytes]:
        head = self._read(9, end)
        return head[:1], self._read(int.from_bytes(head[1:], "little"), end)

    def _read(self, size: int, end: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, parts = self._process.stdout.fileno(), bytearray()
        while len(parts) < size:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            part = os.read(descriptor, min(size - len(parts), 1 << 20)) if ready else b""
            if not part:
                raise self._ended(end)
            parts += part
        return bytes(parts)

    def _ended(self, end: float) -> _EndedError:
        """End the process, and return why it gave no answer."""
        late = time.monotonic() >= end
        if not late:
            self._process.wait()
        self._finalizer()
        if late or self._process.returncode == -signal.SIGPROF:
            seconds = _WALL_SECONDS if late else chat_worker.CPU_SECONDS
            return _EndedError(f"takes more than {seconds:.0f} seconds")
        return _EndedError("ends the process that renders it")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
    process.wait()


def find_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """Return the template in chat_template.jinja or tokenizer_config.json; None without one.

    Of several named templates `default` is taken, and `tool_use` where tools are offered.

    Raises:
        ModelError: it is not text, or not valid jinja2.
    """
    path = folder / "chat_template.jinja"
    try:
        source = path.read_text("utf-8") if path.exists() else settings.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    tool_use = None
    if isinstance(source, list):
        named = {
            item.get("name"): item.get("template") for item in source if isinstance(item, dict)
        }
        source, tool_use = named.get("default"), named.get("tool_use")
        if source is None:
            raise ModelError("none of the templates in tokenizer_config.json is called default")
    if source is None:
        return None
    if not isinstance(source, str) or not isinstance(tool_use, str | None):
        raise ModelError("chat_template in tokenizer_config.json is not text")
    return ChatTemplate(source, tool_use)
