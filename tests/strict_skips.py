"""Turns a skip into a failure, unless `tests/skips.txt` names it: nothing is left out unnoticed.

On where `--strict-skips` is given, as by `scripts/test.sh`.
"""

from fnmatch import fnmatch
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("skips.txt")


def allowed_skips(text):
    """Return the patterns of skips that are allowed, from `PATTERN: REASON` lines."""
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.partition(": ") for line in lines if line and not line.startswith("#")]
    for pattern, _, reason in pairs:
        if not reason.strip():
            raise ValueError(f"{LIST.name} gives no reason for {pattern!r}: write PATTERN: REASON")
    return [pattern for pattern, _, _ in pairs]


class StrictSkips:
    """A plugin of pytest."""

    def __init__(self, patterns):
        self.patterns = patterns

    def _refuse(self, report):
        if not report.skipped or hasattr(report, "wasxfail"):
            return report
        where = report.longrepr
        reason = (where[2] if isinstance(where, tuple) else str(where)).removeprefix("Skipped: ")
        texts = (report.nodeid, reason)
        if not any(fnmatch(text, pattern) for text in texts for pattern in self.patterns):
            report.outcome = "failed"
            report.longrepr = (
                f"skipped: {reason}; name {report.nodeid} in tests/{LIST.name} to allow it"
            )
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        return self._refuse((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self):
        return self._refuse((yield))


def pytest_addoption(parser):
    about = "Fail for every skip that tests/skips.txt does not name."
    parser.addoption("--strict-skips", action="store_true", help=about)


def pytest_configure(config):
    if config.getoption("--strict-skips"):
        config.pluginmanager.register(StrictSkips(allowed_skips(LIST.read_text())))
