"""Nodes that are processes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from paceline.engines.pipeline.remote import RemoteNodes
from paceline.engines.pipeline.settings import NodeSettings
from paceline.errors import ModelError

_END_SECONDS = 10.0  # for a process to end by itself


class ProcessNodes(RemoteNodes):
    """Starts each node as a process of this machine.

    Args:
        settings: what they load.
    """

    def __init__(self, settings: NodeSettings) -> None:
        super().__init__(settings, "127.0.0.1")
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def launch(self, index: int, told: dict[str, Any]) -> None:
        """Start a process that runs the `main` of the settings' module."""
        self._end(index)
        command = [sys.executable, "-m", self.settings.module]
        try:
            # Not in our process group: an interrupt of ours must not end it before we do.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
            self.processes[index] = process
            assert process.stdin is not None
            with process.stdin as given:
                given.write(json.dumps(told).encode())
        except OSError as error:
            raise ModelError(f"{self.name(index)} cannot be started: {error.strerror}") from None

    def ended(self, index: int) -> str | None:
        """Return why a process has ended."""
        code = self.processes[index].poll()
        return None if code is None else f"ended with status {code}"

    def _end(self, index: int) -> None:
        process = self.processes.pop(index, None)
        if process is None:
            return
        process.kill()
        process.wait(_END_SECONDS)

    def close(self) -> None:
        """End all processes."""
        super().close()
        for index in list(self.processes):
            self._end(index)
