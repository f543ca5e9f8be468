"""The file format: what the safetensors package writes is read in place; all else is refused."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.models.formats import safetensors as module
from paceline.models.formats.safetensors import open_tensors, read_file

FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, JSON or bytes, before these tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    arrays = {"x": FLOATS, "y": FLOATS.astype(np.float16), "empty": np.zeros((0, 3), np.float32)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    found = read_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name].values, array)
        assert not found[name].values.flags.writeable
    assert [found[name].dtype for name in ("x", "y")] == ["F32", "F16"]


def test_tensors_are_views(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"x": FLOATS}, path)
    values = read_file(path)["x"].values
    while isinstance(values.base, np.ndarray):
        values = values.base
    assert isinstance(values, np.memmap)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"{", 0, "not valid JSON"),
        (b"[]", 0, "not a JSON object"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"a": 1, "a": 2}', 0, "occurs twice"),
        ({"x": 3}, 0, "inconsistent at tensor 'x'"),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8, "inconsistent"),
        ({"x": entry(0, 8, [-2])}, 8, "inconsistent"),
        ({"x": entry(0, 8, [2.0])}, 8, "inconsistent"),
        ({"x": {**entry(0, 8, [2]), "data_offsets": [0, 8, 9]}}, 8, "inconsistent"),
        ({"x": entry(0, 8, [16], "F4")}, 8, "unknown dtype 'F4'"),
        ({"x": entry(0, 8, [2], ["F32"])}, 8, "inconsistent"),
        ({"x": entry(0, 8, [3])}, 8, "not its shape"),
        ({"x": entry(8, 0, [2])}, 8, "not its shape"),
        ({"x": entry(0, 8, [2]), "y": entry(4, 12, [2])}, 12, "begins at byte 4"),
        ({"x": entry(0, 8, [2]), "y": entry(12, 20, [2])}, 20, "begins at byte 12"),
        ({"x": entry(0, 8, [2])}, 7, "truncated"),
        ({"x": entry(0, 8, [2])}, 9, "truncated"),
        ({"x": entry(0, 2**65, [2**63])}, 8, "truncated"),
    ],
)
def test_refusals(tmp_path: Path, header: Any, size: int, message: str) -> None:
    path = write(tmp_path / "a.safetensors", header, b"\0" * size)
    with pytest.raises(ModelError, match=message):
        read_file(path)


@pytest.mark.parametrize(
    "data", [b"", b"\1\0", b"\xff" * 8, b"\xff" * 100, b"<html>not found</html>"]
)
def test_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="truncated or no safetensors file"):
        read_file(path)
    with pytest.raises(ModelError, match="cannot read"):
        read_file(tmp_path)


def test_a_header_ends_within_the_file_and_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", b"{}")
    assert read_file(path) == {}
    path.write_bytes((3).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="10 bytes cannot hold a header of 3 bytes"):
        read_file(path)
    path.write_bytes(b"\0" * 7)
    with pytest.raises(ModelError, match="7 bytes cannot hold a header of 0 bytes"):
        read_file(path)
    assert module._LARGEST_HEADER == 100_000_000
    monkeypatch.setattr(module, "_LARGEST_HEADER", 20)
    assert read_file(write(path, b"{}".ljust(20))) == {}
    with pytest.raises(ModelError, match="29 bytes cannot hold a header of 21 bytes"):
        read_file(write(path, b"{}".ljust(21)))


def test_shards(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": FLOATS}, tmp_path / "1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in (
        ({"x": "1.safetensors", "y": "1.safetensors"}, "lacks 'y'"),
        ({"x": "2.safetensors"}, "No such file"),
        ({"x": "../1.safetensors"}, "expected a file name"),
        ({"x": 3}, "expected a file name"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=message):
            open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "1.safetensors"}}))
    assert np.array_equal(open_tensors(tmp_path)["x"].values, FLOATS)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds neither"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"only pickled weights .*save_pretrained"):
        open_tensors(tmp_path)


OFFSETS = st.integers(-2, 40) | st.integers()
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", None, 3]),
        "shape": st.lists(st.integers(-1, 6) | st.integers(), max_size=3) | st.none(),
        "data_offsets": st.lists(OFFSETS, min_size=1, max_size=3),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3).map(
        lambda header: json.dumps(header).encode()
    )
    | st.binary(max_size=30),
    data=st.binary(max_size=40),
    cut=st.integers(0, 8),
)
def test_fuzz(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes, cut: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    with suppress(ModelError):
        for tensor in read_file(path).values():
            assert math.prod(tensor.values.shape) * tensor.values.itemsize <= len(data)
            tensor.values.sum()


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 300), byte=st.integers(0, 255))
def test_fuzz_one_wrong_byte(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    path = tmp_path_factory.getbasetemp() / "byte.safetensors"
    data = bytearray(safetensors.numpy.save({"x": FLOATS, "y": FLOATS.astype(np.float16)}))
    data[at % len(data)] = byte
    path.write_bytes(data)
    with suppress(ModelError):
        read_file(path)
