"""`datastore` against its plain Python meaning, and the files it reads."""

import gzip
import json
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.drafters.base import Target
from paceline.drafters.history import corpus_index
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models.tokenizer import open_tokenizer
from paceline.registry import drafters
from tests.byte_tokenizer import byte_level
from tests.drafters import reference
from tests.drafters.steps import asked
from tests.drafters.test_recycle import assert_same


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return open_tokenizer(byte_level(tmp_path_factory.mktemp("bytes")))


def store(path, tokens, tokenizer):
    corpus_index.write_corpus(path, np.array(tokens, np.int32), tokenizer)
    return path


def build(path, tokenizer, vocab=259, **changes):
    spec = ",".join(f"{name}={value}" for name, value in {"path": path, **changes}.items())
    return drafters.parse(f"datastore:{spec}").build(Target(vocab, tokenizer=tokenizer))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-1, 3), max_size=60))
def test_suffixes_are_in_order(text):
    order = _native.suffix_array(np.array(text, np.int32)).tolist()
    assert order == sorted(range(len(text)), key=lambda at: text[at:])


def test_suffixes_of_long_and_repetitive_texts_are_in_order():
    random = np.random.default_rng(0)
    for text in (
        np.zeros(5000, np.int32),
        np.tile(np.array([1, 2, 1, 3], np.int32), 2000),
        random.integers(-1, 60000, 20000).astype(np.int32),
    ):
        order = _native.suffix_array(text)
        assert sorted(order.tolist()) == list(range(len(text)))
        words = text.astype(">i4").tobytes()  # in order for tokens of 0 and more
        if text.min() >= 0:
            for a, b in zip(order[:-1:37].tolist(), order[1::37].tolist(), strict=True):
                assert words[4 * a :] < words[4 * b :]


@pytest.mark.parametrize("wrong", [[-2], [1 << 24]])
def test_tokens_that_cannot_be_sorted_are_refused(wrong):
    with pytest.raises(ValueError, match="tokens are"):
        _native.suffix_array(np.array(wrong, np.int32))


@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.integers(-1, 4), min_size=1, max_size=80),
    context=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    prompt=st.integers(1, 20),
    longest=st.integers(1, 5),
    k=st.integers(1, 4),
    samples=st.integers(1, 9),
)
def test_agrees_with_the_reference(
    tmp_path_factory, tokenizer, text, context, prompt, longest, k, samples
):
    path = store(tmp_path_factory.mktemp("store") / "corpus", text, tokenizer)
    drafter = build(path, tokenizer, longest=longest, k=k, samples=samples, rate=0.1)
    slow = reference.Suffixes(tuple(text), longest, k, samples, 0.1)
    prompt = min(prompt, len(context))
    drafter.begin(asked(context[:prompt]))
    tree = drafter.propose(np.array(context, np.int32), 8)
    slow.learn(tuple(context), prompt)
    learnt = drafter.state()["reliability"]
    assert learnt == pytest.approx(list(slow.reliability.values()), abs=1e-4)
    assert_same(tree, slow.propose(tuple(context), 8))


def test_the_corpus_is_continued_up_to_the_end_of_a_document(tmp_path, tokenizer):
    path = store(tmp_path / "corpus", [1, 2, 3, 4, -1, 9, 3, 8, -1], tokenizer)
    drafter = build(path, tokenizer)
    drafter.begin(asked([7]))
    assert drafter.propose(np.array([7, 2], np.int32), 8).tokens.tolist() == [2, 3, 4]
    tree = drafter.propose(np.array([2, 3], np.int32), 8)
    assert tree.tokens[1] == 4  # the longer match
    assert 8 in tree.tokens[tree.parents == 0]
    assert len(drafter.propose(np.array([100], np.int32), 8)) == 1


def test_texts_are_read_whatever_their_form(tmp_path, tokenizer):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("One.", "Two."))
    (tmp_path / "a.jsonl").write_text(rows + "\n")
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write(rows)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(rows)
    (tmp_path / "d.txt").write_text("One.")
    with lzma.open(tmp_path / "e.txt.xz", "wt") as file:
        file.write("Two.")
    two = [*tokenizer.encode("One."), -1, *tokenizer.encode("Two."), -1]
    for names in (["a.jsonl"], ["b.jsonl.xz"], ["c.jsonl.gz"], ["d.txt", "e.txt.xz"]):
        reported = []
        paths = [tmp_path / name for name in names]
        read = corpus_index.tokenise(paths, tokenizer, 1000, reported.append)
        assert read.tokens.tolist() == two
        assert (read.documents, read.complete) == (2, True)
        assert sum(reported) == sum(path.stat().st_size for path in paths)


def test_long_documents_are_read_in_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus_index, "_PIECE", 10)
    (tmp_path / "a.txt").write_text("abcdefghij" * 4 + "k")
    read = corpus_index.tokenise([tmp_path / "a.txt"], tokenizer, 1000)
    assert read.tokens.tolist() == [*tokenizer.encode("abcdefghij" * 4 + "k"), -1]
    assert read.documents == 1


def test_reading_stops_at_the_limit(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a" * 50)
    read = corpus_index.tokenise([tmp_path / "a.txt"], tokenizer, 20)
    assert (len(read.tokens), read.complete) == (20, False)
    read = corpus_index.tokenise([tmp_path / "a.txt"], tokenizer, 51)
    assert (len(read.tokens), read.complete) == (51, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\nno\n', "line 2"),
        ("a.jsonl", b'{"words": "a"}\n', "line 1"),
        ("a.jsonl", b'["a"]\n', "line 1"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"", "no text"),
        ("a.jsonl.xz", b"junk", "damaged"),
        ("a.txt.gz", b"junk", "damaged"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-20], "damaged"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        corpus_index.tokenise([tmp_path / name], tokenizer, 1000)


def test_files_of_another_tokenizer_are_refused(tmp_path, tokenizer, tmp_path_factory):
    path = store(tmp_path / "corpus", [1, 2, 3], tokenizer)
    folder = byte_level(tmp_path_factory.mktemp("other"))
    text = (folder / "tokenizer.json").read_text().replace("<pad>", "<none>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(MethodError, match="another tokenizer"):
        build(path, open_tokenizer(folder))
    with pytest.raises(MethodError, match="needs the model's tokenizer"):
        drafters.parse(f"datastore:path={path}").build(Target(259))
    with pytest.raises(MethodError, match="tokens that the model lacks"):
        build(path, tokenizer, vocab=3)


def test_broken_files_are_refused(tmp_path, tokenizer):
    path = store(tmp_path / "corpus", [1, 2, 3], tokenizer)
    whole = path.read_bytes()
    with pytest.raises(ModelError):
        build(tmp_path / "nothing", tokenizer)
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="truncated"):
        build(path, tokenizer)
    path.write_bytes(whole.replace(b"suffixes", b"suffixen"))
    with pytest.raises(MethodError, match="no datastore"):
        build(path, tokenizer)
    last = len(whole) - 32 - 4
    path.write_bytes(whole[:last] + b"\x07\0\0\0" + whole[last + 4 :])
    with pytest.raises(MethodError, match="damaged"):
        build(path, tokenizer)
    path.write_bytes(whole)
    assert len(build(path, tokenizer).propose(np.array([1], np.int32), 4)) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path, tokenizer, monkeypatch):
    path = store(tmp_path / "corpus", [1, 2, 3], tokenizer)
    whole = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(ModelError, match="cannot write"):
        store(path, [4, 5, 6], tokenizer)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["corpus"]


def refuse(self, target):
    raise OSError(28, "No space left on device")
