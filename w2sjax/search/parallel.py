"""UCT with all branchings advancing together: k + height sequential steps instead of k × depth.

What a node returns on its m-th visit depends on its own subtree alone, not on when the visit comes:
every branching is a bandit of its own. So none waits until it is asked. Each keeps its next two
returns ready in a queue; while there is room it plays one more visit per step, which takes the next
return of the chosen child out of that child's queue. The root needs no queue and plays k visits.

After t steps a branching of height h has played at least min(t − h, 2 + returns taken from it by
step t − 1) visits: by induction over t and h, since no more than one return is taken per step, and
a chosen child with an empty queue would have played less than that. So the root is done after
k + height steps. By then every branching has played visits that nobody asked for: the two in its
queue, and those that the visits of its parent that nobody asked for took. They are taken back,
latest first, for which each branching notes its latest 2·depth choices, a few bits each.

XLA copies what a step of a loop still reads when its new value is there. So a step carries nothing
that follows from the rest: the choice of the coming visit is the latest one noted, and visits are
the sum of counts. Returns of a few steps are added up plainly and then, corrected for rounding, to
the sums.

Memory is in the size of the tables. Every branching plays as fast as its parent may ask, also where
search would hardly have come to: more work than one simulation at a time, in far fewer steps, each
a few long vector operations. Most branchings have two choices, so tables are grouped by width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from w2sjax.search.scores import add_compensated, puct, uct
from w2sjax.trees.compress import BranchTable

_STEPS = 64  # whose returns are added up plainly, where floats are short
_QUEUE = 2  # returns that a branching keeps ready; with one, every second step would be idle
_NOTHING = -1
_FEW = 2**11  # choices, padding included
_SMALL = 16  # branchings in a tree, padding included
_UNROLLED = 4  # choices up to which code is written out row by row
_MOST_IN_ROUNDS = 32  # choices up to which rows are added, and the best found, vector by vector


class Group(NamedTuple):
    """Branchings of up to `width` choices, more than the group before."""

    width: int
    columns: int  # how many there may be in the batch


def general_groups(num_trees: int, num_branchings: int) -> tuple[Group, ...]:
    """Groups that hold whatever there may be: R trajectories make at most (R − 1) / (c − 1)
    branchings of c choices. One for all where they are few, since each takes time to compile.
    """
    if num_trees * num_branchings * (num_branchings + 1) <= _FEW:
        return (Group(num_branchings + 1, num_trees * num_branchings),)
    groups, least = [], 1
    for width in (2, 4, 8, *(8 * 4**i for i in range(1, 14))):
        groups.append(Group(width, num_trees * max(1, num_branchings // least)))
        if width > num_branchings:
            return tuple(groups)
        least = width
    raise ValueError(f"{num_branchings} branchings in a tree are more than 2**29")


def usual_groups(num_trees: int, num_branchings: int) -> tuple[Group, ...]:
    """Groups that hold what there usually is, in a large batch: a quarter to a half of the work of
    `general_groups`. Small trees have few wide branchings, and none of more than eight choices;
    larger ones have some of every width, and of any width one in each tree (usually its root).
    """
    total = num_trees * num_branchings
    if num_branchings <= _SMALL:
        shares = {2: 0.75, 4: 0.2, 8: 0.03}
        return tuple(Group(width, int(share * total) + 1) for width, share in shares.items())
    shares = {2: 0.6, 4: 0.16, 8: 0.06, 32: 0.025, 128: 0.004}
    groups = [Group(w, int(s * total) + 1) for w, s in shares.items() if w <= num_branchings]
    return (*groups, Group(num_branchings + 1, num_trees))


def fits(num_choices: chex.Array, groups: Sequence[Group]) -> chex.Array:
    """Whether the groups hold branchings of these numbers of choices; bool []."""
    held, least = jnp.max(num_choices) <= groups[-1].width, 1
    for group in groups:
        inside = (num_choices > least) & (num_choices <= group.width)
        held &= jnp.sum(inside) <= group.columns
        least = group.width
    return held


class _Table(NamedTuple):
    """What a group's branchings choose from; n columns of w choices."""

    valid: chex.Array  # bool [w, n]
    source: chex.Array  # int32 [w, n], the child's place in the queues; `nobody` for an end
    end_value: chex.Array  # float [w, n], what an end returns
    factor: chex.Array | None  # float [w, n], discount along the chain
    prior: chex.Array | None  # float [w, n]


class _Bandits(NamedTuple):
    """What a group's branchings remember."""

    count: chex.Array  # float [w, n]
    recent: chex.Array  # float [w, n], sum of the latest returns
    history: chex.Array  # uint32 [words, n], the latest choices, that of the coming visit first


class _Queues(NamedTuple):
    """Of all groups side by side, L in all."""

    front: chex.Array  # float [L], the next return
    second: chex.Array  # float [L], the one after
    ready: chex.Array  # int32 [L], how many there are


def slot_visits(
    table: BranchTable,
    priors: chex.Array | None,
    *,
    num_simulations: int,
    exploration_weight: chex.Numeric,
    discount: chex.Numeric,
    groups: Sequence[Group],
    max_depth: int,
) -> chex.Array:
    """Visits of every choice after k simulations.

    Args:
      table: B trees, whose branchings the groups must hold (`fits`).
      priors: float [B, S] for PUCT, or None for UCT.
      num_simulations: k.
      exploration_weight: w.
      discount: γ; a Python 1.0 saves the multiplications.
      groups: tables by width.
      max_depth: branchings above the deepest one, at most.

    Returns:
      int32 [B, S].
    """
    num_trees, num_branchings = table.node.shape
    dtype = table.slot_value.dtype
    discounted = not (isinstance(discount, float | int) and discount == 1)
    # One column more than asked for: nobody, whose queue is always full and never used.
    groups = [Group(groups[0].width, groups[0].columns + 1), *groups[1:]]
    nobody = groups[0].columns - 1
    length = sum(group.columns for group in groups)

    # Where each branching plays. Branching p of tree b is number p·B + b.
    none = num_branchings * num_trees
    number = table.num_slots.T.reshape(-1)
    place = jnp.full((none,), length, jnp.int32)
    first_count, stride = jnp.zeros((2, none), jnp.int32)  # of its choices in the list of counts
    least, start, counts_before = 1, 0, 0
    for width, columns in groups:
        inside = (number > least) & (number <= width)
        rank = jnp.cumsum(inside, dtype=jnp.int32) - 1
        place = jnp.where(inside, start + rank, place)
        first_count = jnp.where(inside, counts_before + rank, first_count)
        stride = jnp.where(inside, columns, stride)
        least, start, counts_before = width, start + columns, counts_before + width * columns
    branching = jnp.full((length,), none, jnp.int32)
    branching = branching.at[place].set(jnp.arange(none, dtype=jnp.int32), mode="drop")
    exists, is_root = branching < none, branching < num_trees

    def by_choice(x, choice, columns, fill):
        """x [B, S] of the choices of branchings, [w, n]; `fill` where there are none."""
        p, b = columns // num_trees, columns % num_trees
        slot = jnp.minimum(table.first_slot[b, p] + choice, x.shape[1] - 1)
        return jnp.where(choice < number[columns], x[b, slot], fill)

    own = jnp.arange(length, dtype=jnp.int32)
    parent = jnp.full((length,), nobody, jnp.int32)
    tables, start = [], 0
    for width, columns in groups:
        here = branching[start : start + columns]
        choice = jnp.arange(width, dtype=jnp.int32)[:, None]
        held = jnp.minimum(here, none - 1)
        valid = (choice < number[held]) & (here < none)
        child = by_choice(table.slot_child, choice, held, -1)
        goes_on = valid & (child >= 0)
        source = jnp.where(goes_on, place[child * num_trees + held % num_trees], nobody)
        me = jnp.broadcast_to(own[start : start + columns], source.shape)
        parent = parent.at[jnp.where(goes_on, source, length)].set(me, mode="drop")
        factor = prior = None
        if discounted:
            steps = by_choice(table.slot_steps, choice, held, 0).astype(dtype)
            factor = jnp.asarray(discount, dtype) ** steps
        if priors is not None:
            prior = by_choice(priors.astype(dtype), choice, held, 0)
        end_value = by_choice(table.slot_value, choice, held, 0)
        tables.append(_Table(valid, source, end_value, factor, prior))
        start += columns

    def pick_of(table, bandits):
        return _latest(bandits.history, len(table.valid))

    def of_picks(name, all_bandits):
        if getattr(tables[0], name) is None:
            return None
        return jnp.concatenate(
            [
                _row(pick_of(table, bandits), getattr(table, name))
                for table, bandits in zip(tables, all_bandits, strict=True)
            ]
        )

    def scores(table, j, total, count, visits):
        if table.prior is None:
            score = uct(total[j], count[j], visits, exploration_weight)
        else:
            score = puct(total[j], count[j], visits, exploration_weight, table.prior[j])
        return jnp.where(table.valid[j], score, -jnp.inf)

    def play(table, bandits, older, active, value):
        """The visits of one step, and the choices of the next."""
        width = len(table.valid)
        choice = jnp.arange(width, dtype=jnp.int32)[:, None]
        chosen = (choice == pick_of(table, bandits)) & active
        count = bandits.count + chosen
        recent = bandits.recent + jnp.where(chosen, value, 0)
        rest = (older + recent, count, _sum_rows(count))
        if width > _UNROLLED:
            pick = _first_best(scores(table, slice(None), *rest))
        else:
            # Row by row, so that each row is one long vector.
            best = scores(table, 0, *rest)
            pick = jnp.zeros(best.shape, jnp.int32)
            for j in range(1, width):
                score = scores(table, j, *rest)
                better = score > best
                best = jnp.where(better, score, best)
                pick = jnp.where(better, j, pick)
        return _Bandits(count, recent, _note(bandits.history, pick, width, active))

    def advance(sums, state):
        """One step; `sums`: what the recent returns come on top of."""
        queues, all_bandits = state
        source = of_picks("source", all_bandits)
        active = (_take(queues.ready, source) > 0) & (queues.ready < _QUEUE)
        end_value = of_picks("end_value", all_bandits)
        value = jnp.where(source == nobody, end_value, _take(queues.front, source))
        if discounted:
            value = value * of_picks("factor", all_bandits)
        taken = _take(jnp.where(active, source, _NOTHING), parent) == own
        left = queues.ready - taken
        front = jnp.where(taken, queues.second, queues.front)
        new, start = [], 0
        for table, bandits, older in zip(tables, all_bandits, sums, strict=True):
            at = slice(start, start + table.valid.shape[1])
            new.append(play(table, bandits, older, active[at], value[at]))
            start = at.stop
        visits = jnp.concatenate([_sum_rows(bandits.count) for bandits in new])
        ready = jnp.where(is_root, _QUEUE * (visits >= num_simulations), left + active)
        queues = _Queues(
            front=jnp.where(active & (left == 0), value, front),
            second=jnp.where(active, value, queues.second),
            ready=ready.astype(jnp.int32),
        )
        return queues, tuple(new)

    def first(table):
        zeros = jnp.zeros(table.valid.shape, dtype)
        width, columns = table.valid.shape
        words = -(-(_QUEUE * max_depth + 1) // _choices_per_word(width))
        return _Bandits(zeros, zeros, jnp.zeros((words, columns), jnp.uint32))

    def advance_some(block, carried):
        """Up to `block_steps` steps, and their returns into the sums."""
        queues, all_bandits, sums, carries = carried
        number = jnp.minimum(steps - block * block_steps, block_steps)
        queues, all_bandits = jax.lax.fori_loop(
            0, number, lambda _, state: advance(sums, state), (queues, all_bandits)
        )
        new = [
            add_compensated(total, carry, bandits.recent)
            for total, carry, bandits in zip(sums, carries, all_bandits, strict=True)
        ]
        sums, carries = map(tuple, zip(*new, strict=True))
        all_bandits = tuple(
            bandits._replace(recent=jnp.zeros_like(bandits.recent)) for bandits in all_bandits
        )
        return queues, all_bandits, sums, carries

    all_bandits = tuple(map(first, tables))
    idle = ~exists | (is_root & (num_simulations == 0))
    queues = _Queues(
        front=jnp.zeros((length,), dtype),
        second=jnp.zeros((length,), dtype),
        ready=jnp.where(idle, _QUEUE, 0).astype(jnp.int32),
    )
    zeros = tuple(bandits.recent for bandits in all_bandits)
    steps = num_simulations + jnp.max(_depths(parent, nobody, max_depth))
    # In float64 all sums are plain, as Python's.
    block_steps = steps if dtype == jnp.float64 else _STEPS
    blocks = jnp.maximum(steps + block_steps - 1, 0) // jnp.maximum(block_steps, 1)
    queues, all_bandits, *_ = jax.lax.fori_loop(
        0, blocks, advance_some, (queues, all_bandits, zeros, zeros)
    )

    def take_back(state):
        owed, all_bandits = state
        returning = owed > 0
        new, start = [], 0
        for table, bandits in zip(tables, all_bandits, strict=True):
            width, columns = table.valid.shape
            here = returning[start : start + columns]
            history = _forget(bandits.history, width, here)
            choice = jnp.arange(width, dtype=jnp.int32)[:, None]
            undone = (choice == _latest(history, width)) & here
            new.append(bandits._replace(count=bandits.count - undone, history=history))
            start += columns
        source = jnp.where(returning, of_picks("source", new), _NOTHING)
        given_back = _take(source, parent) == own
        return owed - returning + given_back, tuple(new)

    owed = jnp.where(exists & ~is_root, queues.ready, 0)
    _, all_bandits = jax.lax.while_loop(
        lambda state: jnp.any(state[0] > 0), take_back, (owed, all_bandits)
    )

    counts = jnp.concatenate([bandits.count.reshape(-1) for bandits in all_bandits])
    slot = jnp.arange(table.slot_child.shape[1], dtype=jnp.int32)
    offset = slot - jnp.take_along_axis(table.first_slot, table.slot_branching, axis=1)
    column = table.slot_branching * num_trees + jnp.arange(num_trees, dtype=jnp.int32)[:, None]
    found = counts[first_count[column] + offset * stride[column]]
    return jnp.where(table.slot_mask, found, 0).astype(jnp.int32)


def _take(x: chex.Array, index: chex.Array) -> chex.Array:
    """x[index]; indices are known to be inside."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _row(pick: chex.Array, table: chex.Array) -> chex.Array:
    """table[pick[m], m] for all m; without a gather where the table has few rows."""
    if table.shape[0] > _UNROLLED:
        return jnp.take_along_axis(table, pick[None], axis=0, mode="promise_in_bounds")[0]
    found = table[0]
    for j in range(1, table.shape[0]):
        found = jnp.where(pick == j, table[j], found)
    return found


def _first_best(scores: chex.Array) -> chex.Array:
    """argmax over the rows of [w, n], the first of equals; int32 [n]. Neighbours against each other
    until one is left: each round is a few long vectors, which a reduction is not on CPU. (Of many
    choices the rounds take longer to compile than they save.)
    """
    if len(scores) > _MOST_IN_ROUNDS:
        return jnp.argmax(scores, axis=0).astype(jnp.int32)
    pick = jnp.broadcast_to(jnp.arange(len(scores), dtype=jnp.int32)[:, None], scores.shape)
    while len(scores) > 1:
        if len(scores) % 2:
            scores = jnp.pad(scores, ((0, 1), (0, 0)), constant_values=-jnp.inf)
            pick = jnp.pad(pick, ((0, 1), (0, 0)))
        better = scores[1::2] > scores[::2]
        pick = jnp.where(better, pick[1::2], pick[::2])
        scores = jnp.where(better, scores[1::2], scores[::2])
    return pick[0]


def _depths(parent: chex.Array, nobody: int, max_depth: int) -> chex.Array:
    """Branchings above each one; int32 [L]. Paths are followed in strides of 1, 2, 4, …"""
    depth = (parent != nobody).astype(jnp.int32)
    for _ in range(max_depth.bit_length()):
        depth = depth + depth[parent]
        parent = parent[parent]
    return depth


def _sum_rows(x: chex.Array) -> chex.Array:
    """Sum over the rows of [w, n]; where they are few, one after the other, as long vectors."""
    if len(x) > _MOST_IN_ROUNDS:
        return jnp.sum(x, axis=0)
    total = x[0]
    for row in x[1:]:
        total = total + row
    return total


def _bits(width: int) -> int:
    return (width - 1).bit_length()


def _choices_per_word(width: int) -> int:
    return 32 // _bits(width)


def _latest(history: chex.Array, width: int) -> chex.Array:
    """The latest choice, int32 [n]: at the low end of the first word."""
    return (history[0] & jnp.uint32(2 ** _bits(width) - 1)).astype(jnp.int32)


def _note(history: chex.Array, pick: chex.Array, width: int, active: chex.Array) -> chex.Array:
    """The history with one more choice where active."""
    bits, last = _bits(width), _bits(width) * (_choices_per_word(width) - 1)
    mask = jnp.uint32(2**bits - 1)
    moving = (history[:-1] >> last) & mask
    moving = jnp.concatenate([pick[None].astype(jnp.uint32), moving])
    return jnp.where(active, (history << bits) | moving, history)


def _forget(history: chex.Array, width: int, active: chex.Array) -> chex.Array:
    """The history without its latest choice where active: undoes `_note`."""
    bits, last = _bits(width), _bits(width) * (_choices_per_word(width) - 1)
    mask = jnp.uint32(2**bits - 1)
    moving = jnp.concatenate([history[1:] & mask, jnp.zeros_like(history[:1])]) << last
    older = (history >> bits) & jnp.uint32(2**last - 1)
    return jnp.where(active, older | moving, history)
