"""UCT with all nodes advancing together: k + height sequential steps instead of k × depth.

What a node returns on its m-th visit depends on its own subtree alone, not on when the visit comes:
every branching is a bandit of its own. So all branchings of all trees play at once. One of height h
plays its visit m at step m + h, when the return that it reads, at most the m-th of a child of less
height, is there. In the end the root was visited k times; its counts say how often its children
were really visited; their counts after that many visits, looked up in the record, say it of theirs;
and so on down.

Every branching plays k visits, also those that search would hardly have come to: more work than one
simulation at a time, in far fewer steps, and each step is a few long vector operations.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from w2sjax.search.scores import add_compensated, puct, uct
from w2sjax.trees.compress import BranchTable


def bytes_per_tree(table: BranchTable, num_simulations: int, width: int, itemsize: int) -> int:
    """What the record of one tree takes."""
    num_branchings = table.node.shape[-1]
    rows = num_simulations + num_branchings + 1
    return rows * num_branchings * (width * _count_dtype(rows).dtype.itemsize + itemsize)


def _count_dtype(rows: int):
    return jnp.zeros((), jnp.uint16 if rows < 2**16 else jnp.int32)


def slot_visits(
    table: BranchTable,
    priors: chex.Array | None,
    *,
    num_simulations: int,
    exploration_weight: chex.Numeric,
    discount: chex.Numeric,
    width: int,
) -> chex.Array:
    """Visits of every choice after k simulations.

    Args:
      table: B trees.
      priors: float [B, S] for PUCT, or None for UCT.
      num_simulations: k.
      exploration_weight: w.
      discount: γ; a Python 1.0 saves the multiplications.
      width: C ≥ the most choices that any branching has.

    Returns:
      int32 [B, S].
    """
    num_trees, num_branchings = table.node.shape
    columns = num_branchings * num_trees  # one per branching: p·B + b
    tree = jnp.arange(num_trees, dtype=jnp.int32)
    dtype = table.slot_value.dtype
    rows = num_simulations + num_branchings + 1
    count_dtype = _count_dtype(rows).dtype

    # Tables [C, P, B], from the ragged ones.
    choice = jnp.arange(width, dtype=jnp.int32)[:, None, None]
    slot = table.first_slot.T + choice
    valid = choice < table.num_slots.T
    source = jnp.where(valid, slot, 0) * num_trees + tree

    def padded(x):
        return jnp.take(x.T.reshape(-1), source)

    child = jnp.where(valid, padded(table.slot_child), -1)
    child = jnp.where(child >= 0, child * num_trees + tree, -1)  # as a column
    height = _heights(child)
    last_step = num_simulations + jnp.max(height)

    # The record of returns, row by row, and behind it the values of ends, so that both are read
    # alike:
    # at `base` + (visits so far)·columns, or at −1 − `base`.
    flat_height = height.reshape(-1)
    end_at = rows * columns + jnp.arange(width * columns, dtype=jnp.int32).reshape(child.shape)
    start_at = flat_height[child] * columns + child
    base = jnp.where(child >= 0, start_at, -1 - end_at).reshape(width, columns)
    returns = jnp.concatenate(
        [jnp.zeros((rows * columns,), dtype), padded(table.slot_value).reshape(-1)]
    )
    discounted = not (isinstance(discount, float | int) and discount == 1)
    if discounted:
        factor = jnp.asarray(discount, dtype) ** padded(table.slot_steps).astype(dtype)
        factor = factor.reshape(width, columns)
    if priors is not None:
        prior = padded(priors.astype(dtype)).reshape(width, columns)
    valid = valid.reshape(width, columns)

    def pick_best(step, count, sums):
        n = count.astype(dtype)
        total = jnp.maximum(step - flat_height, 0).astype(dtype)
        if priors is None:
            score = uct(sums, n, total, exploration_weight)
        else:
            score = puct(sums, n, total, exploration_weight, prior)
        score = jnp.where(valid, score, -jnp.inf)
        best, pick = score[0], jnp.zeros((columns,), jnp.int32)
        for j in range(1, width):
            better = score[j] > best
            best = jnp.where(better, score[j], best)
            pick = jnp.where(better, j, pick)
        return pick

    def of_pick(pick, table):
        found = table[0]
        for j in range(1, width):
            found = jnp.where(pick == j, table[j], found)
        return found

    # The choice is carried from step to step: fused with what uses it, it would be made many times.
    def play(state):
        step, pick, count, counts, returns, sums, carries = state
        at = of_pick(pick, base)
        visits = of_pick(pick, count).astype(jnp.int32)
        value = returns[jnp.where(at < 0, -1 - at, at + visits * columns)]
        chosen = (jnp.arange(width)[:, None] == pick) & (step >= flat_height)
        if discounted:
            value = value * of_pick(pick, factor)
        returns = jax.lax.dynamic_update_slice(returns, value, (step * columns,))
        count = count + chosen.astype(count_dtype)
        counts = jax.lax.dynamic_update_index_in_dim(counts, count, step + 1, axis=0)
        new_sums, new_carries = add_compensated(sums, carries, value)
        sums = jnp.where(chosen, new_sums, sums)
        carries = jnp.where(chosen, new_carries, carries)
        pick = pick_best(step + 1, count, sums)
        return step + 1, pick, count, counts, returns, sums, carries

    zeros = jnp.zeros((width, columns), dtype)
    counts = jnp.zeros((rows, width, columns), count_dtype)
    pick = jnp.zeros((columns,), jnp.int32)
    start = (jnp.int32(0), pick, counts[0], counts, returns, zeros, zeros)
    state = jax.lax.while_loop(lambda state: state[0] < last_step, play, start)
    counts = state[3]

    # Down from the root: how often was each branching really visited?
    visits = jnp.zeros((num_branchings, num_trees), jnp.int32)
    visits = visits.at[0].set(jnp.where(table.num_branchings > 0, num_simulations, 0))

    def settle(p, state):
        visits, slots = state
        row = visits[p] + height[p]
        column = p * num_trees + tree
        here = counts[row, jnp.arange(width)[:, None], column].astype(jnp.int32)
        here = jnp.where(choice[:, 0] < table.num_slots.T[p], here, 0)
        to = child[:, p]
        visits = visits.reshape(-1).at[jnp.where(to >= 0, to, columns)].set(here, mode="drop")
        return visits.reshape(num_branchings, num_trees), slots.at[:, p].set(here)

    slots = jnp.zeros((width, num_branchings, num_trees), jnp.int32)
    most = jnp.max(table.num_branchings)
    _, slots = jax.lax.fori_loop(0, most, settle, (visits, slots))
    offset = jnp.arange(table.slot_child.shape[1]) - jnp.take_along_axis(
        table.first_slot, table.slot_branching, axis=1
    )
    found = slots[jnp.minimum(offset, width - 1), table.slot_branching, tree[:, None]]
    return jnp.where(table.slot_mask, found, 0)


def _heights(child: chex.Array) -> chex.Array:
    """Branchings on the longest way down from each one, itself not counted; int32 [P, B]."""
    _, num_branchings, num_trees = child.shape

    def up(i, height):
        p = num_branchings - 1 - i
        below = jnp.where(child[:, p] >= 0, height.reshape(-1)[child[:, p]] + 1, 0)
        return height.at[p].set(jnp.max(below, axis=0))

    zeros = jnp.zeros((num_branchings, num_trees), jnp.int32)
    return jax.lax.fori_loop(0, num_branchings, up, zeros)
