"""A tree without its unary chains: what search needs of it, in O(R) memory, and the way back."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from w2sjax.trees.build import end_values
from w2sjax.types import TrajectoryTree


@chex.dataclass(frozen=True)
class BranchTable:
    """The branchings of one tree, and their choices. Letters: P branchings, S choices (slots), N
    nodes.

    A branching is a node with two choices or more; a choice is a child, followed down its chain to
    the next branching or leaf, or stopping. R trajectories make at most R − 1 branchings and 2R − 2
    choices. Branchings are in breadth-first order, so a choice leads to a later branching than its
    own; the choices of a branching are contiguous: stopping, where it is one, then the children in
    order.
    """

    node: chex.Array  # int32 [P], the tree's node; 0 on padding
    first_slot: chex.Array  # int32 [P]
    num_slots: chex.Array  # int32 [P]; 0 on padding
    slot_branching: chex.Array  # int32 [S], branching that the choice belongs to; 0 on padding
    slot_child: chex.Array  # int32 [S], branching that it leads to; −1 where it ends the path
    slot_value: chex.Array  # float [S], what the end returns; 0 where `slot_child` ≥ 0
    slot_steps: chex.Array  # int32 [S], steps to the end of the chain; 0 for stopping
    # int32 [S], first node of the chain; the branching's own node for stopping
    slot_entry: chex.Array
    slot_end: chex.Array  # int32 [S], last node of the chain
    slot_stop: chex.Array  # bool [S]
    slot_mask: chex.Array  # bool [S]
    # int32 [N], last node of the chain that each node lies in (itself at its end)
    chain_end: chex.Array
    num_branchings: chex.Array  # int32 []


def compress_chains(tree: TrajectoryTree, *, stop_as_child: bool = True) -> BranchTable:
    """Removes the nodes where there is nothing to choose. Exact for every search that walks from
    the root.

    Args:
      tree: one tree of capacity N over R trajectories; `jax.vmap` for many.
      stop_as_child: whether stopping is a choice where trajectories end at an inner node.

    Returns:
      `BranchTable`. `chain_end` leads back: what search says of a chain's end holds for all its
      nodes.
    """
    chex.assert_rank([tree.parent, tree.trajectory_node], [1, 2])
    num_nodes = tree.parent.shape[0]
    num_rollouts, levels = tree.trajectory_node.shape
    num_branchings = max(1, min(num_rollouts - 1, num_nodes))
    num_slots = max(1, 2 * num_rollouts - 2)
    values, _ = end_values(tree)
    stop = (tree.terminal_count > 0) & (tree.num_children > 0) & stop_as_child
    choices = tree.num_children + stop
    index = jnp.arange(num_nodes, dtype=jnp.int32)

    # Chains are followed in strides of 1, 2, 4, …
    chain_end = jnp.where(choices == 1, tree.first_child, index)
    for _ in range(max(levels - 2, 0).bit_length()):
        chain_end = chain_end[chain_end]

    branches = choices > 1
    rank = jnp.cumsum(branches, dtype=jnp.int32) - 1
    at = jnp.where(branches, rank, num_branchings)
    node = jnp.zeros((num_branchings,), jnp.int32).at[at].set(index, mode="drop")
    count = rank[-1] + 1
    width = jnp.where(jnp.arange(num_branchings) < count, choices[node], 0)
    past = jnp.cumsum(width, dtype=jnp.int32)
    first_slot = past - width

    slot = jnp.arange(num_slots, dtype=jnp.int32)
    mask = slot < past[-1]
    begins = jnp.zeros((num_slots,), jnp.int32).at[first_slot].add(1, mode="drop")
    owner = jnp.where(mask, jnp.cumsum(begins, dtype=jnp.int32) - 1, 0)
    owner_node = node[owner]
    offset = slot - first_slot[owner] - stop[owner_node]
    is_stop = mask & (offset < 0)
    entry = jnp.where(is_stop, owner_node, tree.first_child[owner_node] + offset)
    entry = jnp.where(mask, entry, 0)
    end = jnp.where(is_stop, owner_node, chain_end[entry])
    goes_on = mask & branches[end] & ~is_stop
    return BranchTable(
        node=node,
        first_slot=first_slot,
        num_slots=width,
        slot_branching=owner,
        slot_child=jnp.where(goes_on, rank[end], -1),
        slot_value=jnp.where(mask & ~goes_on, values[end], 0),
        slot_steps=jnp.where(mask, tree.depth[end] - tree.depth[owner_node], 0),
        slot_entry=entry,
        slot_end=end,
        slot_stop=is_stop,
        slot_mask=mask,
        chain_end=chain_end,
        num_branchings=count,
    )
