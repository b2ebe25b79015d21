"""From step keys to a `TrajectoryTree`, level by level."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from w2sjax.types import TrajectoryTree

# Up to this many rollouts prefixes are compared pairwise, above by sorting.
_MAX_PAIRWISE_ROLLOUTS = 64
_ODD = np.array([0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35], np.uint32)  # factors of the hash


def build_tree(
    step_keys: chex.Array,
    lengths: chex.Array,
    returns: chex.Array,
    *,
    max_nodes: int,
    mask: chex.Array | None = None,
) -> TrajectoryTree:
    """Merges trajectories by their common prefixes into one tree.

    Two trajectories share the node at depth t exactly when their first t keys are equal. Nodes are
    numbered breadth-first; siblings in the order in which trajectories first take them. So
    permuting the trajectories renumbers nodes and changes no value (beyond the rounding of float
    sums).

    One tree per call; `jax.vmap` over a leading axis gives many. Work O(T·R·min(R, 64)) or, above
    64 rollouts, O(T·R·log R); memory O(R·T + max_nodes).

    Args:
      step_keys: int32 [R, T], any values; what lies past a trajectory's end is ignored.
      lengths: int32 [R], steps of each trajectory, taken into 0 … T.
      returns: float [R]; its dtype becomes that of the sums.
      max_nodes: capacity N, the root included. 1 + R·T always suffices. Where it does not suffice,
        the breadth-first first N nodes are kept, `overflow` counts the others, and trajectories
        are followed as far as their nodes exist (`data_count` still counts them, `terminal_count`
        does not).
      mask: bool [R], False for rows that are no trajectory; all True where None. Equal to deleting
        the rows (trajectory ids stay those of the rows).

    Returns:
      `TrajectoryTree` of capacity N.

    Raises:
      AssertionError: shapes do not fit.
      ValueError: `max_nodes` is below 1.

    Example:
      >>> keys, lengths, returns = jnp.array([[7, 8], [7, 9]]), jnp.array([2, 2]), jnp.ones(2)
      >>> tree = build_tree(keys, lengths, returns, max_nodes=5)
      >>> tree.parent.tolist(), tree.data_count.tolist(), int(tree.num_nodes)
      ([-1, 0, 1, 1, -1], [2, 2, 1, 1, 0], 4)
    """
    chex.assert_rank([step_keys, lengths, returns], [2, 1, 1])
    chex.assert_type([step_keys, lengths], int)
    num_rollouts, num_steps = step_keys.shape
    chex.assert_shape([lengths, returns], (num_rollouts,))
    if max_nodes < 1:
        raise ValueError(f"max_nodes: got {max_nodes}; the root alone needs 1")
    present = jnp.ones((num_rollouts,), bool) if mask is None else mask.astype(bool)
    chex.assert_shape(present, (num_rollouts,))
    returns = returns if jnp.issubdtype(returns.dtype, jnp.floating) else returns.astype(float)
    lengths = jnp.clip(lengths, 0, num_steps)
    lengths = jnp.where(present, lengths, -1)

    group_level = _group_pairwise if num_rollouts <= _MAX_PAIRWISE_ROLLOUTS else _group_by_sorting

    def level(carry, inputs):
        node, base = carry  # virtual node of each trajectory at depth t; number of nodes so far
        key, t = inputs
        alive = lengths > t
        rank, leader, count = group_level(node, key, alive)
        node = jnp.where(alive, base + rank, -1)
        return (node, base + count), (node, leader)

    root = jnp.where(present, 0, -1).astype(jnp.int32)
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    (_, total), (nodes, leaders) = jax.lax.scan(
        level, (root, jnp.int32(1)), (step_keys.T.astype(jnp.int32), steps)
    )
    ids = jnp.concatenate([root[None], nodes])  # [T+1, R], without regard to the capacity
    first = jnp.argmax(present)  # the root's representative
    root_leader = jnp.zeros((num_rollouts,), bool).at[first].set(present[first])
    leaders = jnp.concatenate([root_leader[None], leaders])
    return _collect(ids, leaders, total, step_keys, lengths, returns, max_nodes)


def _group_pairwise(node, key, alive):
    """Groups the R trajectories of one level by (node, key).

    Returns per trajectory the rank of its group in the order (node, first trajectory of the
    group), and whether it is that first trajectory; and the number of groups. Written out, one
    trajectory after the other, which a compiler makes long vectors of; sums over an axis of R are
    three times slower on CPU.
    """
    num = node.shape[0]
    index = jnp.arange(num, dtype=jnp.int32)
    first = jnp.full((num,), num, jnp.int32)
    for j in reversed(range(num)):
        first = jnp.where((node == node[j]) & (key == key[j]) & alive[j], j, first)
    leader = alive & (first == index)
    rank = jnp.zeros((num,), jnp.int32)
    for j in range(num):
        before = (node[j] < node) | ((node == node[j]) & (j < first))
        rank += before & leader[j]
    return rank, leader, jnp.sum(leader, dtype=jnp.int32)


def _group_by_sorting(node, key, alive):
    """The same as `_group_pairwise` in O(R log R).

    Equal trajectories meet in a table by a hash of (node, key), and the earliest in each place
    takes those that are indeed equal to it; the others go on to the next round, with another hash.
    A round settles at least the earliest of each place, so rounds end; three or four are usual.
    Groups are then ranked by sorting one word each (sorting the pairs themselves, with their
    indices, takes ten times as long).
    """
    num = node.shape[0]
    index = jnp.arange(num, dtype=jnp.int32)
    bits = min((4 * num - 1).bit_length(), 31)

    def meet(state):
        first, seed = state
        seeking = alive & (first == num)
        place = (_mix(_mix(key, seed), node) >> (32 - bits)).astype(jnp.int32)
        table = jnp.full((2**bits,), num, jnp.int32)
        table = table.at[jnp.where(seeking, place, 2**bits)].min(index, mode="drop")
        earliest = jnp.minimum(table[place], num - 1)
        equal = (node[earliest] == node) & (key[earliest] == key)
        return jnp.where(seeking & equal, earliest, first), seed + 1

    first, _ = jax.lax.while_loop(
        lambda state: jnp.any(alive & (state[0] == num)),
        meet,
        (jnp.full((num,), num, jnp.int32), jnp.uint32(1)),
    )
    leader = alive & (first == index)
    count = jnp.sum(leader, dtype=jnp.int32)
    in_order = jnp.where(index < count, _leaders_in_order(node, leader), num)
    rank = jnp.zeros((num,), jnp.int32).at[in_order].set(index, mode="drop")
    return rank[jnp.minimum(first, num - 1)], leader, count


def _mix(x, seed):
    """A hash of int32 `x` and `seed`; uint32, the high bits are the better ones."""
    x = (x.astype(jnp.uint32) ^ (seed.astype(jnp.uint32) * _ODD[0])) * _ODD[1]
    return (x ^ (x >> 15)) * _ODD[2]


def _leaders_in_order(node, leader):
    """Indices of the leaders in the order (node, index), then anything. Nodes of a level are less
    than R apart, so both fit into one word up to 2**16 trajectories.
    """
    num = node.shape[0]
    index = jnp.arange(num, dtype=jnp.int32)
    last = jnp.iinfo(jnp.int32).max
    node = jnp.where(leader, node, last)
    bits = (num - 1).bit_length()
    if 2 * bits > 32:
        return jax.lax.sort((node, index), num_keys=2)[1]
    words = ((node - jnp.min(node)) << bits | index).astype(jnp.uint32)
    words = jnp.where(leader, words, np.uint32(2**32 - 1))
    return (jnp.sort(words) & np.uint32(2**bits - 1)).astype(jnp.int32)


def _collect(ids, leaders, total, step_keys, lengths, returns, max_nodes):
    """Reads the node arrays off ids [T+1, R], breadth-first, −1 past the end, not yet cut to N."""
    num_levels, num_rollouts = ids.shape
    num_steps = num_levels - 1
    kept = jnp.where(ids < max_nodes, ids, -1)
    target = jnp.where(kept >= 0, kept, max_nodes)  # max_nodes is out of range: dropped
    # Where each node is first met: flat position in [T+1, R]. Everything else of it is read there.
    position = jnp.arange(num_levels * num_rollouts, dtype=jnp.int32).reshape(ids.shape)
    where = (
        jnp.full((max_nodes,), -1, jnp.int32)
        .at[jnp.where(leaders, target, max_nodes)]
        .set(position, mode="drop", unique_indices=False)
    )
    exists = where >= 0
    depth = jnp.where(exists, where // num_rollouts, 0)
    representative = jnp.where(exists, where % num_rollouts, -1)
    inner = exists & (depth > 0)
    parent = jnp.where(inner, ids.reshape(-1)[jnp.maximum(where - num_rollouts, 0)], -1)
    key_at = jnp.maximum(representative, 0) * num_steps + jnp.maximum(depth - 1, 0)
    flat_keys = step_keys.reshape(-1).astype(jnp.int32)
    root_key = jnp.where(jnp.arange(max_nodes) == 0, -1, 0)
    step_key = jnp.where(inner, flat_keys[key_at], root_key) if num_steps else root_key

    # Several nodes' worth of sums in two scatters: over all positions, and over the ends alone.
    zeros = jnp.zeros((max_nodes,), returns.dtype)
    shape = ids.shape
    data_count = jnp.zeros((max_nodes,), jnp.int32).at[target].add(1, mode="drop")
    return_sum = zeros.at[target].add(jnp.broadcast_to(returns, shape), mode="drop")
    end = jnp.take_along_axis(target, jnp.maximum(lengths, 0)[None, :], axis=0)[0]
    end = jnp.where(lengths >= 0, end, max_nodes)
    terminal_count = jnp.zeros((max_nodes,), jnp.int32).at[end].add(1, mode="drop")
    terminal_return_sum = zeros.at[end].add(returns, mode="drop")

    # Parents do not decrease along breadth-first ids, so siblings are runs.
    node = jnp.arange(max_nodes, dtype=jnp.int32)
    up = jnp.where(inner, parent, max_nodes)
    starts = jnp.concatenate([jnp.ones((1,), bool), up[1:] != up[:-1]])
    ends = jnp.concatenate([up[1:] != up[:-1], jnp.ones((1,), bool)])
    none = jnp.full((max_nodes,), -1, jnp.int32)
    first_child = none.at[jnp.where(starts, up, max_nodes)].set(node, mode="drop")
    last_child = none.at[jnp.where(ends, up, max_nodes)].set(node, mode="drop")
    num_children = jnp.where(first_child >= 0, last_child - first_child + 1, 0)
    num_nodes = jnp.minimum(total, max_nodes)
    return TrajectoryTree(
        parent=parent.at[0].set(-1),
        depth=depth,
        step_key=step_key,
        data_count=data_count,
        return_sum=return_sum,
        terminal_count=terminal_count,
        terminal_return_sum=terminal_return_sum,
        first_child=first_child,
        num_children=num_children,
        representative=representative,
        trajectory_node=kept.T,
        num_nodes=num_nodes,
        overflow=total - num_nodes,
    )


def path_lengths(tree: TrajectoryTree) -> chex.Array:
    """Steps of each trajectory that the tree holds, int32 [R]; −1 for rows that are no trajectory.

    Equal to the given lengths, except where nodes did not fit (`overflow`).
    """
    chex.assert_rank(tree.trajectory_node, 2)
    return jnp.sum(tree.trajectory_node >= 0, axis=1, dtype=jnp.int32) - 1


def end_values(tree: TrajectoryTree) -> tuple[chex.Array, chex.Array]:
    """What ending at a node returns, float [N], and whether it is a place to end, bool [N].

    The mean return of the trajectories that end there. A leaf where none ends (its continuations
    did not fit: `overflow`) stands for the trajectories through it, with their mean return.
    Elsewhere 0 and False.
    """
    chex.assert_rank(tree.parent, 1)
    ended = tree.terminal_count > 0
    leaf = (tree.num_children == 0) & (tree.data_count > 0)
    total = jnp.where(ended, tree.terminal_return_sum, tree.return_sum)
    count = jnp.where(ended, tree.terminal_count, tree.data_count)
    ends = ended | leaf
    value = total / jnp.maximum(count, 1).astype(total.dtype)
    return jnp.where(ends, value, 0), ends
