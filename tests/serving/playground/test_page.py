"""What the page is, without a browser."""

import re

import httpx2 as httpx

from paceline.serving.playground import _FILES


def test_the_page_and_its_parts_are_served_under_a_strict_policy(address):
    found = httpx.get(f"{address}/")
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    parts = re.findall(r'(?:href|src)="([^"]+)"', found.text)
    assert {part.removeprefix("playground/") for part in parts} == set(_FILES) - {"index.html"}
    with httpx.Client() as client:
        files = [client.get(f"{address}/playground/{name}") for name in _FILES]
    for each in [found, *files]:
        assert each.status_code == 200
        policy = each.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert each.headers["x-content-type-options"] == "nosniff"


def test_nothing_points_outside_and_markup_is_never_made_of_text():
    for name, file in _FILES.items():
        text = file.read_text()
        outside = re.findall(r"https?://[^\s\"']+", text)
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"\son[a-z]+=|\sstyle=|javascript:", text), name


def test_other_files_are_not_served(address):
    for name in ("nothing.js", "..%2f__init__.py", "__init__.py", "%2e%2e/app.py", "a%00.js"):
        found = httpx.get(f"{address}/playground/{name}")
        assert found.status_code == 404
        assert found.json()["error"]["message"]


def test_what_the_machine_can_do(address, lm):
    found = httpx.get(f"{address}/v1/machine", timeout=60).json()
    assert found["bandwidth"] > 1e8
    running, stored, *others = found["formats"]
    assert (running["format"], stored["format"]) == ("running", "auto")
    assert running["bytes"] == lm.engine.weight_bytes
    assert running["speed"] > 0
    assert running["roofline"] == found["bandwidth"] / running["bytes"]
    assert set(running["passes"]) == {"4", "8", "16"}
    assert {each["format"] for each in others} >= {"int8", "int4"}


def test_the_facts(address, lm):
    found = httpx.get(f"{address}/v1/playground").json()
    assert found["model"] == "tiny"
    assert found["context"] == lm.engine.config.context
    assert found["chat"] is True
    assert found["machine"] is True
    assert found["format"] == lm.engine.format
    assert found["memory"] >= lm.engine.weight_bytes
    assert found["drafter"] == "blend"
    assert found["exact"] is True
    assert {"plain", "recycle", "blend"} <= set(found["drafters"])
