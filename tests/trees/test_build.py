"""Trees equal the plain-Python trie, whatever the trajectories; and the laws of the arrays hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_sets import as_lists, random_sets
from trie_oracle import Trie

from w2sjax import trees
from w2sjax.trees import build as build_module

BATCH, ROLLOUTS, STEPS = 64, 6, 5


@functools.partial(jax.jit, static_argnames="max_nodes")
def build_many(keys, lengths, returns, mask, *, max_nodes):
    build = functools.partial(trees.build_tree, max_nodes=max_nodes)
    return jax.vmap(lambda k, n, r, m: build(k, n, r, mask=m))(keys, lengths, returns, mask)


build_one = jax.jit(trees.build_tree, static_argnames="max_nodes")  # eager, each small op compiles


def one(tree, b):
    return jax.tree.map(lambda x: np.asarray(x)[b], tree)


def check_against_oracle(tree, trie, max_nodes):
    """All fields of one tree, whether everything fitted or not."""
    nodes = trie.nodes[:max_nodes]
    n = len(nodes)
    assert int(tree.num_nodes) == n
    assert int(tree.overflow) == len(trie.nodes) - n
    index = {id(node): i for i, node in enumerate(nodes)}
    kept = [[c for c in node.children.values() if id(c) in index] for node in nodes]
    expected = {
        "parent": [index[id(v.parent)] if v.parent else -1 for v in nodes],
        "depth": [v.depth for v in nodes],
        "step_key": [v.key for v in nodes],
        "data_count": [len(v.through) for v in nodes],
        "return_sum": [sum(trie.returns[i] for i in v.through) for v in nodes],
        "terminal_count": [len(v.ending) for v in nodes],
        "terminal_return_sum": [sum(trie.returns[i] for i in v.ending) for v in nodes],
        "first_child": [index[id(c[0])] if c else -1 for c in kept],
        "num_children": [len(c) for c in kept],
        "representative": [v.through[0] if v.through else -1 for v in nodes],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(tree, name)[:n], values, err_msg=name)
    walks = np.full(tree.trajectory_node.shape, -1)
    for v in nodes:
        for i in v.through:
            walks[i, v.depth] = index[id(v)]
    np.testing.assert_array_equal(tree.trajectory_node, walks)
    trees.check_invariants(tree)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    alphabet=st.sampled_from([1, 2, 3, 9]),
    max_nodes=st.sampled_from([1 + ROLLOUTS * STEPS, 12]),
)
def test_equals_the_python_trie(seed, alphabet, max_nodes):
    sets = random_sets(seed, batch=BATCH, rollouts=ROLLOUTS, steps=STEPS, alphabet=alphabet)
    tree = build_many(*sets, max_nodes=max_nodes)
    keys, lengths, returns, mask = sets
    for b in range(BATCH):
        trie = Trie(as_lists(keys[b], lengths[b], mask[b]), returns[b])
        check_against_oracle(one(tree, b), trie, max_nodes)


@pytest.mark.parametrize("rollouts, steps", [(1, 3), (3, 0)])
def test_small_shapes(rollouts, steps):
    sets = random_sets(3, batch=8, rollouts=rollouts, steps=steps, alphabet=2)
    tree = build_many(*sets, max_nodes=1 + rollouts * steps)
    for b in range(8):
        trie = Trie(as_lists(sets[0][b], sets[1][b], sets[3][b]), sets[2][b])
        check_against_oracle(one(tree, b), trie, 1 + rollouts * steps)


def test_capacity_exactly_met_and_missed_by_one():
    keys = jnp.array([[0, 1], [0, 2]])
    arguments = (keys, jnp.array([2, 2]), jnp.ones(2))
    exact = build_one(*arguments, max_nodes=4)
    assert (int(exact.num_nodes), int(exact.overflow)) == (4, 0)
    missed = build_one(*arguments, max_nodes=3)
    assert (int(missed.num_nodes), int(missed.overflow)) == (3, 1)
    assert missed.trajectory_node.tolist() == [[0, 1, 2], [0, 1, -1]]
    assert missed.num_children.tolist() == [1, 1, 0]


def test_grouping_by_sorting_equals_pairwise():
    rng = np.random.default_rng(0)
    pairwise, sorting = (
        jax.jit(build_module._group_pairwise),
        jax.jit(build_module._group_by_sorting),
    )
    for _ in range(200):
        alive = rng.random(40) < 0.8
        node = np.where(alive, rng.integers(0, 6, 40), -1).astype(np.int32)
        key = rng.integers(-3, 3, 40).astype(np.int32)
        a, b = pairwise(node, key, alive), sorting(node, key, alive)
        np.testing.assert_array_equal(a[0][alive], b[0][alive])
        np.testing.assert_array_equal(a[1], b[1])
        assert int(a[2]) == int(b[2])


@pytest.mark.parametrize("num", [1000, 70_000])
def test_grouping_many_equals_sorting_in_numpy(num):
    """Few keys and many, far from and near to each other; above 2**16 ranks need two words."""
    rng = np.random.default_rng(num)
    group = jax.jit(build_module._group_by_sorting)
    for high in (3, 50, 2**31):
        alive = rng.random(num) < 0.9
        node = np.where(alive, 5 + rng.integers(0, num, num), -1).astype(np.int32)
        key = rng.integers(-high, high, num).astype(np.int32)
        rank, leader, count = group(node, key, alive)
        pairs = np.stack([node, key], axis=1)[alive]
        _, first, which = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        order = np.lexsort((first, pairs[first, 0]))  # groups by (node, first trajectory)
        wanted = np.argsort(order)[which.reshape(-1)]
        np.testing.assert_array_equal(np.asarray(rank)[alive], wanted)
        np.testing.assert_array_equal(np.flatnonzero(leader), np.flatnonzero(alive)[np.sort(first)])
        assert int(count) == len(first)


def test_a_thousand_rollouts_of_256_steps():
    sets = random_sets(1, batch=1, rollouts=1024, steps=256, alphabet=3)
    keys, lengths, returns, mask = sets
    max_nodes = 1 + int(lengths.sum())
    tree = one(build_many(*sets, max_nodes=max_nodes), 0)
    check_against_oracle(tree, Trie(as_lists(keys[0], lengths[0], mask[0]), returns[0]), max_nodes)


def test_permuting_rollouts_changes_no_value():
    keys, lengths, returns, mask = random_sets(7, batch=32, rollouts=6, steps=5, alphabet=2)
    order = np.random.default_rng(1).permutation(6)
    before = build_many(keys, lengths, returns, mask, max_nodes=31)
    after = build_many(
        keys[:, order], lengths[:, order], returns[:, order], mask[:, order], max_nodes=31
    )
    walks = np.asarray(before.trajectory_node)[:, order]
    np.testing.assert_array_equal(walks >= 0, np.asarray(after.trajectory_node) >= 0)
    for name in (
        "data_count",
        "return_sum",
        "terminal_count",
        "terminal_return_sum",
        "num_children",
    ):
        old, new = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        for b in range(32):
            real = walks[b] >= 0
            np.testing.assert_array_equal(
                old[b][walks[b][real]], new[b][np.asarray(after.trajectory_node)[b][real]]
            )


def test_padding_and_masked_rows_are_inert():
    keys, lengths, returns, _ = random_sets(5, batch=16, rollouts=6, steps=5, alphabet=2)
    mask = np.ones_like(lengths, bool)
    plain = build_many(keys, lengths, returns, mask, max_nodes=31)
    rng = np.random.default_rng(0)
    past = np.arange(5) >= lengths[..., None]
    noisy = np.where(past, rng.integers(-9, 9, keys.shape), keys).astype(np.int32)
    for a, b in zip(
        jax.tree.leaves(plain),
        jax.tree.leaves(build_many(noisy, lengths, returns, mask, max_nodes=31)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    mask[:, 4:] = False
    masked = build_many(keys, lengths, returns, mask, max_nodes=31)
    deleted = build_many(keys[:, :4], lengths[:, :4], returns[:, :4], mask[:, :4], max_nodes=31)
    for name in deleted.__dataclass_fields__:
        wanted = np.asarray(getattr(deleted, name))
        got = np.asarray(getattr(masked, name))
        if name == "trajectory_node":
            assert (got[:, 4:] == -1).all()
            got = got[:, :4]
        np.testing.assert_array_equal(got, wanted, err_msg=name)


def test_batch_row_equals_single_and_shapes_compile_once():
    sets = random_sets(9, batch=4, rollouts=6, steps=5, alphabet=2)
    build = jax.jit(lambda k, n, r: trees.build_tree(k, n, r, max_nodes=31))
    many = jax.vmap(build)(*sets[:3])
    for b in range(4):
        single = build(*(x[b] for x in sets[:3]))
        for x, y in zip(jax.tree.leaves(single), jax.tree.leaves(one(many, b)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert build._cache_size() == 1


def test_wrong_arguments_are_named():
    with pytest.raises(AssertionError):
        trees.build_tree(jnp.zeros((2, 3), int), jnp.zeros(3, int), jnp.zeros(2), max_nodes=4)
    with pytest.raises(ValueError, match="max_nodes: got 0"):
        trees.build_tree(jnp.zeros((2, 3), int), jnp.zeros(2, int), jnp.zeros(2), max_nodes=0)


@pytest.mark.parametrize("field, value", [("parent", 3), ("data_count", 9), ("first_child", 0)])
def test_broken_trees_are_found(field, value):
    tree = build_one(jnp.array([[0, 1], [0, 2]]), jnp.array([2, 2]), jnp.ones(2), max_nodes=4)
    changed = np.array(getattr(tree, field))
    changed[1] = value
    broken = tree.replace(**{field: changed})
    with pytest.raises(ValueError, match="not true at node"):
        trees.check_invariants(broken)
