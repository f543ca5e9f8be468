"""A cache with a low rank of its errors and with outliers; that drafts change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline.core import TokenTree
from paceline.engines.grouped_rounding import low_rank, round_keys, round_values
from paceline.engines.kv_formats import GROUPED_KV, GroupedFormat, grouped_format
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError
from tests.engines.test_attention import CONFIG, WEIGHTS
from tests.kvcache.test_grouped import answers

HEADS, SIZE = 2, 24


def drawn(spans: int, form: GroupedFormat, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(HEADS, spans * form.span, SIZE, generator=generator)
    return rows * torch.linspace(0.1, 4, SIZE)


def grid(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Round a list of numbers to a scale and a minimum in fp16."""
    low = np.float32(np.float16(numbers.min()))
    step = np.float32(np.float16((numbers.max() - low) / np.float32(2**bits - 1)))
    return np.clip(np.round((numbers - low) / (step or 1)), 0, 2**bits - 1) * step + low


def slow(matrix: np.ndarray, form: GroupedFormat, by_channel: bool, heads: int) -> np.ndarray:
    """Round one span [P, H D] of keys (by channel) or values, with the best low rank of errors."""
    rows = matrix.T if by_channel else matrix
    coarse, kept = np.empty_like(rows), np.ones_like(rows, bool)
    for row, numbers in enumerate(rows):
        count = form.outliers_of(len(numbers))
        order = np.argsort(numbers, kind="stable")
        kept[row, order[:count]] = kept[row, order[len(order) - count :]] = False
        inner = kept[row]
        span = form.group or len(numbers)
        starts = range(0, len(numbers), span)
        if not by_channel and form.group:  # no group crosses a head
            size = len(numbers) // heads
            starts = [h * size + at for h in range(heads) for at in range(0, size, span)]
        for at, end in zip(starts, [*list(starts)[1:], len(numbers)], strict=True):
            part = slice(at, end)
            if inner[part].any():
                one = numbers[part]
                used = np.where(inner[part], one, one[inner[part]][0])
                coarse[row, part] = grid(used, form.bits)
    if by_channel:
        coarse, kept = coarse.T, kept.T
    out = coarse.copy()
    for columns in np.split(np.arange(matrix.shape[1]), heads):
        errors = np.where(kept[:, columns], matrix[:, columns] - coarse[:, columns], 0)
        u, s, v = np.linalg.svd(errors, full_matrices=False)
        out[:, columns] += (u[:, : form.rank] * s[: form.rank]) @ v[: form.rank]
    return np.where(kept, out, matrix.astype(np.float16))


@pytest.mark.parametrize("rank", [0, SIZE])
@pytest.mark.parametrize(
    "form",
    [
        GroupedFormat(4, 32, 32, 0, 0.0),
        GroupedFormat(3, 64, 0, 0, 0.05),
        GroupedFormat(2, 64, 16, 0, 0.1),
    ],
)
def test_rounding_is_that_of_a_slow_reference(form: GroupedFormat, rank: int) -> None:
    form = GroupedFormat(form.bits, form.span, form.group, rank, form.outliers)
    rows = drawn(2, form)
    for by_channel, fast in ((True, round_keys), (False, round_values)):
        found = fast(rows, form).numpy()
        for at in range(0, 2 * form.span, form.span):
            span = rows[:, at : at + form.span].numpy()
            matrix = np.hstack(list(span))  # [P, H D]
            expected = slow(matrix, form, by_channel, HEADS)
            own = np.hstack(list(found[:, at : at + form.span]))
            np.testing.assert_allclose(own, expected, atol=2e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_a_low_rank_is_nearly_the_best_one(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = 0.5 ** torch.arange(16)
    errors = (torch.randn(3, 64, 16, generator=generator) * scales) @ torch.linalg.qr(
        torch.randn(16, 16, generator=generator)
    )[0]
    left = (errors - low_rank(errors, rank)).square().sum((1, 2))
    best = torch.linalg.svdvals(errors)[:, rank:].square().sum(1)
    # Four steps of the power method: 1.05 of the best in the mean, 3.7 with unlucky starts.
    assert (left <= 6 * best + 1e-5 * errors.square().sum((1, 2))).all()


def test_what_has_the_rank_comes_back() -> None:
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(64, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    torch.testing.assert_close(low_rank(errors, 2), errors, atol=0.01, rtol=0)
    assert not low_rank(torch.zeros(2, 32, 8), 4).any()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([2, 3, 4]), st.sampled_from([0, 8, 32]), st.integers(0, 4), st.integers(0, 9)
)
def test_outliers_and_a_rank_lose_no_more(bits: int, group: int, rank: int, seed: int) -> None:
    plain = GroupedFormat(bits, 32, group, 0, 0.0)
    rows = drawn(1, plain, seed)
    rows[0, 5, 3], rows[1, 9, 7] = 60.0, -70.0
    for fast in (round_keys, round_values):
        lost = [
            float((fast(rows, form) - rows).square().sum())
            for form in (
                plain,
                GroupedFormat(bits, 32, group, rank, 0.0),
                GroupedFormat(bits, 32, group, rank, 0.07),
            )
        ]
        assert lost[1] <= lost[0] * 1.001
        assert lost[2] < lost[0]
        found = fast(rows, GroupedFormat(bits, 32, group, rank, 0.07))
        assert found[0, 5, 3] == 60.0
        assert found[1, 9, 7] == -70.0


def test_bits_of_a_number() -> None:
    assert [form.number_bits(3, 64) for form in GROUPED_KV.values()] == [5, 4]
    plain = GroupedFormat(3, 64, 32, 2, 0.0)
    assert plain.number_bits(3, 64) == 3 + 1 + 2 * 16 * 128 / 4096
    # Keys: one number at either end of 128, with 7 bits of place; values: two of 192, with 8.
    kept = (1 / 128 * 23 * 2 + 2 / 192 * 24 * 2) / 2
    shared = (32 / 128 + 32 / 192) / 2
    assert GroupedFormat(4, rank=0).number_bits(3, 64) == pytest.approx(4 + shared + kept)


def test_chunks_and_trees_see_the_same() -> None:
    engine = ReferenceEngine(CONFIG, WEIGHTS, kv_format="gear:span=32,rank=2,bits=3")
    text = tiny.tokens(150)
    rows = []
    for chunk in (7, 64, 150):
        sequence = engine.start(text[:149], chunk=chunk)
        rows.append(engine.forward([(sequence, TokenTree.root(int(text[149])))])[0].copy())
    tree = TokenTree.chain(np.array([*text[90:150], 4]))
    rows.append(engine.forward([(engine.start(text[:90]), tree)])[59].copy())
    fresh = ReferenceEngine(CONFIG, WEIGHTS)
    exact = fresh.forward([(fresh.start(text[:149]), TokenTree.root(int(text[149])))])[0]
    for other in rows[1:]:
        # Where a number lies between two steps, noise decides.
        assert np.median(np.abs(other - rows[0])) < 0.2 * np.median(np.abs(exact - rows[0]))


def test_no_drafter_changes_an_answer() -> None:
    form = "gear:span=32,bits=2"
    plain = answers("reference", form, "plain")
    assert plain != answers("reference", "auto", "plain"), "the format is used"
    assert answers("reference", form, "blend", budget=12) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gear:bits=9", "gear:bits is 9, expected 2 to 8"),
        ("gear:bits=four", "gear:bits is 'four', expected int"),
        ("gear:span=40", "gear:span is 40, expected a multiple of 32"),
        ("gear:group=48", "gear:group is 48, expected 0 or a divisor of the span 128"),
        ("gear:group=-32", "gear:group is -32"),
        ("gear:outliers=nan", "gear:outliers is nan, expected 0 to 0.5"),
        ("gear:ranks=4", "unknown setting of gear 'ranks'; did you mean rank"),
    ],
)
def test_wrong_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        grouped_format(text)


def test_other_formats_are_no_groups() -> None:
    assert grouped_format("int8") is grouped_format("auto") is grouped_format("gearbox") is None
