"""How much better a step was than what the policy does at that place, and weights from it."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from w2sjax.types import TrajectoryTree


def edge_advantages(
    tree: TrajectoryTree, node_values: chex.Array, *, discount: float = 1.0
) -> chex.Array:
    """A(step into v) = γ·Q(v) − V(parent of v).

    With `backup_mean` and γ = 1 the advantages of a node's children and of its ends, weighted by
    their trajectories, sum to 0.

    Args:
      tree: one tree of capacity N; `jax.vmap` for many.
      node_values: float [N], such as a backup or a search's `node_values`.
      discount: γ ≤ 1 per step, the one that made the values.

    Returns:
      float [N]; 0 at the root and on padding, which have no step into them.
    """
    chex.assert_rank(tree.parent, 1)
    chex.assert_equal_shape([tree.parent, node_values])
    inner = tree.parent >= 0
    gain = discount * node_values - node_values[tree.parent]
    return jnp.where(inner, gain, 0)


def step_weights(
    tree: TrajectoryTree,
    advantages: chex.Array,
    *,
    beta: float,
    max_weight: float = 20.0,
    keep: chex.Array | None = None,
) -> chex.Array:
    """Weights exp(A/β) of the steps of every trajectory, for advantage-weighted likelihood.

    A subtree in which nothing ever succeeds has advantages of 0, hence weights of 1, and may hold
    most of the tokens: `keep` takes such steps out (for example `backup_max(tree) > 0`).

    Args:
      tree: one tree of capacity N, with `trajectory_node` [R, T+1].
      advantages: float [N], of the step into each node.
      beta: β > 0, in units of return; small is greedy.
      max_weight: weights are cut to this.
      keep: bool [N], nodes whose incoming step is trained at all; all where None.

    Returns:
      float [R, T], 0 past a trajectory's end and where `keep` is False.
    """
    chex.assert_equal_shape([tree.parent, advantages])
    # The exponent is cut before exp, so that no infinity arises.
    exponent = jnp.minimum(advantages / beta, jnp.log(max_weight))
    weights = jnp.exp(exponent)
    if keep is not None:
        chex.assert_equal_shape([tree.parent, keep])
        weights = jnp.where(keep, weights, 0)
    nodes = tree.trajectory_node[:, 1:]
    return jnp.where(nodes >= 0, weights[nodes], 0)
