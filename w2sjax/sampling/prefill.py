"""Long chunks of few slots, computed apart from the short chunks of many.

An episode's first chunk (instruction and first observation) is several times as long as the others.
Padding all slots to it would make them pay for their one neighbour that starts: the heads of
long chunks are written here instead, in small groups of slots, and only their tails go into the
common step.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2sjax.types import Policy

TAIL = 16  # tokens of a long chunk that are left to the common step
_SMALLEST_GROUP = 8  # slots per call; an eighth of all slots where that is more


class Remainder(NamedTuple):
    """What is left of a turn's input once the heads are in the cache."""

    cache: Any
    length: np.ndarray  # int32 [S], tokens in the context, a pending one included
    pending: np.ndarray  # int32 [S], −1 for none
    chunk: np.ndarray  # int32 [S, at most TAIL]


def fill_heads(
    params: Any,
    cache: Any,
    length: np.ndarray,
    pending: np.ndarray,
    chunk: np.ndarray,
    chunk_length: np.ndarray,
    fits: np.ndarray,
    *,
    policy: Policy,
) -> tuple[Remainder, np.ndarray]:
    """Writes all but the last `TAIL` tokens of every longer chunk into the cache.

    What a slot computes depends on its own chunk alone.

    Args:
      params: the policy's parameters.
      cache: the policy's cache; it is donated.
      length: int32 [S], tokens in each slot's context, resets done.
      pending: int32 [S], last sampled token that is not yet in the cache; −1 for none.
      chunk: int32 [S, C].
      chunk_length: int32 [S].
      fits: bool [S], slots whose chunk is to be written.
      policy: the model; its caches may have the slot axis anywhere.

    Returns:
      What is left to do, and the chunk lengths that are left, int32 [S] (unchanged where a chunk
      does not fit).
    """
    rows = np.flatnonzero(fits & (chunk_length > TAIL))
    axes = _slot_axes(policy)
    if not rows.size or axes is None:
        return Remainder(cache, length, pending, chunk), chunk_length
    num_slots = len(length)
    rows = rows[np.argsort(chunk_length[rows], kind="stable")]
    group = min(num_slots, max(_SMALLEST_GROUP, num_slots // 8))
    length, pending, left = length.copy(), pending.copy(), chunk_length.copy()
    tails = chunk[:, :TAIL].copy()
    for first in range(0, len(rows), group):
        members = rows[first : first + group]
        heads = []
        for slot in members:
            head = chunk[slot, : left[slot] - TAIL]
            heads.append(head if pending[slot] < 0 else np.insert(head, 0, pending[slot]))
        width = TAIL
        while width < max(map(len, heads)):
            width *= 2
        slots = np.full(group, num_slots, np.int32)  # past the end: not written
        tokens = np.zeros((group, width), np.int32)
        start = np.zeros(group, np.int32)
        last = np.full(group, -1, np.int32)
        for i, (slot, head) in enumerate(zip(members, heads, strict=True)):
            slots[i] = slot
            tokens[i, : len(head)] = head
            start[i] = length[slot] - (pending[slot] >= 0)
            last[i] = len(head) - 1
            tails[slot] = chunk[slot, left[slot] - TAIL : left[slot]]
            length[slot] += left[slot] - TAIL
            pending[slot] = -1
            left[slot] = TAIL
        cache = _fill(params, cache, slots, tokens, start, last, policy=policy)
    return Remainder(cache, length, pending, tails), left


@functools.partial(jax.jit, static_argnames="policy", donate_argnames="cache")
def _fill(
    params: Any,
    cache: Any,
    slots: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    last: jax.Array,
    *,
    policy: Policy,
) -> Any:
    """Decodes tokens [G, W] of some slots [G] only; slots past the end are left out."""
    axes = _slot_axes(policy)
    leaves, treedef = jax.tree.flatten(cache)
    some = [
        jnp.take(leaf, slots, axis=i, mode="clip") for leaf, i in zip(leaves, axes, strict=True)
    ]
    _, some = policy.decode_fn(params, treedef.unflatten(some), tokens, start, last)
    written = [
        leaf.at[(slice(None),) * i + (slots,)].set(new, mode="drop")
        for leaf, new, i in zip(leaves, jax.tree.leaves(some), axes, strict=True)
    ]
    return treedef.unflatten(written)


@functools.cache
def _slot_axes(policy: Policy) -> tuple[int, ...] | None:
    """The slot axis of each leaf of the policy's cache; None where a leaf has not just one."""
    two, three = (
        jax.tree.leaves(jax.eval_shape(functools.partial(policy.init_cache, slots, 64)))
        for slots in (2, 3)
    )
    axes = []
    for a, b in zip(two, three, strict=True):
        differing = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(differing) != 1:
            return None
        axes.append(differing[0])
    return tuple(axes)
