"""Which blocks of nested matrices are loaded into a given memory."""

from hypothesis import given
from hypothesis import strategies as st

from paceline.models.nested import NestedSizes, choose_blocks


@st.composite
def matrices(draw):
    made = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        steps = draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))
        losses = sorted(draw(st.lists(st.floats(0, 1), min_size=len(steps), max_size=len(steps))))
        sizes = [sum(steps[: end + 1]) for end in range(len(steps))]
        made[name] = NestedSizes(sizes, losses[::-1])
    return made


@given(matrices(), st.integers(0, 700))
def test_what_is_chosen_fits_and_leaves_no_room_for_a_next_block(made, room):
    counts = choose_blocks(made, room)
    least = sum(matrix.sizes[0] for matrix in made.values())
    assert (counts is None) == (room < least)
    if counts is None:
        return
    used = sum(made[name].sizes[count - 1] for name, count in counts.items())
    assert used <= room
    whole = sum(matrix.sizes[-1] for matrix in made.values())
    assert room < whole or used == whole


def test_the_block_that_saves_most_for_its_bytes_comes_first():
    made = {
        "a": NestedSizes([10, 20, 30], [0.5, 0.2, 0.1]),
        "b": NestedSizes([10, 20, 30], [0.5, 0.1, 0.09]),
    }
    assert choose_blocks(made, 20) == {"a": 1, "b": 1}
    assert choose_blocks(made, 30) == {"a": 1, "b": 2}
    assert choose_blocks(made, 40) == {"a": 2, "b": 2}
    assert choose_blocks(made, 50) == {"a": 3, "b": 2}
