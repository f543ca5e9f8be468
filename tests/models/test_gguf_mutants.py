"""A small share of scripts/fuzz_gguf.py: its seeds run, its mutants are refused or load."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import fuzz_gguf
import gguf_mutants

MUTANTS = 300


@pytest.fixture(scope="module")
def seeds() -> list[gguf_mutants.Seed]:
    return gguf_mutants.seeds([])


def test_seeds_run_and_have_every_architecture_and_type(
    seeds: list[gguf_mutants.Seed], tmp_path: Path
) -> None:
    names, kinds = map(set, zip(*(seed.name.split() for seed in seeds), strict=True))
    assert names == set(gguf_mutants.ARCHITECTURES)
    assert kinds == set(gguf_mutants.TYPES)
    for seed in seeds:
        path = tmp_path / "seed.gguf"
        path.write_bytes(seed.data)
        assert fuzz_gguf.check(path, native=True) == "loaded", seed.name


def test_mutants_are_refused_or_load(seeds: list[gguf_mutants.Seed], tmp_path: Path) -> None:
    path, outcomes = tmp_path / "mutant.gguf", Counter[str]()
    for which in range(MUTANTS):
        path.write_bytes(gguf_mutants.mutant(1, which, seeds))
        outcomes[fuzz_gguf.check(path, native=True)] += 1
    assert outcomes.total() == MUTANTS
    assert min(outcomes[name] for name in ("loaded", "refused", "refused in use")) > 5


def test_whatever_is_no_error_of_ours_is_found(
    seeds: list[gguf_mutants.Seed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seed.gguf"
    path.write_bytes(seeds[0].data)

    def broken(*_: object) -> None:
        raise IndexError

    monkeypatch.setattr(fuzz_gguf, "load", broken)
    with pytest.raises(IndexError):
        fuzz_gguf.check(path, native=False)
