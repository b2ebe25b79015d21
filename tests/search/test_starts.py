"""Where rollouts begin, and values where some began inside the tree, against plain Python."""

import doctest
import functools
import math

import jax
import numpy as np
import pytest
from random_sets import as_lists, random_sets
from trie_oracle import Trie

from w2sjax import search, trees
from w2sjax.search import starts as starts_module

BATCH, ROLLOUTS, STEPS, STARTS = 64, 6, 7, 5
WEIGHT = 0.37


def random_starts(keys, lengths, mask, seed):
    """int32 [B, R]: some rollouts began where they part from an earlier one, or before."""
    rng = np.random.default_rng(seed)
    start = np.zeros(lengths.shape, np.int32)
    for b, r in np.argwhere(mask):
        if not r or rng.random() < 0.4:
            continue
        shared = [
            int(np.cumprod(keys[b, r] == keys[b, q])[: min(lengths[b, r], lengths[b, q])].sum())
            for q in range(r)
            if mask[b, q]
        ]
        start[b, r] = rng.integers(max(shared, default=0) + 1)
    return start


@functools.partial(jax.jit, static_argnames=("max_depth",))
def everything(keys, lengths, returns, mask, start, max_depth):
    def one(keys, lengths, returns, mask, start):
        tree = trees.build_tree(keys, lengths, returns, max_nodes=1 + ROLLOUTS * STEPS, mask=mask)
        values = search.backup_mean(tree, start=start)
        nodes = search.choose_starts(
            tree, values, start, num_starts=STARTS, exploration_weight=WEIGHT, max_depth=max_depth
        )
        return {
            "tree": tree,
            "plain": search.backup_mean(tree),
            "all_from_root": search.backup_mean(tree, start=0 * start),
            "values": values,
            "nodes": nodes,
        }

    return jax.vmap(one)(keys, lengths, returns, mask, start)


class Places:
    """The rule of `choose_starts` over `trie_oracle.Node`s."""

    def __init__(self, trie, values, start, max_depth):
        self.trie, self.values, self.max_depth = trie, values, max_depth
        self.through = {v: len(v.through) for v in trie.nodes}
        self.began = dict.fromkeys(trie.nodes, 0)
        for v in trie.nodes:
            self.began[v] += sum(start[r] == v.depth for r in v.through)

    def may(self, node):
        return bool(node.children) and (self.max_depth is None or node.depth <= self.max_depth)

    def chain_from(self, node):
        chain = [node]
        while len(chain[-1].children) == 1:
            chain += chain[-1].children.values()
        return chain

    def choose(self):
        if not self.may(self.trie.root):
            return 0
        node = self.trie.root
        while True:
            chain = self.chain_from(node)
            places = [v for v in chain if self.may(v)]
            children = [c for c in chain[-1].children.values() if self.may(c)]
            here = sum(self.began[v] for v in chain)
            total = here + sum(self.through[c] for c in children)

            def score(value, n, total=total):
                return value + WEIGHT * math.sqrt(math.log(total) / n) if n else math.inf

            options = [(score(self.values[places[-1].index], here), None)]
            options += [(score(self.values[c.index], self.through[c]), c) for c in children]
            top = max(value for value, _ in options)
            node = next(place for value, place in options if value == top)
            if node is None:
                break
        middle = (places[0].depth + places[-1].depth) // 2
        chosen = min(places, key=lambda v: (self.began[v], abs(v.depth - middle), v.depth > middle))
        self.began[chosen] += 1
        above = chosen
        while above is not None:
            self.through[above] += 1
            above = above.parent
        return chosen.index


def mean(trie, node, start):
    """V(v): the children that rollouts took which came to v by themselves or began there."""
    if node is None:
        return 0.0
    own = [r for r in node.through if start[r] <= node.depth]
    total = sum(trie.mean(node.ending) for r in own if r in node.ending)
    for child in node.children.values():
        number = sum(r in child.through for r in own)
        total += number * mean(trie, child, start)
    return total / len(own)


@pytest.mark.parametrize("max_depth", [None, 2])
def test_equal_plain_python_on_random_trees(max_depth):
    chosen = []
    for seed, alphabet in ((0, 2), (1, 3), (2, 2), (3, 1)):
        keys, lengths, returns, mask = random_sets(
            seed, batch=BATCH, rollouts=ROLLOUTS, steps=STEPS, alphabet=alphabet, levels=4
        )
        start = random_starts(keys, lengths, mask, seed)
        with jax.enable_x64(True):
            out = everything(keys, lengths, returns.astype(float), mask, start, max_depth)
            out = jax.tree.map(np.asarray, out)
        np.testing.assert_allclose(out["all_from_root"], out["plain"], atol=1e-12)
        for b in range(BATCH):
            trie = Trie(as_lists(keys[b], lengths[b], mask[b]), returns[b].astype(float))
            if not trie.root.through:
                assert not out["nodes"][b].any() and not out["values"][b].any()
                continue
            wanted = [mean(trie, v, start[b]) for v in trie.nodes]
            np.testing.assert_allclose(out["values"][b][: len(wanted)], wanted, atol=1e-12)
            assert not out["values"][b][len(wanted) :].any()
            rule = Places(trie, wanted, start[b], max_depth)
            assert out["nodes"][b].tolist() == [rule.choose() for _ in range(STARTS)], (seed, b)
            chosen += [trie.nodes[v] for v in out["nodes"][b]]
    depths = {v.depth for v in chosen}
    assert depths == set(range(STEPS)) if max_depth is None else depths == {0, 1, 2}
    assert all(v.children or v.parent is None for v in chosen)


def tree_of(keys, returns):
    keys = np.asarray(keys)
    lengths = np.full(len(keys), keys.shape[1])
    return jax.jit(trees.build_tree, static_argnames="max_nodes")(
        keys, lengths, np.asarray(returns, float), max_nodes=1 + keys.size
    )


def test_rollouts_from_a_child_do_not_change_how_often_it_is_reached():
    """Two rollouts from the root, one of which was gone on from eight times and always failed."""
    keys = [[1, 9], [2, 9]] + [[1, i] for i in range(8)]
    start = np.array([0, 0] + [1] * 8)
    tree = tree_of(keys, [0, 1] + [0] * 8)
    assert float(search.backup_mean(tree)[0]) == pytest.approx(0.1)
    assert float(search.backup_mean(tree, start=start)[0]) == pytest.approx(0.5)
    # And where they sometimes succeed, all that is known of the child counts.
    values = search.backup_mean(tree_of(keys, [0, 0] + [1, 0] * 4), start=start)
    assert values[:3].tolist() == pytest.approx([2 / 9, 4 / 9, 0])


def test_a_chain_is_halved_and_halved_again():
    """One failure of eight steps; every rollout that goes on from it parts from it at once."""
    keys, depths = [list(range(8))], []
    for number in range(1, 4):
        tree = tree_of(keys, [0.0] * number)
        start = np.array([0, *depths])
        values = search.backup_mean(tree, start=start)
        node = search.choose_starts(tree, values, start, num_starts=1, exploration_weight=0.5)[0]
        depths.append(int(tree.depth[node]))
        text = keys[int(tree.representative[node])]
        keys.append([*text[: depths[-1]], *range(100 * number, 100 * number + 8 - depths[-1])])
    assert depths == [3, 5, 5]
    assert keys[2][:5] == [0, 1, 2, 3, 4] and keys[3][:5] == [0, 1, 2, 100, 101]


def test_example_in_the_docstring():
    assert doctest.testmod(starts_module).failed == 0
