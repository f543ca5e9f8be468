import gc
import json
import sys
import weakref
from contextlib import suppress
from typing import Literal

import jsonschema
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM, _native
from paceline.control.capabilities import ExtendsDrafts, FiltersDrafts, ForcesTokens
from paceline.control.grammar import Grammar
from paceline.core import TokenTree
from paceline.decoding.governor import Fixed
from paceline.errors import MethodError, PacelineError, RequestError
from paceline.measuring.baseline import decode, plain_drafter
from paceline.registry import drafters
from tests.conftest import shared

pytest.importorskip("llguidance")
parse = drafters.parse

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["dragon", "princess", "drake"]},
        "friends": {"type": "array", "items": {"enum": [1, 22, -3]}, "maxItems": 3},
    },
    "required": ["name", "kind", "friends"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="blend", budget=16, engine="native")


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer that drops the first space of a text, and has single bytes as tokens."""
    return LM(shared("models", "stories260K"), drafter="forced", budget=16, engine="native")


def control(lm, grammar):
    found = lm.request("Once", grammar=grammar, controls={}, temperature=0).controls[-1]
    assert isinstance(found, ForcesTokens)
    assert isinstance(found, FiltersDrafts)
    return found, lm.tokenizer.encode("Once")


def allowed(found, history, size):
    return np.flatnonzero(np.isfinite(found.apply(np.zeros(size, np.float32), history))).tolist()


@pytest.mark.parametrize("model", ["lm", "spaced"])
@pytest.mark.parametrize("seed", range(6))
def test_every_finished_output_is_valid(request, model, seed):
    lm = request.getfixturevalue(model)
    output = lm.generate(
        "Once", schema=PERSON, temperature=1.0, seed=seed, max_new_tokens=160, controls={}
    )
    if output.finish == "stop":
        jsonschema.validate(json.loads(output.text), PERSON)
        assert output.tokens[-1] in lm.model.defaults.stop_tokens
    else:
        assert output.finish == "length"
        assert output.text.startswith('{"name": "')


def test_most_outputs_finish(lm):
    ends = [
        lm.generate("Once", schema=PERSON, temperature=1.0, seed=s, controls={}).finish
        for s in range(8)
    ]
    assert ends.count("stop") >= 6


@pytest.mark.parametrize("model", ["lm", "spaced"])
@pytest.mark.parametrize("pattern", ["(ab|b)c+", " ?a[bc]{2} d", "[0-9]{1,3}(,[0-9]{3})*", "é+ü?"])
def test_the_text_matches_the_whole_expression(request, model, pattern):
    lm = request.getfixturevalue(model)
    for seed in range(4):
        output = lm.generate(
            "Once", grammar=Grammar(pattern), temperature=1.0, seed=seed, max_new_tokens=40
        )
        if output.finish == "stop":
            assert regex.fullmatch(pattern, output.text), output.text
        else:
            assert regex.fullmatch(pattern, output.text, partial=True), output.text


@pytest.mark.parametrize("pattern", ["(ab|b)c+", "a[bc]{2} d", "(the|then|there) [a-z]+"])
def test_the_mask_is_what_can_still_match(lm, pattern):
    found, prompt = control(lm, Grammar(pattern))
    pieces, size = lm.vocabulary.pieces, lm.vocabulary.size
    stop = next(iter(lm.model.defaults.stop_tokens))
    generator = np.random.default_rng(0)
    for _ in range(30):
        history, text = list(prompt), b""
        for _ in range(6):
            expected = [
                t
                for t, piece in enumerate(pieces)
                if piece and regex.fullmatch(pattern.encode(), text + piece, partial=True)
            ]
            if regex.fullmatch(pattern.encode(), text):
                expected.append(stop)
            got = allowed(found, history, size)
            if found.forced(history):  # then it is the tokenizer's own way to write it
                assert got == [found.forced(history)[0]]
                assert set(got) <= set(expected)
            else:
                assert got == sorted(expected)
            token = int(generator.choice(got))
            if token == stop:
                break
            history.append(token)
            text += pieces[token]


@given(st.integers(1, 200), st.integers(0, 2**32), st.sampled_from([0.02, 0.5, 0.98]))
def test_masks_leave_what_their_bits_say(size, seed, share):
    random = np.random.default_rng(seed)
    allowed = random.random(size) < share
    bits = np.packbits(np.pad(allowed, (0, -size % 32)), bitorder="little").view(np.uint32)
    logits = random.normal(size=size).astype(np.float32)
    assert np.array_equal(_native.mask_logits(logits, bits), np.where(allowed, logits, -np.inf))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_questions_may_come_in_any_order(lm, data):
    """A matcher that has been elsewhere answers as one that has not."""
    used, prompt = control(lm, Grammar.schema(PERSON))
    size, histories, answers = lm.vocabulary.size, [list(prompt)], []
    for _ in range(12):
        history = data.draw(st.sampled_from(histories))
        got = allowed(used, history, size)
        answers.append((history, got, used.forced(history)))
        going = [t for t in got if t not in lm.model.defaults.stop_tokens]
        if going:
            histories.append([*history, data.draw(st.sampled_from(going))])
    for history, got, forced in answers:
        fresh, _ = control(lm, Grammar.schema(PERSON))
        assert allowed(fresh, history, size) == got
        assert fresh.forced(history) == forced


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_a_node_is_allowed_if_the_mask_allows_it_after_its_parent(lm, seed):
    generator = np.random.default_rng(seed)
    found, prompt = control(lm, Grammar("( a| b|ab|c)+[.]"))
    size = lm.vocabulary.size
    some = [t for t, p in enumerate(lm.vocabulary.pieces) if p in (b" a", b" b", b"a", b"b", b"c")]
    some += [*lm.model.defaults.stop_tokens, 77]
    tokens, parents, texts = [prompt[-1]], [-1], [list(prompt)]
    edges = set()
    for _ in range(14):
        parent, token = int(generator.integers(len(tokens))), int(generator.choice(some))
        if (parent, token) not in edges:
            edges.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            texts.append([*texts[parent], token])
    n = len(tokens)
    tree = TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.ones(n, np.float32),
        np.zeros(n, np.int16),
    )
    expected = [True]
    for node in range(1, n):
        above = expected[parents[node]] and tokens[parents[node]] not in some[-2:-1]
        expected.append(above and tokens[node] in allowed(found, texts[parents[node]], size))
    kept = found.allows(list(prompt), tree)
    assert kept.tolist() == expected
    assert len(tree.keep(kept)) == kept.sum()


def test_what_must_follow_a_guess_is_known(lm):
    found, prompt = control(lm, Grammar.schema(PERSON))
    assert isinstance(found, ExtendsDrafts)
    start = found.forced(prompt)
    inside = lm.vocabulary.inside
    history = [*prompt, *start]
    some = inside(b"Bo"), inside(b"Ann"), inside(b'"'), inside(b"\n")
    tokens, parents = [history[-1]], [-1]
    for text in some:
        above = 0
        for token in text:
            parents.append(above)
            above = len(tokens)
            tokens.append(token)
        parents.append(above)
        tokens.append(inside(b'"')[0])
    n = len(tokens)
    scores, origin = np.ones(n, np.float32), np.zeros(n, np.int16)
    tree = TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), scores, origin)
    kept, chains = found.extensions(history, tree)
    assert kept.tolist() == found.allows(history, tree).tolist()
    assert len(chains) >= 2
    for node in np.flatnonzero(kept)[1:]:
        path, at = [], node
        while at:
            path.insert(0, tokens[at])
            at = parents[at]
        forced = found.forced([*history, *path])
        following = [tokens[c] for c in range(1, n) if parents[c] == node and kept[c]]
        assert chains.get(node, forced) == forced
        assert not forced or node in chains or following == forced[:1]


def test_forced_tokens_cost_no_passes(lm):
    lm.reset()
    output = lm.generate("Once", grammar=Grammar.choice(["once upon a time there was"]))
    assert output.text == "once upon a time there was"
    assert output.accepted["forced"] == len(output.tokens) - output.passes
    assert output.passes <= 2
    for _ in range(40):
        lm.generate("Once", max_new_tokens=20)  # nothing is forced
    again = lm.generate("Once", grammar=Grammar.choice(["once upon a time there was"]))
    assert again.passes <= 2, "forced still rests"


class Resting(Fixed):
    """A budget that leaves the drafter alone."""

    def nodes_wanted(self, requests=1):
        return 0

    def nodes_for_forced(self):
        return self.nodes


@pytest.mark.parametrize(
    "drafter", ["forced", "blend", "blend:members=predicted_output+forced", "recycle"]
)
def test_forced_tokens_are_drafted_while_the_drafter_rests(lm, drafter):
    request = lm.request("Once", grammar=Grammar.choice(["once upon a time there was"]))
    plain = decode(lm, plain_drafter(lm), request, Fixed(0))
    assert plain.passes == len(plain.tokens), "budget 0 is plain"
    output = decode(lm, parse(drafter).build(lm.draft_target), request, Resting(16))
    assert output.tokens == plain.tokens
    if drafter == "recycle":
        assert output.passes == plain.passes
    else:
        assert output.accepted == {"forced": len(output.tokens) - output.passes}
        assert output.passes <= 2
    free = lm.request("Once", max_new_tokens=8)
    output = decode(lm, parse(drafter).build(lm.draft_target), free, Resting(16))
    assert output.passes == output.nodes == 8


def test_a_choice_is_one_of_its_texts(lm):
    texts = ["yes", "no", 'say "x"', "naïve\n", "yes sir"]
    found = {
        lm.generate("Once", grammar=Grammar.choice(texts), temperature=2.0, seed=s).text
        for s in range(30)
    }
    assert found <= set(texts)
    assert len(found) > 1


def test_pydantic_models_are_schemas(lm):
    class Model:
        @classmethod
        def model_json_schema(cls):
            return {"const": 42}

    assert lm.generate("Once", schema=Model).text == "42"
    assert lm.generate("Once", schema='{"const": [1, 2]}').text == "[1, 2]"


def test_the_value_of_a_schema_is_parsed(lm):
    pydantic = pytest.importorskip("pydantic")

    class Card(pydantic.BaseModel, extra="forbid"):
        suit: Literal["hearts", "spades"]
        rank: Literal[1, 2]

    class Picky(Card):
        @pydantic.model_validator(mode="after")
        def none_will_do(self):
            raise ValueError("no such card")

    output = lm.generate("Once", schema=Card)
    assert isinstance(output.parsed, Card)
    assert output.parsed == Card(**json.loads(output.text))
    same = lm.generate("Once", schema=Card.model_json_schema())
    assert same.parsed == output.parsed.model_dump()
    assert lm.generate("Once", grammar=Grammar('{"const": 3}', "json")).parsed == 3
    assert lm.generate("Once", schema=Card, max_new_tokens=2).parsed is None
    assert lm.generate("Once", grammar=Grammar.choice(["3"])).parsed is None
    assert lm.generate("Once", max_new_tokens=2).parsed is None
    with pytest.raises(RequestError, match="no such card"):
        _ = lm.generate("Once", schema=Picky).parsed


def test_what_is_cut_says_so_and_is_kept(lm):
    output = lm.generate("Once", grammar=Grammar("[0-9]+x"), max_new_tokens=3, temperature=1.0)
    if output.finish != "stop":
        assert output.finish == "length"
        assert regex.fullmatch("[0-9]+", output.text)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (("a(b",), "unclosed group"),
        (("[^\\s\\S]",), "no text from here"),
        (("start: start", "lark"), "no text from here"),
        (("start: foo", "lark"), 'unknown name: "foo"'),
        (('{"type": "array", "uniqueItems": true}', "json"), "uniqueItems"),
        (('{"contains": {"type": "string"}}', "json"), "contains cannot be enforced"),
        (('{"type": "arry"}', "json"), "arry"),
        (('{"$ref": "http://example.com/x.json"}', "json"), "cannot be used"),
    ],
)
def test_bad_grammars_are_refused_before_anything_runs(lm, grammar, said):
    with pytest.raises(RequestError, match=said):
        lm.request("Once", grammar=Grammar(*grammar))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grammar("a", "ebnf"), "expected regex, json, lark"),
        (lambda: Grammar("a" * (2 << 20)), "at most 1048576"),
        (lambda: Grammar('{"a":', "json"), "line 1, column 6"),
        (lambda: Grammar("[" * 100_000, "json"), "levels deep"),
        (lambda: Grammar('{"not":' * 200 + "{}" + "}" * 200, "json"), "levels deep"),
        (lambda: Grammar("3", "json"), "not an object"),
        (lambda: Grammar.schema({1, 2}), "JSON cannot hold the schema"),
        (lambda: Grammar.choice(["a", ""]), "not empty"),
        (lambda: Grammar.choice([]), "not empty"),
    ],
)
def test_absurd_grammars_are_refused(make, said):
    with pytest.raises(PacelineError, match=said):
        make()


def test_a_grammar_needs_an_end(lm):
    with pytest.raises(RequestError, match="stop token"):
        lm.request("Once", grammar=Grammar("a"), ignore_eos=True)
    with pytest.raises(MethodError, match="grammar is given twice"):
        lm.request("Once", grammar=Grammar("a"), schema={})


def test_grammars_do_not_keep_a_model_in_memory():
    lm = LM(drafter="forced", budget=4, engine="native")
    lm.generate("Once", grammar=Grammar.choice(["yes", "no"]))
    vocabulary = weakref.ref(lm.vocabulary)
    del lm
    gc.collect()
    assert vocabulary() is None


def test_without_llguidance_it_says_what_to_install(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MethodError, match=r"pip install 'paceline\[grammar\]'"):
        lm.request("Once", grammar=Grammar("a"))


def test_a_contradiction_is_reported(lm):
    with pytest.raises(RequestError, match="allow no token"):
        lm.generate("Once", grammar=Grammar("b"), controls={"bad_words": ["b"]})


HOSTILE = [
    ("(a{1,1000}){1,1000}",),
    ("((((a{1,100}){1,100}){1,100}){1,100}){1,100}",),
    ("(" * 5000 + "a" + ")" * 5000,),
    ("start: " + "( " * 3000 + '"a"' + " )" * 3000, "lark"),
    ('start: start start start | "a"', "lark"),
    ('{"$ref": "#"}', "json"),
    ('{"allOf": [{"$ref": "#"}, {"$ref": "#"}]}', "json"),
    (json.dumps({"enum": [f"{i:x}" * 9 for i in range(3000)]}), "json"),
    (json.dumps({"type": "string", "minLength": 10**9}), "json"),
    (json.dumps({"enum": [float("nan"), 1e999]}), "json"),
    ('{"const": "\\ud800"}', "json"),
    (json.dumps({"properties": {f"k{i}": {"type": "string"} for i in range(800)}}), "json"),
    ("start: " + " | ".join(f'"a{i}"' for i in range(4000)), "lark"),
]


def chained(kind, length):
    """References that lead on and on: the compiler follows them in depth."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    if kind == "properties":
        links = {name: {"properties": {"a": link}} for name, link in links.items()}
    links[f"d{length}"] = {"type": "integer"}
    if kind == "rules":
        rules = [f'r{i}: "a" r{i + 1}' for i in range(length)]
        return Grammar("\n".join(["start: r0", *rules, f'r{length}: "b"']), "lark")
    return Grammar(json.dumps({"$defs": links, "$ref": "#/$defs/d0"}), "json")


@pytest.mark.parametrize(
    ("kind", "length"), [("references", 10_000), ("properties", 1500), ("rules", 4000)]
)
def test_long_chains_of_references_do_not_overflow_the_stack(lm, kind, length):
    with suppress(PacelineError):
        lm.generate("Once", grammar=chained(kind, length), max_new_tokens=4)


def test_a_limit_that_is_met_on_the_way_is_named(lm):
    grammar = Grammar("start: " + " | ".join(f'"a{i}"' for i in range(6000)), "lark")
    with pytest.raises(RequestError, match="max is") as caught:
        lm.generate("Once", grammar=grammar, max_new_tokens=8, temperature=1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("grammar", HOSTILE, ids=lambda g: g[0][:20])
def test_hostile_grammars_are_refused_or_work(lm, grammar):
    with suppress(PacelineError):
        lm.generate("Once", grammar=Grammar(*grammar), max_new_tokens=4)


@given(
    st.text("ab()[]{}|*+?\\^$.,019-", max_size=16).map(lambda t: (t,))
    | st.text('start: abAB"/|()~?*%\n', max_size=24).map(lambda t: (f"start: {t}", "lark"))
    | st.recursive(
        st.sampled_from([True, 1, "a", "string", "object", "#", None]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "properties",
                        "items",
                        "anyOf",
                        "enum",
                        "$ref",
                        "required",
                        "minLength",
                    ]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ).map(lambda schema: (json.dumps({"x": 1} if schema is None else schema), "json"))
)
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_grammar_or_refused(lm, grammar):
    with suppress(PacelineError):
        lm.generate("Once", grammar=Grammar(*grammar), max_new_tokens=3)


@given(st.text(max_size=20) | st.text('{}[]":, \nabc01é🙂', max_size=20))
@settings(max_examples=100, deadline=None)
def test_text_inside_a_text_is_divided_without_loss(lm, spaced, text):
    for vocabulary in (lm.vocabulary, spaced.vocabulary):
        ids = vocabulary.inside(text.encode())
        assert b"".join(vocabulary.pieces[t] for t in ids) == text.encode()
