"""UCT with all nodes advancing together: k + height sequential steps instead of k × depth.

What a node returns on its m-th visit depends on its own subtree alone, not on when the visit comes:
every branching is a bandit of its own. So all branchings of all trees play at once. One of height h
plays its visit m at step m + h, when the return that it reads, at most the m-th of a child of less
height, is there. In the end the root was visited k times; its counts say how often its children
were really visited; their counts after that many visits, looked up in the record, say it of theirs;
and so on down.

Every branching plays k visits, also those that search would hardly have come to: more work than one
simulation at a time, in far fewer steps, and each step is a few long vector operations. Most
branchings have two choices, so the few wider ones are a table of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from w2sjax.search.scores import add_compensated, puct, uct
from w2sjax.trees.compress import BranchTable


class Shape(NamedTuple):
    """Static sizes of the table of wide branchings."""

    width: int  # the most choices that any branching has
    per_tree: int  # wide branchings (of 3 choices or more) per tree, on average over a batch


class _Play(NamedTuple):
    """The state of a table of branchings; M columns of C choices."""

    pick: chex.Array  # int32 [M], the choice of the coming visit
    count: chex.Array  # float [C, M]
    total: chex.Array  # float [C, M], sum of returns
    carry: chex.Array  # float [C, M], rounding of the sums
    record: chex.Array  # uint16 or int32 [rows, C, M], counts before each step


def bytes_per_tree(table: BranchTable, num_simulations: int, shape: Shape) -> int:
    """What the record of one tree takes."""
    num_branchings = table.node.shape[-1]
    rows = num_simulations + num_branchings + 1
    counts = 2 * num_branchings + shape.width * shape.per_tree
    returns = num_branchings + shape.per_tree
    itemsize = table.slot_value.dtype.itemsize
    return rows * (counts * _count_dtype(rows).itemsize + returns * itemsize)


def _count_dtype(rows: int) -> jnp.dtype:
    return jnp.dtype(jnp.uint16 if rows < 2**16 else jnp.int32)


def slot_visits(
    table: BranchTable,
    priors: chex.Array | None,
    *,
    num_simulations: int,
    exploration_weight: chex.Numeric,
    discount: chex.Numeric,
    shape: Shape,
) -> chex.Array:
    """Visits of every choice after k simulations.

    Args:
      table: B trees. No branching may have more choices than `shape.width`, and no more branchings
        than B·`shape.per_tree` may have over two.
      priors: float [B, S] for PUCT, or None for UCT.
      num_simulations: k.
      exploration_weight: w.
      discount: γ; a Python 1.0 saves the multiplications.
      shape: see `Shape`.

    Returns:
      int32 [B, S].
    """
    num_trees, num_branchings = table.node.shape
    columns = num_branchings * num_trees  # one per branching: p·B + b
    tree = jnp.arange(num_trees, dtype=jnp.int32)
    dtype = table.slot_value.dtype
    rows = num_simulations + num_branchings + 1
    count_dtype = _count_dtype(rows)

    # Tables [C, P·B], from the ragged ones.
    choice = jnp.arange(shape.width, dtype=jnp.int32)[:, None, None]
    slot = table.first_slot.T + choice
    valid = choice < table.num_slots.T
    source = jnp.where(valid, slot, 0) * num_trees + tree

    def padded(x):
        return jnp.take(x.T.reshape(-1), source).reshape(shape.width, columns)

    child = jnp.where(valid.reshape(shape.width, columns), padded(table.slot_child), -1)
    child = jnp.where(child >= 0, child * num_trees + jnp.tile(tree, num_branchings), -1)
    height = _heights(child.reshape(valid.shape))
    last_step = num_simulations + jnp.max(height)
    flat_height = height.reshape(-1)

    # Where each branching plays: the first `columns` places are those of the narrow ones.
    wide = table.num_slots.T.reshape(-1) > 2
    num_wide = shape.per_tree * num_trees
    place = jnp.where(wide, columns + jnp.cumsum(wide) - 1, jnp.arange(columns)).astype(jnp.int32)
    wide_columns = jnp.nonzero(wide, size=num_wide, fill_value=0)[0]
    length = columns + num_wide  # of a row of the record of returns

    # The record of returns: what the visits of step t returned is its row t + 1. The n-th visit of
    # a branching is at `base` + n·length of the flat record.
    base = jnp.where(child >= 0, (flat_height[child] + 1) * length + place[child], -1)
    discounted = not (isinstance(discount, float | int) and discount == 1)
    tables = {
        "base": base,
        "end_value": padded(table.slot_value),
        "valid": valid.reshape(shape.width, columns),
        "height": flat_height[None],
    }
    if discounted:
        tables["factor"] = jnp.asarray(discount, dtype) ** padded(table.slot_steps).astype(dtype)
    if priors is not None:
        tables["prior"] = padded(priors.astype(dtype))
    narrow = {name: x[:2] for name, x in tables.items()}
    # Not wider than the table, where no branching has more than two choices.
    tables = [narrow] + ([{n: x[:, wide_columns] for n, x in tables.items()}] if num_wide else [])

    def scores(table, j, n, total, visits):
        if priors is None:
            score = uct(total, n, visits, exploration_weight)
        else:
            score = puct(total, n, visits, exploration_weight, table["prior"][j])
        return jnp.where(table["valid"][j], score, -jnp.inf)

    def visit(step, returns, table, play):
        """One visit of every branching of a table; the returns of the visits, and the new state."""
        width = table["base"].shape[0]
        at = _of_pick(play.pick, table["base"])
        n = _of_pick(play.pick, play.count).astype(jnp.int32)
        value = returns.reshape(-1)[jnp.where(at < 0, 0, at + n * length)]
        value = jnp.where(at < 0, _of_pick(play.pick, table["end_value"]), value)
        if discounted:
            value = value * _of_pick(play.pick, table["factor"])
        visits = step - table["height"][0]
        chosen = (jnp.arange(width)[:, None] == play.pick) & (visits >= 0)
        count = play.count + chosen
        record = jax.lax.dynamic_update_index_in_dim(
            play.record, count.astype(count_dtype), step + 1, axis=0
        )
        total, carry = add_compensated(play.total, play.carry, value)
        total = jnp.where(chosen, total, play.total)
        carry = jnp.where(chosen, carry, play.carry)
        # The next choice is made here and carried to the next step: fused with what uses it, it
        # would be made many times. Row by row, so that each row is one long vector.
        visits = jnp.maximum(visits + 1, 0).astype(dtype)
        best = scores(table, 0, count[0], total[0], visits)
        pick = jnp.zeros(best.shape, jnp.int32)
        for j in range(1, width):
            score = scores(table, j, count[j], total[j], visits)
            better = score > best
            best = jnp.where(better, score, best)
            pick = jnp.where(better, j, pick)
        return value, _Play(pick=pick, count=count, total=total, carry=carry, record=record)

    def advance(state):
        step, row, returns, plays = state
        # Written a step late, before all reads: so the record never needs a copy.
        returns = jax.lax.dynamic_update_index_in_dim(returns, row, step, axis=0)
        done = [visit(step, returns, *pair) for pair in zip(tables, plays, strict=True)]
        row = jnp.concatenate([value for value, _ in done])
        return step + 1, row, returns, tuple(play for _, play in done)

    def first(table):
        zeros = jnp.zeros(table["base"].shape, dtype)
        return _Play(
            pick=jnp.zeros(zeros.shape[1:], jnp.int32),
            count=zeros,
            total=zeros,
            carry=zeros,
            record=jnp.zeros((rows, *zeros.shape), count_dtype),
        )

    returns = jnp.zeros((rows, length), dtype)
    start = (jnp.int32(0), returns[0], returns, tuple(map(first, tables)))
    *_, plays = jax.lax.while_loop(lambda state: state[0] < last_step, advance, start)

    # Down from the root: how often was each branching really visited?
    visits = jnp.zeros((columns,), jnp.int32)
    visits = visits.at[tree].set(jnp.where(table.num_branchings > 0, num_simulations, 0))
    child = child.reshape(valid.shape)

    def settle(p, state):
        visits, slots = state
        column = p * num_trees + tree
        row = visits[column] + height[p]
        here = plays[0].record[row, jnp.arange(min(2, shape.width))[:, None], column]
        here = jnp.pad(here, ((0, shape.width - here.shape[0]), (0, 0)))
        if num_wide:
            at = jnp.maximum(place[column] - columns, 0)
            of_wide = plays[1].record[row, jnp.arange(shape.width)[:, None], at]
            here = jnp.where(wide[column], of_wide, here)
        here = jnp.where(choice[:, 0] < table.num_slots.T[p], here.astype(jnp.int32), 0)
        to = child[:, p]
        visits = visits.at[jnp.where(to >= 0, to, columns)].set(here, mode="drop")
        return visits, slots.at[:, p].set(here)

    slots = jnp.zeros(valid.shape, jnp.int32)
    _, slots = jax.lax.fori_loop(0, jnp.max(table.num_branchings), settle, (visits, slots))
    offset = jnp.arange(table.slot_child.shape[1], dtype=jnp.int32) - jnp.take_along_axis(
        table.first_slot, table.slot_branching, axis=1
    )
    found = slots[jnp.minimum(offset, shape.width - 1), table.slot_branching, tree[:, None]]
    return jnp.where(table.slot_mask, found, 0)


def _of_pick(pick: chex.Array, table: chex.Array) -> chex.Array:
    """table[pick[m], m] for all m, without a gather: tables have few rows."""
    found = table[0]
    for j in range(1, table.shape[0]):
        found = jnp.where(pick == j, table[j], found)
    return found


def _heights(child: chex.Array) -> chex.Array:
    """Branchings on the longest way down from each one, itself not counted; int32 [P, B]."""
    _, num_branchings, num_trees = child.shape

    def up(i, height):
        p = num_branchings - 1 - i
        below = jnp.where(child[:, p] >= 0, height.reshape(-1)[child[:, p]] + 1, 0)
        return height.at[p].set(jnp.max(below, axis=0))

    zeros = jnp.zeros((num_branchings, num_trees), jnp.int32)
    return jax.lax.fori_loop(0, num_branchings, up, zeros)
