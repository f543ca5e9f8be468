"""The GGUF container that we write, read by our reader and by the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.models.formats import gguf_writer
from paceline.models.formats.gguf import GGUFFile
from paceline.models.formats.gguf_quantize import quantize
from paceline.models.formats.gguf_types import TYPES, dequantize
from paceline.models.formats.gguf_writer import PendingTensor, write_gguf

NUMBERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32]
NUMBERS += [np.uint64, np.int64, np.float64, np.bool_]


def pending(name, values, step=2):
    rows = values if values.ndim == 2 else values[None]

    def pieces():
        for start in range(0, len(rows), step):
            yield quantize(name, rows[start : start + step])

    return PendingTensor(name, values.shape, pieces)


VALUES = st.one_of(
    st.text(max_size=20),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.lists(st.text(max_size=8), min_size=1, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5),
)


def as_plain(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return [each.decode() for each in value]
    return value


@given(st.dictionaries(st.text(min_size=1, max_size=12), VALUES, max_size=8))
def test_metadata_come_back(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, metadata, {})
    found = GGUFFile.open(path).metadata
    assert list(found) == list(metadata)
    for key, value in metadata.items():
        got = as_plain(found[key])
        if isinstance(value, float):
            assert np.float32(got) == np.float32(value)
        elif isinstance(value, list) and isinstance(value[0], float):
            np.testing.assert_array_equal(np.float32(got), np.float32(value))
        else:
            assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("kind", NUMBERS)
def test_numpy_numbers_and_arrays_keep_their_type(tmp_path, kind):
    values = np.array([0, 1, 1], kind)
    write_gguf(tmp_path / "a.gguf", {"one": values[1], "many": values}, {})
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["one"].parts[-1].dtype == kind
    np.testing.assert_array_equal(GGUFFile.open(tmp_path / "a.gguf").metadata["many"], values)
    assert GGUFFile.open(tmp_path / "a.gguf").metadata["many"].dtype == kind


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_tensors_are_the_same_in_our_reader_and_in_the_package(tmp_path, name):
    random = np.random.default_rng(1)
    matrix = random.standard_normal((5, 2 * TYPES[name].weights)).astype(np.float32)
    vector = random.standard_normal(7).astype(np.float32)
    path = tmp_path / "a.gguf"
    tensors = {"matrix": pending(name, matrix), "vector": pending("F32", vector)}
    size = write_gguf(path, {"general.architecture": "llama"}, tensors)
    assert path.stat().st_size == size
    expected = quantize(name, matrix)
    ours = GGUFFile.open(path).tensors
    np.testing.assert_array_equal(ours["matrix"].data, expected)
    assert ours["matrix"].shape == matrix.shape
    assert ours["vector"].shape == vector.shape
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert theirs["matrix"].tensor_type == gguf.GGMLQuantizationType[name]
    assert list(theirs["matrix"].shape) == [*reversed(matrix.shape)]
    data = np.ascontiguousarray(theirs["matrix"].data).view(np.uint8).reshape(expected.shape)
    np.testing.assert_array_equal(dequantize(name, data), dequantize(name, expected))
    np.testing.assert_array_equal(theirs["vector"].data, vector)


def test_every_tensor_begins_at_the_alignment(tmp_path):
    tensors = {f"t{n}": pending("F32", np.ones(n, np.float32)) for n in (1, 3, 8, 9)}
    write_gguf(tmp_path / "a.gguf", {}, tensors)
    offsets = [tensor.data_offset for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors]
    assert all(offset % 32 == 0 for offset in offsets)
    assert np.diff(offsets).tolist() == [32, 32, 32]


def test_progress_counts_every_byte(tmp_path):
    seen = []
    tensor = pending("Q8_0", np.ones((7, 64), np.float32))
    write_gguf(tmp_path / "a.gguf", {}, {"t": tensor}, seen.append)
    assert sum(seen) == tensor.nbytes
    assert len(seen) == 4


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path, failure):
    path = tmp_path / "a.gguf"
    path.write_text("earlier")

    def pieces():
        yield quantize("F32", np.ones((1, 4), np.float32))
        raise failure

    tensors = {"t": PendingTensor("F32", (2, 4), pieces)}
    expected = ModelError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_gguf(path, {}, tensors)
    if expected is ModelError:
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert [each.name for each in tmp_path.iterdir()] == ["a.gguf"]
    assert path.read_text() == "earlier"


def test_a_full_disk_is_noticed_before_the_work_begins(tmp_path, monkeypatch):
    usage = gguf_writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(gguf_writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"it will have \d+ MB and the disk has 0 MB left"):
        write_gguf(tmp_path / "a.gguf", {}, {"t": pending("F32", np.ones((9, 999), np.float32))})


def test_a_tensor_with_other_bytes_than_its_shape_is_refused(tmp_path):
    rows = quantize("F32", np.ones((2, 4), np.float32))
    tensor = PendingTensor("F32", (3, 4), lambda: iter([rows]))
    with pytest.raises(ModelError, match="tensor t has 32 bytes, expected 48"):
        write_gguf(tmp_path / "a.gguf", {}, {"t": tensor})
    assert not (tmp_path / "a.gguf").exists()
