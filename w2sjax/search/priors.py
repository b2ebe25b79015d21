"""Priors of the steps of a tree, from the log-probabilities of the policy that sampled it."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from w2sjax.types import TrajectoryTree


def step_priors(
    tree: TrajectoryTree, step_logps: chex.Array, *, temperature: float = 1.0
) -> chex.Array:
    """How likely each child is to be taken, as priors for `run_mcts`.

    A step's log-probability is averaged over the trajectories that took it (as probabilities:
    log-mean-exp; their thoughts may differ where their keys do not), then siblings are normalised
    against each other: P(c) = (1 − stop share of the parent) · softmax_c(logp_c / τ). The stop
    share is the share of trajectories that end at the parent, so children and stop sum to 1.

    Args:
      tree: one tree of capacity N, with `trajectory_node` [R, T+1].
      step_logps: float [R, T], log-probability (nats) of each step; ignored past a trajectory's
        end.
      temperature: τ > 0; above 1 flattens (long answers differ by many nats).

    Returns:
      float [N], prior of the step into each node; 0 at the root and on padding.
    """
    num_nodes = tree.parent.shape[0]
    nodes = tree.trajectory_node[:, 1:]
    chex.assert_shape(step_logps, nodes.shape)
    dtype = jnp.promote_types(step_logps.dtype, jnp.float32)
    at = jnp.where(nodes >= 0, nodes, num_nodes)
    taken = jnp.where(nodes >= 0, step_logps.astype(dtype), -jnp.inf)
    lowest = jnp.full((num_nodes,), -jnp.inf, dtype)

    highest = lowest.at[at].max(taken, mode="drop")
    shift = jnp.where(highest > -jnp.inf, highest, 0)
    mass = jnp.zeros((num_nodes,), dtype).at[at].add(jnp.exp(taken - shift[nodes]), mode="drop")
    count = jnp.maximum(tree.data_count, 1).astype(dtype)
    logp = jnp.where(mass > 0, shift + jnp.log(mass / count), -jnp.inf) / temperature

    child = tree.parent >= 0
    up = jnp.where(child, tree.parent, num_nodes)
    top = lowest.at[up].max(logp, mode="drop")
    top = jnp.where(top > -jnp.inf, top, 0)
    weight = jnp.where(child, jnp.exp(logp - top[tree.parent]), 0)
    total = jnp.zeros((num_nodes,), dtype).at[up].add(weight, mode="drop")
    # Siblings that are all impossible under the policy share equally.
    equal = 1 / jnp.maximum(tree.num_children, 1).astype(dtype)
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)[tree.parent] * weight
    share = jnp.where((total > 0)[tree.parent], share, equal[tree.parent])
    going_on = 1 - tree.terminal_count.astype(dtype) / count
    return jnp.where(child, share * going_on[tree.parent], 0)
