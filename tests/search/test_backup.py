"""Backups, priors and paths equal their recursive definitions; laws that tie them together."""

import doctest
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_sets import as_lists, random_sets
from trie_oracle import Trie

from w2sjax import search, trees
from w2sjax.search import backup as backup_module

BATCH, ROLLOUTS, STEPS = 64, 6, 5
DISCOUNT, TEMPERATURE = 0.9, 0.3


@jax.jit
@jax.vmap
def everything(keys, lengths, returns, mask, logps):
    tree = trees.build_tree(keys, lengths, returns, max_nodes=1 + ROLLOUTS * STEPS, mask=mask)
    best = search.backup_max(tree, discount=DISCOUNT)
    soft = functools.partial(search.backup_soft, tree)
    return {
        "tree": tree,
        "mean": search.backup_mean(tree),
        "max": best,
        "soft": soft(temperature=TEMPERATURE, discount=DISCOUNT),
        "soft_cold": soft(temperature=1e-3, discount=DISCOUNT),
        "soft_hot": soft(temperature=1e3),
        "priors": search.step_priors(tree, logps),
        "path": search.best_path(tree, best, discount=DISCOUNT),
        "path_to_leaf": search.best_path(tree, best, allow_stop=False),
    }


def run(seed, alphabet):
    sets = random_sets(seed, batch=BATCH, rollouts=ROLLOUTS, steps=STEPS, alphabet=alphabet)
    logps = np.random.default_rng(seed).normal(-2, 1, sets[0].shape).astype(np.float32)
    out = jax.tree.map(np.asarray, everything(*sets, logps))
    keys, lengths, returns, mask = sets
    for b in range(BATCH):
        trie = Trie(as_lists(keys[b], lengths[b], mask[b]), returns[b])
        yield trie, jax.tree.map(lambda x, b=b: x[b], out), logps[b]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), alphabet=st.sampled_from([1, 2, 3]))
def test_equal_the_recursive_definitions(seed, alphabet):
    for trie, out, logps in run(seed, alphabet):
        n = len(trie.nodes)
        for name in ("mean", "max", "soft", "priors"):
            assert not out[name][n:].any()
        if not trie.root.through:
            continue
        wanted = {
            "mean": [trie.backup_mean(v) for v in trie.nodes],
            "max": [trie.backup_max(v, DISCOUNT) for v in trie.nodes],
            "soft": [trie.backup_soft(v, TEMPERATURE, DISCOUNT) for v in trie.nodes],
        }
        trie.set_priors(logps)
        wanted["priors"] = [v.prior for v in trie.nodes]
        for name, values in wanted.items():
            np.testing.assert_allclose(out[name][:n], values, rtol=2e-5, atol=2e-6, err_msg=name)
        # Soft lies between mean and maximum, and reaches both.
        np.testing.assert_allclose(out["soft_cold"], out["max"], atol=4e-3)
        np.testing.assert_allclose(out["soft_hot"], out["mean"], atol=1e-3)
        values = out["max"]
        for name, options in (
            ("path", {"discount": DISCOUNT}),
            ("path_to_leaf", {"allow_stop": False}),
        ):
            path = out[name]
            wanted_path = trie.best_path(values, **options)
            assert path.nodes[: path.length + 1].tolist() == wanted_path
            assert (path.nodes[path.length + 1 :] == -1).all()


def test_a_success_is_not_walked_past_into_a_failure():
    """The reference code's mistake: a trajectory that is a prefix of another pays nothing."""
    tree = jax.jit(trees.build_tree, static_argnames="max_nodes")(
        np.array([[1, 2], [1, 2]]), np.array([1, 2]), np.array([1.0, 0.0]), max_nodes=3
    )
    result = jax.jit(functools.partial(search.run_mcts, num_simulations=100))(tree)
    assert int(result.stop_visits[1]) > 80
    path = search.best_path(tree, result.node_values)
    assert path.nodes.tolist() == [0, 1, -1] and int(path.length) == 1
    by_visits = search.best_path(tree, result.node_visits, stop_values=result.stop_visits)
    assert int(by_visits.length) == 1
    assert int(search.best_path(tree, result.node_values, allow_stop=False).length) == 2


def test_candidates_close_paths():
    tree = jax.jit(trees.build_tree, static_argnames="max_nodes")(
        np.array([[1, 2], [3, 4]]), np.array([2, 2]), np.array([1.0, 0.0]), max_nodes=5
    )
    values = search.backup_mean(tree)
    assert search.best_path(tree, values).nodes.tolist() == [0, 1, 3]
    closed = np.array([True, False, True, True, True])
    assert search.best_path(tree, values, candidates=closed).nodes.tolist() == [0, 2, 4]
    closed[4] = False
    assert search.best_path(tree, values, candidates=closed).nodes.tolist() == [0, 2, -1]


@pytest.mark.parametrize("module", [backup_module])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
