"""The playground in light, in the dark, on a phone, by keyboard, and its contrast."""

import pytest

from tests.serving.playground.conftest import Watched
from tests.serving.playground.steps import (
    SAME,
    answering,
    compare,
    done,
    expect,
    fill,
    mode,
    panel,
    say,
)


def tabbed(page):
    """The names of what Tab reaches; each shows its focus and has a name."""
    seen = []
    page.locator("#show-sidebar").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    for _ in range(60):
        identity, named, outline = page.evaluate(
            "(e => [e.id || e.name || e.className || e.tagName,"
            "Boolean((e.labels && e.labels.length) || e.ariaLabel || e.textContent.trim()),"
            "getComputedStyle(e.name === 'mode' ? e.nextElementSibling : e).outlineStyle])"
            "(document.activeElement)"
        )
        if identity in seen or identity == "BODY":
            break
        seen.append(identity)
        if identity != "prompt":  # its frame shows the focus
            assert outline != "none", identity
        assert named, identity
        page.keyboard.press("Tab")
    return seen


def test_the_page_is_used_by_keyboard(page):
    mode(page, "Completion")
    panel(page, "settings")
    every = ["show-sidebar", "colours", "show-inspector", "show-settings", "theme", "mode", "new"]
    every += ["search", "import", "prompt", "run"]
    fields = ["temperature", "seed", "top_p", "top_k", "min_p", "max_tokens", "stops"]
    fields += ["drafter", "budget", "schema", "tools"]
    assert [name for name in tabbed(page) if name in every + fields] == every + fields
    panel(page, "inspector")
    assert [name for name in tabbed(page) if name in [*every, "compare"]] == [*every, "compare"]


LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
    "small": {"color_scheme": "light", "viewport": {"width": 320, "height": 568}},
}


@pytest.mark.parametrize("look", LOOKS)
def test_looks(browser, address, tmp_path, look):
    found = Watched(browser, address, reduced_motion="reduce", **LOOKS[look])
    page = found.page
    body = "(e => getComputedStyle(e).backgroundColor)(document.body)"
    colours = {"light": "rgb(250, 250, 248)", "dark": "rgb(19, 21, 24)"}
    scheme = LOOKS[look]["color_scheme"]
    assert page.evaluate(body) == colours[scheme]
    expect(page.locator("#temperature")).to_be_hidden()
    wide = LOOKS[look]["viewport"]["width"] > 900
    mode(page, "Completion")
    for step in (
        compare,
        lambda page: fill(page, seed=7, max_tokens=80, temperature=0.7, budget=12),
    ):
        step(page)
        if not wide:
            page.keyboard.press("Escape")
    page.locator("#run").click()
    done(page)
    expect(page.locator("#verdict")).to_have_text(SAME)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=tmp_path / f"{look}.png", full_page=True)
    other = {"light": "dark", "dark": "light"}[scheme]
    page.locator("#theme").click()
    assert page.evaluate(body) == colours[other]
    page.reload()
    assert page.evaluate(body) == colours[other]
    page.locator("#theme").click()
    assert page.evaluate(body) == colours[scheme]
    moving = "getComputedStyle(document.getElementById('run')).transitionDuration"
    assert page.evaluate(moving) == "0s"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) != "0s"
    found.close()


CONTRAST = """() => {
    const parse = (text) => {
        const numbers = text.match(/[\\d.]+/g).map(Number);
        const scale = text.startsWith("color(") ? 255 : 1;
        return [...numbers.slice(0, 3).map((each) => each * scale), numbers[3] ?? 1];
    };
    const over = ([r, g, b, a], below) =>
        [r, g, b].map((each, index) => each * a + below[index] * (1 - a));
    const behind = (element) => {
        if (!element) return [255, 255, 255];
        const own = parse(getComputedStyle(element).backgroundColor);
        return over(own, behind(element.parentElement));
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((each) => each / 255).map((each) =>
            each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const texts = [...element.childNodes].filter((each) => each.nodeType === 3);
        const text = texts.some((each) => each.data.trim());
        const style = getComputedStyle(element);
        if (!text || !element.checkVisibility({ checkOpacity: true }) || style.clipPath !== "none"
            || element.closest(":disabled, svg, option")) continue;
        const back = behind(element);
        const fore = over(parse(style.color), back);
        const [high, low] = [light(fore), light(back)].sort((a, b) => b - a);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) found.push([ratio, element.className, element.textContent.slice(0, 40)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(browser, address, scheme):
    found = Watched(browser, address, color_scheme=scheme, reduced_motion="reduce")
    page = found.page
    fill(page, max_tokens=40, temperature=0, budget=8)
    say(page, "Once upon a time")
    page.locator("#colours").click()
    for name in ("settings", "inspector"):
        panel(page, name)
        assert page.locator("#talk .token:not(.own)").count() > 3
        assert page.evaluate(CONTRAST) == []
    page.locator("#colours").click()
    code = "~~~python\n# note\nif x:\n    return 'a' + 1\n~~~\n\n> so `it` *is*\n\n[a](https://a.example)"
    with answering(page, [{"reasoning_content": "Hm."}, {"content": code}]):
        say(page, "Code")
        page.locator(".reasoning summary").last.click()
        assert page.evaluate(CONTRAST) == []
    mode(page, "Completion")
    page.locator("#run").click()
    done(page)
    assert page.evaluate(CONTRAST) == []
    found.close()
