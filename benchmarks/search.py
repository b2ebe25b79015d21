"""How fast is tree search? Against Python objects, mctx and a numba loop, on the same trees.

    python benchmarks/search.py [--quick] [--json FILE]

Chain removal is part of this library's time and of the numba loop's tables. Peers: `python` is UCT
as one writes it, a Python object per node that scores itself (timed on at most 64 trees and scaled
up); `tight_python` is the same with all calls inlined by hand; `mctx` is `muzero_policy` with the
same trees as look-up tables (timed on at most 512), another algorithm: it ends each simulation at a
new node, and its trees grow; equal numbers of simulations are compared, not equal results; `numba`
is one thread of compiled loops over the compressed trees, and is left out where numba is not
installed. The host's cores are shown to JAX as devices and the tasks are split over them by
`shard_map`, as a user would; their trees lie there, where building so split leaves them. Times are
medians, warm. Visit counts are checked against Python's before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator

os.environ.setdefault(
    "XLA_FLAGS", f"--xla_force_host_platform_device_count={min(os.cpu_count() or 1, 2)}"
)

import jax
import jax.numpy as jnp
import mctx
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from trees import (
    MAX_NODES,
    ROLLOUTS,
    STEPS,
    Node,
    build_many,
    build_python,
    make_tasks,
    median_ms,
    peak_gib,
)

from w2sjax import search, trees

WEIGHT = 1.41
PEERS = ("python", "tight_python", "mctx", "numba")


class SearchNode:
    """A node that scores itself; stopping is a child in front of the others."""

    def __init__(self, node: Node, parent: SearchNode | None = None, *, stop: bool = False):
        self.parent, self.visits, self.value_sum = parent, 0, 0.0
        self.value = node.terminal_return_sum / max(1, node.terminal_count)
        self.children: list[SearchNode] = []
        if node.children and not stop:
            if node.terminal_count:
                self.children.append(SearchNode(node, self, stop=True))
            self.children += [SearchNode(child, self) for child in node.children.values()]

    def score(self) -> float:
        """UCT: how much this child of its parent promises."""
        if self.visits == 0:
            return math.inf
        spread = math.sqrt(math.log(self.parent.visits) / self.visits)
        return self.value_sum / self.visits + WEIGHT * spread

    def best_child(self) -> SearchNode:
        """The child of highest score, the first of equals."""
        return max(self.children, key=lambda child: child.score())


def search_python(root: SearchNode, simulations: int) -> None:
    """UCT over `SearchNode`s."""
    for _ in range(simulations):
        node = root
        while node.children:
            node = node.best_child()
        value = node.value
        while node is not None:
            node.visits += 1
            node.value_sum += value
            node = node.parent


def search_tight(root: Node, simulations: int) -> None:
    """UCT over the nodes of a build, in one function; stopping is a choice in front of the
    children.
    """
    stops: dict[Node, list[float]] = {}
    for _ in range(simulations):
        node, path = root, [root]
        while node.children:
            stop = None
            if node.terminal_count:
                stop = stops.setdefault(node, [0, 0.0])
            total = node.visits
            best, best_score = None, -math.inf
            if stop is not None:
                if stop[0] == 0:
                    best_score = math.inf
                else:
                    best_score = stop[1] / stop[0] + WEIGHT * math.sqrt(math.log(total) / stop[0])
            for child in node.children.values():
                if child.visits == 0:
                    score = math.inf
                else:
                    spread = math.sqrt(math.log(total) / child.visits)
                    score = child.value_sum / child.visits + WEIGHT * spread
                if score > best_score:
                    best, best_score = child, score
            if best is None:
                break
            node = best
            path.append(node)
        value = node.terminal_return_sum / node.terminal_count
        if node.children:
            stops[node][0] += 1
            stops[node][1] += value
        for node in path:
            node.visits += 1
            node.value_sum += value


def in_order(root: Node) -> list[Node]:
    """Breadth-first."""
    nodes = [root]
    for node in nodes:
        nodes.extend(node.children.values())
    return nodes


def our_search(simulations: int, form: str, devices: int):
    """The jitted search of a batch, its tasks split over devices."""
    run = jax.vmap(functools.partial(search.run_mcts, num_simulations=simulations, form=form))
    if devices > 1:
        spec = PartitionSpec("task")
        run = jax.shard_map(
            run, mesh=task_mesh(devices), in_specs=spec, out_specs=spec, check_vma=False
        )
    return jax.jit(run)


def task_mesh(devices: int) -> jax.sharding.Mesh:
    """The first devices in a row, to split tasks over."""
    return jax.make_mesh((devices,), ("task",), axis_types=(AxisType.Auto,))


def over_devices(tree: trees.TrajectoryTree, devices: int) -> trees.TrajectoryTree:
    """The trees where a build split over the devices leaves them."""
    if devices == 1:
        return tree
    return jax.device_put(tree, NamedSharding(task_mesh(devices), PartitionSpec("task")))


def mctx_search(tree: trees.TrajectoryTree, simulations: int):
    """`muzero_policy` on look-up tables; returns a function of no arguments."""
    width = int(tree.num_children.max())
    batch, nodes = tree.parent.shape
    children = tree.first_child[..., None] + jnp.arange(width)
    exists = jnp.arange(width) < tree.num_children[..., None]
    children = jnp.where(exists, children, jnp.arange(nodes)[None, :, None])
    logits = jnp.where(exists, 0.0, -1e9)
    leaf = tree.num_children == 0
    value = jnp.where(leaf, tree.return_sum / jnp.maximum(tree.data_count, 1), 0.0)
    row = jnp.arange(batch)

    def recurrent_fn(tables, rng_key, action, node):
        del rng_key
        children, logits, value = tables
        node = children[row, node, action]
        return mctx.RecurrentFnOutput(
            reward=jnp.zeros(batch),
            discount=jnp.ones(batch),
            prior_logits=logits[row, node],
            value=value[row, node],
        ), node

    @jax.jit
    def run(tables, invalid):
        root = mctx.RootFnOutput(
            prior_logits=tables[1][:, 0],
            value=tables[2][:, 0],
            embedding=jnp.zeros(batch, jnp.int32),
        )
        return mctx.muzero_policy(
            tables,
            jax.random.key(0),
            root,
            recurrent_fn,
            num_simulations=simulations,
            invalid_actions=invalid,
            dirichlet_fraction=0.0,
        ).action_weights

    tables = (children, logits, value)
    return lambda: jax.block_until_ready(run(tables, ~exists[:, 0]))


def numba_search(tree: trees.TrajectoryTree, simulations: int):
    """One thread of loops over the branch tables; None without numba."""
    try:
        import numba
    except ImportError:
        return None
    table = jax.tree.map(np.asarray, jax.jit(jax.vmap(trees.compress_chains))(tree))

    @numba.njit(fastmath=False)
    def run(first, number, child, value, simulations):
        batch, slots = child.shape
        counts = np.zeros((batch, slots), np.int32)
        sums = np.zeros((batch, slots), np.float32)
        path = np.zeros(first.shape[1], np.int32)
        for b in range(batch):
            if number[b, 0] == 0:
                continue
            for _ in range(simulations):
                node, depth, slot = 0, 0, 0
                while node >= 0:
                    total = 0
                    for j in range(first[b, node], first[b, node] + number[b, node]):
                        total += counts[b, j]
                    log_total = np.float32(math.log(total)) if total > 0 else np.float32(0)
                    best = np.float32(-np.inf)
                    for j in range(first[b, node], first[b, node] + number[b, node]):
                        if counts[b, j] == 0:
                            slot = j
                            break
                        n = np.float32(counts[b, j])
                        score = sums[b, j] / n + np.float32(1.41) * math.sqrt(log_total / n)
                        if score > best:
                            best, slot = score, j
                    path[depth] = slot
                    depth += 1
                    node = child[b, slot]
                for i in range(depth):
                    counts[b, path[i]] += 1
                    sums[b, path[i]] += value[b, slot]
        return counts

    arrays = (table.first_slot, table.num_slots, table.slot_child, table.slot_value)
    return lambda: run(*arrays, simulations)


def check_exact(tasks: list, returns: np.ndarray, simulations: int) -> int:
    """How many trees have visit counts equal to Python's, in float64."""
    with jax.enable_x64(True):
        keys = trees.intern_steps(tasks)
        build = functools.partial(trees.build_tree, max_nodes=MAX_NODES)
        tree = jax.jit(jax.vmap(build))(keys.step_keys, keys.lengths, returns.astype(np.float64))
        visits = np.asarray(our_search(simulations, "parallel", 1)(tree).node_visits)
    equal = 0
    for b, (rollouts, row) in enumerate(zip(tasks, returns.tolist(), strict=True)):
        root = build_python(rollouts, row)
        scoring = SearchNode(root)
        search_python(scoring, simulations)
        search_tight(root, simulations)
        wanted = [node.visits for node in in_order(root)]
        assert [child.visits for child in root.children.values()] == [
            child.visits for child in scoring.children[-len(root.children) :]
        ]
        equal += visits[b, : len(wanted)].tolist() == wanted
    return equal


def compare(num_tasks: int, simulations: int, repeats: int) -> dict[str, float]:
    """Times of one setting, in milliseconds."""
    tasks, returns = make_tasks(num_tasks)
    keys = trees.intern_steps(tasks, num_rollouts=ROLLOUTS, num_steps=STEPS)
    tree = jax.block_until_ready(build_many(keys.step_keys, keys.lengths, returns))
    sample = min(num_tasks, 64)

    def all_tasks(prepare, play) -> float:
        """Milliseconds for all tasks of what `play` does with what `prepare` makes of a build."""
        took = []
        for _ in range(3):
            roots = [
                prepare(build_python(*x))
                for x in zip(tasks[:sample], returns[:sample].tolist(), strict=True)
            ]
            start = time.perf_counter()
            for root in roots:
                play(root, simulations)
            took.append(1e3 * (time.perf_counter() - start))
        return statistics.median(took) * num_tasks / sample

    def timed(form: str, devices: int) -> float:
        run = our_search(simulations, form, devices)
        there = over_devices(tree, devices)
        return median_ms(lambda: jax.block_until_ready(run(there)), repeats)

    result = {
        "python_ms": all_tasks(SearchNode, search_python),
        "tight_python_ms": all_tasks(lambda root: root, search_tight),
    }
    # mctx's own tree has a node per simulation: 8,192 × 1,000 of them would take minutes.
    timed_tasks = min(num_tasks, 512)
    part = jax.tree.map(lambda x: x[:timed_tasks], tree)
    mctx_ms = median_ms(mctx_search(part, simulations), 1)
    result["mctx_ms"] = mctx_ms * num_tasks / timed_tasks
    numba_run = numba_search(tree, simulations)
    if numba_run is not None:
        result["numba_ms"] = median_ms(numba_run, repeats)
    result["parallel_ms"] = timed("parallel", 1)
    result["sequential_ms"] = timed("sequential", 1)
    result["ours_ms"] = timed("parallel", len(jax.devices()))
    for peer in PEERS:
        if f"{peer}_ms" in result:
            result[f"vs_{peer}"] = result[f"{peer}_ms"] / result["ours_ms"]
    return result


def count_steps(num_tasks: int, simulations: int) -> dict[str, int]:
    """Sequential steps of the two forms, and their work: choices scored, over all trees."""
    tasks, returns = make_tasks(num_tasks)
    keys = trees.intern_steps(tasks)
    tree = build_many(keys.step_keys, keys.lengths, returns)
    table = jax.tree.map(np.asarray, jax.jit(jax.vmap(trees.compress_chains))(tree))
    visits = np.asarray(our_search(simulations, "parallel", 1)(tree).node_visits)
    height, scored = 0, 0
    for b in range(num_tasks):
        heights = np.zeros(table.node.shape[1], int)
        for s in reversed(range(table.slot_child.shape[1])):
            if table.slot_mask[b, s]:
                c = table.slot_child[b, s]
                p = table.slot_branching[b, s]
                heights[p] = max(heights[p], heights[c] + 1 if c >= 0 else 0)
        height = max(height, int(heights[0]))
        scored += int((visits[b][table.node[b]] * table.num_slots[b]).sum())
    return {
        "parallel_steps": simulations + height,
        "sequential_steps_at_most": simulations * (height + 1),
        "parallel_choices_scored": (simulations + height) * int(table.slot_mask.sum()),
        "sequential_choices_scored": scored,
    }


def scaling(quick: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Building and searching in one call, along tasks, rollouts and simulations: the points of
    each curve, with the peak memory of the process so far.
    """

    def point(base, num_tasks: int, simulations: int) -> dict[str, float]:
        keys, returns = base
        pick = np.arange(num_tasks) % len(returns)
        num_rollouts = returns.shape[1]
        batch = (keys.step_keys[pick], keys.lengths[pick], returns[pick])
        batch = jax.tree.map(jnp.asarray, batch)
        max_nodes = min(MAX_NODES * num_rollouts // ROLLOUTS, 1 + num_rollouts * STEPS)

        @jax.jit
        @jax.vmap
        def run(step_keys, lengths, returns):
            tree = trees.build_tree(step_keys, lengths, returns, max_nodes=max_nodes)
            found = search.run_mcts(tree, num_simulations=simulations)
            return found.node_visits, tree.overflow

        assert int(run(*batch)[1].max()) == 0
        took = median_ms(lambda: jax.block_until_ready(run(*batch)), 1)
        return {
            "tasks": num_tasks,
            "rollouts": num_rollouts,
            "simulations": simulations,
            "trajectories": num_tasks * num_rollouts,
            "ms": took,
            "peak_gib": peak_gib(),
        }

    def base(num_tasks: int, num_rollouts: int):
        tasks, returns = make_tasks(num_tasks, num_rollouts=num_rollouts)
        keys = trees.intern_steps(tasks, num_rollouts=num_rollouts, num_steps=STEPS)
        return keys, returns

    usual = base(512, ROLLOUTS)
    sizes = [512, 4096] if quick else [64, 512, 4096, 16384, 62500]
    simulations = [64] if quick else [64, 256, 1024, 4096]
    rollouts = [] if quick else [16, 64, 256, 1024]
    yield from (("simulations", point(usual, 512, number)) for number in simulations)
    yield from (("rollouts", point(base(64, number), 64, 256)) for number in rollouts)
    yield from (("tasks", point(usual, size, 256)) for size in sizes)


def main() -> None:
    """Prints the comparison, and writes it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    exact_tasks, exact_returns = make_tasks(32 if arguments.quick else 512)
    exact = check_exact(exact_tasks, exact_returns, 256)
    print(f"visit counts equal to Python's (float64): {exact} of {len(exact_tasks)} trees")
    settings = [(512, 256)]
    if not arguments.quick:
        settings = [(64, 256), (512, 256), (8192, 256), (64, 1000), (512, 1000), (8192, 1000)]
    results = {}
    for num_tasks, simulations in settings:
        repeats = 21 if num_tasks <= 512 else 3
        result = compare(num_tasks, simulations, repeats)
        results[f"{num_tasks}x{simulations}"] = result
        print(f"{num_tasks} tasks × {simulations} simulations on {len(jax.devices())} devices:")
        print("  " + ", ".join(f"{name} {value:.1f}" for name, value in result.items()), flush=True)
    steps = count_steps(512, 256)
    print("  " + ", ".join(f"{name} {value}" for name, value in steps.items()))
    print("building and searching in one call:")
    curves: dict[str, list[dict[str, float]]] = {}
    for along, at in scaling(arguments.quick):
        curves.setdefault(along, []).append(at)
        print(
            "  along {along}: {tasks:6d} tasks × {rollouts:4d} rollouts, {simulations:4d}"
            " simulations: {ms:9.1f} ms, peak {peak_gib:.2f} GiB".format(along=along, **at),
            flush=True,
        )
    if arguments.json:
        main_setting = results["512x256"]
        ratios = {
            f"mcts_vs_{peer}": main_setting[f"vs_{peer}"]
            for peer in PEERS
            if f"vs_{peer}" in main_setting
        }
        data = {"ratios": ratios, "settings": results, "steps": steps, "scaling": curves}
        data["exact"] = {"equal": exact, "of": len(exact_tasks)}
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)


if __name__ == "__main__":
    main()
