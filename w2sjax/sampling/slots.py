"""Which slots are computed together: shared prefixes are copied, long chunks cut, groups formed.

All of this is arithmetic on the host about what the device shall do. What a slot's tokens are
depends on none of it, beyond float rounding of the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2sjax.types import Policy

LEAST_SHARED = 16  # tokens of a common prefix from which copying pays
WIDTHS = (16, 32, 128, 512)  # tokens that pieces are padded to; few, since each is a program
_SMALLEST_GROUP = 4  # slots per call; an eighth of all slots where that is more
_ALONE = 128  # from this width, a single piece is computed alone rather than in a group with gaps
_CALL = 32  # what a call costs beside its tokens, in tokens


class Copy(NamedTuple):
    """The first tokens of a slot's context are those of another slot."""

    source: int
    target: int
    tokens: int


class Piece(NamedTuple):
    """Some tokens of one slot, to be computed in one call."""

    slot: int
    start: int  # position of the first token
    tokens: np.ndarray  # int32 [n]
    last: bool  # whether the slot's input ends here, so that the first answer token is drawn


def plan_copies(
    prompts: dict[int, np.ndarray], contexts: np.ndarray, cached: np.ndarray
) -> list[tuple[list[Copy], list[int]]]:
    """How slots that start an episode get the parts of their prompts that others hold already.

    Slots come in waves. A wave copies from what is in the cache then, and computes the rest; a slot
    that shares more with another one of its wave than with anything cached waits for the next.

    Args:
      prompts: slot → tokens int32 [n] of its new context, which starts empty.
      contexts: int32 [S, M], tokens that each slot's cache holds; those of `prompts` hold nothing.
      cached: int32 [S], how many of them are valid.

    Returns:
      Per wave its copies and its slots.
    """
    valid = cached.copy()
    contexts = contexts.copy()
    valid[list(prompts)] = 0
    waiting, waves = sorted(prompts), []
    while waiting:
        copies: list[Copy] = []
        leaders: list[int] = []
        later: list[int] = []
        for slot in waiting:
            prompt = prompts[slot]
            among = max((_shared(prompt, prompts[other]) for other in leaders), default=0)
            shared = _shared_with_all(prompt, contexts, valid)
            source = int(shared.argmax())
            if among >= shared[source] + LEAST_SHARED:
                later.append(slot)
                continue
            leaders.append(slot)
            if shared[source] >= LEAST_SHARED:
                copies.append(Copy(source, slot, int(shared[source])))
        for slot in leaders:
            size = len(prompts[slot])
            contexts[slot, :size], valid[slot] = prompts[slot], size
        waves.append((copies, leaders))
        waiting = later
    return waves


def _shared(prompt: np.ndarray, other: np.ndarray) -> int:
    """First tokens that two prompts have in common, fewer than all of the first."""
    size = min(len(prompt) - 1, len(other))
    differs = prompt[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size


def _shared_with_all(prompt: np.ndarray, contexts: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """int [S]: `_shared` with what each slot holds."""
    size = min(len(prompt) - 1, contexts.shape[1])
    differs = np.ones((len(contexts), size + 1), bool)  # at the end they count as different
    differs[:, :size] = contexts[:, :size] != prompt[:size]
    return np.minimum(differs.argmax(axis=1), valid)


def cut(slot: int, start: int, tokens: np.ndarray) -> list[Piece]:
    """A slot's input in pieces that fill one of `WIDTHS` each, or nearly."""
    pieces, first = [], 0
    while first < len(tokens):
        left = len(tokens) - first
        width = _cheapest(left)[1] if left < 2 * WIDTHS[-1] else WIDTHS[-1]
        pieces.append(Piece(slot, start + first, tokens[first : first + width], False))
        first += width
    pieces[-1] = pieces[-1]._replace(last=True)
    return pieces


@functools.cache
def _cheapest(length: int) -> tuple[int, int]:
    """(what computing so many tokens costs, in tokens; width of the first piece)."""
    if length <= 0:
        return 0, 0
    costs = [(_CALL + width + _cheapest(length - width)[0], width) for width in WIDTHS[::-1]]
    return min(costs, key=lambda cost: cost[0])


def group_size(num_slots: int) -> int:
    """Slots of a call that does not compute all of them."""
    return min(num_slots, max(_SMALLEST_GROUP, num_slots // 8))


def width_of(pieces: Sequence[Piece]) -> int:
    """Tokens that a call with these pieces is padded to."""
    longest = max(len(piece.tokens) for piece in pieces)
    return next(width for width in WIDTHS if width >= longest)


def form_groups(pieces: Sequence[Piece], num_slots: int) -> list[tuple[int, list[Piece]]]:
    """Divides one piece each of some slots into calls, by length; or puts all into one call, where
    that pads little more than calls of few slots each would.

    Returns:
      Per call for how many slots it is made, all of them in order or so many as it has pieces or
      more, and its pieces.
    """
    ordered = sorted(pieces, key=lambda piece: (len(piece.tokens), piece.slot))
    few = group_size(num_slots)
    groups = [ordered[first : first + few] for first in range(0, len(ordered), few)]
    sizes = [1 if len(own) == 1 and width_of(own) >= _ALONE else few for own in groups]
    apart = sum(size * width_of(own) for size, own in zip(sizes, groups, strict=True))
    if num_slots * width_of(ordered) <= 1.25 * apart:
        return [(num_slots, ordered)]
    return list(zip(sizes, groups, strict=True))


@functools.partial(jax.jit, static_argnames="policy", donate_argnames="cache")
def copy_slots(cache: Any, source: jax.Array, target: jax.Array, *, policy: Policy) -> Any:
    """Gives slots `target` [G] all that slots `source` [G] hold; targets past the end are left
    out."""
    axes = slot_axes(policy)
    leaves, treedef = jax.tree.flatten(cache)
    return treedef.unflatten(
        write_slots(leaf, target, take_slots(leaf, source, axis), axis)
        for leaf, axis in zip(leaves, axes, strict=True)
    )


def take_slots(leaf: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
    """Some slots of a part of the cache."""
    return jnp.take(leaf, slots, axis=axis, mode="clip")


def write_slots(leaf: jax.Array, slots: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    """The part of the cache with some slots replaced; those past the end are not written."""
    return leaf.at[(slice(None),) * axis + (slots,)].set(values, mode="drop")


@functools.cache
def slot_axes(policy: Policy) -> tuple[int, ...] | None:
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
