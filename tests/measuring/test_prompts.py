import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import RequestError
from paceline.measuring.prompts import Dialogue, read_prompts


def file(folder, name, *lines):
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def test_text_has_one_prompt_a_line(tmp_path):
    path = file(tmp_path, "a.txt", "Once", "", "Lily said: {no json}")
    assert read_prompts(path) == [
        Dialogue(("Once",), "text", 1),
        Dialogue(("Lily said: {no json}",), "text", 3),
    ]


def test_jsonl_has_prompt_or_turns_and_a_category(tmp_path):
    path = file(
        tmp_path,
        "a.jsonl",
        json.dumps({"prompt": "Hi"}),
        json.dumps({"category": "qa", "turns": ["One?", "Two?"], "question_id": 3}),
    )
    one, two = read_prompts(path)
    assert one == Dialogue(("Hi",), "text", 1)
    assert two == Dialogue(("One?", "Two?"), "qa", 2)
    assert [one.name(0), two.name(1)] == ["line 1", "line 2 turn 2"]


def test_the_limit_counts_prompts_and_reads_no_further(tmp_path):
    path = file(tmp_path, "a.jsonl", "", '{"prompt": "a"}', '{"prompt": "b"}', "broken")
    assert [d.line for d in read_prompts(path, 2)] == [2, 3]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 has neither 'prompt' nor 'turns'"),
        ('{"text": "x"}', "line 2 has neither 'prompt' nor 'turns'"),
        ('{"prompt": ""}', "line 2 has a prompt that is not text or is empty"),
        ('{"prompt": 3}', "line 2 has a prompt that is not text or is empty"),
        ('{"turns": []}', "line 2 has a prompt that is not text or is empty"),
        ('{"turns": "Hi"}', "line 2 has a prompt that is not text or is empty"),
        ('{"turns": ["Hi", null]}', "line 2 has a prompt that is not text or is empty"),
        (r'{"prompt": "\ud800"}', "line 2 has a prompt that is not text or is empty"),
        ('{"prompt": "Hi", "category": 1}', "line 2 has a category that is not text"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, line, said):
    path = file(tmp_path, "a.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(RequestError, match=said):
        read_prompts(path)


def test_many_bad_lines_make_one_short_sentence(tmp_path):
    path = file(tmp_path, "a.jsonl", *["?"] * 9)
    with pytest.raises(RequestError, match=r"line 5 is not JSON, and 4 more$"):
        read_prompts(path)


def test_files_that_hold_no_prompts(tmp_path):
    with pytest.raises(RequestError, match="cannot read the prompts"):
        read_prompts(tmp_path / "missing.txt")
    with pytest.raises(RequestError, match="cannot read the prompts"):
        read_prompts(tmp_path)
    with pytest.raises(RequestError, match="holds no prompt"):
        read_prompts(file(tmp_path, "a.txt", "", "  "))
    (tmp_path / "b.txt").write_bytes(b"ok\n\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8 text \\(byte 3\\)"):
        read_prompts(tmp_path / "b.txt")


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(content)
    with suppress(RequestError):
        assert all(dialogue.turns for dialogue in read_prompts(path))
