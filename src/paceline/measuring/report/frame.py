"""The frame of every report: one HTML page that has no script and fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from paceline.measuring.report.svg import clean

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def frame(title: str, heading: str, facts: str, sections: Sequence[str]) -> str:
    """Return a page, light or dark by preference.

    Args:
        title: of the browser's window.
        heading: above the page.
        facts: a line below it.
        sections: of HTML.
    """
    style = files("paceline.measuring.report").joinpath("page.css").read_text(encoding="utf-8")
    head = f"<header><h1>{clean(heading)}</h1><p>{clean(facts)}</p></header>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{clean(title)}</title><style>{style}</style></head>"
        f"<body><main>{head}{''.join(sections)}</main></body></html>\n"
    )
