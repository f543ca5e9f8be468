from contextlib import suppress
from dataclasses import make_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.cli.parsing import (
    budgets,
    find_drafters,
    numbers,
    one_temperature,
    parse_sampler,
    split_drafters,
)
from paceline.control.min_p import MinP
from paceline.control.repetition_penalty import RepetitionPenalty
from paceline.control.top_k import TopK
from paceline.core import Exactness
from paceline.errors import MethodError, PacelineError, RequestError
from paceline.registry import drafters


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["lookup"], ["lookup"]),
        (["lookup,recycle"], ["lookup", "recycle"]),
        (["recycle:tree=paper,k=8,lookup"], ["recycle:tree=paper,k=8", "lookup"]),
        (["lookup:n=3,recycle:tree=paper"], ["lookup:n=3", "recycle:tree=paper"]),
        (["recycle:tree=paper;recycle:tree=static,k=4"], None),
        (["lookup", "recycle"], ["lookup", "recycle"]),
        ([" lookup , lookup ;; "], ["lookup"]),
        ([""], []),
        (["recycle:k=8,keep=0.5+lookup"], ["recycle:k=8,keep=0.5", "lookup"]),
        (['datastore:path="a,b+c"+lookup'], ['datastore:path="a,b+c"', "lookup"]),
        (["blend:members=trie+forced,lookup"], ['blend:members="trie+forced"', "lookup"]),
    ],
)
def test_drafter_lists(texts, found):
    expected = ["recycle:tree=paper", "recycle:tree=static,k=4"] if found is None else found
    assert split_drafters(texts) == expected


names = st.from_regex(
    r"[a-z]{1,5}(:[a-z]=[a-z0-9]{1,3}(,[a-z]{2}=[a-z0-9]{1,3})?(,[a-z]{3}=[a-z0-9]{1,3})?)?",
    fullmatch=True,
)


@given(st.lists(names, max_size=5, unique=True))
def test_joining_and_splitting_are_inverse(texts):
    assert split_drafters([",".join(texts)]) == texts
    assert split_drafters([";".join(texts)]) == texts
    assert split_drafters(texts) == texts


def test_samplers_become_controls():
    controls, temperature = parse_sampler(
        "min_p=0.1, temperature=0.8,top_k=7,repetition_penalty=1.3"
    )
    assert controls == [MinP(0.1), TopK(7), RepetitionPenalty(1.3)]
    assert temperature == 0.8
    assert parse_sampler(None) == (None, None)
    assert parse_sampler("") == ([], None)
    long = parse_sampler(
        "min_p:p=0.1+temperature:value=0.8+top_k:k=7+repetition_penalty:penalty=1.3"
    )
    assert long == (controls, temperature)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("min_p=0.1,top_k", "has no value"),
        ("min_p:p=0.1+top_k:40", "has no key"),
        ("temperature:value=1+temperature:value=2", "one setting"),
        ("minp=0.1", "did you mean min_p"),
        ("min_p=2", "min_p is 2"),
        ("min_p=x", "expected float"),
        ("top_k=1.5", "expected int"),
        ("temperature=warm", "expected a number"),
        ("temperature=nan", "expected a number"),
    ],
)
def test_bad_samplers(text, said):
    with pytest.raises(PacelineError, match=said):
        parse_sampler(text)


def test_two_temperatures_must_agree():
    assert one_temperature(None, None) is None
    assert one_temperature(0.5, None) == one_temperature(None, 0.5) == one_temperature(0.5, 0.5)
    with pytest.raises(RequestError, match="give one of them"):
        one_temperature(0.5, 0.6)


def test_lists_of_numbers():
    assert numbers("--temperatures", "0,0.7, 1.0,0") == [0.0, 0.7, 1.0]
    assert budgets("4, 8,auto,4") == [4, 8, "auto"]
    for text in ("", ",", "a", "-1", "1,,nan", "inf"):
        with pytest.raises(PacelineError):
            numbers("--temperatures", text)
    for text in ("1.5", "4097", "x", "", "4,", "-1", "²", "9" * 5000):
        with pytest.raises(RequestError, match="--budget"):
            budgets(text)


def test_all_is_every_exact_visible_drafter_that_needs_nothing(monkeypatch):
    def method(exactness=Exactness.EXACT, hidden=False, needs=(), fields=()):
        about = {"exactness": exactness, "hidden": hidden, "needs": needs}
        return make_dataclass("Method", fields, namespace=about)

    known = {
        "good": method(),
        "needy": method(needs=("a draft model",)),
        "unset": method(fields=["path"]),
        "hidden": method(hidden=True),
        "lossy": method(Exactness.LOSSY),
    }
    monkeypatch.setattr(drafters, "methods", lambda: known)
    monkeypatch.setattr(drafters, "parse", lambda name: known[name])
    found, left_out = find_drafters(["all", "hidden"])
    assert (list(found), left_out) == (["good", "hidden"], ["needy", "unset"])


def test_an_empty_list_of_drafters_is_refused():
    with pytest.raises(MethodError, match="no drafter is named"):
        find_drafters([" , "])


@given(st.text(max_size=30) | st.from_regex(r"(min_p|top_k|temperature)=[-0-9einfa.]{0,6}"))
def test_any_text_is_a_sampler_or_refused(text):
    with suppress(PacelineError):
        parse_sampler(text)
    with suppress(PacelineError):
        budgets(text)
