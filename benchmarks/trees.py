"""How fast are trees built? Strings to `TrajectoryTree`s, against what one would write in Python.

    python benchmarks/trees.py [--quick] [--json FILE]

Tasks of 16 rollouts of 8 to 20 steps, half of all steps shared with an earlier rollout; returns in quarters.
Everything counts: from the text of the steps to the arrays of the tree. Peers, in the same process: a Python
object per node with a dict of children (`python`), and a bare dict trie that keeps nothing but counts (`trie`).
Times are medians, warm, of the machine that runs this; ratios above 1 say that this library is faster.
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


def make_tasks(num_tasks: int, seed: int = 0) -> tuple[list, np.ndarray]:
    """Random trajectories as text: per task 16 lists of (action, observation), and returns [B, R]."""
    rng = np.random.default_rng(seed)
    tasks = []
    for _ in range(num_tasks):
        rollouts: list[list[tuple[str, str]]] = []
        for r in range(ROLLOUTS):
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
    return tasks, (rng.integers(0, 5, (num_tasks, ROLLOUTS)) / 4).astype(np.float32)
