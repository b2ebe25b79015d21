"""Search does exactly what the plain rules say, in both of its forms, and mctx agrees."""

import functools

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from random_sets import as_lists, random_sets
from trie_oracle import Trie

from w2sjax import search, trees
from w2sjax.search import mcts as mcts_module
from w2sjax.search import parallel

ROLLOUTS, STEPS, NODES = 7, 6, 43


def many_trees(batch, dtype, seeds=(0, 1, 2, 3)):
    """Trees of random sets, thin and bushy, with their tries and the log-probabilities of steps."""
    parts = [
        random_sets(
            s, batch=batch, rollouts=ROLLOUTS, steps=STEPS, alphabet=2 + s, levels=3 + 4 * s
        )
        for s in seeds
    ]
    keys, lengths, returns, mask = (np.concatenate(x) for x in zip(*parts, strict=True))
    returns = returns.astype(dtype)
    build = functools.partial(trees.build_tree, max_nodes=NODES)
    tree = jax.jit(jax.vmap(lambda k, n, r, m: build(k, n, r, mask=m)))(
        keys, lengths, returns, mask
    )
    tries = [
        Trie(as_lists(k, n, m), r) for k, n, m, r in zip(keys, lengths, mask, returns, strict=True)
    ]
    logps = np.random.default_rng(0).normal(-1, 1, keys.shape).astype(dtype)
    return tree, tries, logps


def assert_equal_search(result, tries, rtol):
    for b, trie in enumerate(tries):
        if not trie.root.through:
            assert not np.asarray(result.node_visits[b]).any()
            continue
        n = len(trie.nodes)
        visits = np.asarray(result.node_visits[b])
        assert visits[:n].tolist() == [v.visits for v in trie.nodes]
        assert not visits[n:].any()
        assert np.asarray(result.stop_visits[b])[:n].tolist() == [v.stop_visits for v in trie.nodes]
        sums = [v.value_sum for v in trie.nodes]
        np.testing.assert_allclose(np.asarray(result.value_sum[b])[:n], sums, rtol=rtol)


@pytest.mark.parametrize(
    "form, options",
    [
        ("parallel", {}),
        ("parallel", {"stop_as_child": False}),
        ("sequential", {"stop_as_child": False}),
        ("parallel", {"puct": True, "discount": 0.9}),
    ],
)
def test_visits_equal_the_plain_rules_in_float64(form, options):
    """Ties included: returns come from few levels, so that equal values are common."""
    options = dict(options)
    puct = options.pop("puct", False)
    with jax.enable_x64(True):
        tree, tries, logps = many_trees(50, np.float64)

        @jax.jit
        @jax.vmap
        def run(tree, logps):
            priors = search.step_priors(tree, logps) if puct else None
            return search.run_mcts(tree, num_simulations=70, priors=priors, form=form, **options)

        result = jax.tree.map(np.asarray, run(tree, logps))
    for b, trie in enumerate(tries):
        if trie.root.through:
            trie.set_priors(logps[b])
            trie.search(70, puct=puct, **options)
    assert_equal_search(result, tries, 1e-12)


@pytest.fixture(scope="module")
def float32_case():
    tree, tries, _ = many_trees(16, np.float32)
    run = jax.jit(jax.vmap(functools.partial(search.run_mcts, num_simulations=100)))
    return tree, tries, run, run(tree)


def test_float32_visits_equal_up_to_256_simulations(float32_case):
    _, tries, _, result = float32_case
    for trie in tries:
        if trie.root.through:
            trie.search(100)
    assert_equal_search(result, tries, 1e-5)


def test_table_sizes_nested_vmap_and_single_trees_change_nothing(float32_case, monkeypatch):
    tree, _, _, result = float32_case
    single = jax.tree.map(lambda x: x[3], tree)
    alone = jax.jit(functools.partial(search.run_mcts, num_simulations=100))(single)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(x, y[3])
    # with tables of the usual sizes, as large batches have them, and in parts, the last not full
    monkeypatch.setattr(mcts_module, "_LARGE", 0)
    monkeypatch.setattr(mcts_module, "_CPU_PART", 6 * 25)
    nested = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), tree)
    run = jax.jit(jax.vmap(jax.vmap(functools.partial(search.run_mcts, num_simulations=100))))
    for x, y in zip(jax.tree.leaves(run(nested)), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(x.reshape(y.shape), y)


def test_tables_of_usual_and_of_general_sizes_agree():
    """Trees beyond the small ones: some branchings of every width, the widest at the root."""
    keys, lengths, returns, _ = random_sets(6, batch=12, rollouts=24, steps=5, alphabet=2)
    keys[:, :20, 0] = np.arange(20)
    lengths, mask = np.maximum(lengths, 1), np.ones_like(lengths, bool)

    @jax.jit
    @jax.vmap
    def compress(*sets):
        return trees.compress_chains(trees.build_tree(*sets[:3], max_nodes=121, mask=sets[3]))

    table = compress(keys, lengths, returns, mask)
    sizes = [parallel.usual_groups(12, 23), parallel.general_groups(12, 23)]
    assert all(bool(parallel.fits(table.num_slots, groups)) for groups in sizes)
    options = dict(num_simulations=40, exploration_weight=1.41, discount=1.0, max_depth=5)
    usual, general = (
        jax.jit(functools.partial(parallel.slot_visits, groups=groups, **options))(table, None)
        for groups in sizes
    )
    assert (table.num_slots[:, 0] > 8).all()
    np.testing.assert_array_equal(usual, general)
    # Two wide branchings in every tree are more than usual.
    twice = table.num_slots.at[:, :2].set(24)
    assert not bool(parallel.fits(twice, sizes[0]))


def test_compiled_once_per_shape_and_without_host_callbacks(float32_case):
    tree, _, run, _ = float32_case
    run(jax.tree.map(lambda x: x[::-1], tree))
    assert run._cache_size() == 1
    program = run.lower(tree).as_text()
    assert "while" in program and "callback" not in program


def test_spare_capacity_changes_nothing():
    keys, lengths, returns, mask = random_sets(3, batch=8, rollouts=7, steps=6, alphabet=3)

    @functools.partial(jax.jit, static_argnames="max_nodes")
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
    def run(keys, lengths, returns, mask, max_nodes):
        tree = trees.build_tree(keys, lengths, returns, max_nodes=max_nodes, mask=mask)
        return search.run_mcts(tree, num_simulations=60), search.backup_max(tree)

    tight = run(keys, lengths, returns, mask, NODES)
    loose = run(keys, lengths, returns, mask, 2 * NODES)
    for a, b in zip(jax.tree.leaves(tight), jax.tree.leaves(loose), strict=True):
        np.testing.assert_array_equal(a, b[:, :NODES])
        assert not np.asarray(b)[:, NODES:].any()


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_a_thousand_rollouts_and_hundreds_of_choices(form):
    """Wide at the root, then deep: many sizes of tables, and more choices than one word holds."""
    keys, lengths, returns, mask = random_sets(
        1, batch=1, rollouts=1024, steps=256, alphabet=3, levels=9
    )
    keys[0, :, 0] = np.random.default_rng(0).integers(0, 300, 1024)
    trie = Trie(as_lists(keys[0], lengths[0], mask[0]), returns[0])
    trie.search(600)
    assert len(trie.root.children) > 200
    with jax.enable_x64(True):
        build = jax.jit(functools.partial(trees.build_tree, max_nodes=1 + int(lengths.sum())))
        sets = (keys, lengths, returns.astype(np.float64))
        tree = build(*(x[0] for x in sets), mask=mask[0])
        run = jax.jit(functools.partial(search.run_mcts, num_simulations=600, form=form))
        result = jax.tree.map(lambda x: np.asarray(x)[None], run(tree))
    assert_equal_search(result, [trie], 1e-12)


def test_the_parallel_form_is_done_after_k_plus_height_steps():
    """Each returns more than the one before it: so a chain of branchings, the worst case."""
    rollouts, simulations = 12, 50
    keys = np.tril(np.ones((rollouts, rollouts), np.int32), -1)
    lengths = np.minimum(np.arange(rollouts) + 1, rollouts - 1).astype(np.int32)
    returns = np.arange(rollouts, dtype=np.float32) / rollouts
    tree = trees.build_tree(keys, lengths, returns, max_nodes=1 + rollouts * rollouts)
    table = trees.compress_chains(tree)
    height = int(table.num_branchings) - 1
    assert height == rollouts - 2
    run = jax.jit(functools.partial(search.run_mcts, num_simulations=simulations))
    trie = Trie(as_lists(keys, lengths, np.ones(rollouts, bool)), returns)
    trie.search(simulations)
    assert_equal_search(jax.tree.map(lambda x: np.asarray(x)[None], run(tree)), [trie], 1e-5)


def test_float32_sums_stay_right_at_a_million_visits():
    """Two arms of 0.1 and 0.3: nearly all visits go to one, where a plain float32 sum stalls."""
    tree = jax.jit(trees.build_tree, static_argnames="max_nodes")(
        jnp.array([[0, 0], [0, 1], [1, 0]]),
        jnp.array([2, 2, 2]),
        jnp.array([0.1, 0.3, 0.2], jnp.float32),
        max_nodes=6,
    )
    result = jax.jit(functools.partial(search.run_mcts, num_simulations=10**6))(tree)
    visits = np.asarray(result.node_visits, np.float64)
    assert visits[0] == 10**6
    assert visits[1] + visits[2] == 10**6 and visits[3] + visits[4] == visits[1]
    # The visits solve UCT's own balance, as they only do when the means were right all the way.
    mean = np.float32([0.1, 0.3]).astype(np.float64)
    spread = 1.41 * np.sqrt(np.log(visits[1]) / visits[[3, 4]])
    assert abs((mean + spread)[0] - (mean + spread)[1]) < 2e-3
    total = visits[3] * mean[0] + visits[4] * mean[1]
    np.testing.assert_allclose(np.asarray(result.value_sum)[1], total, rtol=1e-6)


def full_width_tree(depth, width, rng):
    """All action sequences of a depth, random returns; and a stop worth 0 at each inner node."""
    leaves = np.stack(np.meshgrid(*[np.arange(width)] * depth, indexing="ij"), -1).reshape(
        -1, depth
    )
    rows, lengths, returns = [*leaves], [depth] * len(leaves), [*rng.uniform(0.1, 1, len(leaves))]
    for level in range(depth):
        for prefix in np.unique(leaves[:, :level], axis=0):
            rows.append(np.concatenate([prefix, np.zeros(depth - level, int)]))
            lengths.append(level)
            returns.append(0.0)
    return np.array(rows, np.int32), np.array(lengths, np.int32), np.array(returns, np.float32)


def test_mctx_agrees_on_full_width_trees():
    """mctx ends a simulation at each new node, with a value from outside. With a stop in front of
    the children whose value is that value (0) and whose prior is 0, PUCT here does the same: the
    first visit stops, no later one does. Then all visit counts agree, from the root down."""
    depth, width, simulations = 3, 3, 120
    rng = np.random.default_rng(0)
    keys, lengths, returns = full_width_tree(depth, width, rng)
    nodes = (width ** (depth + 1) - 1) // (width - 1)
    tree = jax.jit(trees.build_tree, static_argnames="max_nodes")(
        keys, lengths, returns, max_nodes=nodes
    )
    assert int(tree.num_nodes) == nodes and int(tree.overflow) == 0
    logits = rng.normal(size=(nodes, width)).astype(np.float32)
    probabilities = np.asarray(jax.nn.softmax(logits))
    parent, key = np.asarray(tree.parent), np.asarray(tree.step_key)
    priors = np.where(parent >= 0, probabilities[parent, key], 0).astype(np.float32)
    # One simulation more: mctx counts the root's own evaluation before it starts.
    ours = jax.jit(
        lambda tree: search.run_mcts(
            tree, num_simulations=simulations + 1, exploration_weight=1.25, priors=priors
        )
    )(tree)

    child = np.zeros((nodes, width), np.int32)
    child[parent[1:], key[1:]] = np.arange(1, nodes)
    leaf = np.asarray(tree.num_children) == 0
    value = np.where(leaf, np.asarray(search.backup_mean(tree)), 0).astype(np.float32)
    child, value, logits, is_leaf = map(jnp.asarray, (child, value, logits, leaf))

    def recurrent_fn(params, rng_key, action, embedding):
        del params, rng_key
        node = jnp.where(is_leaf[embedding], embedding, child[embedding, action])
        output = mctx.RecurrentFnOutput(
            reward=jnp.zeros(1),
            discount=jnp.ones(1),
            prior_logits=logits[node],
            value=value[node],
        )
        return output, node

    root = mctx.RootFnOutput(
        prior_logits=logits[:1], value=jnp.zeros(1), embedding=jnp.zeros(1, jnp.int32)
    )
    output = jax.jit(
        lambda root: (
            mctx.muzero_policy(
                params=(),
                rng_key=jax.random.key(0),
                root=root,
                recurrent_fn=recurrent_fn,
                num_simulations=simulations,
                max_depth=depth,
                dirichlet_fraction=0.0,
                qtransform=lambda tree, node: tree.qvalues(node),
                pb_c_init=1.25,
                pb_c_base=1e9,
            ).search_tree
        )
    )(root)
    visits = np.asarray(ours.node_visits)
    reached = np.asarray(output.embeddings[0])
    counts = np.asarray(output.children_visits[0])
    theirs = {}
    for index in range(simulations + 1):
        if np.asarray(output.node_visits)[0, index] and not leaf[reached[index]]:
            for action in range(width):
                theirs[int(child[reached[index], action])] = int(counts[index, action])
    compared = [v for v in theirs if v]
    assert len(compared) > 20
    assert [theirs[v] for v in compared] == [int(visits[v]) for v in compared]


def test_trees_without_choices():
    build = jax.jit(trees.build_tree, static_argnames="max_nodes")
    run = jax.jit(functools.partial(search.run_mcts, num_simulations=5))
    keys, lengths = jnp.array([[4, 5], [4, 5]]), jnp.array([2, 2])
    line = run(build(keys, lengths, jnp.array([1.0, 0.5]), max_nodes=3))
    assert line.node_visits.tolist() == [5, 5, 5]
    assert line.value_sum.tolist() == [3.75] * 3
    assert line.stop_visits.tolist() == [0, 0, 5]
    empty = run(build(keys, lengths, jnp.ones(2), max_nodes=3, mask=jnp.zeros(2, bool)))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(empty))
    with pytest.raises(ValueError, match="form: got 'fast'"):
        search.run_mcts(
            build(keys, lengths, jnp.ones(2), max_nodes=3), num_simulations=1, form="fast"
        )
