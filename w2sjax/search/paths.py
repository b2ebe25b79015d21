"""From node values to the path that follows them."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from w2sjax.trees.build import end_values
from w2sjax.types import TrajectoryTree


class BestPath(NamedTuple):
    """A path from the root. Its text is a prefix of `tree.representative[nodes[length]]`."""

    nodes: chex.Array  # int32 [T+1], −1 past the end
    length: chex.Array  # int32 [], steps; the path ends at nodes[length]


def best_path(
    tree: TrajectoryTree,
    node_values: chex.Array,
    *,
    stop_values: chex.Array | None = None,
    discount: float = 1.0,
    allow_stop: bool = True,
    candidates: chex.Array | None = None,
) -> BestPath:
    """Walks from the root to the child of highest value, until an end.

    Where trajectories end at an inner node, stopping there is a choice like any child (so a
    success is not walked past into a failure); it wins ties, then the first child does.

    Args:
      tree: one tree of capacity N, with `trajectory_node` [R, T+1].
      node_values: float or int [N], value of being at a node: a backup, or a search's
        `node_values` or `node_visits`.
      stop_values: [N], value of stopping at a node; where None, the mean return of the
        trajectories that end there. Give a search's `stop_visits` along with its `node_visits`.
      discount: γ ≤ 1 on the step to a child, none on stopping. 1 for visit counts.
      allow_stop: False ends the path at leaves alone (the reference code's way).
      candidates: bool [N], the nodes a path may enter; all where None. A path ends where no child
        is one.

    Returns:
      `BestPath(nodes, length)`.
    """
    num_nodes = tree.parent.shape[0]
    chex.assert_shape(node_values, (num_nodes,))
    stops, ends = end_values(tree)
    if stop_values is not None:
        chex.assert_shape(stop_values, (num_nodes,))
        stops = stop_values.astype(stops.dtype)
    ends = ends & allow_stop
    steps = tree.trajectory_node.shape[1] - 1
    node = jnp.arange(num_nodes)
    may = (node > 0) & (tree.parent >= 0)
    if candidates is not None:
        chex.assert_shape(candidates, (num_nodes,))
        may = may & candidates
    # The best child of every node: children are runs of ids, so a segment maximum, then its first
    # place.
    up = jnp.where(may, tree.parent, num_nodes)
    value = node_values.astype(stops.dtype)
    best = jnp.full((num_nodes,), -jnp.inf, stops.dtype).at[up].max(value, mode="drop")
    is_best = may & (value == best[tree.parent])
    choice = jnp.full((num_nodes,), num_nodes, jnp.int32)
    choice = choice.at[jnp.where(is_best, up, num_nodes)].min(node.astype(jnp.int32), mode="drop")
    halt = (choice == num_nodes) | (ends & (stops >= discount * best))

    def step(at, _):
        following = jnp.where((at < 0) | halt[at], -1, choice[at])
        return following, following

    _, nodes = jax.lax.scan(step, jnp.int32(0), length=steps)
    nodes = jnp.concatenate([jnp.zeros((1,), jnp.int32), nodes.astype(jnp.int32)])
    return BestPath(nodes=nodes, length=jnp.sum(nodes >= 0, dtype=jnp.int32) - 1)
