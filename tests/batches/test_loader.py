"""Laws of the loaders: order by (seed, step) alone, each thing once an epoch, one shape."""

import collections

import numpy as np
import pytest

from w2sjax.batches import PairSequences, Sequence, preference_batches, sft_batches


def make_sequences(count, *, low=2, high=30, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length = int(rng.integers(low, high + 1))
        weights = np.ones(length, np.float32)
        weights[0] = 0
        result.append(Sequence(rng.integers(0, 99, length), weights))
    return result


def same(left, right):
    np.testing.assert_array_equal(left.ids, right.ids)
    for name in ("tokens", "positions", "subtree_end", "predecessor", "loss_weight", "sequence_id"):
        np.testing.assert_array_equal(getattr(left.batch, name), getattr(right.batch, name))
    assert left.extras.keys() == right.extras.keys()
    for name in left.extras:
        np.testing.assert_array_equal(left.extras[name], right.extras[name])


def test_a_batch_is_a_function_of_seed_and_step():
    sequences = make_sequences(40)
    loader = sft_batches(sequences, rows_per_batch=3, row_length=32, seed=7)
    in_order = [loader.batch(step) for step in range(30)]
    fresh = sft_batches(sequences, rows_per_batch=3, row_length=32, seed=7)
    for step in (29, 3, 17, 0):
        same(fresh.batch(step), in_order[step])
    other = sft_batches(sequences, rows_per_batch=3, row_length=32, seed=8)
    assert any(
        not np.array_equal(other.batch(step).batch.tokens, in_order[step].batch.tokens)
        for step in range(3)
    )


def test_every_sequence_comes_once_an_epoch_and_epochs_run_into_each_other():
    sequences = make_sequences(37)
    loader = sft_batches(sequences, rows_per_batch=4, row_length=32, seed=1)
    epochs = [loader.rows_in_epoch(epoch) for epoch in range(4)]
    assert any(sum(epochs[: count + 1]) % 4 for count in range(4))  # a batch spans two epochs
    rows = []
    for step in range(-(-sum(epochs) // 4)):
        loaded = loader.batch(step)
        assert loaded.batch.tokens.shape == (4, 32)
        for ids in loaded.batch.sequence_id:
            rows.append([int(loaded.ids[place]) for place in dict.fromkeys(ids[ids >= 0].tolist())])
    assert all(rows)  # no empty row
    start = 0
    for count in epochs:
        seen = collections.Counter(index for row in rows[start : start + count] for index in row)
        assert seen == dict.fromkeys(range(37), 1)
        start += count


def test_batches_hold_the_tokens_of_their_ids():
    sequences = make_sequences(20)
    loader = sft_batches(sequences, rows_per_batch=4, row_length=32, seed=1)
    loaded = loader.batch(2)
    for place, index in enumerate(loaded.ids):
        at = loaded.batch.sequence_id == place
        np.testing.assert_array_equal(loaded.batch.tokens[at], sequences[index].tokens)
        np.testing.assert_array_equal(loaded.batch.loss_weight[at], sequences[index].weights)


def test_a_small_data_set_fills_a_large_batch():
    loader = sft_batches(make_sequences(2), rows_per_batch=8, row_length=32, seed=0)
    loaded = loader.batch(0)
    assert (loaded.batch.sequence_id >= 0).any(axis=1).all()
    assert set(loaded.ids.tolist()) == {0, 1}


def test_fill_rate_counts_tokens():
    sequences = make_sequences(60)
    loader = sft_batches(sequences, rows_per_batch=4, row_length=64, seed=0)
    tokens = sum(len(sequence) for sequence in sequences)
    assert loader.fill_rate() == pytest.approx(tokens / (loader.rows_in_epoch(0) * 64))
    assert loader.fill_rate() > 0.9


def test_micro_batches_are_the_rows_of_the_one_batch():
    sequences = make_sequences(30)
    whole = sft_batches(sequences, rows_per_batch=4, row_length=32, seed=0).batch(1)
    parts = sft_batches(sequences, rows_per_batch=4, row_length=32, seed=0, micro_batches=2)
    tokens = parts.batch(1).batch.tokens
    assert tokens.shape == (2, 2, 32)
    np.testing.assert_array_equal(tokens.reshape(4, 32), whole.batch.tokens)


def make_pairs(count, seed=0):
    sides = make_sequences(2 * count, low=3, high=24, seed=seed)
    return [PairSequences(sides[2 * i], sides[2 * i + 1]) for i in range(count)]


def test_pairs_carry_ids_and_extras():
    pairs = make_pairs(11)
    extras = {"ref_chosen_logps": np.arange(11.0), "ref_rejected_logps": -np.arange(11.0)}
    loader = preference_batches(
        pairs, pairs_per_batch=4, row_length=32, seed=3, total_steps=11, extras=extras
    )
    seen = collections.Counter()
    for step in range(11):
        loaded = loader.batch(step)
        seen.update(loaded.ids.tolist())
        assert loaded.batch.tokens.shape == (loader.num_rows, 32)
        np.testing.assert_array_equal(loaded.extras["ref_chosen_logps"], loaded.ids)
        np.testing.assert_array_equal(loaded.extras["ref_rejected_logps"], -loaded.ids)
        for place, index in enumerate(loaded.ids):
            for identity, side in (
                (place, pairs[index].chosen),
                (4 + place, pairs[index].rejected),
            ):
                at = loaded.batch.sequence_id == identity
                np.testing.assert_array_equal(loaded.batch.tokens[at], side.tokens)
    assert seen == dict.fromkeys(range(11), 4)  # 44 pairs are 4 epochs
    same(
        loader.batch(5),
        preference_batches(
            pairs, pairs_per_batch=4, row_length=32, seed=3, total_steps=11, extras=extras
        ).batch(5),
    )


def test_the_row_count_is_the_smallest_for_the_schedule():
    pairs = make_pairs(20)
    loader = preference_batches(pairs, pairs_per_batch=4, row_length=32, seed=0, total_steps=10)
    used = [(loader.batch(step).batch.sequence_id >= 0).any(axis=1).sum() for step in range(10)]
    assert max(used) == loader.num_rows
    rounded = preference_batches(
        pairs, pairs_per_batch=4, row_length=32, seed=0, total_steps=10, rows_multiple=4
    )
    assert rounded.num_rows % 4 == 0 and 0 <= rounded.num_rows - loader.num_rows < 4
    with pytest.raises(IndexError, match="outside the schedule of 10 steps"):
        loader.batch(10)


def test_preference_micro_batches_hold_their_own_pairs():
    pairs = make_pairs(9)
    extras = {"ref_chosen_logps": np.arange(9.0)}
    options = {"pairs_per_batch": 4, "row_length": 32, "seed": 0, "total_steps": 3}
    whole = preference_batches(pairs, extras=extras, **options).batch(1)
    parts = preference_batches(pairs, extras=extras, micro_batches=2, **options).batch(1)
    np.testing.assert_array_equal(parts.ids, whole.ids)
    assert parts.extras["ref_chosen_logps"].shape == (2, 2)
    for part in range(2):
        for place in range(2):
            index = parts.ids[2 * part + place]
            at = parts.batch.sequence_id[part] == 2 + place
            np.testing.assert_array_equal(
                parts.batch.tokens[part][at], pairs[index].rejected.tokens
            )


def test_bad_data_is_named():
    good = make_sequences(3)
    mute = Sequence(np.array([1, 2]), np.zeros(2))
    with pytest.raises(ValueError, match="sequences is empty"):
        sft_batches([], rows_per_batch=1, row_length=8, seed=0)
    with pytest.raises(ValueError, match=r"sequences\[3\] has weight 0"):
        sft_batches([*good, mute], rows_per_batch=1, row_length=32, seed=0)
    with pytest.raises(ValueError, match=r"sequences\[0\] has \d+ tokens .* row of 2"):
        sft_batches(good, rows_per_batch=1, row_length=2, seed=0)
    with pytest.raises(ValueError, match="rows_per_batch = 3 does not divide"):
        sft_batches(good, rows_per_batch=3, row_length=32, seed=0, micro_batches=2)
    with pytest.raises(ValueError, match="rows_per_batch must be at least 1; got 0"):
        sft_batches(good, rows_per_batch=0, row_length=32, seed=0)
    with pytest.raises(ValueError, match=r"rejected sequences\[0\] has weight 0"):
        preference_batches(
            [PairSequences(good[0], mute)], pairs_per_batch=1, row_length=32, seed=0, total_steps=1
        )
    with pytest.raises(ValueError, match=r"extras\['x'\] must have one entry per pair, 2"):
        preference_batches(
            make_pairs(2),
            pairs_per_batch=1,
            row_length=32,
            seed=0,
            total_steps=1,
            extras={"x": np.zeros(3)},
        )
