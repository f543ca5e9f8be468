"""The parts of a chat: commands, saved files, Markdown as it comes, progress."""

import json
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.cli.conversation import saved, screen
from paceline.cli.conversation.commands import COMMANDS, Command, parse_line, parse_settings
from paceline.cli.conversation.transcript import Transcript
from paceline.cli.progress import time_left
from paceline.errors import PacelineError, RequestError

LINES = st.text() | st.builds("/{}{}".format, st.sampled_from([*COMMANDS, "x", "?"]), st.text())
TURNS = st.lists(st.tuples(st.text(), st.text()), max_size=3)


@given(LINES)
def test_any_line_is_a_message_a_command_or_one_sentence(line):
    try:
        found = parse_line(line)
    except RequestError as error:
        assert line.strip().startswith("/")
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    if isinstance(found, Command):
        assert found.name in COMMANDS
        assert found.argument == found.argument.strip()
        assert line.strip()[1:].lstrip("?" + string.ascii_letters).strip() == found.argument
    else:
        assert found == line.strip().removeprefix("/" if line.strip().startswith("//") else "")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/etc/hosts is a file", "/etc/hosts is a file"),
        ("//help", "/help"),
        ("/", "/"),
        ("/SYSTEM  a\nb ", Command("system", "a\nb")),
        ("/quit", Command("exit")),
        ("/?", Command("help")),
        ("a /help", "a /help"),
    ],
)
def test_what_is_a_command(line, found):
    assert parse_line(line) == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/sav x", "did you mean /save"),
        ("/clear all", "/clear takes nothing after it"),
        ("/zzzz", "/help lists them"),
    ],
)
def test_what_is_none(line, said):
    with pytest.raises(RequestError, match=said):
        parse_line(line)


@given(st.text() | st.from_regex(r"(top_p|seed|x)=?[-0-9.a-z]*( top_k=\d+)?", fullmatch=True))
def test_any_settings_are_numbers_or_one_sentence(text):
    try:
        found = parse_settings(text)
    except RequestError:
        return
    assert found
    assert all(value is None or isinstance(value, int | float) for value in found.values())


def no_surrogates(turns):
    return all(text == text.encode(errors="replace").decode() for turn in turns for text in turn)


@given(TURNS.filter(no_surrogates), st.none() | st.text(min_size=1))
def test_a_talk_is_saved_and_read_back(tmp_path_factory, turns, system):
    if system is not None and system != system.encode(errors="replace").decode():
        return
    path = tmp_path_factory.mktemp("talk") / "talk.json"
    saved.save_talk(path, Transcript("x", system, turns), "tiny")
    found, model = saved.read_talk(path)
    assert (found.system, found.turns, model) == (system, turns, "tiny")
    assert os.listdir(path.parent) == ["talk.json"]  # noqa: PTH208


def talk(**changes):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"schema": saved.SCHEMA, "model": "m", "system": None, "messages": messages} | changes


HOSTILE = {
    "empty": (b"", "is not JSON"),
    "bytes": (b"\xff\xfe", "is not UTF-8"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "list": (b"[]", "is no saved conversation"),
    "schema": (talk(schema="other"), "is no saved conversation"),
    "field": (talk(more=1), "unknown field 'more'"),
    "system": (talk(system=["x"]), "system of .* is not text"),
    "model": (talk(model=3), "model of .* is not text"),
    "messages": (talk(messages={"a": 1}), "no list of messages"),
    "odd": (talk(messages=[{"role": "user", "content": "a"}]), "no list of messages"),
    "role": (talk(messages=[{"role": "tool", "content": "a"}] * 2), "with role user"),
    "content": (talk(messages=[{"role": "user", "content": 1}] * 2), "message 1 of .* is not text"),
    "null": (talk(messages=[None, None]), "is not a role and a content"),
    "surrogate": (talk(system="\ud800"), "half a character"),
    "nan": (b'{"schema": NaN}', "is no saved conversation"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(tmp_path, name):
    content, said = HOSTILE[name]
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(RequestError, match=said) as caught:
        saved.read_talk(path)
    assert len(str(caught.value).splitlines()) == 1


@given(st.recursive(st.none() | st.text() | st.integers() | st.floats(), st.lists, max_leaves=5))
def test_any_json_in_place_of_messages_is_refused_or_a_talk(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("talk") / "talk.json"
    path.write_text(json.dumps(talk(messages=value)))
    if value == []:
        assert saved.read_talk(path)[0].turns == []
        return
    with pytest.raises(RequestError):
        saved.read_talk(path)


def test_other_files_are_neither_read_nor_overwritten(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(RequestError, match="no saved conversation; choose another name"):
        saved.save_talk(other, Transcript(), "m")
    assert other.read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path, "is not a file"), (tmp_path / "pipe", "is not a file")):
        with pytest.raises(RequestError, match=said):
            saved.read_talk(path)
    for text in ("", "a\0b", "x" * 5000):
        with pytest.raises(PacelineError):
            saved.read_talk(saved.path_of(text))
    with pytest.raises(PacelineError, match="there is no folder"):
        saved.save_talk(tmp_path / "missing" / "talk.json", Transcript(), "m")


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("One\ntwo", 0),
        ("One\n\n", 0),
        ("One\n\nT", 5),
        ("- a\n\n  b", 0),
        ("```\na\n\nb", 0),
        ("```\na\n\nb\n```\n", 13),
        ("~~~~\n```\n~~~~\nx", 14),
        ("\n\n", 0),
    ],
)
def test_a_block_is_complete_when_nothing_can_change_it(text, cut):
    assert screen.complete_blocks(text) == cut


MARKDOWN = (
    "# Title\n\nSome **bold** words.\n\n- one\n- two\n\n```python\nx = 1\n\ny = 2\n```\n\nEnd."
)


class Grid:
    """A terminal that knows text, line feeds, and the escapes that the screen uses."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text):
        import re

        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", text):
            if part == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\r":
                self.column = 0
            elif part.endswith("A") and part[0] == "\x1b":
                up = int(part[2:-1])
                assert up < self.height
                self.row -= up
            elif part == "\x1b[J":
                self.lines = self.lines[: self.row + 1]
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif part[0] != "\x1b":
                if self.column == self.width:
                    self.feed("\n")
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1


def shown(pieces, width, height, monkeypatch):
    grid = Grid(width, height)
    monkeypatch.setattr(screen, "write", grid.feed)
    size = os.terminal_size((width, height))
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: size)
    made = screen.MarkdownScreen()
    for piece in pieces:
        made.add(piece)
    made.finish()
    return "\n".join(line.rstrip() for line in grid.lines).rstrip("\n")


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("width", [12, 40, 100])
def test_what_is_shown_does_not_depend_on_the_pieces(size, width, monkeypatch):
    pieces = [MARKDOWN[at : at + size] for at in range(0, len(MARKDOWN), size)]
    found = shown(pieces, width, 50, monkeypatch)
    assert "**" not in found
    assert "```" not in found
    assert found == shown(list(MARKDOWN), width, 50, monkeypatch)
    assert "bold" in found
    assert found.endswith("End.")


def test_a_block_taller_than_the_terminal_stays_as_it_came(monkeypatch):
    text = "\n".join(f"line {number}" for number in range(20)) + "\n\nEnd."
    found = shown(list(text), 40, 10, monkeypatch)
    assert [f"line {number}" for number in range(20)] == found.splitlines()[:20]


@given(st.lists(st.text(), max_size=8))
def test_no_answer_controls_the_terminal(pieces):
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "write", written.append)
        for made in (screen.MarkdownScreen(), screen.PlainScreen(terminal=True)):
            for piece in [*pieces, "\x1b[2J\x07\x9b"]:
                made.add(piece)
            made.finish()
    assert "\x1b[2J" not in "".join(written)
    assert "\x07" not in "".join(written)
    assert "\x9b" not in "".join(written)


def test_the_time_that_is_left_is_told_in_words():
    assert time_left(0, 10, 5.0) == ""
    assert time_left(5, 10, 5.0) == "0:05 left"
    assert time_left(1, 3601, 1.0) == "1:00:00 left"
    assert time_left(10, 10, 5.0) == ""


def test_a_talk_of_any_length_is_cut_before_it_is_rendered(paceline, toy, monkeypatch):
    from tests.toy import Oracle, ToyEngine

    toy.engine = ToyEngine(context=60)
    toy.drafter = Oracle(toy.engine)
    rendered = []
    encode = toy.tokenizer.encode

    def counted(text, **options):
        rendered.append(len(text))
        return encode(text)

    monkeypatch.setattr(toy.tokenizer, "encode", counted)
    talk = Transcript("U: {user}\nB:", None, [("hello", "bye")] * 50_000)
    prompt, dropped = talk.fit(toy, "now", 5)
    assert prompt.endswith("U: now\nB:")
    assert dropped + len(talk.turns) == 50_000
    assert len(rendered) < 200
    assert max(rendered) < 60 * 16 * 3


def words_of_a_talk():
    commands = [f"/{name}" for name in COMMANDS if name not in ("save", "exit")]
    arguments = st.text(max_size=20) | st.sampled_from(
        ["", "off", "temperature=0.5", "top_p=2", "seed=-1", "max_new_tokens=0", "top_k=x", "/dev"]
    )
    return st.text(max_size=30) | st.builds("{} {}".format, st.sampled_from(commands), arguments)


@given(st.lists(words_of_a_talk(), max_size=8))
def test_no_line_ends_a_talk_or_breaks_it(lines):
    """Any messages and commands, in any order: the talk goes on and stays consistent."""
    from paceline.cli.conversation.talk import Talk
    from tests.measuring.toy_lm import ToyLM

    class Typist:
        interactive = True

        def __init__(self):
            self.left = [*lines, "hello"]

        def read(self):
            return self.left.pop(0) if self.left else None

    lm = ToyLM()
    options = {"max_new_tokens": 3, "stop": []}
    talk = Talk(lm, Transcript("U: {user}\nB:"), options, Typist(), quiet=True)
    talk.run()
    assert not talk.reader.left
    for turn, answer in zip(talk.transcript.turns[::-1], talk.answers[::-1], strict=False):
        assert turn[0] == answer.said


def test_keywords_keep_commas_within_quotation_marks(paceline):
    words = ("--keywords", '"cat, dog",park', "--max-new-tokens", 40, "--json")
    done = paceline("generate", "Once upon a time", *words)
    assert done.code == 0
    assert "cat, dog" in done.json["text"]
    assert "park" in done.json["text"]


def test_an_answer_that_never_began_is_not_kept_and_a_retry_keeps_the_earlier_one():
    from paceline.cli.conversation.talk import Talk
    from tests.measuring.toy_lm import ToyLM
    from tests.toy import Oracle

    class Impatient(Oracle):
        def propose(self, context, budget, min_path_prob=0.0):
            raise KeyboardInterrupt

    lm = ToyLM()
    talk = Talk(
        lm, Transcript("U: {user}\nB:"), {"max_new_tokens": 3, "stop": []}, None, quiet=True
    )
    talk.reader = type("Reader", (), {"interactive": False})()
    assert talk.answer("hello")
    before = list(talk.transcript.turns)
    lm.drafter = Impatient(lm.engine)
    talk.take("and now?")
    talk.take("/retry")
    assert talk.transcript.turns == before
    assert [each.said for each in talk.answers] == ["hello"]
