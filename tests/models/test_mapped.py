"""Pages of mapped files: what is given back is out of memory, and is read again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from paceline.models import load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import parse_gguf_format
from paceline.models.formats.mapped import free_pages, is_mapped
from paceline.models.formats.safetensors import read_file
from tests.conftest import shared

SMAPS = Path("/proc/self/smaps")


def resident(path):
    """Return the bytes of a mapped file that are in this process's memory."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.endswith(str(path.resolve()))
        elif inside and words[0] == "Rss:":
            total += 1024 * int(words[1])
    return total


def test_pages_leave_memory_and_come_back(tmp_path):
    path = tmp_path / "some.safetensors"
    values = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    safetensors.numpy.save_file({"a": values, "b": values + 1}, path)
    tensors = read_file(path)
    arrays = [each.values for each in tensors.values()]
    assert all(map(is_mapped, arrays))
    total = sum(float(each.sum()) for each in arrays)
    assert resident(path) > 7 << 20
    free_pages([*arrays, np.ones(3)])
    assert resident(path) < 1 << 20
    assert sum(float(each.sum()) for each in arrays) == total


@pytest.mark.parametrize("gguf", [False, True])
def test_weights_free_the_pages_of_their_files(tmp_path, gguf):
    path = tmp_path / "copy"  # other tests of this process may have mapped the original
    shutil.copytree(shared("models", "stories260K"), path)
    file = path / "model.safetensors"
    if gguf:
        file = tmp_path / "copy.gguf"
        GGUFExport(load(path), parse_gguf_format("q8_0")).write(file)
    model = load(file if gguf else path)
    before = {name: model.weights.dense(name) + 0 for name in model.weights}
    read = resident(file)
    model.weights.free_pages()
    assert resident(file) < read / 2
    for name, values in before.items():
        assert np.array_equal(model.weights.dense(name), values), name
