import gzip
import json

import pytest

from paceline.errors import RequestError
from paceline.measuring.evaluation import data
from paceline.measuring.evaluation.data import find_file, is_any_text, is_text, read_rows
from paceline.measuring.evaluation.texts import read_documents

TEXT = {"text": is_text}


def rows(path, fields=TEXT):
    return list(read_rows(path, fields))


def test_plain_and_compressed_files_have_the_same_rows(tmp_path):
    content = '{"text": "a\u2028b"}\n\n  \n{"text": "c"}'
    (tmp_path / "x.jsonl").write_text("\ufeff" + content, encoding="utf-8")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    expected = [{"text": "a\u2028b"}, {"text": "c"}]
    assert rows(tmp_path / "x.jsonl") == rows(tmp_path / "y.jsonl.gz") == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("3", "line 2 is no JSON object"),
        ('{"other": 1}', "line 2 has no 'text'"),
        ('{"text": 3}', "line 2 has 3 as 'text'"),
        ('{"text": " "}', "line 2 has ' ' as 'text'"),
        ('{"text": "\\ud800"}', "as 'text'"),
        ('{"text": null}', "line 2 has None as 'text'"),
        ('{"text": NaN}', "line 2 has nan as 'text'"),
    ],
)
def test_bad_lines_are_told_by_number(tmp_path, line, said):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    with pytest.raises(RequestError) as error:
        rows(path)
    assert said in str(error.value)
    assert len(str(error.value)) < 400


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode())
    for name, content in (
        ("cut.jsonl.gz", whole[:-12]),
        ("none.jsonl.gz", b"no gzip"),
        ("damaged.jsonl.gz", whole[:15] + b"\xff\xff\xff" + whole[18:]),
        ("latin.jsonl", b'{"text": "\xe9"}'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError):
            rows(tmp_path / name)
    with pytest.raises(RequestError, match="cannot read"):
        rows(tmp_path / "missing.jsonl")
    (tmp_path / "long.jsonl").write_text('{"text": "' + "x" * 400 + '"}')
    monkeypatch.setattr(data, "_LINE", 100)
    with pytest.raises(RequestError, match="too long at line 1"):
        rows(tmp_path / "long.jsonl")


def test_files_are_found_in_the_folder_of_the_suite_or_in_itself(tmp_path):
    with pytest.raises(RequestError, match="there is no folder"):
        find_file(tmp_path / "nowhere", "suite", "x.jsonl")
    with pytest.raises(RequestError, match=r"expected x\.jsonl"):
        find_file(tmp_path, "suite", "x.jsonl")
    (tmp_path / "x.jsonl.gz").touch()
    assert find_file(tmp_path, "suite", "x.jsonl").name == "x.jsonl.gz"
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "x.jsonl").touch()
    assert find_file(tmp_path, "suite", "x.jsonl").parent.name == "suite"
    (tmp_path / "suite" / "x.jsonl.gz").touch()
    with pytest.raises(RequestError, match="several files"):
        find_file(tmp_path, "suite", "x.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(RequestError, match="has no data of other"):
        find_file(tmp_path, "other", "folder.jsonl")


def test_documents_of_texts(tmp_path):
    text = "".join(f"line {i} of a text\n" for i in range(500))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    pieces = read_documents(tmp_path / "a.txt.gz")
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(len(piece) >= 2000 for piece in pieces[:-1])
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert read_documents(tmp_path / "b.jsonl") == ["one", "two"]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "e.txt.gz").write_bytes(b"\x1f\x8b nonsense")
    for name in ("c.txt", "d.txt", "e.txt.gz", "missing.txt", "."):
        with pytest.raises(RequestError):
            read_documents(tmp_path / name)
    assert is_any_text("")
    assert not is_any_text("\udc00")
