"""`paceline chat` on a pseudo-terminal, with and without prompt_toolkit."""

import json
import re
import shutil
import sys

import pytest

from tests.cli.terminal import PROGRAM, Terminal
from tests.conftest import shared

BARE = [
    sys.executable,
    "-c",
    "import sys; sys.modules['prompt_toolkit'] = None; from paceline.cli import main; main()",
]
BOTH = pytest.mark.parametrize("program", [PROGRAM, BARE], ids=["prompt_toolkit", "readline"])
STATS = r"\d+ tokens, [\d.]+ tokens/s, [\d.]+ tokens per pass"
WAITING = """if True:
    import sys, time
    from paceline.cli import main
    from paceline.decoding.session import Session
    accept, passes = Session.accept, []

    def accept_five(*args):
        passes.append(1)
        if len(passes) == 5:
            print("WAITING", file=sys.stderr, flush=True)
            time.sleep(1000)
        return accept(*args)

    Session.accept = accept_five
    main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny-chat"
    shutil.copytree(shared("models", "stories260K"), folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def start(tmp_path, model):
    """Starts a chat whose cache is its own."""

    def chat(*words, program=PROGRAM, env=None):
        env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **(env or {})}
        fast = ("--max-new-tokens", 12, "--drafter", "plain", "--budget", 0)
        return Terminal("chat", model, *fast, *words, program=program, env=env)

    return chat


@BOTH
def test_a_talk_with_commands(start, program, tmp_path):
    file = tmp_path / "talk.json"
    with start("--system", "Be kind.", program=program) as screen:
        screen.expect(r"tiny-chat · fp32 weights · .*threads?")
        screen.expect("/help lists commands")
        screen.send("Tell me a story")
        screen.expect(STATS)
        screen.send("/nope")
        screen.expect("unknown command '/nope'")
        screen.send("/help")
        screen.expect(r"/retry +answer the last message again")
        screen.send("/system")
        screen.expect("system prompt: Be kind.")
        screen.send("/system You are a cat.")
        screen.expect("system prompt: You are a cat.")
        screen.send("/settings temperature=0.5 top_p=0.9")
        screen.expect("temperature=0.5 top_p=0.9")
        screen.send("/settings top_p=7")
        screen.expect("top_p is 7")
        screen.send("/retry")
        screen.expect(STATS)
        screen.send("/stats")
        screen.expect(r"1 turn, about \d+ of \d+ tokens of the context; \d+ tokens written")
        screen.send(f"/save {file}")
        screen.expect("saved 1 turn")
        screen.send("/clear")
        screen.expect("begins anew")
        screen.send(f"/load {file}")
        screen.expect("loaded 1 turn")
        screen.send("/load /missing")
        screen.expect("there is no file /missing")
        screen.send("/exit")
        assert screen.end() == 0
        assert "Traceback" not in screen.raw
    kept = json.loads(file.read_text())
    assert kept["system"] == "You are a cat."
    assert [each["role"] for each in kept["messages"]] == ["user", "assistant"]
    assert kept["messages"][0]["content"] == "Tell me a story"
    assert not list(tmp_path.glob(".*tmp"))


def test_a_paste_of_several_lines_is_one_message(start, tmp_path):
    file = tmp_path / "talk.json"
    with start() as screen:
        screen.expect(">")
        screen.type("\x1b[200~One line\nand another\x1b[201~")
        screen.type("\r")
        screen.expect(STATS)
        screen.expect(">")
        screen.type("first\x1b\rsecond\r")  # Alt-Enter
        screen.expect(STATS)
        screen.send(f"/save {file}")
        screen.expect("saved 2 turns")
        screen.expect(">")
        screen.type("\x04")
        assert screen.end() == 0
    said = [m["content"] for m in json.loads(file.read_text())["messages"][::2]]
    assert said == ["One line\nand another", "first\nsecond"]


@BOTH
def test_ctrl_c_stops_the_answer_and_not_the_talk(start, program):
    waiting = WAITING if program is PROGRAM else BARE[2].partition("from")[0] + "\n" + WAITING
    with start(program=[sys.executable, "-c", waiting]) as screen:
        screen.expect(">")
        screen.send("Tell me a story")
        screen.expect("WAITING")
        screen.type("\x03")
        screen.expect("; interrupted")
        screen.expect(">")
        screen.type("half a mess")
        screen.expect("half a mess")
        screen.interrupt("Ctrl-D or /exit ends the talk")
        screen.send("And then?")
        screen.expect(STATS)
        screen.expect(">")
        screen.type("\x04")
        assert screen.end() == 0


@BOTH
def test_the_history_is_kept_for_its_user_only(start, program, tmp_path):
    for words, count in (((), 1), (("--no-history",), 1)):
        with start(*words, program=program) as screen:
            screen.expect(">")
            screen.send(f"/system Words of {len(words)}")
            screen.expect("system prompt")
            screen.expect(">")
            screen.type("\x1b[A")  # up
            screen.expect(f"/system Words of {len(words)}")
            screen.interrupt(">")
            screen.type("\x04")
            assert screen.end() == 0
        files = list((tmp_path / "cache" / "paceline").glob("chat-*"))
        assert len(files) == count
        assert files[0].stat().st_mode & 0o077 == 0
        assert "Words of 0" in files[0].read_text()
        assert "Words of 1" not in files[0].read_text()


def test_no_color_and_dumb_terminals(start):
    colours = re.compile(r"\x1b\[[\d;]*(3\d|4\d|9\d)m|\x1b\[2m")
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        with start(env=env) as screen:
            screen.expect(">")
            screen.send("Tell me a story")
            screen.expect(STATS)
            screen.send("/exit")
            assert screen.end() == 0
            assert not colours.search(screen.raw)
            if "TERM" in env:
                assert "\x1b" not in screen.raw


def test_errors_of_a_message_do_not_end_the_talk(start):
    with start() as screen:
        screen.expect(">")
        screen.send("word " * 700)  # a terminal holds 4,096 bytes of a line that nobody reads yet
        screen.expect("tokens")
        screen.send("Tell me a story")
        screen.expect(STATS)
        screen.send("/exit")
        assert screen.end() == 0
