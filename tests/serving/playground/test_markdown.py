"""Answers are shown as Markdown, and nothing that a model writes becomes anything else."""

import random

from tests.serving.playground.steps import answering, expect, say, turns

SHOW = """async (text) => {
    const { showMarkdown } = await import("/playground/render.js");
    const place = document.createElement("div");
    showMarkdown(place, text);
    return place.innerHTML.replace(/<button.*?<\\/button>/g, "");
}"""
P = "<p>{}</p>".format


def tight(kind, *items):
    return f"<{kind}>" + "".join(f"<li>{item}</li>" for item in items) + f"</{kind}>"


FORMS = {
    "a *b* **c** ***d*** ~~e~~": P(
        "a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del>"
    ),
    "snake_case_name and 2 * 3 * 4": P("snake_case_name and 2 * 3 * 4"),
    "_a_ __b__ *c": P("<em>a</em> <strong>b</strong> *c"),
    "**a *b** c*": P("<em><em>a <em>b</em></em> c</em>"),
    "`a*b*` ``c`d`` `e": P("<code>a*b*</code> <code>c`d</code> `e"),
    r"\*a\* &lt;b&gt; &amp;amp;": P("*a* &lt;b&gt; &amp;amp;"),
    "one\ntwo": P("one<br>two"),
    "one\n\ntwo": P("one") + P("two"),
    "# A\n## B *c*": "<h3>A</h3><h4>B <em>c</em></h4>",
    "a\n\n---\n\nb": P("a") + "<hr>" + P("b"),
    "> a\nb\n\nc": f"<blockquote>{P('a<br>b')}</blockquote>" + P("c"),
    "- a\n- b": tight("ul", "a", "b"),
    "Here:\n1. a\n2. b": P("Here:") + tight("ol", "a", "b"),
    "- a\n  - b\n  - c\n- d": tight("ul", "a" + tight("ul", "b", "c"), "d"),
    "1. a\n   - b\n2. c": tight("ol", "a" + tight("ul", "b"), "c"),
    "3. a\n4. b": tight("ol", "a", "b").replace("<ol>", '<ol start="3">'),
    "- a\n\n- b": tight("ul", P("a"), P("b")),
    "It was in\n1986. Then": P("It was in<br>1986. Then"),
    "<b>no</b> <!-- no -->": P("&lt;b&gt;no&lt;/b&gt; &lt;!-- no --&gt;"),
}


def test_the_forms_of_markdown(page):
    expect(page.locator("#model")).to_have_text("tiny")
    for text, markup in FORMS.items():
        assert page.evaluate(SHOW, text) == markup, text


def test_tables_tasks_and_links(page):
    with answering(
        page,
        "| a | b |\n|---|--:|\n| 1 | `x|y` |\n| 2 |\n\n- [x] done\n- [ ] open\n\n"
        "[site](https://example.org/a_(b) 'x') https://example.org/c. ![cat](http://example.org/cat.png)",
    ):
        say(page, "Show")
    table = page.locator(".markdown table")
    rows = [row.locator("th, td").all_inner_texts() for row in table.locator("tr").all()]
    assert rows == [["a", "b"], ["1", "x|y"], ["2", ""]]
    assert table.locator("td").nth(1).evaluate("e => getComputedStyle(e).textAlign") == "end"
    states = page.locator(".task input").evaluate_all("all => all.map(e => e.checked)")
    assert states == [True, False]
    links = page.locator("#talk a")
    assert links.evaluate_all("all => all.map(e => [e.textContent, e.href, e.rel, e.target])") == [
        [text, f"{address}", "noopener noreferrer nofollow", "_blank"]
        for text, address in (
            ("site", "https://example.org/a_(b)"),
            ("https://example.org/c", "https://example.org/c"),
            ("Image: cat", "http://example.org/cat.png"),
        )
    ]


def test_code_is_shown_and_copied(watched):
    page = watched.page
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "def f(x):\n    return `x` * 2  # *no* <b>\n"
    with answering(page, f"Look:\n\n```python\n{code}```\n\nDone.", "~~~\nopen"):
        say(page, "Code")
        assert page.locator(".code-head span").inner_text() == "python"
        assert page.locator(".code code").text_content() == code.rstrip("\n")
        page.get_by_role("button", name="Copy code").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == code.rstrip("\n")
        say(page, "More")
    assert page.locator(".code code").last.text_content() == "open"
    page.get_by_role("button", name="Copy message").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == "~~~\nopen"


def test_code_is_copied_where_the_page_is_not_secure(watched):
    page = watched.page
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with answering(page, "Hello *there*."):
        say(page, "Hi")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')) }")
    page.get_by_role("button", name="Copy message").last.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Hello *there*."


EVIL = [
    "<script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    "<svg/onload=window.hurt=1>",
    "<a href='javascript:window.hurt=1'>x</a>",
    "[x](javascript:window.hurt=1)",
    "[x](<javascript:window.hurt=1>)",
    "[x](JaVaScRiPt:window.hurt=1)",
    "[x](java\tscript:window.hurt=1)",
    "[x](\x01javascript:window.hurt=1)",
    "[x](data:text/html,<script>window.hurt=1</script>)",
    "[x](vbscript:x)",
    "[x](file:///etc/passwd)",
    "[x](//evil.example)",
    "[x](blob:https://a/b)",
    "<javascript:window.hurt=1>",
    "![x](javascript:window.hurt=1)",
    '[x](https://a.example/"onmouseover="window.hurt=1)',
    "`<script>`",
    "```<script>\n</code></pre><script>window.hurt=1</script>\n```",
    "| <img src=x onerror=window.hurt=1> | b |\n|--|--|\n| [x](javascript:1) | b |",
    "&lt;script&gt;window.hurt=1&lt;/script&gt;",
    "&#106;avascript:x",
    "<think>",
    "</think>",
    "\u202e\u0000\ufeff\ud83d",
]
BITS = [
    "*",
    "**",
    "_",
    "~~",
    "`",
    "```",
    "\n",
    "\n\n",
    "> ",
    "- ",
    "1. ",
    "# ",
    "|",
    "|--|",
    "[",
    "]",
]
BITS += [
    "(",
    ")",
    "<",
    ">",
    "&",
    '"',
    "'",
    "\\",
    "!",
    " ",
    "    ",
    "word",
    "https://a.example/",
    ":",
]

CHECK = """async (texts) => {
    const { showMarkdown, clearMarkdown } = await import("/playground/render.js");
    const { markedWriter } = await import("/playground/token_marks.js");
    const TAGS = new Set(("P H3 H4 H5 H6 UL OL LI BLOCKQUOTE PRE CODE EM STRONG DEL A BR HR TABLE "
        + "THEAD TBODY TR TH TD DIV SPAN BUTTON INPUT svg path").split(" "));
    const wrong = [];
    const place = document.createElement("div");
    document.body.append(place);
    for (const text of texts) {
        const marks = [...text].length < 2 ? [] : [0, 1, 2].map((n) => ({
            start: n * 2, end: n * 2 + 2, token: { pass: 0, name: "lookup", probability: 0.5 },
        }));
        for (const write of [undefined, markedWriter(marks)]) {
            clearMarkdown(place);
            for (const size of [Math.floor(text.length / 2), text.length]) {  // as it grows
                showMarkdown(place, text.slice(0, size), write);
            }
            for (const element of place.querySelectorAll("*")) {
                const names = element.getAttributeNames();
                const scheme = element.tagName === "A" ? new URL(element.href).protocol : "https:";
                if (!TAGS.has(element.tagName) || names.some((name) => name.startsWith("on"))
                    || !["http:", "https:", "mailto:"].includes(scheme)) {
                    wrong.push([text, element.outerHTML]);
                }
            }
            const fresh = document.createElement("div");
            showMarkdown(fresh, text, write);
            if (fresh.innerHTML !== place.innerHTML) wrong.push([text, "differs as it grows"]);
        }
    }
    place.remove();
    return wrong;
}"""


def test_hostile_texts_stay_texts(page):
    """Whatever pieces of markup a model joins, only the elements of the renderer appear."""
    draw = random.Random(14)
    pieces = EVIL + BITS * 2
    texts = EVIL + ["".join(draw.choices(pieces, k=draw.randint(2, 14))) for _ in range(1500)]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.evaluate(CHECK, texts) == []
    assert page.evaluate("window.hurt") is None


UNITS = [
    "*a ",
    "**",
    "[",
    "](",
    "> ",
    "- ",
    "`",
    "|",
    "_a*",
    "<",
    "  - ",
    "![a](",
    '"a',
    "/*",
    "'''",
]


def test_long_hostile_texts_take_no_forever(page):
    expect(page.locator("#model")).to_have_text("tiny")
    for unit in UNITS:
        text = unit * (40_000 // len(unit))
        for whole in (text, f"~~~js\n{text}", f"~~~python\n{text}"):
            assert page.evaluate(SHOW, whole), unit


def test_hostile_answers_in_a_conversation(page):
    with answering(page, *EVIL[:12]):
        for text in EVIL[:12]:
            say(page, text)
    assert turns(page)[::2] == [text.strip() for text in EVIL[:12]]
    assert page.locator("#talk a, #talk img, #talk script").count() == 0
    assert page.evaluate("window.hurt") is None


PARTS = {
    ("python", 'if x: # a "b"\n  y = "#1" + 12'): [
        ("keyword", "if"),
        ("comment", '# a "b"'),
        ("string", '"#1"'),
        ("number", "12"),
    ],
    ("js", "let a = 'x\\'y'; // no\n/* a\nb */ f(1.5)"): [
        ("keyword", "let"),
        ("string", "'x\\'y'"),
        ("comment", "// no"),
        ("comment", "/* a\nb */"),
        ("number", "1.5"),
    ],
    ("SQL", "SELECT a -- b\n"): [("keyword", "SELECT"), ("comment", "-- b")],
    ("json", '{"a": 1, "b": "//"}'): [
        ("string", '"a"'),
        ("number", "1"),
        ("string", '"b"'),
        ("string", '"//"'),
    ],
    ("", "it isn't // x"): [],
}


def test_the_parts_of_code_have_colours(page):
    expect(page.locator("#model")).to_have_text("tiny")
    for (language, text), expected in PARTS.items():
        parts = page.evaluate(
            """async ([text, language]) =>
                (await import("/playground/highlight.js")).codeParts(text, language)""",
            [text, language],
        )
        assert "".join(part["text"] for part in parts) == text
        assert [(part["kind"], part["text"]) for part in parts if part["kind"]] == expected


def test_blocks_that_are_complete_stay_while_an_answer_grows(page):
    expect(page.locator("#model")).to_have_text("tiny")
    kept = page.evaluate("""async () => {
        const { showMarkdown } = await import("/playground/render.js");
        const place = document.createElement("div");
        showMarkdown(place, "one\\n\\n```\\ncode");
        const [first, second] = place.children;
        showMarkdown(place, "one\\n\\n```\\ncode\\n```\\n\\nthree");
        return [place.children[0] === first, place.children[1] === second, place.children.length];
    }""")
    assert kept == [True, False, 3]
