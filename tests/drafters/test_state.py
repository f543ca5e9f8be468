"""Checks of learned state, and documents that are computed once."""

import json

import numpy as np
import pytest

from paceline.cache_dir import cached_json
from paceline.drafters.state import check_successors, checked
from paceline.errors import MethodError

LIKE = {"rows": np.zeros((0, 2), np.int32), "rates": np.zeros(3, np.float32)}
RANGES = {"rows": (-1, 9), "rates": (0, 1)}


def state(rows=((1, 2),), rates=(0.0, 0.5, 1.0), dtype=np.int32):
    return {"rows": np.array(rows, dtype).reshape(-1, 2), "rates": np.array(rates, np.float32)}


def check(found):
    return checked("a test", found, LIKE, RANGES, rows=("rows",))


def test_rows_may_have_any_length_and_limits_are_possible():
    for rows in ((), ((-1, 9),), ((1, 2), (3, 4))):
        assert check(state(rows))["rows"].shape == (len(rows), 2)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"rows": LIKE["rows"]}, "it lacks rates"),
        ({**LIKE, "more": LIKE["rates"]}, "it has more"),
        (state(dtype=np.int64), r"rows is int64 \(1, 2\), expected int32 \(1, 2\)"),
        (state(rates=(0.0, 0.5)), r"rates is float32 \(2,\), expected float32 \(3,\)"),
        (state(rows=((10, 0),)), "impossible rows, expected -1 to 9"),
        (state(rates=(0.0, 1.1, 0.0)), "impossible rates, expected 0 to 1"),
        (state(rates=(0.0, np.nan, 0.0)), "impossible rates"),
    ],
)
def test_what_does_not_fit_is_named(found, said):
    with pytest.raises(MethodError, match=said):
        check(found)


def test_a_token_may_not_follow_twice_but_none_may():
    check_successors("a test", np.array([[1, 2, -1, -1]]))
    with pytest.raises(MethodError, match="twice"):
        check_successors("a test", np.array([[1, 2, 1, -1]]))


def test_a_document_is_computed_once_and_again_when_damaged(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"value": made[-1]}

    def get():
        return cached_json("test", "key", make, lambda found: int(found["value"]), tmp_path / "a")

    assert [get(), get()] == [0, 0]
    for text in ("", "[]", '{"value": "x"}'):
        (tmp_path / "a" / "test-key.json").write_text(text)
        assert get() == get() == made[-1]
    assert made == [0, 1, 2, 3]
    assert json.loads((tmp_path / "a" / "test-key.json").read_text()) == {"value": 3}
    (tmp_path / "file").write_text("")
    assert cached_json("test", "key", make, lambda found: found, tmp_path / "file") == {"value": 4}
