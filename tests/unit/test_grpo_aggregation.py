"""Means as coefficients: their values, what they sum to, and rows without a trained token."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from grpo.aggregation import fixed_length, sequence_mean, token_mean
from tests.unit.grpo_groups import LENGTHS, flat

TOY = [[np.ones(n, bool) for n in LENGTHS]]
# the toy batch's clipped losses, eps 0.2, advantages 1, -1, -1, 1
TOY_LOSSES = [[-1.105171, -0.740818, -1.0], [1.0, 1.221403], [1.491825, 1.0, 0.8, 1.0], [-1.0]]
TOKEN = token_mean
SEQUENCE = sequence_mean
FIXED = partial(fixed_length, max_tokens=4)


@pytest.mark.parametrize(
    ("aggregation", "mean"), [(SEQUENCE, 0.058749), (TOKEN, 0.266724), (FIXED, 0.166702)]
)
def test_each_mean_of_the_toy_batch_is_the_one_worked_by_hand(aggregation, mean):
    coefficients = flat([row for group in aggregation(TOY) for row in group])
    assert coefficients @ flat(TOY_LOSSES) == pytest.approx(mean, abs=1e-6)


def test_coefficients_of_lengths_one_and_three():
    masks = [[np.ones(1, bool)], [np.ones(3, bool)]]
    assert flat([g[0] for g in TOKEN(masks)]).tolist() == [1 / 4] * 4
    assert flat([g[0] for g in SEQUENCE(masks)]).tolist() == [1 / 2] + [1 / 6] * 3
    assert flat([g[0] for g in FIXED(masks)]).tolist() == [1 / 8] * 4


def test_a_sequence_mean_divides_by_the_trained_tokens_of_its_row():
    masks = [[np.array([False, True, True]), np.array([True])]]
    assert [row.tolist() for row in SEQUENCE(masks)[0]] == [[0, 1 / 4, 1 / 4], [1 / 2]]


@pytest.mark.parametrize("aggregation", [TOKEN, SEQUENCE, FIXED])
def test_untrained_tokens_get_no_coefficient(aggregation):
    mask = np.array([False, True, True, False])
    ((row,),) = aggregation([[mask]])
    assert ((row > 0) == mask).all()


def test_a_row_without_a_trained_token_leaves_the_token_mean_but_stays_in_the_others():
    masks = [[np.ones(2, bool), np.zeros(2, bool)]]
    sums = [flat(agg(masks)[0]).sum() for agg in (TOKEN, SEQUENCE, FIXED)]
    # token mean: 2/2; sequence mean: one of two rows; fixed length: 2 / (2 * 4)
    assert sums == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("aggregation", [TOKEN, SEQUENCE, FIXED])
def test_an_update_without_a_trained_token_has_only_zeros(aggregation):
    ((row, empty),) = aggregation([[np.zeros(3, bool), np.zeros(0, bool)]])
    assert row.tolist() == [0.0] * 3
    assert empty.tolist() == []


@pytest.mark.parametrize("aggregation", [TOKEN, SEQUENCE, FIXED])
def test_how_rows_are_grouped_does_not_change_their_coefficients(aggregation):
    rng = np.random.default_rng(0)
    rows = [rng.random(int(n)) < 0.8 for n in rng.integers(1, 9, 12)]
    together = [row for group in aggregation([rows]) for row in group]
    apart = [row for group in aggregation([rows[:5], rows[5:]]) for row in group]
    for left, right in zip(together, apart, strict=True):
        np.testing.assert_array_equal(left, right)


def test_equal_lengths_make_token_mean_and_sequence_mean_the_same_to_the_last_bit():
    masks = [[np.ones(7, bool)] * 3, [np.ones(7, bool)] * 3]
    for left, right in zip(TOKEN(masks), SEQUENCE(masks), strict=True):
        np.testing.assert_array_equal(left, right)
