"""Where in a tree to begin the next rollouts."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from w2sjax.search.scores import uct
from w2sjax.trees.compress import compress_chains
from w2sjax.types import TrajectoryTree


def choose_starts(
    tree: TrajectoryTree,
    node_values: chex.Array,
    start: chex.Array,
    *,
    num_starts: int,
    exploration_weight: float = 1.0,
    max_depth: int | None = None,
) -> chex.Array:
    """Chooses the nodes that the next rollouts begin at, by UCT over the parts of the tree.

    A chain is a longest run of nodes with one child each, with the branching or the leaf that it
    leads to; what is known of its nodes is the same, so it is one place. The walk begins at the
    root's chain. At a chain the choices are to begin here, and every child of its last node that is
    not a leaf, in that order; the one of highest score is taken, ties going to the first:

        begin here:  Q(chain) + w·sqrt(ln Σ / n), n rollouts having begun in the chain; +∞ for n = 0
        child c:     Q(c)     + w·sqrt(ln Σ / n), n rollouts having gone through c

    Σ is the sum of all n of the choices, Q(c) the value of the node, Q(chain) that of the last node
    of the chain that a rollout may begin at. The walk ends where beginning here is chosen: at the
    node of the chain where fewest rollouts began, of those at the one next to the middle, of two
    such at the upper one. So chains are halved and halved again. Nothing begins at a leaf (the
    episode is over there) or below `max_depth`; where that leaves no node, at the root.

    The nodes are chosen one after the other, each choice counting as a rollout through the nodes
    down to its own, with a return that leaves their values as they are. (Kocsis & Szepesvári 2006,
    with beginning a rollout as a choice of its own.)

    Args:
      tree: one tree of capacity N; `jax.vmap` for many.
      node_values: float [N], a backup.
      start: int32 [R], depth that each trajectory began at; the steps before are another's.
      num_starts: k.
      exploration_weight: w, in units of return.
      max_depth: the deepest node to begin at; no limit where None.

    Returns:
      int32 [k], nodes; 0 for a tree without trajectories.

    Example:
      >>> from w2sjax.trees import build_tree
      >>> keys, ones = jnp.array([[1, 2, 3, 4], [5, 2, 3, 4]]), jnp.ones(2, int)
      >>> tree = build_tree(keys, 4 * ones, jnp.eye(2)[0], max_nodes=9)
      >>> values = tree.return_sum / jnp.maximum(tree.data_count, 1)
      >>> starts = choose_starts(tree, values, 0 * ones, num_starts=2)
      >>> starts.tolist(), tree.depth[starts].tolist(), tree.representative[starts].tolist()
      ([3, 1], [2, 1], [0, 0])
    """
    chex.assert_rank([tree.parent, tree.trajectory_node], [1, 2])
    num_nodes = tree.parent.shape[0]
    chex.assert_shape(node_values, (num_nodes,))
    chex.assert_shape(start, tree.trajectory_node.shape[:1])
    dtype = jnp.promote_types(node_values.dtype, jnp.float32)
    values = node_values.astype(dtype)
    index = jnp.arange(num_nodes, dtype=jnp.int32)
    chain = compress_chains(tree, stop_as_child=False).chain_end
    allowed = tree.num_children > 0
    if max_depth is not None:
        allowed &= tree.depth <= max_depth

    # Of each chain, at the index of its last node: the depths between which rollouts may begin.
    depth = tree.depth
    at = jnp.where(allowed, chain, num_nodes)
    highest = jnp.full((num_nodes,), jnp.iinfo(jnp.int32).max).at[at].min(depth, mode="drop")
    deepest = jnp.full((num_nodes,), -1, jnp.int32).at[at].max(depth, mode="drop")
    at_deepest = jnp.where(allowed & (depth == deepest[chain]), chain, num_nodes)
    here_value = jnp.zeros((num_nodes,), dtype).at[at_deepest].set(values, mode="drop")
    middle = (highest[chain] + deepest[chain]) // 2
    off = 2 * jnp.abs(depth - middle) + (depth > middle)

    first = jnp.take_along_axis(tree.trajectory_node, jnp.maximum(start, 0)[:, None], axis=1)[:, 0]
    began = jnp.zeros((num_nodes,), jnp.int32)
    began = began.at[jnp.where(first >= 0, first, num_nodes)].add(1, mode="drop")
    is_child = allowed & (tree.parent >= 0)
    up = jnp.where(is_child, tree.parent, num_nodes)

    def choose(counts, _):
        began, through = counts
        here = jnp.zeros((num_nodes,), jnp.int32).at[chain].add(began)
        total = here.at[up].add(through, mode="drop").astype(dtype)
        n = through.astype(dtype)
        score = uct(values * n, n, total[tree.parent], exploration_weight)
        n = here.astype(dtype)
        here_score = uct(here_value * n, n, total, exploration_weight)
        best = jnp.full((num_nodes,), -jnp.inf, dtype).at[up].max(score, mode="drop")
        is_best = is_child & (score == best[tree.parent])
        choice = jnp.full((num_nodes,), num_nodes, jnp.int32)
        choice = choice.at[jnp.where(is_best, up, num_nodes)].min(index, mode="drop")
        stays = (choice == num_nodes) | (here_score >= best)

        end = jax.lax.while_loop(lambda end: ~stays[end], lambda end: chain[choice[end]], chain[0])
        least = jnp.where(allowed & (chain == end), began, jnp.iinfo(jnp.int32).max)
        fewest = allowed & (chain == end) & (began == jnp.min(least))
        node = jnp.argmin(jnp.where(fewest, off, jnp.iinfo(jnp.int32).max)).astype(jnp.int32)
        node = jnp.where(jnp.any(fewest), node, 0)

        def climb(state):
            at, through = state
            return tree.parent[at], through.at[at].add(1)

        _, through = jax.lax.while_loop(lambda state: state[0] >= 0, climb, (node, through))
        return (began.at[node].add(1), through), node

    _, nodes = jax.lax.scan(choose, (began, tree.data_count), length=num_starts)
    return nodes
