import json
import logging
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import RequestError
from paceline.serving.logs import formatter
from paceline.serving.settings import PREFIX, ServerSettings, Size, names

FORMATS = {
    "toml": 'port = 1\nmax_running = 2\nqueue = 3\nmemory = "1GB"\ncors = ["a", "b"]',
    "json": "",
}
FORMATS["json"] = json.dumps(
    {"port": 1, "max_running": 2, "queue": 3, "memory": "1GB", "cors": ["a", "b"]}
)


def read(flags=(), environ=(), file=None):
    return ServerSettings.read(
        dict(flags), {PREFIX + k.upper(): v for k, v in dict(environ).items()}, file
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_flags_come_before_the_environment_before_the_file_before_defaults(tmp_path, kind):
    file = tmp_path / f"serve.{kind}"
    file.write_text(FORMATS[kind])
    found = read({"queue": 33, "port": None}, {"max_running": "22", "queue": "0"}, file)
    assert (found.port, found.max_running, found.queue) == (1, 22, 33)
    assert found.memory == 10**9
    assert found.cors == ("a", "b")
    assert found.drain == ServerSettings().drain


def test_the_environment_is_read_in_the_types_of_the_settings():
    found = read(
        (), {"prefill_slowdown": "3", "cors": "x, y", "log_prompts": "true", "keys_file": "a/b"}
    )
    assert (found.prefill_slowdown, found.cors, found.log_prompts) == (3.0, ("x", "y"), True)
    assert found.keys_file == Path("a/b")
    assert ServerSettings.read({}, {"PATH": "/bin"}) == ServerSettings()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"prot": "1"}, "unknown variable 'PACELINE_SERVE_PROT'; .*PACELINE_SERVE_PORT"),
        ({"port": "x"}, "port is 'x': expected a whole number"),
        ({"port": "99999"}, "port is 99999, expected 0 to 65535"),
        ({"prefill_slowdown": "nan"}, "prefill_slowdown is nan"),
        ({"drain": "inf"}, "drain is inf"),
        ({"log_prompts": "maybe"}, "log_prompts is 'maybe': expected true or false"),
        ({"memory": "much"}, "memory is 'much': expected a size"),
        ({"prefix_cache": "2"}, "prefix_cache is 2.0, expected 0 to 1"),
    ],
)
def test_wrong_variables_are_told_in_a_sentence(environ, said):
    with pytest.raises(RequestError, match=said):
        read((), environ)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prot = 1", "unknown setting 'prot'; did you mean port"),
        ("port = true", "port is True: expected a whole number"),
        ("port = 1.5", "port is 1.5: expected a whole number"),
        ("name = 3", "name is 3: expected a string"),
        ("cors = 3", "cors is 3: expected a list of strings"),
        ("port = ", "is not valid toml"),
        ("keys = ['a:b']", "put them into a separate file"),
        ("memory = -1", "memory is -1"),
    ],
)
def test_wrong_files_are_told_in_a_sentence(tmp_path, content, said):
    file = tmp_path / "serve.toml"
    file.write_text(content)
    with pytest.raises(RequestError, match=said):
        read(file=file)


def test_files_that_are_none(tmp_path):
    for name, content in (("a.json", "[1]"), ("b.json", "[" * 10**5), ("c.toml", "\x00")):
        (tmp_path / name).write_text(content)
        with pytest.raises(RequestError):
            read(file=tmp_path / name)
    with pytest.raises(RequestError, match="cannot read the settings"):
        read(file=tmp_path / "none.toml")


def test_keys_are_not_shown():
    found = read((), {"keys": "ann:secret-of-ann,bob:secret-of-bob"})
    assert found.shown()["keys"] == ["ann", "bob"]
    assert "secret" not in json.dumps(found.shown()) + repr(found)
    assert set(found.shown()) == set(names(secret=True))


@settings(deadline=None)
@given(st.text(max_size=20))
def test_a_size_is_one_or_no_size(text):
    try:
        size = Size.parse(text)
    except ValueError:
        return
    assert size >= 0


@settings(deadline=None)
@given(st.integers(0, 10**12))
def test_a_size_is_written_as_it_is_read(size):
    assert Size.parse(str(Size(size))) == size
    assert Size.parse("2GB") == 2 * 10**9
    assert Size.parse("1.5 MiB") == 3 * 2**19


def test_a_guide_keeps_semicolons_within_quoted_texts():
    text = 'calm=cfg:negative="loud; angry, sad",scale=2;dry=cfg:negative=wet'
    settings = ServerSettings.read({"guides": text}, {})
    assert settings.guides == (
        'calm=cfg:negative="loud; angry, sad",scale=2',
        "dry=cfg:negative=wet",
    )
    with pytest.raises(RequestError, match="cors has an empty member"):
        ServerSettings.read({}, {"PACELINE_SERVE_CORS": "a,,b"})
    assert ServerSettings.read({}, {"PACELINE_SERVE_CORS": ""}).cors == ()


@pytest.mark.parametrize("name", ["auto", "text", "json"])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_is_text_on_a_terminal_and_json_elsewhere(name, terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    record = logging.LogRecord("paceline", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/v1", "prompt": 'a "b"\n\x1b[2J', "seconds": 0.12345678}
    line = formatter(name).format(record)
    if name == "text" or (name == "auto" and terminal):
        assert re.fullmatch(r"\d\d:\d\d:\d\d request path=/v1 prompt=\"a .*\" seconds=0.1235", line)
        assert line.isprintable()
    else:
        assert json.loads(line)["prompt"] == record.fields["prompt"]


def test_settings_of_log_and_tls_are_checked():
    for flags in ({"log_format": "yaml"}, {"ssl_keyfile": "key.pem"}):
        with pytest.raises(RequestError, match=next(iter(flags))):
            ServerSettings.read(flags, {})


def test_the_memory_of_weights_is_a_size_or_a_width():
    for text in ("80MB", "4bits"):
        assert ServerSettings(weight_memory=text).weight_memory == text
    with pytest.raises(RequestError, match="weight_memory"):
        ServerSettings(weight_memory="much")


@pytest.mark.parametrize(
    ("given", "counted"),
    [
        ({}, True),
        ({"engine": "native"}, True),
        ({"engine": "reference"}, False),
        ({"device": "cpu"}, False),
        ({"weight_memory": "4bits"}, False),
    ],
)
def test_replicas_have_threads_of_their_own_where_the_engine_counts_them(given, counted):
    from paceline.cli.serve import _has_threads

    assert _has_threads(ServerSettings(**given)) is counted
