"""Keys and values on disk: the bits of computing them again, whatever happens to the files."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import Cost, TokenTree
from paceline.engines import page_store
from paceline.engines.ensemble import EnsembleEngine
from paceline.engines.native import KV_FORMATS, NativeEngine
from paceline.engines.page_file import MAGIC, VERSION, file_size
from paceline.engines.page_folder import PageFolder, stored_pages
from paceline.engines.page_store import PageStore
from paceline.engines.pages import PAGE
from paceline.engines.reference import ReferenceEngine
from paceline.errors import CombinationError, MemoryFullError, RequestError
from tests.engines.test_attention import CONFIG, WEIGHTS
from tests.engines.test_attention import native as open_native
from tests.engines.test_native import trees

EDGES = st.one_of(
    *(st.integers(edge - 2, edge + 2) for edge in (64, 128, 192)), st.integers(1, 300)
)
CHUNKS = st.sampled_from((1, 7, 63, 64, 65, 256))


def engine(kv_format="fp32", **options) -> NativeEngine:
    return open_native(kv_format, **{"threads": 2, **options})


def store(folder, one=None, limit=10**8, model="weights"):
    return PageStore(one or engine(), lambda: model, folder, limit)


def saved(folder, tokens, one=None, **options):
    """A folder with the pages of a text."""
    one = one or engine()
    own = store(folder, one, **options)
    sequence = one.start(tokens)
    own.save(tokens, sequence)
    assert own.flush()
    own.close()
    one.release(sequence)
    assert one.memory.used == 0
    return own


def loaded(folder, tokens, one=None, **options):
    """A new engine's sequence of a text, read as far as it is stored; and how far that is."""
    one = one or engine()
    sequence = one.open()
    length = store(folder, one, **options).load(tokens, sequence)
    assert length == sequence.length
    return one, sequence, length


def check_bits(one, sequence, tokens, tree, chunk=256):
    """The rest is computed; a tree behind it has the bits that it has behind a computed text."""
    one.extend(sequence, tokens[sequence.length :], chunk=chunk)
    fresh = one.start(tokens)
    assert np.array_equal(one.forward([(sequence, tree)]).copy(), one.forward([(fresh, tree)]))
    one.release(fresh)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@settings(max_examples=10)
@given(data=st.data())
def test_loaded_pages_have_the_bits_of_computed_ones(kv_format, data, tmp_path_factory):
    folder, tokens = tmp_path_factory.mktemp("pages"), tiny.tokens(data.draw(EDGES))
    isa = data.draw(st.sampled_from(_native.isas()))
    first = engine(kv_format, isa=isa, threads=data.draw(st.integers(1, 3)))
    sequence = first.open()
    first.extend(sequence, tokens, chunk=data.draw(CHUNKS))
    own = store(folder, first)
    own.save(tokens, sequence)
    assert own.flush()
    known = data.draw(st.integers(0, len(tokens)))  # what the memory has of the text already
    other = engine(kv_format, isa=isa)
    sequence = other.start(tokens[:known])
    length = store(folder, other).load(tokens, sequence)
    assert length == max(known, len(tokens) // PAGE * PAGE)
    company = other.start(tiny.tokens(70, 1))
    other.forward([(company, data.draw(trees(3)))])
    check_bits(other, sequence, tokens, data.draw(trees(9)), data.draw(CHUNKS))


def test_the_longest_common_beginning_is_read(tmp_path):
    tokens = tiny.tokens(300)
    saved(tmp_path, tokens)
    other = tokens.copy()
    other[150] += 1
    for text, length in ((other, 128), (tokens[:127], 64), (tokens[:63], 0), (tokens[64:], 0)):
        one, sequence, found = loaded(tmp_path, text)
        assert found == length
        check_bits(one, sequence, text, TokenTree.chain(tiny.tokens(3, 2)))


@settings(max_examples=60)
@given(data=st.data())
def test_no_change_of_files_changes_a_logit(data, tmp_path_factory):
    folder, tokens = tmp_path_factory.mktemp("pages"), tiny.tokens(260)
    saved(folder, tokens)
    files = sorted(each.path for each in stored_pages(folder))
    before = {path: path.read_bytes() for path in files}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes()) if path.exists() else bytearray()
        what = data.draw(st.sampled_from(("flip", "cut", "longer", "other", "zeros", "gone")))
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if what == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "cut":
            content = content[:place]
        elif what == "longer":
            content += b"\0" * data.draw(st.integers(1, 100))
        elif what == "zeros":
            content = bytearray(len(content))
        elif what == "other":
            content = bytearray(before[data.draw(st.sampled_from(files))])
        path.unlink(missing_ok=True)
        if what != "gone":
            path.write_bytes(content)
    one, sequence, length = loaded(folder, tokens)
    check_bits(one, sequence, tokens, TokenTree.chain(tiny.tokens(4, 2)))
    own = store(folder, one)  # what was damaged is written again
    own.save(tokens, sequence)
    assert own.flush()
    for path in files:
        own_version = path.read_bytes()[:12] == before[path][:12]
        assert path.read_bytes() == before[path] or not own_version or length < 256


def test_a_damaged_file_is_removed_with_one_line_and_a_foreign_one_is_left(tmp_path, caplog):
    tokens = tiny.tokens(200)
    saved(tmp_path, tokens)
    files = {PageFolder.path(own._folder, link): link for own in [store(tmp_path)]
             for link in own._folder.links(tokens)}  # fmt: skip
    first, second, third = files
    later = bytearray(second.read_bytes())
    later[len(MAGIC)] = VERSION + 1
    second.write_bytes(later)
    third.write_bytes(
        b"a letter to a friend, which is as long as a page's head or a bit longer " * 9
    )
    for path in (second, third, first):
        caplog.clear()
        if path == first:
            path.write_bytes(path.read_bytes()[:-1])
        link, own = files[path], store(tmp_path)
        for _ in range(2):
            assert own._folder.read(link, own._engine.memory.page_bytes) is None
        assert len(caplog.records) == 1
        assert path.name in caplog.text
        assert path.exists() == (path != first)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_is_passed_over(kind, tmp_path, caplog):
    tokens = tiny.tokens(100)
    saved(tmp_path, tokens)
    [file] = [each.path for each in stored_pages(tmp_path)]
    file.unlink()
    {"folder": os.mkdir, "pipe": os.mkfifo, "loop": lambda path: path.symlink_to(path)}[kind](file)
    one, sequence, length = loaded(tmp_path, tokens)
    assert length == 0
    check_bits(one, sequence, tokens, TokenTree.root(3))
    saved(tmp_path, tokens)


def test_other_models_formats_and_code_find_nothing(tmp_path, monkeypatch):
    tokens = tiny.tokens(130)
    saved(tmp_path, tokens)
    assert loaded(tmp_path, tokens)[2] == 128
    assert loaded(tmp_path, tokens, model="others")[2] == 0
    assert loaded(tmp_path, tokens, engine("int8"))[2] == 0
    assert loaded(tmp_path, tokens, engine(format="int8"))[2] == 0
    for isa in _native.isas()[1:]:
        assert loaded(tmp_path, tokens, engine(isa=_native.isas()[0]))[2] == 128 or isa
    found = {isa: loaded(tmp_path, tokens, engine(isa=isa))[2] for isa in _native.isas()}
    assert sorted(found.values()) == [0] * (len(found) - 1) + [128]
    monkeypatch.setattr(page_store, "__version__", "0.0.0")
    assert loaded(tmp_path, tokens)[2] == 0


def test_the_folder_is_bounded_and_the_least_recently_used_go_first(tmp_path):
    size = file_size(engine().memory.page_bytes)
    texts = [tiny.tokens(200, seed) for seed in range(4)]  # of three pages
    for text in texts[:2]:
        saved(tmp_path, text, limit=7 * size)
    loads = store(tmp_path, limit=7 * size)
    saved(tmp_path, texts[0], limit=7 * size)  # used again
    saved(tmp_path, texts[2], limit=7 * size)
    del loads
    assert [loaded(tmp_path, text)[2] for text in texts] == [192, 64, 192, 0]
    own = saved(tmp_path, texts[3], limit=2 * size)
    assert own.statistics.evicted_pages == 7
    assert [loaded(tmp_path, text)[2] for text in texts] == [0, 0, 0, 128]
    assert (
        sum(each.size for each in stored_pages(tmp_path)) == 2 * size == own.statistics.stored_bytes
    )


def test_writers_of_one_folder_keep_the_limit_and_every_page_whole(tmp_path):
    limit, wrong = 5 * file_size(engine().memory.page_bytes), []

    def work(seed):
        one = engine()
        own = store(tmp_path, one, limit)
        for round_ in range(12):
            tokens = tiny.tokens(200, (seed + round_) % 5)
            sequence = one.open()
            own.load(tokens, sequence)
            one.extend(sequence, tokens[sequence.length :])
            own.save(tokens, sequence)
            own.flush()
            if sum(each.size for each in stored_pages(tmp_path)) > limit:
                wrong.append("too much")
            fresh = one.start(tokens)
            tree = TokenTree.root(5)
            if not np.array_equal(
                one.forward([(sequence, tree)]).copy(), one.forward([(fresh, tree)])
            ):
                wrong.append("other bits")
            one.release(sequence)
            one.release(fresh)
        if own.statistics.unusable_pages:
            wrong.append("unusable")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_dead_writer_left_is_removed_and_what_is_not_ours_is_not(tmp_path):
    tokens = tiny.tokens(70)
    saved(tmp_path, tokens)
    [page] = [each.path for each in stored_pages(tmp_path)]
    left = page.with_name(f".{page.stem}.1.1.part")
    left.write_bytes(b"half")
    mine, kept = page.with_name("notes.txt"), tmp_path / "a.page"
    mine.write_text("mine")
    kept.write_text("mine")
    stored_pages(tmp_path)
    assert left.exists()  # it may be under way
    os.utime(left, (1, 1))
    saved(tmp_path, tiny.tokens(70, 1), limit=file_size(engine().memory.page_bytes))
    assert not left.exists()
    assert not page.exists()
    assert mine.exists()
    assert kept.exists()


def test_a_full_disk_stops_the_writing_and_nothing_else(tmp_path, caplog, monkeypatch):
    one, tokens = engine(), tiny.tokens(150)
    own, sequence = store(tmp_path, one), one.start(tokens)

    def full(self, link, page):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PageFolder, "write", full)
    for _ in range(3):
        own.save(tokens, sequence)
        assert own.flush()
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert own.statistics.skipped_texts == 3
    one.release(sequence)
    assert one.memory.used == 0


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    own = store(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", full)
    [link] = own._folder.links(tiny.tokens(64))
    with pytest.raises(OSError, match="full"):
        own._folder.write(link, np.zeros(8, np.uint8))
    assert [path.name for path in own._folder.own.iterdir()] == []


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    folder, one, tokens = tmp_path / "a" / "b", engine(), tiny.tokens(70)
    own = store(folder, one)
    shutil.rmtree(tmp_path / "a")
    sequence = one.open()
    assert own.load(tokens, sequence) == 0
    one.extend(sequence, tokens)
    own.save(tokens, sequence)
    assert own.flush()
    assert loaded(folder, tokens)[2] == 64


def test_a_folder_or_limit_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(
            RequestError, match=r"cannot hold a prefix cache: .*; name one that can"
        ):
            store(folder)
    with pytest.raises(RequestError, match="of 9 bytes holds no page of this model, which takes"):
        store(tmp_path, limit=9)
    reference = ReferenceEngine(CONFIG, WEIGHTS)
    for other in (reference, EnsembleEngine([engine(), engine()], [0.5, 0.5])):
        with pytest.raises(CombinationError, match="hand out its cached keys and values"):
            store(tmp_path, other)


def test_reading_that_takes_longer_than_computing_is_given_up_and_tried_again(tmp_path):
    tokens, one = tiny.tokens(300), engine()
    saved(tmp_path, tokens)
    own = store(tmp_path, one)
    fast, slow = Cost((1,), (1e-12,)), Cost((1, 64), (1.0, 64.0))
    for _ in range(3):
        assert own.load(tokens, one.open(), slow) == 256
    assert own.load(tokens, one.open(), fast) == 0
    own._page_seconds.append(1e-13)  # as if other files had been read quickly
    assert own.load(tokens, one.open(), fast) == 256
    own._page_seconds.extend([1.5] * 8)
    rounds = [own.load(tokens, one.open(), Cost((1,), (1 / PAGE,))) for _ in range(10)]
    assert set(rounds) == {0, 256}


def test_pages_are_read_as_far_as_there_is_memory(tmp_path):
    tokens = tiny.tokens(300)
    saved(tmp_path, tokens)
    one = engine()
    one.kv_limit = 3 * one.memory.page_bytes
    _, sequence, length = loaded(tmp_path, tokens, one)
    assert length == 192
    other = one.open()
    calls = []

    def reclaim():
        calls.append(1)
        one.truncate(sequence, 0)
        return len(calls) < 2

    assert store(tmp_path, one).load(tokens, other, None, reclaim) == 192
    assert len(calls) == 2


def test_texts_that_wait_give_their_memory_back(tmp_path):
    one, tokens = engine(), tiny.tokens(100)
    own, sequence = store(tmp_path, one), one.start(tokens)
    with own._folder.locked():  # the writer waits for it
        own.save(tokens, sequence)
        while not own._writer._busy:
            time.sleep(0.001)
        for _ in range(page_store._MAX_WAITING + 5):
            own.save(tokens, sequence)
        one.release(sequence)
        assert own.give_way()
        assert not own.give_way()
    assert own.flush()
    assert own.statistics.skipped_texts >= page_store._MAX_WAITING
    assert one.memory.used == 0
    assert loaded(tmp_path, tokens)[2] == 64


def test_a_store_that_is_dropped_writes_what_waits(tmp_path):
    one, tokens = engine(), tiny.tokens(100)
    own = store(tmp_path, one)
    own.save(tokens, one.start(tokens))
    del own
    assert loaded(tmp_path, tokens)[2] == 64


def test_pages_that_do_not_fit_are_refused():
    one = engine()
    sequence = one.start(tiny.tokens(100))
    page = one.read_page(sequence, 0)
    for index in (1, 2, -1, 10**30):
        with pytest.raises(RequestError, match="cannot read page"):
            one.read_page(sequence, index)
    with pytest.raises(RequestError, match="cannot follow 100 positions"):
        one.append_page(sequence, page)
    other = one.open()
    for wrong in (page[:-1], page.astype(np.int64), page[None], None):
        with pytest.raises(RequestError, match="cannot append a page"):
            one.append_page(other, wrong)
    for _ in range(CONFIG.context // PAGE):
        one.append_page(other, page)
    with pytest.raises(RequestError, match="beyond the context"):
        one.append_page(other, page)
    one.truncate(other, PAGE)
    small = engine()
    small.kv_limit = small.memory.page_bytes
    other = small.open()
    small.append_page(other, page)
    with pytest.raises(MemoryFullError):
        small.append_page(other, page)
    assert other.length == PAGE
    tracked = one.open()
    one.track_attention(tracked)
    with pytest.raises(RequestError, match="tracks attention"):
        one.append_page(tracked, page)
    one.release(tracked)


def test_a_pass_under_way_is_forgotten_by_a_page():
    one = engine()
    source = one.start(tokens := tiny.tokens(64))
    target = one.open()
    one.forward([(target, TokenTree.chain(tiny.tokens(150, 3)))])
    one.append_page(target, one.read_page(source, 0))
    with pytest.raises(RequestError, match="no forward pass to commit"):
        one.commit(target, [0])
    assert len(one.pages(target)) == 1
    check_bits(one, target, tokens, TokenTree.root(4))


def test_the_log_is_quiet_where_nothing_is_wrong(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    saved(tmp_path, tiny.tokens(130))
    loaded(tmp_path, tiny.tokens(130))
    assert not caplog.records
