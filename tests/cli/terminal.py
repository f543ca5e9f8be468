"""A program on a pseudo-terminal: what is typed, and what the screen got."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

PROGRAM = [sys.executable, "-c", "from paceline.cli import main; main()"]
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>]|[^a-zA-Z]*$)")


def _own_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """Runs a program with a terminal of 100 columns; a context manager that ends it."""

    def __init__(self, *words, program=PROGRAM, env=None, rows=30):
        self._main, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
        own = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **(env or {})}
        own.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            [*program, *map(str, words)],
            stdin=end, stdout=end, stderr=end,
            env=own, preexec_fn=_own_terminal, close_fds=True,
        )  # fmt: skip
        os.close(end)
        self.raw = ""
        self._seen = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._main)

    def type(self, text):
        os.write(self._main, text.encode())

    def send(self, line):
        self.type(line + "\r")

    def read(self, seconds):
        """Read what comes within a while; False at the end of the program."""
        if select.select([self._main], [], [], seconds)[0]:
            try:
                part = os.read(self._main, 65536)
            except OSError:
                return False
            self.raw += part.decode(errors="replace")
            return bool(part)
        return True

    @property
    def text(self):
        """What came after the last `expect`, without escapes."""
        return _ESCAPES.sub("", self.raw).replace("\r", "")[self._seen :]

    def expect(self, pattern, seconds=100):
        """Wait for a pattern in the text; return the match."""
        end = time.monotonic() + seconds
        alive = True
        while True:
            found = re.search(pattern, self.text)
            if found:
                self._seen += found.end()
                return found
            if not alive or time.monotonic() > end:
                raise AssertionError(f"no {pattern!r} in {self.text!r}")
            alive = self.read(0.2)

    def interrupt(self, pattern):
        """Press Ctrl-C until a pattern comes: readline misses it while it handles another key."""
        for _ in range(20):
            self.type("\x03")
            try:
                return self.expect(pattern, 5)
            except AssertionError:
                continue
        return self.expect(pattern, 0)

    def end(self, seconds=100):
        """Wait for the end; return the exit code."""
        limit = time.monotonic() + seconds
        while self.read(0.2) and time.monotonic() < limit and self.process.poll() is None:
            pass
        return self.process.wait(timeout=seconds)
