"""UCT one simulation after the other, all trees in step: memory in the size of the trees alone."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from w2sjax.search.scores import add_compensated, puct, uct
from w2sjax.trees.compress import BranchTable


def slot_visits(
    table: BranchTable,
    priors: chex.Array | None,
    *,
    num_simulations: int,
    exploration_weight: chex.Numeric,
    discount: chex.Numeric,
    width: int,
) -> chex.Array:
    """Visits of every choice after k simulations; arguments and result as in
    `parallel.slot_visits`.
    """
    num_trees, num_branchings = table.node.shape
    num_slots = table.slot_child.shape[1]
    tree = jnp.arange(num_trees, dtype=jnp.int32)
    dtype = table.slot_value.dtype
    flat = num_slots * num_trees  # slots are at s·B + b

    def by_slot(x):
        return x.T.reshape(-1)

    first, number = by_slot(table.first_slot), by_slot(table.num_slots)
    child, end_value = by_slot(table.slot_child), by_slot(table.slot_value)
    discounted = not (isinstance(discount, float | int) and discount == 1)
    if discounted:
        factor = jnp.asarray(discount, dtype) ** by_slot(table.slot_steps).astype(dtype)
    prior = None if priors is None else by_slot(priors.astype(dtype))
    choice = jnp.arange(width, dtype=jnp.int32)[:, None]

    def simulate(_, state):
        counts, sums, carries = state

        def descend(walk):
            depth, node, path = walk
            at = jnp.maximum(node, 0) * num_trees + tree
            slot = jnp.minimum(first[at] + choice, num_slots - 1) * num_trees + tree
            valid = choice < number[at]
            n = jnp.where(valid, counts[slot], 0)
            total = jnp.sum(n, axis=0).astype(dtype)
            if prior is None:
                score = uct(sums[slot], n.astype(dtype), total, exploration_weight)
            else:
                score = puct(sums[slot], n.astype(dtype), total, exploration_weight, prior[slot])
            pick = jnp.argmax(jnp.where(valid, score, -jnp.inf), axis=0).astype(jnp.int32)
            taken = jnp.minimum(first[at] + pick, num_slots - 1) * num_trees + tree
            path = path.at[depth].set(jnp.where(node >= 0, taken, flat))
            return depth + 1, jnp.where(node >= 0, child[taken], -1), path

        start = jnp.where(table.num_branchings > 0, 0, -1)
        path = jnp.full((num_branchings, num_trees), flat, jnp.int32)
        depth, _, path = jax.lax.while_loop(
            lambda walk: jnp.any(walk[1] >= 0), descend, (jnp.int32(0), start, path)
        )

        def back(i, state):
            value, counts, sums, carries = state
            at = path[depth - 1 - i]
            on = at < flat
            source = jnp.where(on, at, 0)
            value = jnp.where(on & (child[source] < 0), end_value[source], value)
            if discounted:
                value = jnp.where(on, value * factor[source], value)
            new_sum, new_carry = add_compensated(sums[source], carries[source], value)
            counts = counts.at[at].add(1, mode="drop")
            sums = sums.at[at].set(new_sum, mode="drop")
            carries = carries.at[at].set(new_carry, mode="drop")
            return value, counts, sums, carries

        zero = jnp.zeros((num_trees,), dtype)
        return jax.lax.fori_loop(0, depth, back, (zero, counts, sums, carries))[1:]

    zeros = jnp.zeros((flat,), dtype)
    counts = jnp.zeros((flat,), jnp.int32)
    counts, *_ = jax.lax.fori_loop(0, num_simulations, simulate, (counts, zeros, zeros))
    return jnp.where(table.slot_mask, counts.reshape(num_slots, num_trees).T, 0)
