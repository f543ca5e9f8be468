"""What was learnt goes through a file."""

import numpy as np
import pytest

from paceline.drafters.base import Target
from paceline.drafters.history.state_file import read_learnt, write_learnt
from paceline.errors import ModelError
from paceline.registry import drafters
from tests.drafters.test_contract import LEARNING, built, live


@pytest.mark.parametrize("spec", [s for s in LEARNING if ":" not in s])
def test_states_go_through_a_file(spec, tmp_path):
    drafter, path = built(spec, 20), tmp_path / "learnt"
    for empty in (True, False):
        if not empty:
            list(live(drafter, np.random.default_rng(0), 20, 6))
        write_learnt(path, drafter.state())
        state = read_learnt(path)
        assert state.keys() == drafter.state().keys()
        for name, array in drafter.state().items():
            assert np.array_equal(array, state[name]), name
            assert array.dtype == state[name].dtype
        built(spec, 20).load(state)


def test_types_that_the_format_lacks_are_refused(tmp_path):
    with pytest.raises(ModelError, match="complex128"):
        write_learnt(tmp_path / "learnt", {"x": np.zeros(2, np.complex128)})
    assert not (tmp_path / "learnt").exists()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "learnt"
    drafter = drafters.parse("recycle").build(Target(9))
    write_learnt(path, drafter.state())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError):
        read_learnt(path)
