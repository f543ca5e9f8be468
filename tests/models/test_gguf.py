"""The GGUF container: read as the `gguf` package writes it; lies are refused in one sentence."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.models.formats.gguf import GGUFFile, is_gguf
from paceline.models.formats.mapped import is_mapped

Key = tuple[bytes, int, bytes]  # name, type, value
Tensor = tuple[bytes, Sequence[int], int, int]  # name, sizes, type, offset


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def file(
    keys: Sequence[Key] = (),
    tensors: Sequence[Tensor] = (),
    data: bytes = b"",
    *,
    start: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    """A file by hand."""
    counts = counts or (len(tensors), len(keys))
    head = start + struct.pack("<QQ", *counts)
    for name, kind, value in keys:
        head += text(name) + number(kind) + value
    for name, sizes, kind, offset in tensors:
        head += text(name) + number(len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
        head += number(kind) + struct.pack("<Q", offset)
    return head + bytes(-len(head) % align) + data


def opened(path: Path, content: bytes) -> GGUFFile:
    path.write_bytes(content)
    return GGUFFile.open(path)


ONE: Tensor = (b"a", (32, 2), 8, 0)  # two rows of one block of Q8_0


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"uint8": 7, "int8": -7, "uint16": 65535, "int16": -9, "uint32": 2**32 - 1}
    numbers |= {"int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63)}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("float32", 1e-5)
    writer.add_float64("float64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "été\0")
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("integers", list(range(300)))
    writer.add_array("flags", [True, False])
    writer.add_array("strings", ["a", "", "日本", "x" * 1000])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = GGUFFile.open(path).metadata
    assert {name: data[name] for name in numbers} == numbers
    assert (data["float32"], data["float64"]) == (1e-5, 0.1)
    assert (data["yes"], data["no"], data["text"]) == (True, False, "été\0")
    assert data["strings"] == [b"a", b"", "日本".encode(), b"x" * 1000]
    np.testing.assert_array_equal(data["floats"], [0.5, -1.5])
    np.testing.assert_array_equal(data["integers"], np.arange(300))
    np.testing.assert_array_equal(data["flags"], [True, False])
    assert data["flags"].dtype == np.bool_
    assert not data["integers"].flags.writeable


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_views_of_the_file(version: int, tmp_path: Path) -> None:
    start = b"GGUF" + number(version)
    tensors = [ONE, (b"v", (3,), 0, 96)]
    rows, vector = bytes(range(68)), np.float32([1, 2, 3]).tobytes()
    data = rows + bytes(28) + vector
    read = opened(tmp_path / "a.gguf", file((), tensors, data, start=start))
    assert list(read.tensors) == ["a", "v"]
    tensor = read.tensors["a"]
    assert (tensor.type, tensor.shape) == ("Q8_0", (2, 32))
    assert tensor.data.tobytes() == rows
    assert tensor.data.shape == (2, 34)
    assert is_mapped(tensor.data)
    assert not tensor.data.flags.writeable
    assert read.tensors["v"].data.view("<f4").tolist() == [[1, 2, 3]]
    assert read.files == (tmp_path / "a.gguf",)
    assert is_gguf(tmp_path / "a.gguf")
    assert not is_gguf(tmp_path / "nothing")


def test_alignment(tmp_path: Path) -> None:
    key = (b"general.alignment", 4, number(256))
    content = file([key], [ONE, (b"b", (32,), 8, 256)], bytes(256) + bytes([5] * 34), align=256)
    read = opened(tmp_path / "a.gguf", content)
    assert read.tensors["b"].data.tobytes() == bytes([5] * 34)


BIG = struct.pack("<Q", 2**60)
KEY: Key = (b"k", 4, number(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no GGUF file: it begins with b''"),
        (b"PK\3\4" + bytes(40), r"is no GGUF file: it begins with b'PK"),
        (b"GGUF\3\0\0\0\0", "is truncated after 9 bytes"),
        (file(start=b"GGUF\0\0\0\3"), "is a big-endian GGUF file"),
        (file(start=b"GGUF\1\0\0\0"), "is GGUF version 1, expected 2 or 3"),
        (file(start=b"GGUF\4\0\0\0"), "is GGUF version 4"),
        (file(start=b"GGUF\0\0\0\0"), "is GGUF version 0"),
        (file(counts=(2**63, 0)), f"claims {2**63} tensors"),
        (file(counts=(0, 2**62)), f"claims {2**62} keys"),
        (file(counts=(0, 1)), "claims 1 keys in 32 bytes"),
        (file([(text(b"k") * 3, 4, b"")], counts=(0, 2)), "would need"),
        (file([KEY, KEY]), "has the key 'k' twice"),
        (file([(b"\xff\xfe", 4, number(1))]), "is not UTF-8"),
        (file([(b"k", 13, number(1))]), "gives 'k' the unknown type 13"),
        (file([(b"k", 8, BIG + b"text")]), f"need {2**60} more"),
        (file([(b"k", 9, number(4) + BIG)]), f"need {2**62} more"),
        (file([(b"k", 9, number(12) + struct.pack("<Q", 2**61))]), f"need {2**64} more"),
        (file([(b"k", 9, number(8) + BIG)]), f"claims {2**60} strings in 'k'"),
        (file([(b"k", 9, number(8) + struct.pack("<Q", 2) + BIG + bytes(9))]), "has a string of"),
        (file([(b"k", 9, number(8) + struct.pack("<Q", 3) + text(b"x" * 24))]), "ends inside 'k'"),
        (file([(b"k", 9, number(9) + struct.pack("<Q", 1) + bytes(40))]), "an array of arrays"),
        (file([(b"k", 9, number(77) + struct.pack("<Q", 1) + bytes(40))]), "unknown type 77"),
        (file([(b"general.alignment", 4, number(0))]), "is aligned to 0 bytes"),
        (file([(b"general.alignment", 4, number(48))]), "expected a power of two"),
        (file([(b"general.alignment", 8, text(b"32"))]), "general.alignment in .* is '32'"),
        (file([(b"general.alignment", 4, number(2**31))], [ONE], bytes(68)), "aligned to"),
        (file((), [ONE, ONE], bytes(200)), "has the tensor 'a' twice"),
        (file((), [(b"a", (), 8, 0)], bytes(99)), "gives tensor 'a' 0 axes"),
        (file((), [(b"a", (1,) * 5, 0, 0)], bytes(99)), "5 axes, expected 1 to 4"),
        (file((), [(b"a", (32, 0), 8, 0)], bytes(99)), r"the sizes \[0, 32\]"),
        (file((), [(b"a", (32, 2**31), 8, 0)], bytes(99)), "the sizes"),
        (file((), [(b"a", (2**31 - 1,) * 4, 0, 0)], bytes(99)), "places tensor 'a'"),
        (file((), [(b"a", (31, 2), 8, 0)], bytes(99)), "needs a multiple of 32"),
        (file((), [(b"a", (32, 2), 16, 0)], bytes(99)), "stored as IQ2_XXS, which Paceline does"),
        (file((), [(b"a", (32, 2), 36, 0)], bytes(99)), r"I2_S of bitnet.cpp"),
        (file((), [(b"a", (32, 2), 40, 0)], bytes(99)), "NVFP4"),
        (file((), [(b"a", (32, 2), 2**31, 0)], bytes(99)), f"stored as type {2**31}"),
        (file((), [ONE], bytes(67)), "places tensor 'a'"),
        (file((), [(b"a", (32, 2), 8, 16)], bytes(99)), "at a multiple of 32"),
        (file((), [(b"a", (32, 2), 8, 2**64 - 32)], bytes(99)), "places tensor 'a'"),
        (file((), [ONE, (b"b", (32,), 8, 64)], bytes(99)), "'a' and 'b' overlap"),
        (file((), [ONE, (b"b", (32,), 8, 0)], bytes(99)), "overlap"),
    ],
)
def test_what_lies_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as error:
        opened(tmp_path / "a.gguf", content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + 2 * len(str(tmp_path))


def test_what_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*: No such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"cannot read .*: Is a directory"):
        GGUFFile.open(tmp_path)


@given(data=st.data())
def test_every_truncation_is_refused(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    keys = [KEY, (b"s", 9, number(8) + struct.pack("<Q", 2) + text(b"ab") + text(b"c"))]
    content = file(keys, [ONE], bytes(68))
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(ModelError):
        opened(tmp_path_factory.getbasetemp() / "cut.gguf", content[:cut])


def parts(folder: Path, count: int = 3, **changes: Any) -> Path:
    """A model of one tensor a part."""
    for index in range(count):
        own = {"no": index, "count": count} | ({} if index else {"tensors.count": count})
        own |= changes.get(f"part{index}", {})
        keys = [(f"split.{key}".encode(), 4, number(value)) for key, value in own.items()]
        name = f"t{changes.get('twice', index) if index == 2 else index}".encode()
        content = file(keys, [(name, (32,), 8, 0)], bytes([index] * 34))
        (folder / f"m-{index + 1:05}-of-{count:05}.gguf").write_bytes(content)
    return folder / f"m-00001-of-{count:05}.gguf"


def test_split_files_are_joined(tmp_path: Path) -> None:
    read = GGUFFile.open(parts(tmp_path))
    assert list(read.tensors) == ["t0", "t1", "t2"]
    assert [tensor.data[0, 0] for tensor in read.tensors.values()] == [0, 1, 2]
    assert len(read.files) == 3
    assert read.path == read.files[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part0": {"tensors.count": 4}}, "hold 3 tensors, expected 4"),
        ({"part1": {"no": 2}}, "is not part 2 of 3"),
        ({"part2": {"count": 4}}, "is not part 3 of 3"),
        ({"twice": 1}, "holds tensor 't1' of an earlier part"),
        ({"part0": {"count": 4}}, "expected a name that ends in -00001-of-00004"),
        ({"part0": {"no": 1}}, "is not the first of 3 parts"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        GGUFFile.open(parts(tmp_path, **changes))


def test_other_parts_than_the_first_are_refused(tmp_path: Path) -> None:
    first = parts(tmp_path)
    with pytest.raises(ModelError, match=r"is not the first of 3 parts; name .*00001-of-00003"):
        GGUFFile.open(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf is not beside it"):
        GGUFFile.open(first)
    with pytest.raises(ModelError, match="expected a name that ends in"):
        GGUFFile.open(first.rename(tmp_path / "renamed.gguf"))
