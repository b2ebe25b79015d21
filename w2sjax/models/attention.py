"""Attention: rotary positions, masks, and grouped-query attention in plain XLA.

Shape letters are the project's (`w2sjax.types`), plus `M` (keys that may be attended to), `C`
(tokens of a chunk), `G` (query heads per key/value head; `H == K * G`) and `E` (width of one head).
"""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that rows without any visible key stay finite too
_BLOCK = 192  # least number of queries in a block of `attend_backwards`


def rotary(values: chex.Array, positions: chex.Array, *, theta: float) -> chex.Array:
    """Rotates pairs of features by an angle proportional to the token's position.

    Feature `e` is paired with feature `e + E/2` (the layout of Llama's Hugging Face checkpoints):
    the pair turns by `position * theta ** (-2e / E)` (RoFormer, arXiv 2104.09864).

    Args:
      values: float [S, L, ..., E], E even; any number of head axes between L and E.
      positions: int32 [S, L].
      theta: base of the geometric series of wavelengths.

    Returns:
      Array of the shape and dtype of `values`; computed in float32.
    """
    half = values.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency  # [S, L, E/2]
    angle = angle.reshape(angle.shape[:2] + (1,) * (values.ndim - 3) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(values.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(values.dtype)


def subtree_mask(subtree_end: chex.Array) -> chex.Array:
    """Who may attend to whom within a row: `j <= i < subtree_end[j]`.

    For plain sequences this is causal attention that stops where a sequence ends; for token trees
    laid out depth first it is exactly "j is an ancestor of i, or i itself". A token with
    `subtree_end <= j` (padding has 0) is visible to nobody, not even to itself.

    Args:
      subtree_end: int32 [S, L].

    Returns:
      bool [S, L, L], indexed [row, query i, key j].
    """
    chex.assert_rank(subtree_end, 2)
    index = jnp.arange(subtree_end.shape[1], dtype=jnp.int32)
    causal = index[None, None, :] <= index[None, :, None]
    return causal & (index[None, :, None] < subtree_end[:, None, :])


def cache_mask(position: chex.Array, cache_length: int) -> chex.Array:
    """Which cached keys a chunk may attend to: those at positions up to its own.

    Args:
      position: int32 [S, C], the position of each chunk token in its slot.
      cache_length: positions that the cache holds (M).

    Returns:
      bool [S, C, M].
    """
    return jnp.arange(cache_length, dtype=jnp.int32)[None, None, :] <= position[:, :, None]


def attend(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
    """Softmax attention with grouped queries; keys and values are never repeated per query head.

    Scores are scaled by `E ** -0.5`; the softmax runs in float32. A query that may see no key at
    all gets zeros, not NaN, and takes nothing from any value. Keys come transposed and the queries
    of a group are one matrix: in that layout XLA on CPU runs both products fastest, and without a
    copy of the cache.

    Args:
      query: float [S, L, H, E].
      key: float [S, K, E, M]; query head `h` reads key/value head `h // (H / K)`.
      value: float [S, K, M, E].
      mask: bool [S, L, M], True where the query may attend to the key.

    Returns:
      float [S, L, H, E] in the dtype of `value`.
    """
    rows, length, heads, width = query.shape
    groups, keys = value.shape[1], value.shape[2]
    chex.assert_shape(key, (rows, groups, width, keys))
    chex.assert_shape(value, (rows, groups, keys, width))
    chex.assert_shape(mask, (rows, length, keys))
    query = jnp.swapaxes(query * width**-0.5, 1, 2).reshape(rows, groups, -1, width)
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)  # [S, K, G * L, M]
    scores = scores.reshape(rows, groups, -1, length, keys)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak).reshape(rows, groups, -1, keys)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed = (mixed / total).reshape(rows, heads, length, width)
    mixed = jnp.where(mask.any(axis=-1)[:, None, :, None], mixed, 0.0)
    return jnp.swapaxes(mixed, 1, 2).astype(value.dtype)


def attend_backwards(
    query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array
) -> chex.Array:
    """`attend` within a row, where no query sees a later key: long rows take nearly half the work.

    Queries go in blocks, each with the keys up to its own end alone.

    Args:
      query, key, value: as in `attend`, of the same L tokens.
      mask: bool [S, L, L], False wherever the key is later than the query.

    Returns:
      float [S, L, H, E].
    """
    length = query.shape[1]
    blocks = max(1, length // _BLOCK)
    bounds = [length * block // blocks for block in range(blocks + 1)]
    parts = [
        attend(query[:, start:end], key[..., :end], value[:, :, :end], mask[:, start:end, :end])
        for start, end in itertools.pairwise(bounds)
    ]
    return jnp.concatenate(parts, axis=1) if blocks > 1 else parts[0]


def write_cache(
    cache: tuple[chex.Array, chex.Array],
    key: chex.Array,
    value: chex.Array,
    position: chex.Array,
    valid: chex.Array,
) -> tuple[chex.Array, chex.Array]:
    """Writes a chunk's keys and values into the cache, in place where its buffers are donated.

    Tokens that are not valid, and positions past the end of the cache, are dropped: nothing is
    clamped onto a position that another token owns.

    Args:
      cache: keys float [S, K, E, M] and values float [S, K, M, E].
      key: float [S, C, K, E].
      value: float [S, C, K, E].
      position: int32 [S, C], increasing along C.
      valid: bool [S, C].

    Returns:
      The updated (keys, values).
    """
    keys, values = cache
    num_slots, _, cache_length, _ = values.shape
    chex.assert_shape([position, valid], key.shape[:2])
    slot = jnp.arange(num_slots, dtype=jnp.int32)[:, None]
    index = jnp.where(valid & (position >= 0), position, cache_length)
    keys = keys.at[slot, :, :, index].set(key.astype(keys.dtype), mode="drop")
    values = values.at[slot, :, index].set(value.astype(values.dtype), mode="drop")
    return keys, values
