"""The file format: what the safetensors package writes is read in place; all else is refused."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.models.formats import safetensors as module
from paceline.models.formats.mapped import is_mapped
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


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2"), ("F8_E4M3", "u1"),
        ("F8_E5M2", "u1"), ("I64", "<i8"), ("I32", "<i4"), ("I16", "<i2"), ("I8", "i1"),
        ("U64", "<u8"), ("U32", "<u4"), ("U16", "<u2"), ("U8", "u1"), ("BOOL", "u1"),
    ],
)  # fmt: skip
def test_every_type_is_read_little_endian(tmp_path: Path, dtype: str, stored: str) -> None:
    data = bytes(range(1, 2 * np.dtype(stored).itemsize + 1))
    header = {"x": entry(0, len(data), [1, 2], dtype), "__metadata__": {"a": "b"}}
    found = read_file(write(tmp_path / "a.safetensors", header, data))
    assert found.keys() == {"x"}
    assert (found["x"].shape, found["x"].values.dtype) == ((1, 2), np.dtype(stored))
    assert (found["x"].dtype, found["x"].format) == (dtype, dtype.lower())
    assert found["x"].values.tobytes() == data
    assert is_mapped(found["x"].values)
    assert not is_mapped(np.zeros((2, 2))[1:])


def test_a_stored_tensor_is_compared_by_identity_and_cannot_be_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": entry(0, 8, [2])}, b"\0" * 8)
    [first], [second] = read_file(path).values(), read_file(path).values()
    assert first == first
    assert first != second
    with pytest.raises(FrozenInstanceError):
        first.dtype = "F16"  # type: ignore[misc]
    assert not hasattr(first, "__dict__")


def test_messages_name_the_file_and_shorten_names(tmp_path: Path) -> None:
    path, long = tmp_path / "a.safetensors", "x" * 300
    for header, message in (
        ({long: 3}, f"the header of {path} is inconsistent at tensor '{'x' * 79}"),
        (
            {long: entry(0, 8, [2], "F" * 90)},
            f"tensor '{'x' * 79} of {path} has the unknown dtype '{'F' * 19}",
        ),
        (
            {long: entry(0, 8, [1] * 99)},
            f"tensor '{'x' * 79} of {path} has 8 bytes, which is not its shape "
            f"{str([1] * 99)[:80]} in F32",
        ),
        (
            {long: entry(4, 8, [1])},
            f"tensor '{'x' * 79} of {path} begins at byte 4 where the one before ends at 0; the "
            "file is inconsistent, download it again",
        ),
        (
            {"x": entry(0, 4, [1])},
            f"{path} is truncated or inconsistent: its header describes 4 bytes of tensors and the "
            "file has 8; download it again",
        ),
    ):
        with pytest.raises(ModelError) as raised:
            read_file(write(path, header, b"\0" * 8))
        assert str(raised.value) == message


def test_a_header_may_be_missing_or_have_many_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\0" * 8)
    with pytest.raises(ModelError, match="not valid JSON"):
        read_file(path)
    header = {f"x{number}": entry(0, 0, [0]) for number in range(300)}
    assert read_file(write(path, {**header, "y": entry(0, 4, [1])}, b"\0" * 4)).keys() == {
        *header,
        "y",
    }


def test_what_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ModelError, match=f"^cannot read {missing}: No such file or directory$"):
        open_tensors(missing)
    with pytest.raises(ModelError, match=f"^cannot read {missing}: No such file or directory$"):
        read_file(missing)

    def fail(path: Path) -> None:
        raise OSError("no reason of the system")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(ModelError, match=f"^cannot read {tmp_path}: no reason of the system$"):
        open_tensors(tmp_path)
    path = write(tmp_path / "a.safetensors", b"{}")
    monkeypatch.setattr(Path, "open", lambda path, mode: fail(path))
    with pytest.raises(ModelError, match=f"^cannot read {path}: no reason of the system$"):
        read_file(path)


def test_tensors_may_be_listed_in_any_order(tmp_path: Path) -> None:
    header = {"y": entry(8, 12, [1]), "x": entry(0, 8, [2]), "empty": entry(8, 8, [0])}
    data = np.arange(3, dtype="<f4")
    found = read_file(write(tmp_path / "a.safetensors", header, data.tobytes()))
    assert [found[name].values.tolist() for name in ("x", "y", "empty")] == [[0, 1], [2], []]


def test_large_offsets_are_compared_by_value(tmp_path: Path) -> None:
    header = {"x": entry(0, 1200, [300]), "y": entry(1200, 2400, [300])}
    data = np.arange(600, dtype="<f4")
    found = read_file(write(tmp_path / "a.safetensors", header, data.tobytes()))
    assert np.array_equal(found["y"].values, data[300:])


def test_one_file_goes_before_shards_and_every_shard_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(module, "read_file", lambda path: opened.append(path) or read_file(path))
    for name in "ab":
        content = {f"{name}{number}": FLOATS + number for number in range(2)}
        safetensors.numpy.save_file(content, tmp_path / f"{name}.safetensors")
    places = {name: f"{name[0]}.safetensors" for name in ("a0", "b0", "a1")}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = open_tensors(tmp_path)
    assert list(found) == ["a0", "b0", "a1"], "what the index does not name is left out"
    assert np.array_equal(found["a1"].values, FLOATS + 1)
    assert opened == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    write(tmp_path / "model.safetensors", {})
    assert open_tensors(tmp_path) == {}


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
    (tmp_path / "readme.txt").write_text("a checkpoint")
    with pytest.raises(ModelError, match="holds neither"):
        open_tensors(tmp_path)
    for name in ("b.pt", "c.pth", "d.ckpt"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelError, match=r"only pickled weights \(b.pt\)"):
            open_tensors(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"only pickled weights \(a.bin\)"):
        open_tensors(tmp_path)
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
