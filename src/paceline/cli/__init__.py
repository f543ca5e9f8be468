"""The command line, one file for each verb."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; the entry point of `paceline`."""
    try:
        fill_streams()
        from paceline.cli.app import make_app

        make_app(sys.argv[1] if len(sys.argv) > 1 else None)()
    except KeyboardInterrupt:  # before a verb has begun
        print("paceline: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def fill_streams() -> None:
    """Put something where the caller closed a stream, so that no file takes its number.

    Reading ends at once, writing to stdout fails as it would, and stderr goes nowhere.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
