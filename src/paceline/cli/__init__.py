"""The command line, one file for each verb."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point of `paceline`."""
    try:
        from paceline.cli.app import app

        app()
    except KeyboardInterrupt:  # before a verb has begun
        raise SystemExit(130) from None
