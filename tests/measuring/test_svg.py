import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.measuring.report.svg import Axis, Plot, clean, doubling, even

amounts = st.floats(1e-6, 1e6)


@given(
    st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), min_size=1, max_size=9),
    st.integers(2, 9),
)
def test_an_even_axis_holds_all_values_between_few_round_ticks(values, most):
    axis = even("x", values, most)
    slack = 1e-8 * (axis.ticks[-1] - axis.ticks[0])
    assert axis.ticks[0] - slack <= min(values) <= max(values) <= axis.ticks[-1] + slack
    assert 2 <= len(axis.ticks) <= most + 1
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@given(amounts, amounts)
def test_a_doubling_axis_holds_both_ends_between_powers_of_two(a, b):
    low, high = sorted((a, b))
    axis = doubling("x", low, high)
    assert axis.ticks[0] <= low * (1 + 1e-6)
    assert axis.ticks[-1] >= high * (1 - 1e-6)
    assert all(math.log2(tick).is_integer() for tick in axis.ticks)
    assert axis.place(axis.ticks[1]) == pytest.approx(1 / (len(axis.ticks) - 1))


def test_places_run_from_end_to_end_and_stop_there():
    axis = Axis("x", (0.0, 5.0, 10.0))
    assert [axis.place(value) for value in (-3, 0, 2.5, 10, 99)] == [0, 0, 0.25, 1, 1]


def test_a_plot_is_well_formed_and_its_marks_are_where_the_values_say():
    plot = Plot(Axis("a < b", (0.0, 1.0)), Axis("y", (0.0, 1.0)))
    plot.line([(0, 0), (1, 1)], "c0")
    plot.dot(0.5, 0.5, "c1", 'a "tip" & more')
    plot.bar(0.25, 0.75, 0.5, 10, "c2", "bar")
    plot.text(1, 1, "words", (0, 4))
    root = ElementTree.fromstring(plot.svg("what & why"))
    dot, bar = root.find("circle"), root.find("rect")
    (x0, y0), (x1, y1) = plot.at(0, 0), plot.at(1, 1)
    assert float(dot.get("cx")) == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert float(dot.get("cy")) == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert float(bar.get("width")) == pytest.approx((x1 - x0) / 2, abs=0.1)
    assert dot.find("title").text == 'a "tip" & more'
    assert root.get("aria-label") == "what & why"
    assert "a < b" in [text.text for text in root.findall("text")]


@given(st.text())
def test_cleaned_text_is_one_piece_of_text(text):
    shown = ElementTree.fromstring(f"<p>{clean(text)}</p>".replace("￾", "").replace("￿", ""))
    assert len(shown) == 0
