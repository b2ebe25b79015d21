"""Laws of packing: a row is the trie of its sequences, and nothing is lost, doubled or too long."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2sjax.batches import (
    Part,
    Sequence,
    best_fit,
    fill_rate,
    find_prefixes,
    pack_rows,
    plan_rows,
    token_nodes,
)

LONGEST = 8


def learned(tokens):
    """All but the first token count."""
    return Sequence(np.asarray(tokens), np.arange(len(tokens)) > 0)


@st.composite
def forests(draw, most=12):
    """Sequences over few tokens: prefixes of each other, equal ones, several trees. The last token
    counts, and others do.
    """
    made = []
    for _ in range(draw(st.integers(1, most))):
        tokens = draw(st.lists(st.integers(0, 2), min_size=2, max_size=LONGEST))
        weights = [draw(st.sampled_from([0, 0.5, 1, 3])) for _ in tokens]
        weights[0], weights[-1] = 0, draw(st.sampled_from([0.25, 1]))
        made.append(Sequence(np.array(tokens), np.array(weights)))
    return made


def path_to(batch, row, token):
    """Row indices of a token and all before it on its path, by `predecessor`."""
    path = [token]
    while batch.positions[row, path[0]]:
        path.insert(0, int(batch.predecessor[row, path[0]]))
    return path


def trie(sequences):
    """The slow way: each prefix once → (sum of weights, how many learn it) of its last token."""
    found = {}
    for one in sequences:
        tokens = tuple(one.tokens.tolist())
        for end, weight in enumerate(one.weights.tolist(), start=1):
            total, count = found.get(tokens[:end], (0.0, 0))
            found[tokens[:end]] = total + weight, count + (weight > 0)
    return found


@settings(max_examples=60, deadline=None)
@given(forests(), st.integers(LONGEST, 40))
def test_a_row_is_the_trie_of_its_sequences(sequences, row_length):
    whole = [Part(place, 0, len(one)) for place, one in enumerate(sequences)]
    batch = pack_rows(sequences, row_length, parts=whole)
    num_rows = batch.tokens.shape[0]
    assert num_rows & (num_rows - 1) == 0
    if len(trie(sequences)) <= row_length:
        assert num_rows == 1
    index, seen = np.arange(row_length), []
    for row in range(num_rows):
        members = [q for q in range(len(sequences)) if (batch.path_id[row] == q).any()]
        seen += members
        wanted = trie(sequences[q] for q in members)
        used = len(wanted)
        paths = [path_to(batch, row, token) for token in range(used)]
        prefixes = [tuple(batch.tokens[row, path].tolist()) for path in paths]
        # Each prefix of a sequence is one token, and there are no others.
        assert len(set(prefixes)) == used and set(prefixes) == set(wanted)
        for token, prefix in enumerate(prefixes):
            assert batch.positions[row, token] == len(prefix) - 1
            weight, count = wanted[prefix]
            assert batch.loss_weight[row, token] == weight
            assert batch.loss_count[row, token] == count
        visible = (index <= index[:, None]) & (index[:, None] < batch.subtree_end[row])
        ancestors = np.zeros_like(visible)
        for token, path in enumerate(paths):
            ancestors[token, path] = True
        np.testing.assert_array_equal(visible, ancestors)
        for field in ("tokens", "subtree_end", "loss_weight", "loss_count", "predecessor"):
            assert not getattr(batch, field)[row, used:].any()
        for q in members:
            tokens = batch.path_token[row, batch.path_id[row] == q]
            path = path_to(batch, row, int(tokens[-1]))
            np.testing.assert_array_equal(batch.tokens[row, path], sequences[q].tokens)
            np.testing.assert_array_equal(tokens, np.array(path)[sequences[q].learned])
            weights = batch.path_weight[row, batch.path_id[row] == q]
            np.testing.assert_array_equal(weights, sequences[q].weights[sequences[q].learned])
    assert sorted(seen) == list(range(len(sequences)))  # each in one row alone
    assert batch.loss_weight.sum() == sum(one.weights.sum() for one in sequences)
    assert batch.loss_count.sum() == sum(len(one.learned) for one in sequences)


@settings(max_examples=30, deadline=None)
@given(forests(), st.integers(LONGEST, 24), st.booleans())
def test_a_plan_holds_every_sequence_once_and_no_row_overflows(sequences, row_length, share):
    prefixes = find_prefixes(sequences, share=share)
    rows = plan_rows(prefixes, row_length)
    assert sorted(place for row in rows for place in row) == list(range(len(sequences)))
    assert all(row == sorted(row) for row in rows)
    sizes = [
        [len(trie([sequences[prefixes.order[place]]])) for place in row]
        if not share
        else [len(trie(sequences[prefixes.order[place]] for place in row))]
        for row in rows
    ]
    assert all(0 < sum(size) <= row_length for size in sizes)
    if share:
        assert prefixes.num_tokens == len(trie(sequences))
    else:
        assert prefixes.num_tokens == sum(map(len, sequences))


def test_a_trunk_is_repeated_no_more_than_it_must():
    trunk = list(range(10))
    leaves = [learned([*trunk, 100 + leaf, *range(9)]) for leaf in range(6)]  # 10 + 6 · 10
    plan = functools.partial(plan_rows, find_prefixes(leaves))
    assert plan(70) == [list(range(6))]
    assert sorted(map(len, plan(40))) == [3, 3]  # 10 + 3 · 10 each
    assert sorted(map(len, plan(39))) == [2, 2, 2]
    # A subtree that fits stays whole: its own trunk is not repeated, whatever lies beside it.
    twigs = [learned([*trunk, 50, 51, 52, twig, 5]) for twig in range(3)]  # 3 + 3 · 2 below
    prefixes = find_prefixes([*leaves, *twigs])
    rows = plan_rows(prefixes, 40)
    together = [place for place, one in enumerate(prefixes.order) if one >= len(leaves)]
    assert len(rows) == 3 and sum(set(together) <= set(row) for row in rows) == 1


def test_without_sharing_sequences_lie_side_by_side():
    sequences = [learned([1, 2, 3]), learned([1, 2, 3, 4]), learned([1, 2])]
    batch = pack_rows(sequences, 9, share=False)
    assert batch.tokens.tolist() == [[1, 2, 3, 1, 2, 3, 4, 1, 2]]
    assert batch.subtree_end.tolist() == [[3] * 3 + [7] * 4 + [9] * 2]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert batch.predecessor.tolist() == [[0, 0, 1, 0, 3, 4, 5, 0, 7]]
    assert fill_rate(batch) == 1


def test_paths_are_the_learned_tokens_of_their_parts():
    one = Sequence(np.array([5, 6, 7, 8, 9]), np.array([0, 0, 2, 0, 1.0]))
    other = Sequence(np.array([5, 6, 7, 1]), np.array([0, 1, 1, 1.0]))
    parts = [Part(1, 0, 2), Part(0, 0, 3), Part(0, 3, 5), Part(1, 2, 4), Part(0, 0, 2)]
    batch = pack_rows([one, other], 8, parts=parts)
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 8, 9, 0, 0]]
    entries = [
        (int(i), int(t), float(w))
        for i, t, w in zip(batch.path_id[0], batch.path_token[0], batch.path_weight[0], strict=True)
    ]
    assert entries == [(0, 1, 1), (3, 2, 1), (3, 3, 1), (1, 2, 2), (2, 5, 1)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=40), st.booleans())
def test_best_fit_holds_everything_once_and_opens_a_bin_only_where_it_must(sizes, decreasing):
    sizes = sorted(sizes, reverse=True) if decreasing else sizes
    bins = best_fit(sizes, 32)
    assert sorted(index for one in bins for index in one) == list(range(len(sizes)))
    used = [sum(sizes[index] for index in one) for one in bins]
    assert all(0 < tokens <= 32 for tokens in used)
    assert all(
        used[earlier] + sizes[bins[later][0]] > 32
        for later in range(len(bins))
        for earlier in range(later)
    )


def test_nodes_are_runs_without_a_branching():
    sequences = [[7, 1, 2, 3], [7, 1, 2, 4], [7, 1], [7, 5], [8, 8, 8]]
    batch = pack_rows([learned(tokens) for tokens in sequences], 12)
    assert batch.tokens.tolist() == [[7, 1, 2, 3, 4, 5, 8, 8, 8, 0, 0, 0]]
    # [7, 1] ends inside of a run: nothing branches there.
    assert token_nodes(batch).tolist() == [[0, 1, 1, 2, 3, 4, 5, 5, 5, -1, -1, -1]]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"sequence 1 has 9 tokens; a row holds 1 to 8"):
        pack_rows([learned(range(3)), learned(range(9))], 8)
    with pytest.raises(ValueError, match=r"need 2 rows of 8; num_rows is 1"):
        pack_rows([learned(range(5)), learned(range(1, 6))], 8, num_rows=1)
    empty = pack_rows([], 8)
    assert all(not getattr(empty, f.name).any() for f in dataclasses.fields(empty))


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
    np.testing.assert_array_equal(learned(range(3)).scaled(2.5).weights, [0, 2.5, 2.5])
