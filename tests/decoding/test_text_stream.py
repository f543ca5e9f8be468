from hypothesis import given
from hypothesis import strategies as st

from paceline.core import Request
from paceline.decoding.text_stream import TextStream, pieces_of, text_of


class Letters:
    """Each token is a character."""

    def push(self, token):
        return chr(token)

    def flush(self):
        return ""


def show(text, stops):
    stream, shown = TextStream(Letters(), stops), []
    for letter in text:
        shown.append(stream.push(ord(letter)))
        if stream.stopped:
            break
    shown.append(stream.flush())
    return "".join(shown), stream.stopped, shown


def test_text_ends_before_the_stop_string():
    assert show("one two three", ("two",))[:2] == ("one ", True)


def test_what_may_become_a_stop_string_is_held_back():
    shown = show("a\n\nb", ("\n\n",))[2]
    assert shown[:2] == ["a", ""]
    assert show("a\nb", ("\n\n",))[:2] == ("a\nb", False)


def test_the_end_of_the_output_releases_what_was_held():
    assert show("ab\n", ("\n\n",))[:2] == ("ab\n", False)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", max_size=4), max_size=3))
def test_the_shown_text_is_cut_at_the_first_stop_that_completes(text, stops):
    wanted = tuple(filter(None, stops))
    ends = [(at + len(s), at) for s in wanted if (at := text.find(s)) >= 0]
    first = min(end for end, _ in ends) if ends else None
    cut = min(at for end, at in ends if end == first) if ends else len(text)
    assert show(text, tuple(stops))[0] == text[:cut]


def test_without_stop_strings_nothing_is_held_back():
    assert show("ab", ())[2] == ["a", "b", ""]
    assert show("ab", ("", ""))[2] == ["a", "b", ""]


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 12),
    st.booleans(),
)
def test_stop_strings_count_behind_a_minimum_and_may_be_included(text, stops, after, include):
    ends = [
        (at + len(stop), at)
        for stop in stops
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > after
    ]
    first = min((end for end, _ in ends), default=len(text))
    start = min((at for end, at in ends if end == first), default=first)
    stream, shown = TextStream(Letters(), tuple(stops), after, include), ""
    for letter in text:
        shown += stream.push(ord(letter))
        if stream.stopped:
            break
    shown += stream.flush()
    assert shown == (text[:first] if include else text[:start])
    assert stream.stopped == bool(ends)
    assert stream.stopped_by == (text[start:first] if ends else "")


class Bytes:
    """Gives all its text at the end, as a decoder does that waits for a character."""

    def __init__(self):
        self.held = ""

    def push(self, token):
        self.held += chr(token)
        return ""

    def flush(self):
        return self.held


def test_a_stop_string_in_the_text_that_comes_last_is_found():
    stream = TextStream(Bytes(), ("b",))
    assert [stream.push(ord(letter)) for letter in "abc"] == ["", "", ""]
    assert stream.flush() == "a"
    assert stream.stopped
    assert stream.flush() == ""


class Spaces:
    """Drops a space at the beginning of what it decodes, as SentencePiece does."""

    silent = byte_tokens = frozenset()

    def decode(self, ids):
        return "".join(map(chr, ids)).removeprefix(" ")


def test_only_an_output_that_continues_the_prompt_keeps_its_first_space():
    for continues, expected in ((True, " b"), (False, "b")):
        request = Request((97,), 5, continues=continues, stop_strings=("c",))
        stream = text_of(request, Spaces())
        shown = [stream.push(ord(letter)) for letter in " bc"]
        assert "".join(shown) == expected
        assert stream.stopped
        pieces = pieces_of(request, Spaces())
        assert "".join(pieces.push(ord(letter)) for letter in " bcd") == f"{expected}cd"
