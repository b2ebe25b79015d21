"""Laws of packing: nothing lost, nothing doubled, nothing that does not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.batches import Sequence, fill_rate, pack_rows, plan_rows, plan_rows_decreasing


def sequence(length, start=1, context=1):
    weights = np.ones(length, np.float32)
    weights[:context] = 0
    return Sequence(np.arange(start, start + length), weights)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=40), st.booleans())
def test_plan_holds_every_sequence_once_and_no_row_overflows(lengths, decreasing):
    plan = (plan_rows_decreasing if decreasing else plan_rows)(lengths, 32)
    assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in plan]
    assert all(0 < tokens <= 32 for tokens in used)
    # A row was opened because no earlier one had room for its first sequence.
    assert all(
        used[earlier] + lengths[plan[later][0]] > 32
        for later in range(len(plan))
        for earlier in range(later)
    )


def test_best_fit_takes_the_fullest_row_with_room():
    assert plan_rows([6, 8, 2, 4], 10) == [[0, 3], [1, 2]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=12))
def test_rows_give_back_their_sequences(lengths):
    sequences = [sequence(length, start=100 * index) for index, length in enumerate(lengths)]
    batch = pack_rows(sequences, 16)
    assert batch.tokens.shape[0] & (batch.tokens.shape[0] - 1) == 0
    assert fill_rate(batch) == pytest.approx(sum(lengths) / batch.tokens.size)
    for index, member in enumerate(sequences):
        rows, columns = np.nonzero(batch.sequence_id == index)
        assert len(set(rows)) == 1 and (np.diff(columns) == 1).all()
        row, span = rows[0], slice(columns[0], columns[-1] + 1)
        np.testing.assert_array_equal(batch.tokens[row, span], member.tokens)
        np.testing.assert_array_equal(batch.loss_weight[row, span], member.weights)
        np.testing.assert_array_equal(batch.positions[row, span], np.arange(len(member)))
        np.testing.assert_array_equal(batch.subtree_end[row, span], columns[-1] + 1)
        np.testing.assert_array_equal(batch.predecessor[row, span][1:], columns[:-1])
    padding = batch.sequence_id == -1
    for field in (batch.tokens, batch.subtree_end, batch.loss_weight):
        assert not field[padding].any()


def test_visible_tokens_are_exactly_the_own_prefix():
    batch = pack_rows([sequence(3), sequence(4), sequence(2)], 8, num_rows=2)
    i, j = np.arange(8)[:, None], np.arange(8)[None]
    for ends, ids in zip(batch.subtree_end, batch.sequence_id, strict=True):
        visible = (j <= i) & (i < ends[None])
        own = (ids[None] == ids[:, None]) & (j <= i) & (ids[None] >= 0)
        np.testing.assert_array_equal(visible, own)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"sequence 1 has 9 tokens; a row holds 1 to 8"):
        pack_rows([sequence(3), sequence(9)], 8)
    with pytest.raises(ValueError, match=r"need 2 rows of 8; num_rows is 1"):
        pack_rows([sequence(5), sequence(5)], 8, num_rows=1)


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [
        ([1, 2], [0.0], "equally long"),
        ([], [], "not empty"),
        ([1, 2], [0.0, np.nan], "finite"),
        ([1, 2], [0.0, -1.0], "not negative"),
        ([1, 2], [1.0, 1.0], "nothing predicts the first token"),
    ],
)
def test_malformed_sequences_are_refused(tokens, weights, message):
    with pytest.raises(ValueError, match=message):
        Sequence(np.array(tokens, np.int32), np.array(weights, np.float32))


def test_a_multiplicity_is_a_weight():
    np.testing.assert_array_equal(sequence(3).scaled(2.5).weights, [0, 2.5, 2.5])
