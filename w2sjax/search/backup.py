"""Node values by one sweep over the data: the mean, the best, and what lies between."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from w2sjax.trees.build import end_values, path_lengths
from w2sjax.types import TrajectoryTree


def backup_mean(tree: TrajectoryTree, *, start: chex.Array | None = None) -> chex.Array:
    """The mean return of the trajectories through each node: the policy's own Monte-Carlo value.

    Trajectories that began inside the tree say nothing about how often the policy gets there. With
    `start`, a node's value is the mean over the trajectories that came to it by themselves or began
    at it, of the value of the child that each took next (or of its end): V(v) = Σ_c m(c)·V(c) /
    Σ_c m(c). So rollouts from a child make its value more exact and weigh no more above it.

    Args:
      tree: one tree of capacity N; `jax.vmap` for many.
      start: int32 [R], depth that each trajectory began at; all at the root where None.

    Returns:
      float [N]; 0 on padding.

    Example:
      >>> from w2sjax.trees import build_tree
      >>> tree = build_tree(jnp.array([[1], [2]]), jnp.array([1, 1]), jnp.eye(2)[0], max_nodes=3)
      >>> backup_mean(tree).tolist()
      [0.5, 1.0, 0.0]
    """
    chex.assert_rank(tree.parent, 1)
    if start is None:
        return tree.return_sum / jnp.maximum(tree.data_count, 1).astype(tree.return_sum.dtype)
    chex.assert_shape(start, tree.trajectory_node.shape[:1])
    ends, _ = end_values(tree)
    num_nodes = tree.parent.shape[0]
    lengths = path_lengths(tree)
    cut = (tree.num_children > 0) & (tree.terminal_count == 0)  # where only overflow stops a path

    def level(values, inputs):
        node, below, t = inputs  # [R] at depth t, [R] at depth t + 1
        stops = lengths == t
        counts = (node >= 0) & (start <= t) & ~(stops & cut[node])
        at = jnp.where(counts, node, num_nodes)
        gain = jnp.where(stops, ends[node], values[jnp.maximum(below, 0)])
        total = jnp.zeros_like(values).at[at].add(gain, mode="drop")
        number = jnp.zeros_like(values).at[at].add(1, mode="drop")
        return jnp.where(number > 0, total / jnp.maximum(number, 1), values), None

    return _from_below(level, tree, jnp.zeros((num_nodes,), ends.dtype))


def _from_below(level, tree: TrajectoryTree, values: chex.Array) -> chex.Array:
    """Values [N] after `level(values, (node [R], the node below [R], depth))`, deepest first."""
    nodes = tree.trajectory_node.T  # [T+1, R]
    below = jnp.concatenate([nodes[1:], jnp.full((1, nodes.shape[1]), -1, nodes.dtype)])
    levels = (nodes, below, jnp.arange(nodes.shape[0]))
    return jax.lax.scan(level, values, levels, reverse=True)[0]


def backup_max(tree: TrajectoryTree, *, discount: float = 1.0) -> chex.Array:
    """The best made of each node: Q*(v) = max(mean end return at v, γ·max Q*(child)).

    Where several trajectories end at one node their mean counts, so that chance in the environment
    is not taken for skill. Unrolled, this is the maximum over trajectories r through v of γ^(steps
    left)·(value of r's end), computed that way, without a loop over levels.

    Args:
      tree: one tree of capacity N.
      discount: γ ≤ 1 per step; below 1, the shorter of two successes has the higher value.

    Returns:
      float [N]; 0 on padding.
    """
    chex.assert_rank([tree.parent, tree.trajectory_node], [1, 2])
    values, ends = end_values(tree)
    nodes = tree.trajectory_node
    lengths = path_lengths(tree)
    last = jnp.take_along_axis(nodes, jnp.maximum(lengths, 0)[:, None], axis=1)[:, 0]
    counts = (lengths >= 0) & ends[last]
    steps_left = lengths[:, None] - jnp.arange(nodes.shape[1])
    dtype = values.dtype
    power = jnp.asarray(discount, dtype) ** jnp.maximum(steps_left, 0).astype(dtype)
    candidates = jnp.where(counts[:, None], values[last][:, None] * power, -jnp.inf)
    num_nodes = tree.parent.shape[0]
    target = jnp.where((nodes >= 0) & counts[:, None], nodes, num_nodes)
    best = jnp.full((num_nodes,), -jnp.inf, dtype).at[target].max(candidates, mode="drop")
    return jnp.where(best > -jnp.inf, best, 0)


def backup_soft(tree: TrajectoryTree, *, temperature: float, discount: float = 1.0) -> chex.Array:
    """Between mean and maximum: V(v) = τ·ln Σ_c (N_c / N_v)·exp(γ·V(c) / τ).

    Ending at v is one of the c. τ → ∞ gives `backup_mean` (at γ = 1), τ → 0 gives `backup_max`.
    The weights N_c / N_v are the data's own frequencies, so this is the value of the best policy
    that pays τ per nat for departing from the policy that made the data (the log-sum-exp backup of
    KL-regularised control).

    Args:
      tree: one tree of capacity N.
      temperature: τ > 0, in units of return.
      discount: γ ≤ 1 per step.

    Returns:
      float [N]; 0 on padding.
    """
    chex.assert_rank([tree.parent, tree.trajectory_node], [1, 2])
    ends, _ = end_values(tree)
    num_nodes = tree.parent.shape[0]
    lengths = path_lengths(tree)
    dtype = ends.dtype
    cut = (tree.num_children > 0) & (tree.terminal_count == 0)  # where only overflow stops a path

    def level(values, inputs):
        node, below, t = inputs  # [R] at depth t, [R] at depth t + 1
        here = node >= 0
        at = jnp.where(here, node, num_nodes)
        stops = lengths == t
        value = jnp.where(stops, ends[node], discount * values[jnp.maximum(below, 0)])
        weight = (here & ~(stops & cut[node])).astype(dtype)
        best = jnp.full((num_nodes,), -jnp.inf, dtype)
        best = best.at[at].max(jnp.where(weight > 0, value, -jnp.inf), mode="drop")
        shift = jnp.where(best > -jnp.inf, best, 0)
        term = weight * jnp.exp((value - shift[node]) / temperature)
        total = jnp.zeros((num_nodes,), dtype).at[at].add(term, mode="drop")
        count = jnp.zeros((num_nodes,), dtype).at[at].add(weight, mode="drop")
        mean = jnp.where(count > 0, total / jnp.maximum(count, 1), 1)
        new = shift + temperature * jnp.log(mean)
        return values.at[at].set(new[node], mode="drop"), None

    return _from_below(level, tree, jnp.zeros((num_nodes,), dtype))
