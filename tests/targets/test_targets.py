"""Targets: pairs, choices and advantages equal plain-Python definitions, and count what they leave
out.
"""

import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_sets import as_lists, random_sets
from trie_oracle import Trie

from w2sjax import search, targets, trees
from w2sjax.targets import pairs as pairs_module
from w2sjax.targets import sft as sft_module

BATCH, ROLLOUTS, STEPS, MAX_PAIRS = 32, 6, 5, 4
GAP, PER_NODE = 0.3, 2


@functools.partial(jax.jit, static_argnames="pairing")
def make_pairs(keys, lengths, returns, mask, *, pairing):
    def one(keys, lengths, returns, mask):
        tree = trees.build_tree(keys, lengths, returns, max_nodes=31, mask=mask)
        values = search.backup_mean(tree)
        pairs = targets.branch_pairs(
            tree,
            values,
            max_pairs=MAX_PAIRS,
            min_value_gap=GAP,
            pairing=pairing,
            max_pairs_per_node=PER_NODE,
            max_extra_steps=1,
        )
        return values, pairs

    return jax.vmap(one)(keys, lengths, returns, mask)


def slow_pairs(trie, values, lengths, pairing):
    """(gap, rejected node, chosen node, trajectories, start, ends), best first, and counts."""
    below = over_cap = 0
    found = []
    worth = [
        trie.mean(next(v for v in trie.nodes if i in v.ending).ending)
        if any(i in v.ending for v in trie.nodes)
        else None
        for i in range(len(trie.returns))
    ]
    for node in trie.nodes:
        ranked = sorted(node.children.values(), key=lambda c: (-values[c.index], c.index))
        if len(ranked) < 2:
            continue
        if pairing == "best_vs_each":
            sides = [(ranked[0], other) for other in ranked[1:]]
        elif pairing == "best_vs_worst":
            sides = [(ranked[0], ranked[-1])]
        else:
            sides = list(itertools.pairwise(ranked))
        here = []
        for chosen, rejected in sides:
            gap = values[chosen.index] - values[rejected.index]
            if gap < np.float32(GAP) or gap <= 0:
                below += 1
                continue
            best = min(chosen.through, key=lambda i: (-worth[i], i))
            worst = min(rejected.through, key=lambda i: (worth[i], i))
            end = lengths[best]
            cut = min(lengths[worst], end + 1)
            here.append((-gap, rejected.index, chosen.index, best, worst, node.depth, end, cut))
        order = sorted(here, key=lambda p: (p[0], ranked_place(ranked, p[1])))
        over_cap += max(0, len(order) - PER_NODE)
        found += order[:PER_NODE]
    found.sort(key=lambda p: p[:2])
    return found[:MAX_PAIRS], below, over_cap, max(0, len(found) - MAX_PAIRS)


def ranked_place(ranked, index):
    return [c.index for c in ranked].index(index)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), pairing=st.sampled_from(targets.PAIRINGS))
def test_branch_pairs_equal_the_slow_ones(seed, pairing):
    sets = random_sets(seed, batch=BATCH, rollouts=ROLLOUTS, steps=STEPS, alphabet=4)
    values, pairs = jax.tree.map(np.asarray, make_pairs(*sets, pairing=pairing))
    keys, lengths, returns, mask = sets
    for b in range(BATCH):
        trie = Trie(as_lists(keys[b], lengths[b], mask[b]), returns[b])
        found, below, over_cap, over_max = slow_pairs(trie, values[b], lengths[b], pairing)
        p = jax.tree.map(lambda x, b=b: x[b], pairs)
        n = int(p.num_pairs)
        rows = np.stack(
            [
                p.rejected_node,
                p.chosen_node,
                p.chosen_trajectory,
                p.rejected_trajectory,
                p.start,
                p.chosen_end,
                p.rejected_end,
            ],
            axis=1,
        )
        assert rows[:n].tolist() == [list(map(int, f[1:])) for f in found]
        assert p.mask.tolist() == [i < n for i in range(MAX_PAIRS)]
        assert not rows[n:].any() and not p.value_gap[n:].any()
        counts = (p.num_below_gap, p.num_over_node_cap, p.num_over_max_pairs)
        assert tuple(map(int, counts)) == (below, over_cap, over_max)


def test_horizon_of_one_step():
    tree = jax.jit(trees.build_tree, static_argnames="max_nodes")(
        np.array([[1, 2, 3], [1, 4, 5]]), np.array([3, 3]), np.array([0.0, 1.0]), max_nodes=6
    )
    one_step = functools.partial(targets.branch_pairs, max_pairs=2, horizon=1)
    pairs = jax.jit(one_step)(tree, search.backup_mean(tree))
    assert (int(pairs.start[0]), int(pairs.chosen_end[0]), int(pairs.rejected_end[0])) == (1, 2, 2)
    with pytest.raises(ValueError, match="pairing: got 'all'"):
        targets.branch_pairs(tree, search.backup_mean(tree), max_pairs=2, pairing="all")


@functools.partial(jax.jit, static_argnames=("max_pairs", "use_success"))
def match(returns, lengths, key, success, mask, *, max_pairs, use_success):
    return targets.trajectory_pairs(
        returns,
        lengths,
        key,
        max_pairs=max_pairs,
        success=success if use_success else None,
        mask=mask,
    )


@pytest.mark.parametrize("use_success", [True, False])
def test_random_matching(use_success):
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(50):
        returns = (rng.integers(0, 4, 8) / 3).astype(np.float32)
        mask = rng.random(8) < 0.8
        lengths = rng.integers(1, 20, 8).astype(np.int32)
        success = returns == 1
        pairs = match(
            returns, lengths, jax.random.key(i), success, mask, max_pairs=8, use_success=use_success
        )
        pairs = jax.tree.map(np.asarray, pairs)
        good, bad = np.flatnonzero(success & mask), np.flatnonzero(~success & mask)
        n = int(pairs.num_pairs)
        chosen, rejected = pairs.chosen_trajectory[:n], pairs.rejected_trajectory[:n]
        assert (returns[chosen] > returns[rejected]).all()
        assert mask[chosen].all() and mask[rejected].all()
        assert (pairs.rejected_end[:n] <= lengths[chosen] + 5).all()
        if use_success:
            assert n == (max(len(good), len(bad)) if len(good) and len(bad) else 0)
            assert len(set(zip(chosen.tolist(), rejected.tolist(), strict=True))) == n
            wider = bad if len(bad) >= len(good) else good
            used = rejected if len(bad) >= len(good) else chosen
            assert n == 0 or sorted(used.tolist()) == wider.tolist()
        else:
            assert n + int(pairs.num_below_gap) == mask.sum() // 2
            both = [*chosen.tolist(), *rejected.tolist()]
            assert len(set(both)) == len(both)
        seen.add(tuple(chosen.tolist()))
    assert len(seen) > 20
    few = match(
        returns, lengths, jax.random.key(49), success, mask, max_pairs=1, use_success=use_success
    )
    assert int(few.num_pairs) + int(few.num_over_max_pairs) == n


def test_advantages_balance_and_weights():
    sets = random_sets(4, batch=BATCH, rollouts=ROLLOUTS, steps=STEPS, alphabet=3)

    @jax.jit
    @jax.vmap
    def run(keys, lengths, returns, mask):
        tree = trees.build_tree(keys, lengths, returns, max_nodes=31, mask=mask)
        values = search.backup_mean(tree)
        advantages = targets.edge_advantages(tree, values)
        keep = values > 0
        return (
            tree,
            values,
            advantages,
            targets.step_weights(tree, advantages, beta=0.1, max_weight=5.0, keep=keep),
        )

    tree, values, advantages, weights = jax.tree.map(np.asarray, run(*sets))
    for b in range(BATCH):
        stops, _ = trees.end_values(jax.tree.map(lambda x, b=b: x[b], tree))
        balance = np.zeros(31)
        child = tree.parent[b] >= 0
        np.add.at(balance, tree.parent[b][child], (advantages[b] * tree.data_count[b])[child])
        balance += tree.terminal_count[b] * (np.asarray(stops) - values[b])
        np.testing.assert_allclose(balance, 0, atol=1e-5)
        for r in range(ROLLOUTS):
            for t in range(STEPS):
                v = tree.trajectory_node[b, r, t + 1]
                wanted = 0.0
                if v >= 0 and values[b, v] > 0:
                    wanted = min(np.exp(advantages[b, v] / 0.1), 5.0)
                assert weights[b, r, t] == pytest.approx(wanted, rel=1e-5)


def test_best_trajectories():
    returns = jnp.array([0.5, 1.0, 1.0, 1.0, 0.0])
    lengths = jnp.array([1, 9, 4, 4, 2])
    best = functools.partial(targets.best_trajectories, returns, lengths)
    all_of_them = best(max_count=5)
    assert all_of_them.trajectory.tolist() == [2, 3, 1, 0, 4]
    few = best(max_count=2, min_return=0.5, mask=jnp.array([True, True, False, True, True]))
    assert few.trajectory.tolist() == [3, 1]
    assert (int(few.num_ineligible), int(few.num_left_out)) == (2, 1)
    none = best(max_count=7, mask=jnp.zeros(5, bool))
    assert not none.mask.any() and not none.trajectory.any()


@pytest.mark.parametrize("module", [pairs_module, sft_module])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
