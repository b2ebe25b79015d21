"""How fast are trees built? Strings to `TrajectoryTree`s, against what one would write in Python.

    python benchmarks/trees.py [--quick] [--json FILE]

Tasks of 16 rollouts of 8 to 20 steps, nearly half of all steps shared with an earlier rollout;
returns in quarters.
Everything counts: from the text of the steps to the arrays of the tree. Peers, in the same process:
a Python object per node with a dict of children (`python`), and a bare dict trie that keeps nothing
but counts (`trie`). Times are medians, warm; ratios above 1 say that this library is faster.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from w2sjax import trees

ROLLOUTS, STEPS, MAX_NODES = 16, 20, 256


def make_tasks(
    num_tasks: int, seed: int = 0, num_rollouts: int = ROLLOUTS
) -> tuple[list, np.ndarray]:
    """Random trajectories as text: per task R lists of (action, observation), and returns [B,
    R].
    """
    rng = np.random.default_rng(seed)
    tasks = []
    for _ in range(num_tasks):
        rollouts: list[list[tuple[str, str]]] = []
        for r in range(num_rollouts):
            length = int(rng.integers(8, STEPS + 1))
            old = rollouts[rng.integers(r)] if r else []
            shared = int(rng.integers(0, len(old) + 1)) if r else 0
            steps = old[: min(shared, length)]
            for t in range(len(steps), length):
                place, thing = rng.integers(6), rng.integers(40)
                steps = [
                    *steps,
                    (
                        f"go to shelf {place} and take mug {thing}",
                        f"You arrive at shelf {place}. On it you see: mug {thing}, plate {t}.",
                    ),
                ]
            rollouts.append(steps)
        tasks.append(rollouts)
    # Fresh string objects, as they come from a file or an environment.
    tasks = [[[(f"{a}", f"{o}") for a, o in steps] for steps in rollouts] for rollouts in tasks]
    return tasks, (rng.integers(0, 5, (num_tasks, num_rollouts)) / 4).astype(np.float32)


class Node:
    """What one would write: an object per node."""

    def __init__(self, parent: Node | None, depth: int, step: tuple[str, str] | None, who: int):
        self.parent, self.depth, self.step, self.representative = parent, depth, step, who
        self.children: dict[tuple[str, str], Node] = {}
        self.count, self.return_sum = 0, 0.0
        self.terminal_count, self.terminal_return_sum = 0, 0.0
        self.visits, self.value_sum = 0, 0.0  # for search


def build_python(rollouts: list, returns: list[float]) -> Node:
    """One task's tree of `Node`s."""
    root = Node(None, 0, None, 0)
    for who, (steps, value) in enumerate(zip(rollouts, returns, strict=True)):
        node = root
        node.count += 1
        node.return_sum += value
        for step in steps:
            child = node.children.get(step)
            if child is None:
                child = node.children[step] = Node(node, node.depth + 1, step, who)
            node = child
            node.count += 1
            node.return_sum += value
        node.terminal_count += 1
        node.terminal_return_sum += value
    return root


def build_trie(rollouts: list, returns: list[float]) -> dict:
    """A bare dict trie with counts and return sums: the least that one could do."""
    root: dict = {None: [0, 0.0]}
    for steps, value in zip(rollouts, returns, strict=True):
        node = root
        for step in steps:
            entry = node[None]
            entry[0] += 1
            entry[1] += value
            following = node.get(step)
            if following is None:
                following = node[step] = {None: [0, 0.0]}
            node = following
        entry = node[None]
        entry[0] += 1
        entry[1] += value
    return root


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median wall time after one call to warm up, in milliseconds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


@jax.jit
def build_many(
    step_keys: jax.Array, lengths: jax.Array, returns: jax.Array
) -> trees.TrajectoryTree:
    """Trees of a batch of tasks."""
    return jax.vmap(lambda *args: trees.build_tree(*args, max_nodes=MAX_NODES))(
        step_keys, lengths, returns
    )


def compare(num_tasks: int, repeats: int) -> dict[str, float]:
    """Times of one batch size."""
    tasks, returns = make_tasks(num_tasks)
    rows = returns.tolist()

    def ours() -> object:
        keys = trees.intern_steps(tasks, num_rollouts=ROLLOUTS, num_steps=STEPS)
        return jax.block_until_ready(build_many(keys.step_keys, keys.lengths, returns))

    keys = trees.intern_steps(tasks, num_rollouts=ROLLOUTS, num_steps=STEPS)
    on_device = jax.tree.map(jnp.asarray, (keys.step_keys, keys.lengths, returns))
    assert int(build_many(*on_device).overflow.max()) == 0
    result = {
        "python_ms": median_ms(lambda: list(map(build_python, tasks, rows)), repeats),
        "trie_ms": median_ms(lambda: list(map(build_trie, tasks, rows)), repeats),
        "intern_ms": median_ms(lambda: trees.intern_steps(tasks), repeats),
        "kernel_ms": median_ms(lambda: jax.block_until_ready(build_many(*on_device)), 9 * repeats),
        "total_ms": median_ms(ours, repeats),
    }
    result["build_vs_python"] = result["python_ms"] / result["total_ms"]
    result["build_vs_trie"] = result["trie_ms"] / result["total_ms"]
    result["kernel_vs_python"] = result["python_ms"] / result["kernel_ms"]
    return result


def peak_gib() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def scaling(sizes: list[int]) -> list[dict[str, float]]:
    """The kernel on growing batches in one call each, with the peak memory of the process so
    far.
    """
    tasks, returns = make_tasks(512)
    keys = trees.intern_steps(tasks, num_rollouts=ROLLOUTS, num_steps=STEPS)
    curve = []
    for size in sizes:
        pick = np.arange(size) % 512
        batch = jax.tree.map(jnp.asarray, (keys.step_keys[pick], keys.lengths[pick], returns[pick]))
        took = median_ms(lambda batch=batch: jax.block_until_ready(build_many(*batch)), 1)
        curve.append({"trajectories": size * ROLLOUTS, "ms": took, "peak_gib": peak_gib()})
    return curve


def main() -> None:
    """Prints the comparison, and writes it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    sizes = [64, 512] if arguments.quick else [64, 512, 8192]
    tables = {}
    for size in sizes:
        tables[size] = compare(size, 3 if size > 512 else 5)
        print(
            "{size:5d} tasks: python {python_ms:.1f} ms, trie {trie_ms:.1f} ms,"
            " ours {total_ms:.1f} ms (keys {intern_ms:.1f}, kernel {kernel_ms:.1f});"
            " from strings {build_vs_python:.1f}× python, {build_vs_trie:.1f}× trie;"
            " kernel {kernel_vs_python:.1f}× python".format(size=size, **tables[size])
        )
    curve = scaling([64, 512, 4096] if arguments.quick else [64, 512, 4096, 16384, 62500])
    for point in curve:
        print(
            "{trajectories:8d} trajectories: {ms:9.1f} ms, peak {peak_gib:.2f} GiB".format(**point)
        )
    if arguments.json:
        ratios = {"build_vs_python": tables[512]["build_vs_python"]}
        ratios["build_kernel_vs_python"] = tables[512]["kernel_vs_python"]
        ratios["build_vs_trie_at_64"] = tables[64]["build_vs_trie"]
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"ratios": ratios, "sizes": tables, "scaling": curve}, file, indent=2)


if __name__ == "__main__":
    main()
