"""Monte-Carlo tree search on a fixed tree: UCT, or PUCT where priors are given."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from w2sjax.trees.build import end_values
from w2sjax.types import TrajectoryTree


@chex.dataclass(frozen=True)
class SearchResult:
    """What the simulations left at every node."""

    node_visits: chex.Array  # int32 [N], simulations through the node
    value_sum: chex.Array  # float [N], sum of what they returned, discounted to the node
    stop_visits: chex.Array  # int32 [N], simulations that ended at the node

    @property
    def node_values(self) -> chex.Array:
        """Mean value of each node, float [N]; 0 where `node_visits` is 0."""
        return self.value_sum / jnp.maximum(self.node_visits, 1).astype(self.value_sum.dtype)


def run_mcts(
    tree: TrajectoryTree,
    *,
    num_simulations: int,
    exploration_weight: float = 1.41,
    discount: float = 1.0,
    stop_as_child: bool = True,
    priors: chex.Array | None = None,
) -> SearchResult:
    """Runs simulations of UCT (or PUCT) on the tree and returns what they left.

    A simulation starts at the root and takes, at each node, the child of highest score until it
    comes to an end, whose value is the mean return of the trajectories that end there; the value,
    discounted, is added to every node of the path. The score of child c at a node whose children
    were visited Σ times is

        UCT:   Q(c) + w·sqrt(ln Σ / N(c)), an unvisited child first
        PUCT:  Q(c) + w·P(c)·sqrt(Σ) / (1 + N(c)), where Q is 0 for an unvisited child

    ties going to the first child. Where trajectories end at an inner node, stopping is one more
    child, in front of the others. (Kocsis & Szepesvári 2006; Silver et al. 2017; offline as in
    arXiv 2507.18858.)

    Args:
      tree: one tree of capacity N; `jax.vmap` for many.
      num_simulations: k.
      exploration_weight: w.
      discount: γ ≤ 1 per step; Q(c) = γ·mean value of c, and for stopping the plain value.
      stop_as_child: False ignores ends at inner nodes, as the paper's reference code does.
      priors: float [N], prior of the step into each node (`step_priors`); turns on PUCT. The prior
        of stopping is what is left over, 1 − Σ priors of the children, not below 0.

    Returns:
      `SearchResult`; all zeros for a tree without trajectories.
    """
    chex.assert_rank([tree.parent, tree.trajectory_node], [1, 2])
    num_nodes = tree.parent.shape[0]
    values, _ = end_values(tree)
    dtype = values.dtype
    width = tree.trajectory_node.shape[0]
    stop = stop_as_child & (tree.terminal_count > 0) & (tree.num_children > 0)
    gamma = jnp.asarray(discount, dtype)
    steps = tree.trajectory_node.shape[1]
    slots = jnp.arange(width + 1)
    if priors is not None:
        chex.assert_shape(priors, (num_nodes,))
        up = jnp.where(tree.parent >= 0, tree.parent, num_nodes)
        left = 1 - jnp.zeros((num_nodes,), dtype).at[up].add(priors.astype(dtype), mode="drop")
        stop_priors = jnp.maximum(left, 0)

    def simulate(carry, _):
        visits, sums, stop_visits, stop_sums = carry

        def descend(state):
            node, depth, path, _ = state
            child = jnp.where(slots == 0, node, tree.first_child[node] + slots - 1)
            valid = jnp.where(slots == 0, stop[node], slots <= tree.num_children[node])
            child = jnp.where(valid, child, 0)
            n = jnp.where(slots == 0, stop_visits[node], visits[child])
            s = jnp.where(slots == 0, stop_sums[node], gamma * sums[child])
            n = jnp.where(valid, n, 0)
            total = jnp.sum(n).astype(dtype)
            m = jnp.maximum(n, 1).astype(dtype)
            if priors is None:
                score = s / m + exploration_weight * jnp.sqrt(jnp.log(jnp.maximum(total, 1)) / m)
                score = jnp.where(n == 0, jnp.inf, score)
            else:
                p = jnp.where(slots == 0, stop_priors[node], priors[child])
                score = s / m + exploration_weight * p * jnp.sqrt(total) / (1 + n.astype(dtype))
            choice = jnp.argmax(jnp.where(valid, score, -jnp.inf))
            stopped = choice == 0
            depth = depth + ~stopped
            node = child[choice]
            path = path.at[jnp.where(stopped, steps, depth)].set(node, mode="drop")
            return node, depth, path, stopped

        def going(state):
            node, _, _, stopped = state
            return (tree.num_children[node] > 0) & ~stopped

        path = jnp.full((steps,), num_nodes, jnp.int32).at[0].set(0)
        node, depth, path, stopped = jax.lax.while_loop(
            going, descend, (jnp.int32(0), jnp.int32(0), path, jnp.bool_(False))
        )
        value = values[node]
        found = value * gamma ** (depth - jnp.arange(steps)).astype(dtype)
        visits = visits.at[path].add(1, mode="drop")
        sums = sums.at[path].add(found, mode="drop")
        stop_visits = stop_visits.at[node].add(stopped)
        stop_sums = stop_sums.at[node].add(jnp.where(stopped, value, 0))
        return (visits, sums, stop_visits, stop_sums), None

    counts = jnp.zeros((num_nodes,), jnp.int32)
    zeros = jnp.zeros((num_nodes,), dtype)
    (visits, sums, stop_visits, _), _ = jax.lax.scan(
        simulate, (counts, zeros, counts, zeros), length=num_simulations
    )
    empty = tree.data_count[0] == 0
    return SearchResult(
        node_visits=jnp.where(empty, 0, visits),
        value_sum=jnp.where(empty, 0, sums),
        stop_visits=jnp.where(empty, 0, stop_visits),
    )
