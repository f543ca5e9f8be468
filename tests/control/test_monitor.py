"""Attributes behind a dot: those that exist, however they are divided into tokens."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.monitor import Analysis, Monitor, _Monitor
from paceline.core import Request, TokenTree
from paceline.errors import MethodError, RequestError
from paceline.models.tokenizer import open_tokenizer
from paceline.models.vocabulary import Vocabulary
from tests.byte_tokenizer import byte_level

pytest.importorskip("jedi")

CODE = """class Basket:
    def __init__(self):
        self.apples = 1
        self.apple_tree = 2

    def pick(self): ...

basket = Basket()
"""
PUBLIC = {"apples", "apple_tree", "pick"}


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="plain", engine="native", budget=0)


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory):
    tokenizer = open_tokenizer(byte_level(tmp_path_factory.mktemp("bytes")))
    return Vocabulary(len(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def attributes():
    """Asked once: the names do not depend on the tokens."""
    found = Analysis(".")(CODE + "basket.")
    return lambda text: found if text.endswith("basket.") else []


def test_the_analysis_knows_attributes():
    ask = Analysis(".")
    names = ask(CODE + "basket.")
    assert set(names) >= PUBLIC
    assert all(name in PUBLIC or name.startswith("__") for name in names)
    for tail in ("# basket.", "'basket.", "x = 3.", "unknown.", "unknown().", "f(x: .", ""):
        assert ask(CODE + tail) == [], tail
    assert Analysis(".", CODE)("basket.") == names


def test_the_analysis_reads_the_project_and_never_fails(tmp_path, monkeypatch):
    (tmp_path / "shop.py").write_text("def sell(): ...\nraise SystemExit\n")
    names = Analysis(str(tmp_path))("import shop\nshop.")
    assert "sell" in names
    import jedi

    def broken(*words, **more):
        raise RecursionError

    monkeypatch.setattr(jedi, "Script", broken)
    assert Analysis(".")(CODE + "basket.") == []


def bind(vocabulary, analysis, prompt):
    request = Request(tuple(prompt), 50, stop_tokens=frozenset({vocabulary.size - 2}))
    return _Monitor(analysis, request, vocabulary)


def allowed(control, vocabulary, history):
    return np.isfinite(control.apply(np.zeros(vocabulary.size, "f4"), history))


@pytest.mark.parametrize("kind", ["bytes", "real"])
def test_tokens_begin_or_continue_a_name(lm, by_bytes, attributes, kind):
    vocabulary = by_bytes if kind == "bytes" else lm.vocabulary
    prompt = vocabulary.tokenizer.encode("x = basket.")
    control = bind(vocabulary, attributes, prompt)
    names = {name.encode() for name in attributes("basket.")}
    stop = vocabulary.size - 2
    for written in ("", "a", "app", "apple", "apples", "pi", "pick"):
        history = prompt + vocabulary.inside(written.encode()) if written else list(prompt)
        row = allowed(control, vocabulary, history)
        for token, piece in enumerate(vocabulary.pieces):
            part = re.match(rb"[\w\x80-\xff]*", piece)[0]
            name = written.encode() + part
            whole = name in names
            begins = any(each.startswith(name) for each in names)
            if token == stop:
                assert row[token] == (written.encode() in names)
            elif not piece:
                assert not row[token]
            else:
                assert row[token] == (begins if part == piece else whole), (written, piece)


def test_elsewhere_nothing_is_forbidden(by_bytes, attributes):
    for text in ("x = basket", "x = 3.", "x .", ".", "unknown.", "basket.apples + ", "basket.nix"):
        prompt = by_bytes.tokenizer.encode(text)
        control = bind(by_bytes, attributes, prompt)
        assert allowed(control, by_bytes, prompt).all(), text
    history = [*by_bytes.tokenizer.encode("basket."), by_bytes.size - 2]
    assert allowed(control, by_bytes, history).all()  # behind the end of the text


def test_a_broken_analysis_leaves_the_logits_alone(by_bytes):
    prompt = by_bytes.tokenizer.encode("basket.")
    control = bind(by_bytes, lambda text: [], prompt)
    logits = np.zeros(by_bytes.size, "f4")
    assert control.apply(logits, prompt) is logits
    control = bind(by_bytes, lambda text: ["pick"], prompt)
    logits[list(b"p")] = -np.inf  # by another control: no name is left
    logits[by_bytes.tokenizer.encode("p")[0]] = -np.inf
    assert control.apply(logits, prompt) is logits


@given(st.sampled_from(["basket.", "basket.ap", "x = 1"]), st.text("aplesick_ .(1", max_size=8))
@settings(max_examples=80, deadline=None)
def test_drafts_are_dropped_where_tokens_are_forbidden(by_bytes, attributes, text, guess):
    prompt = by_bytes.tokenizer.encode(text)
    tokens = by_bytes.tokenizer.encode(guess) if guess else []
    control = bind(by_bytes, attributes, prompt)
    kept = control.allows(prompt, TokenTree.chain([prompt[-1], *tokens]))
    assert kept[0]
    history = list(prompt)
    for place, token in enumerate(tokens):
        can = allowed(control, by_bytes, history)[token]
        assert kept[place + 1] or not can
        if not can:
            name = re.search(r"basket\.\w*\Z", text + guess[:place])
            assert not kept[place + 1] or not text.startswith("basket") or not name
            break
        history.append(token)


def test_a_model_writes_attributes_that_exist(lm):
    for seed in range(3):
        output = lm.generate(
            CODE + "print(basket.",
            controls=[Monitor()],
            temperature=1.0,
            seed=seed,
            max_new_tokens=24,
        )
        name = re.match(r"\w*", output.text)[0]
        assert any(each.startswith(name) for each in (*PUBLIC, "__"))


def test_what_cannot_be_is_refused(lm, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="expected a folder"):
        lm.request("x", controls=f"monitor={tmp_path / 'none'}")
    with pytest.raises(RequestError, match=r"cannot read monitor\.before"):
        lm.request("x", controls=f"monitor.before={tmp_path / 'none'}")
    with pytest.raises(RequestError, match="expected a file"):
        lm.request("x", controls=f"monitor.before={tmp_path}")
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="not UTF-8"):
        lm.request("x", controls=f"monitor.before={tmp_path / 'bad'}")
    monkeypatch.setitem(__import__("sys").modules, "jedi", None)
    with pytest.raises(MethodError, match=r"paceline\[monitor\]"):
        lm.request("x", controls="monitor=.")
