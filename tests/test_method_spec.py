import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engines.ensemble import parse_ensemble
from paceline.engines.formats import parse_format
from paceline.errors import MethodError, ModelError
from paceline.method_spec import (
    MethodSpec,
    join_specs,
    members,
    parse_spec,
    parse_specs,
    split_list,
    split_quoted,
)
from paceline.watermarks.base import parse_watermark

TEXTS = st.text() | st.text('a",+:=\\; \n', max_size=8)
SETTINGS = st.dictionaries(st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True), TEXTS, max_size=4)
NAMES = ("beam", "cfg", "top_p")


@given(st.builds(MethodSpec, TEXTS, SETTINGS))
def test_any_specification_is_written_and_read_back(spec):
    assert parse_spec(str(spec)) == spec


@given(st.lists(st.builds(MethodSpec, st.sampled_from(NAMES), SETTINGS), max_size=4))
def test_any_list_is_written_and_read_back(specs):
    assert parse_specs(join_specs(specs), NAMES) == specs


@given(TEXTS)
def test_what_was_read_is_written_so_that_it_reads_the_same(text):
    try:
        spec = parse_spec(text)
    except MethodError:
        return
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("cfg:negative=A sad story,scale=1.5", {"negative": "A sad story", "scale": "1.5"}),
        ('cfg:negative="sad, slow",scale=2', {"negative": "sad, slow", "scale": "2"}),
        ('cfg:negative="a"b,scale=2', {"negative": '"a"b', "scale": "2"}),
        ('cfg:words=dog;"ice cream"', {"words": 'dog;"ice cream"'}),
        ("cfg:negative=,, scale=2", {"negative": "", "scale": "2"}),
        ("cfg:negative=a=b+c:d", {"negative": "a=b+c:d"}),
        ("cfg:", {}),
    ],
)
def test_values(text, settings):
    assert parse_spec(text) == MethodSpec("cfg", settings)


def test_values_without_keys_come_first():
    assert parse_spec('cfg:"a,b",2', lambda name: ["negative", "scale"]).settings == {
        "negative": "a,b",
        "scale": "2",
    }
    with pytest.raises(MethodError, match="cfg:x has no value; write x=VALUE"):
        parse_spec("cfg:scale=2,x", lambda name: ["negative", "scale"])
    with pytest.raises(MethodError, match="'2' has no key; write KEY=2"):
        parse_spec("cfg:2")
    with pytest.raises(MethodError, match="nothing closes"):
        parse_spec('cfg:negative="half')
    with pytest.raises(MethodError, match="cfg:scale is given twice"):
        parse_spec("cfg:scale=2,scale=3")


def test_a_plus_separates_only_before_a_known_name():
    specs = parse_specs("cfg:negative=/c++/beans+beam:width=2+top_p", NAMES)
    assert list(map(str, specs)) == ['cfg:negative="/c++/beans"', "beam:width=2", "top_p"]
    assert parse_specs("beam+none", NAMES) == [MethodSpec("beam"), MethodSpec("none")]
    nested = parse_specs("cfg:members=beam+top_p,scale=1+beam", NAMES)
    assert nested == [
        MethodSpec("cfg", {"members": "beam+top_p", "scale": "1"}),
        MethodSpec("beam"),
    ]


@given(st.lists(st.builds(MethodSpec, st.sampled_from(NAMES), SETTINGS), max_size=4))
def test_a_list_in_the_earlier_spelling_reads_the_new_one(specs):
    assert split_list(join_specs(specs), NAMES) == specs


def test_formats_ensembles_and_watermarks_speak_it_and_their_earlier_spellings():
    assert parse_format("int4:head=bf16") == parse_format("int4,head=bf16")
    parts = [("/c++/A", 0.7), ("B:x", 1.0)]
    assert parse_ensemble('"/c++/A":weight=0.7+"B:x"') == parts
    assert parse_ensemble("/c++/A@0.7|B:x") == parts
    assert parse_watermark("inverse:key=a b,length=9") == parse_watermark(
        "key=a b,kind=inverse,length=9"
    )
    assert parse_watermark('green:key="a,b"').key == "a,b"


@pytest.mark.parametrize("text", ["inverse:key=geheim,geheim", "inverse:key", "inverse:length=2"])
def test_the_key_of_a_watermark_is_in_no_error(text):
    with pytest.raises(MethodError) as caught:
        parse_watermark(text)
    assert "geheim" not in str(caught.value)


def test_the_weight_of_an_ensemble_is_a_number():
    with pytest.raises(MethodError, match=r"'much' in .* is no weight"):
        parse_ensemble("A:weight=much+B")
    with pytest.raises(MethodError, match=r"'wait' in .* expected weight"):
        parse_ensemble("A:weight=1+B:wait=1")
    with pytest.raises(ModelError, match="lacks a model"):
        parse_ensemble("A:weight=1+:weight=2")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('a=cfg:negative="x; y",scale=2;b=c', ['a=cfg:negative="x; y",scale=2', "b=c"]),
        ('"a;b"; c', ['"a;b"', "c"]),
        (r'a="q\";z";b', [r'a="q\";z"', "b"]),
        ('x=5" tv;y=6" tv', ['x=5" tv', 'y=6" tv']),
        ('a="b;c', ['a="b', "c"]),
        (";", ["", ""]),
    ],
)
def test_lists_are_split_outside_of_quoted_texts(text, parts):
    assert split_quoted(text, ";") == parts


@given(st.lists(st.text(), min_size=1))
def test_quoted_members_come_back_whatever_they_hold(texts):
    assert [json.loads(part) for part in split_quoted(";".join(map(json.dumps, texts)), ";")] == (
        texts
    )


def test_an_empty_member_is_refused_by_name():
    assert members("cors", " ", ",") == []
    for text in (",", "a,", "a,,b"):
        with pytest.raises(MethodError, match="cors has an empty member"):
            members("cors", text, ",")
