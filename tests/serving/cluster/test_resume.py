"""What is left of a stream after another: everything that was not reported, and nothing twice."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.serving.cluster.resume import ResumedStream, SeamError
from paceline.serving.cluster.resume_responses import ResumedItems

NAMES = ["choices", "index", "delta", "logprobs", "paceline", "type", "finish_reason", "tokens"]
TOKENS = st.lists(st.tuples(st.integers(0, 9), st.text("ab é", max_size=3)), max_size=8)


def sse(pieces):
    return [f"data: {json.dumps(piece)}\n\n".encode() for piece in pieces]


def logprobs(tokens, chat, start):
    names = [f"<{token}>" for token, _ in tokens]
    if chat:
        return {"content": [{"token": name, "logprob": -1.0} for name in names]}
    offsets = [start + sum(len(text) for _, text in tokens[:at]) for at in range(len(tokens))]
    numbers = [-1.0] * len(names)
    return {"tokens": names, "token_logprobs": numbers, "text_offset": offsets}


def traced(tokens, at):
    own = [token for token, _ in tokens]
    return {
        "tokens": own,
        "texts": [text for _, text in tokens],
        "origins": [None] * len(own),
        "at": at,
        "passes": 1,
        "tree": {"path": list(range(len(own)))},
    }


def streamed(draw, answers, chat, reported, trace, number):
    """One run of the same answers: in other pieces, at other times, under another name."""
    left, pieces = dict(enumerate(answers)), []
    clock = 100.0 * number
    lengths = [0] * len(answers)  # of the texts so far
    if chat:
        pieces += [
            ({"index": at, "delta": {"role": "assistant", "content": ""}}, {}) for at in left
        ]
    while left:
        at = draw(st.sampled_from(sorted(left)))
        size = draw(st.integers(min(1, len(left[at])), len(left[at])))
        tokens, left[at] = left[at][:size], left[at][size:]
        text = "".join(text for _, text in tokens)
        over, clock = not left[at], clock + 0.5
        choice = {"index": at, "finish_reason": "stop" if over else None}
        choice |= {"delta": {"content": text} if text else {}} if chat else {"text": text}
        if reported and tokens:
            choice["logprobs"] = logprobs(tokens, chat, lengths[at])
        lengths[at] += len(text)
        pieces.append((choice, {"paceline": traced(tokens, clock)} if trace and tokens else {}))
        if over:
            del left[at]
    head = {"id": f"id{number}", "created": number}
    whole = [
        head | {"choices": [{"finish_reason": None, "logprobs": None} | choice]} | more
        for choice, more in pieces
    ]
    return [*sse([*whole, head | {"choices": [], "usage": {}}]), b"data: [DONE]\n\n"]


def heard(stream):
    """What a reader makes of it: texts, tokens and passes of each choice, and the names."""
    texts, tokens, passes, times, names = {}, {}, {}, [], set()
    offsets = {}
    *events, done = stream.split(b"\n\n")[:-1]
    assert done == b"data: [DONE]"
    for event in events:
        piece = json.loads(event[6:])
        names.add((piece["id"], piece["created"]))
        for choice in piece["choices"]:
            at = choice["index"]
            delta = choice.get("delta", choice)
            texts[at] = texts.get(at, "") + (delta.get("content", delta.get("text")) or "")
            said = choice["logprobs"] or {"tokens": []}
            shown = [each["token"] for each in said["content"]] if "content" in said else None
            tokens[at] = tokens.get(at, []) + (said["tokens"] if shown is None else shown)
            offsets[at] = offsets.get(at, [0]) + said.get("text_offset", [])
            assert offsets[at] == sorted(offsets[at])
            if "paceline" in piece:
                trace = piece["paceline"]
                assert len(trace["tokens"]) == len(trace["texts"]) == len(trace["origins"]) > 0
                assert (len(trace["tree"]["path"]) > len(trace["tokens"])) == (trace["passes"] > 1)
                passes[at] = passes.get(at, []) + trace["tokens"]
                times.append(trace["at"])
    assert times == sorted(times)
    return texts, tokens, passes, names, times


@settings(max_examples=60, deadline=None)
@given(
    st.data(), st.lists(TOKENS, min_size=1, max_size=2), st.booleans(), st.booleans(), st.booleans()
)
def test_no_token_is_lost_or_comes_twice(data, answers, chat, reported, trace):
    stream, deaths = b"", data.draw(st.integers(1, 3))
    for number in range(deaths + 1):
        events = streamed(data.draw, answers, chat, reported, trace, deaths - number)
        splice = ResumedStream(stream, lambda: 0.25)
        size = data.draw(st.integers(0, len(events))) if number < deaths else len(events)
        stream += b"".join(splice.rest(event.strip()) for event in events[:size])
    texts, tokens, passes, names, _ = heard(stream)
    assert texts == {at: "".join(text for _, text in each) for at, each in enumerate(answers)}
    for at, each in enumerate(answers):
        assert tokens[at] == ([f"<{token}>" for token, _ in each] if reported else [])
        assert passes.get(at, []) == ([token for token, _ in each] if trace else [])
    assert len(names) == 1
    assert stream.count(b'"usage"') == 1


def piece(text="", finish=None, said=None, trace=None):
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": said}
    return {"id": "x", "created": 1, "choices": [choice]} | ({"paceline": trace} if trace else {})


def test_time_goes_on_from_the_clock_that_stopped():
    old = [piece("a", trace=traced([(1, "a")], 7.0)), piece("b", trace=traced([(2, "b")], 8.0))]
    new = [piece("abc", trace=traced([(n, t) for n, t in enumerate("abc", 1)], 500.0))]
    new.append(piece("d", trace=traced([(4, "d")], 501.5)))
    splice = ResumedStream(b"".join(sse(old)), lambda: 2.0)
    found = [json.loads(splice.rest(event.strip())[6:])["paceline"] for event in sse(new)]
    assert [each["at"] for each in found] == [10.0, 11.5]
    assert found[0]["tokens"] == [3]
    assert [each["passes"] for each in found] == [2, 1]


@pytest.mark.parametrize(
    ("reported", "new"),
    [
        (piece("abc"), piece("abd")),
        (piece("abc"), piece("ab", "stop")),
        (
            piece("a", said=logprobs([(1, "a")], False, 0)),
            piece("a", said=logprobs([(2, "a")], False, 0)),
        ),
        (piece(trace=traced([(1, "")], 0.0)), piece(trace=traced([(2, "")], 0.0))),
        (piece("a", trace=traced([(1, "a")], 0.0)), piece("a", "stop")),
    ],
)
def test_another_answer_is_no_end_of_this_one(reported, new):
    splice = ResumedStream(sse([reported])[0])
    with pytest.raises(SeamError, match="another replica"):
        splice.rest(sse([new])[0].strip())


JSON = st.recursive(
    st.none() | st.text(max_size=3) | st.integers(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(NAMES), each),
)


def test_reasoning_and_token_ids_go_on_without_a_seam():
    def said(ids, **delta):
        choice = {"index": 0, "finish_reason": None, "logprobs": None, "delta": delta}
        return {"id": "a", "created": 1, "choices": [choice | {"token_ids": ids}]}

    splice = ResumedStream(sse([said([1], reasoning_content="ab")])[0])
    [new] = sse([said([1, 2], reasoning_content="abc", content="d")])
    [choice] = json.loads(splice.rest(new).removeprefix(b"data: "))["choices"]
    assert choice["delta"] == {"reasoning_content": "c", "content": "d"}
    assert choice["token_ids"] == [2]
    splice = ResumedStream(sse([said([1], reasoning_content="ab")])[0])
    with pytest.raises(SeamError):
        splice.rest(sse([said([3], reasoning_content="ab")])[0])


@settings(max_examples=200)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_event_is_told_so(data):
    for kind, start in ((ResumedStream, b"data: "), (ResumedItems, b"event: x\ndata: ")):
        for reported in (b"", start + data + b"\n\n"):
            with contextlib.suppress(SeamError):
                kind(reported).rest(start + data)
    with pytest.raises(SeamError):
        ResumedStream(b"data: {" + data + b"\n\n")
    with pytest.raises(SeamError):
        ResumedItems(b"data: {" + data + b"\n\n")


def test_an_answer_that_goes_wrong_elsewhere_says_why():
    splice = ResumedStream(sse([piece("a")])[0])
    wrong = piece(finish="error") | {"error": {"message": "no memory"}}
    with pytest.raises(SeamError, match="shorter"):
        splice.rest(sse([wrong])[0].strip())
    splice.rest(sse([piece("a")])[0].strip())
    assert b"no memory" in splice.rest(sse([wrong])[0].strip())


def response(draw, text, number):
    """The events of a response, its deltas cut anywhere."""
    name, place = f"resp-{number}", {"item_id": f"msg_resp-{number}-0", "output_index": 0}
    whole = {"id": name, "created_at": number, "output": []}
    events = [
        {"type": "response.created", "response": whole},
        {"type": "response.in_progress", "response": whole},
        {"type": "response.output_item.added", "output_index": 0, "item": {"id": f"msg_{name}-0"}},
    ]
    while text:
        size = draw(st.integers(1, len(text)))
        events.append({"type": "response.output_text.delta", **place, "delta": text[:size]})
        text = text[size:]
    events.append({"type": "response.output_text.done", **place})
    events.append({"type": "response.completed", "response": whole | {"status": "completed"}})
    return [
        f"event: {each['type']}\ndata: {json.dumps(each | {'sequence_number': at})}\n\n".encode()
        for at, each in enumerate(events)
    ]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.text("ab é", max_size=8), st.integers(1, 3))
def test_a_response_goes_on_without_a_seam(data, text, deaths):
    stream = b""
    for number in range(deaths + 1):
        events = response(data.draw, text, deaths - number)
        size = data.draw(st.integers(0, len(events))) if number < deaths else len(events)
        splice = ResumedItems(stream)
        stream += b"".join(splice.rest(event.strip()) for event in events[:size])
    found = [json.loads(event.partition(b"data: ")[2]) for event in stream.split(b"\n\n")[:-1]]
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert "".join(each.get("delta", "") for each in found) == text
    kinds = [each["type"] for each in found if "delta" not in each]
    assert len(kinds) == len(set(kinds)) == 5
    assert len({each["response"]["id"] for each in found if "response" in each}) == 1
    assert len({each["response"]["created_at"] for each in found if "response" in each}) == 1
    named = found[0]["response"]["id"]
    assert all(each["item_id"] == f"msg_{named}-0" for each in found if "item_id" in each)


def test_another_response_is_no_end_of_this_one():
    def draw(_):
        return 2

    reported = b"".join(response(draw, "abcd", 1)[:5])
    for other, why in (("abdc", "differs"), ("ab", "shorter")):
        events = response(draw, other, 2)
        with pytest.raises(SeamError, match=why):
            list(map(ResumedItems(reported).rest, events))
