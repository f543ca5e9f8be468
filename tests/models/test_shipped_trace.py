"""Traces that come with Paceline: what is packed is read back, and damage is refused."""

import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import MethodError, ModelError
from paceline.models import shipped_trace as module
from paceline.models import trace as traces
from paceline.models.shipped_trace import FOLDER, pack_trace, shipped_trace
from paceline.models.trace import Trace, known_trace, trace_path, write_trace


def made(lengths, top, seed, vocabulary=1 << 16):
    random = np.random.default_rng(seed)
    count = sum(lengths)
    probs = -np.sort(-random.random((count, top)).astype(np.float32), 1)
    return Trace(
        random.integers(0, vocabulary, count).astype(np.int32),
        np.cumsum([0, *lengths[:-1]], dtype=np.int32),
        random.integers(0, vocabulary, (count, top)).astype(np.int32),
        probs / probs.sum(1, keepdims=True),
    )


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    top=st.integers(1, 6),
    kept=st.integers(1, 6),
    cut=st.integers(1, 200),
)
def test_what_is_packed_is_read_back(tmp_path_factory, lengths, top, kept, cut):
    folder, trace = tmp_path_factory.mktemp("traces"), made(lengths, top, cut)
    if lengths[0] > cut:
        with pytest.raises(MethodError, match="first text"):
            pack_trace(trace, kept, cut)
        return
    (folder / "print.xz").write_bytes(pack_trace(trace, kept, cut))
    back = shipped_trace("print", folder)
    end = len(back)
    assert end == max(total for total in np.cumsum(lengths) if total <= cut)
    assert np.array_equal(back.tokens, trace.tokens[:end])
    assert np.array_equal(back.starts, trace.starts[trace.starts < end])
    assert np.array_equal(back.top_tokens, trace.top_tokens[:end, :kept])
    assert np.abs(back.top_probs - trace.top_probs[:end, :kept]).max() <= 0.5 / 255 + 1e-6
    assert shipped_trace("another", folder) is None


def test_a_token_that_does_not_fit_is_refused():
    trace = made([4], 2, 0)
    trace.top_tokens[1, 1] = 1 << 16
    with pytest.raises(MethodError, match="above 65535"):
        pack_trace(trace, 2, 100)


@pytest.mark.parametrize("damage", ["cut", "noise", "longer", "texts", "json"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    packed = pack_trace(made([5, 6], 2, 0), 2, 100)
    raw = lzma.decompress(packed)
    changed = {
        "cut": packed[:-9],
        "noise": b"noise" + packed,
        "longer": lzma.compress(raw + b"\0"),
        "texts": lzma.compress(raw.replace(b"\n\x05", b"\n\x04", 1)),
        "json": lzma.compress(b"[]" + raw),
    }[damage]
    (tmp_path / "print.xz").write_bytes(changed)
    with pytest.raises(ModelError, match="install Paceline again"):
        shipped_trace("print", tmp_path)


class _Model:
    def fingerprint(self):
        return "print"


def test_a_recorded_trace_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setattr(traces, "cache_folder", lambda: tmp_path / "cache")
    real = shipped_trace
    monkeypatch.setattr(module, "shipped_trace", lambda name: real(name, tmp_path))
    assert known_trace(_Model(), 1 << 16) is None
    (tmp_path / "print.xz").write_bytes(pack_trace(made([5, 6], 2, 0), 2, 100))
    assert len(known_trace(_Model(), 1 << 16)) == 11
    (tmp_path / "cache").mkdir()
    write_trace(trace_path(_Model()), made([3], 2, 1))
    assert len(known_trace(_Model(), 1 << 16)) == 3


def test_all_that_are_shipped_can_be_read_and_are_small():
    files = list(FOLDER.glob("*.xz"))
    assert files
    for path in files:
        assert path.stat().st_size < 400_000
        trace = shipped_trace(path.stem)
        assert len(trace) > 5000
        assert trace.top_probs.sum(1).max() < 1.02
