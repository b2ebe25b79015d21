"""Laws of the loaders: order by (seed, step) alone, each thing once an epoch, few shapes."""

import collections
import dataclasses
import doctest
import functools
import itertools

import numpy as np
import pytest

from w2sjax.batches import (
    PairSequences,
    Sequence,
    choose_lengths,
    find_prefixes,
    loader,
    packing,
    pair_parts,
    plan_rows,
    preference_batches,
    round_length,
    sft_batches,
    shortest_rows,
)


def make_sequences(count, *, low=2, high=30, seed=0, context=()):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length = int(rng.integers(low, high + 1))
        weights = np.ones(len(context) + length, np.float32)
        weights[: len(context) + 1] = 0
        result.append(Sequence(np.r_[context, rng.integers(0, 99, length)], weights))
    return result


def make_groups(count, size, **options):
    """(sequences, groups): those of a group have 20 tokens in common."""
    found = [
        make_sequences(size, seed=group, context=[group] * 20, **options) for group in range(count)
    ]
    return list(itertools.chain(*found)), np.repeat(np.arange(count), size)


def same(left, right):
    np.testing.assert_array_equal(left.ids, right.ids)
    for field in dataclasses.fields(left.batch):
        np.testing.assert_array_equal(
            getattr(left.batch, field.name), getattr(right.batch, field.name)
        )
    assert left.extras.keys() == right.extras.keys()
    for name in left.extras:
        np.testing.assert_array_equal(left.extras[name], right.extras[name])


def read_back(batch):
    """Leaves of all rows' tries, as tuples of tokens."""
    found = []
    for row, ends in enumerate(batch.subtree_end):
        used = np.count_nonzero(ends)
        inner = {
            int(batch.predecessor[row, token])
            for token in range(used)
            if batch.positions[row, token]
        }
        for token in sorted(set(range(used)) - inner):
            path = [token]
            while batch.positions[row, path[0]]:
                path.insert(0, batch.predecessor[row, path[0]])
            found.append(tuple(batch.tokens[row, path].tolist()))
    return found


def ids_of(loader):
    return np.concatenate([loader.batch(step).ids for step in range(loader.total_steps)])


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_a_batch_is_a_function_of_seed_and_step(packing):
    sequences, groups = make_groups(10, 4)
    make = functools.partial(
        sft_batches,
        sequences,
        sequences_per_batch=6,
        total_steps=20,
        groups=groups,
        packing=packing,
    )
    one = make(seed=7)
    in_order = [one.batch(step) for step in range(20)]
    fresh = make(seed=7)
    for step in (19, 3, 17, 0):
        same(fresh.batch(step), in_order[step])
    assert not np.array_equal(make(seed=8).batch(0).ids, in_order[0].ids)
    # The order does not know how long the schedule is.
    short = sft_batches(sequences, sequences_per_batch=6, total_steps=3, seed=7, groups=groups)
    assert [short.batch(step).ids.tolist() for step in range(3)] == [
        loaded.ids.tolist() for loaded in in_order[:3]
    ]
    with pytest.raises(IndexError, match="outside the schedule of 20 steps"):
        one.batch(20)


def test_every_item_comes_once_an_epoch_and_groups_stay_together():
    sequences, groups = make_groups(9, 4)
    sequences, groups = sequences[:-1], groups[:-1]  # 35
    loader = sft_batches(sequences, sequences_per_batch=8, total_steps=30, seed=1, groups=groups)
    stream = ids_of(loader)
    assert loader.steps_per_epoch() == 35 / 8  # a batch spans two epochs
    orders = set()
    for start in range(0, len(stream) - 35, 35):
        epoch = stream[start : start + 35]
        assert sorted(epoch) == list(range(35))
        assert len(list(itertools.groupby(groups[epoch]))) == 9
        orders.add(tuple(epoch))
    assert len(orders) == 6
    alone = sft_batches(sequences, sequences_per_batch=8, total_steps=30, seed=1)
    assert len(list(itertools.groupby(groups[ids_of(alone)[:35]]))) > 20


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_batches_hold_the_sequences_of_their_ids(packing):
    sequences, groups = make_groups(5, 4, low=5)
    loader = sft_batches(
        sequences,
        sequences_per_batch=6,
        total_steps=4,
        seed=1,
        groups=groups,
        packing=packing,
        num_rows=4,
    )
    for step in range(4):
        loaded = loader.batch(step)
        wanted = sorted(tuple(sequences[index].tokens.tolist()) for index in loaded.ids)
        assert sorted(read_back(loaded.batch)) == wanted
        assert loaded.batch.loss_weight.sum() == sum(
            sequences[index].weights.sum() for index in loaded.ids
        )
        rows = 4 if packing == "tree" else 8  # 6, rounded up to what the mesh splits
        assert loaded.batch.tokens.shape[0] == rows
        if packing == "none":
            assert ((loaded.batch.positions == 0) & (loaded.batch.subtree_end > 0)).sum() == 6


def test_packing_changes_no_order_and_saves_what_is_shared():
    sequences, groups = make_groups(10, 8)
    make = functools.partial(
        sft_batches, sequences, sequences_per_batch=16, total_steps=10, seed=3, groups=groups
    )
    tree, plain = make(packing="tree"), make(packing="none")
    np.testing.assert_array_equal(ids_of(tree), ids_of(plain))
    stream = ids_of(tree).reshape(10, 16)
    tokens = sum(len(sequences[index]) for index in stream.ravel())
    laid_out = sum(find_prefixes([sequences[index] for index in ids]).num_tokens for ids in stream)
    assert tree.sharing() == pytest.approx(tokens / laid_out) and tree.sharing() > 1.3
    assert plain.sharing() == 1
    for one, count in ((tree, laid_out), (plain, tokens)):
        room = sum(one.batch(step).batch.tokens.size for step in range(10))
        assert one.fill_rate() == pytest.approx(count / room)


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_a_schedule_has_few_shapes_and_no_longer_rows_than_it_needs(packing):
    pairs = make_pairs(40, low=3, high=150)
    for num_shapes in (1, 2, 3):
        loader = preference_batches(
            pairs,
            pairs_per_batch=4,
            total_steps=25,
            seed=0,
            packing=packing,
            num_shapes=num_shapes,
            num_rows=2,
        )
        shapes = collections.Counter(
            (batch.tokens.shape, batch.path_id.shape)
            for batch in (loader.batch(step).batch for step in range(25))
        )
        assert len(shapes) == len(loader.shapes) <= num_shapes
        assert num_shapes == 1 or len(shapes) > 1
        for (rows, entries), _ in shapes.items():
            assert loader.shapes[rows[1]] == entries[1]
        used = [(loader.batch(step).batch.subtree_end > 0).any(axis=0).sum() for step in range(25)]
        assert max(loader.shapes) == round_length(max(used))


@pytest.mark.parametrize("num_shapes", [1, 2, 3, 7])
def test_chosen_lengths_pad_least(num_shapes):
    needed = np.random.default_rng(num_shapes).choice([64, 128, 192, 320, 512], 30)
    needed[0] = 512

    def padded(lengths):
        return sum(min(length for length in lengths if length >= one) for one in needed)

    chosen = choose_lengths(needed, num_shapes)
    others = set(needed.tolist()) - {512}
    best = min(
        padded([*some, 512])
        for size in range(min(num_shapes, len(others) + 1))
        for some in itertools.combinations(others, size)
    )
    assert chosen == sorted(chosen) and len(chosen) <= num_shapes and padded(chosen) == best


def test_shortest_rows_are_no_longer_than_they_must_be():
    sequences, _ = make_groups(6, 5, low=10, high=60)
    prefixes = find_prefixes(sequences)
    for num_rows in (1, 2, 5, 40):
        rows, length = shortest_rows(prefixes, num_rows)
        assert len(rows) <= num_rows and length == round_length(length)
        shorter = length - (64 if length <= 512 else 128)
        if shorter >= max(map(len, sequences)):
            assert len(plan_rows(prefixes, shorter)) > num_rows


def test_micro_batches_are_the_items_of_the_one_batch():
    sequences = make_sequences(30)
    options = dict(sequences_per_batch=4, total_steps=3, seed=0)
    whole = sft_batches(sequences, **options).batch(1)
    parts = sft_batches(sequences, micro_batches=2, **options).batch(1)
    assert parts.batch.tokens.shape[:2] == (2, 1)
    np.testing.assert_array_equal(parts.ids, whole.ids)
    for part in range(2):
        fields = {
            field.name: getattr(parts.batch, field.name)[part]
            for field in dataclasses.fields(parts.batch)
        }
        wanted = [sequences[i].tokens.tolist() for i in whole.ids[2 * part : 2 * part + 2]]
        assert sorted(read_back(type(parts.batch)(**fields))) == sorted(map(tuple, wanted))


# ---------------------------------------------------------------------------------------- pairs


def make_pairs(count, seed=0, *, low=3, high=24):
    """Two sequences each, the second half of them with a common start of weights 0 and 1."""
    sides = make_sequences(2 * count, low=low, high=high, seed=seed)
    pairs = [PairSequences(*sides[2 * i : 2 * i + 2]) for i in range(count)]
    for i in range(count // 2, count):
        start = np.r_[[i] * 5], np.r_[0, 0, 1, 0, 1.0]
        pairs[i] = PairSequences(
            *(Sequence(np.r_[start[0], side.tokens + 200], np.r_[start[1], side.weights])
              for side in (pairs[i].chosen, pairs[i].rejected))
        )  # fmt: skip
    return pairs


def test_sides_part_where_tokens_or_weights_do():
    one = Sequence(np.array([1, 2, 3, 4]), np.array([0, 1, 1, 1.0]))
    other = Sequence(np.array([1, 2, 3, 5]), np.array([0, 1, 0, 1.0]))
    assert PairSequences(one, other).parting == 2
    assert PairSequences(one, Sequence(one.tokens[:3], one.weights[:3])).parting == 3
    assert PairSequences(one, one).parting == 4
    sequences, parts = pair_parts([PairSequences(one, other), PairSequences(other, one)])
    assert sequences == [one, other, other, one]
    assert parts == [(0, 2, 4), (1, 2, 4), (2, 2, 4), (3, 2, 4), (0, 0, 2), (1, 0, 2)]


@pytest.mark.parametrize("packing", ["tree", "none"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_pairs_carry_ids_extras_and_the_paths_of_their_parts(packing, micro_batches):
    pairs = make_pairs(11)
    options = dict(
        pairs_per_batch=4,
        seed=3,
        total_steps=11,
        extras={"ref_logps": np.arange(33.0).reshape(11, 3)},
        micro_batches=micro_batches,
        packing=packing,
    )
    loader = preference_batches(pairs, **options)
    seen = collections.Counter()
    for step in range(11):
        loaded = loader.batch(step)
        seen.update(loaded.ids.tolist())
        batch, count = loaded.batch, 4 // micro_batches
        lead = () if micro_batches == 1 else (micro_batches,)
        assert batch.tokens.ndim == 2 + len(lead)
        assert {name: values.shape for name, values in loaded.extras.items()} == {
            "ref_logps": (*lead, count, 3),
            "path_tokens": (*lead, count, 3),
        }
        np.testing.assert_array_equal(
            loaded.extras["ref_logps"].reshape(4, 3)[:, 0], 3 * loaded.ids
        )
        for place, index in enumerate(loaded.ids):
            part, place = (place // count,) if lead else (), place % count
            _, parts = pair_parts([pairs[index]])
            sides = pairs[index].chosen, pairs[index].rejected
            for kind, (side, start, stop) in enumerate(parts):
                here = np.zeros(len(sides[side]), bool)
                here[start:stop] = sides[side].weights[start:stop] > 0
                row, entry = np.nonzero(batch.path_id[part] == kind * count + place)
                tokens = batch.tokens[part][row, batch.path_token[part][row, entry]]
                np.testing.assert_array_equal(tokens, sides[side].tokens[here])
                weights = batch.path_weight[part][row, entry]
                np.testing.assert_array_equal(weights, sides[side].weights[here])
                assert loaded.extras["path_tokens"][part][place, kind] == here.sum()
    assert seen == dict.fromkeys(range(11), 4)  # 44 pairs are 4 epochs
    same(loader.batch(5), preference_batches(pairs, **options).batch(5))


def test_bad_data_is_named():
    good = make_sequences(3)
    mute = Sequence(np.array([1, 2]), np.zeros(2))
    sft = functools.partial(sft_batches, sequences_per_batch=1, total_steps=1, seed=0)
    preference = functools.partial(preference_batches, pairs_per_batch=1, total_steps=1, seed=0)
    with pytest.raises(ValueError, match="sequences is empty"):
        sft([])
    with pytest.raises(ValueError, match=r"sequences\[3\] has weight 0"):
        sft([*good, mute])
    with pytest.raises(
        ValueError, match=r"sequences\[0\] has \d+ tokens, more than max_length = 2"
    ):
        sft(good, max_length=2)
    with pytest.raises(ValueError, match="sequences_per_batch = 3 does not divide"):
        sft(good, sequences_per_batch=3, micro_batches=2)
    for name in ("sequences_per_batch", "total_steps", "num_rows", "num_shapes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            sft(good, **{name: 0})
    with pytest.raises(ValueError, match="packing must be one of tree, none; got 'dense'"):
        sft(good, packing="dense")
    with pytest.raises(ValueError, match="groups must have one entry per item, 3"):
        sft(good, groups=[1, 2])
    with pytest.raises(ValueError, match=r"rejected sequences\[0\] has weight 0"):
        preference([PairSequences(good[0], mute)])
    with pytest.raises(ValueError, match=r"extras\['x'\] must have one entry per pair, 2"):
        preference(make_pairs(2), extras={"x": np.zeros(3)})


@pytest.mark.parametrize("module", [loader, packing], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.attempted and not result.failed
