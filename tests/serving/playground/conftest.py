"""A real browser in front of a real server."""

import shutil

import pytest

from tests.serving.api.conftest import address, lm, served, service  # noqa: F401


@pytest.fixture(scope="package")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    with playwright.sync_playwright() as running:
        own = running.chromium.executable_path  # where Playwright installs it
        program = next(filter(None, map(shutil.which, (*names, own))), None)
        if program is None:
            pytest.skip(f"no browser is here: none of {', '.join(names)}, nor Playwright's own")
        found = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


class Watched:
    """A page, and everything it complained of or asked for."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.url = url

    def close(self, *expected):
        """Nothing was said but what is expected; nothing was asked of anyone else."""
        self.context.close()
        wrong = [said for said in self.said if not any(part in said for part in expected)]
        assert not wrong
        assert len(self.asked) > 8
        assert all(url.startswith(f"{self.url}/") for url in self.asked)


@pytest.fixture
def watched(browser, address):  # noqa: F811
    found = Watched(browser, address, viewport={"width": 1280, "height": 900})
    yield found
    found.close()


@pytest.fixture
def page(watched):
    """The page as it opens: in a chat."""
    return watched.page


@pytest.fixture
def completions(page):
    """The page where it completes prompts."""
    page.get_by_label("Completion", exact=True).check()
    return page
