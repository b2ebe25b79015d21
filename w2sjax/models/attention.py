"""Attention: rotary positions, masks, and grouped-query attention in plain XLA.

Shape letters are the project's (`w2sjax.types`), plus `M` (keys that may be attended to), `C`
(tokens of a chunk), `G` (query heads per key/value head; `H == K * G`) and `E` (width of one head).
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that rows without any visible key stay finite too


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

    The softmax runs in float32. A query that may see no key at all gets zeros, not NaN, and takes
    nothing from any value.

    Args:
      query: float [S, L, K, G, E], already scaled or not: scaling by `E ** -0.5` happens here.
      key: float [S, K, M, E].
      value: float [S, K, M, E].
      mask: bool [S, L, M], True where the query may attend to the key.

    Returns:
      float [S, L, K, G, E] in the dtype of `value`.
    """
    chex.assert_rank([query, key, value, mask], [5, 4, 4, 3])
    scale = query.shape[-1] ** -0.5
    visible = mask[:, None, None]  # [S, 1, 1, L, M]
    scores = jnp.einsum("slkge,skme->skglm", query * scale, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, _MASKED)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    unnormalised = jnp.where(visible, jnp.exp(scores - peak), 0.0)
    total = unnormalised.sum(axis=-1, keepdims=True)
    weights = unnormalised / jnp.where(total > 0.0, total, 1.0)
    return jnp.einsum("skglm,skme->slkge", weights.astype(value.dtype), value)


def write_cache(
    cache: chex.Array, chunk: chex.Array, position: chex.Array, valid: chex.Array
) -> chex.Array:
    """Writes a chunk's keys or values into the cache, in place where the buffer is donated.

    Tokens that are not valid, and positions past the end of the cache, are dropped: nothing is
    clamped onto a position that another token owns.

    Args:
      cache: float [S, K, M, E].
      chunk: float [S, C, K, E].
      position: int32 [S, C], increasing along C.
      valid: bool [S, C].

    Returns:
      The updated cache, float [S, K, M, E].
    """
    num_slots, _, cache_length, _ = cache.shape
    chex.assert_shape([position, valid], chunk.shape[:2])
    slot = jnp.arange(num_slots, dtype=jnp.int32)[:, None]
    index = jnp.where(valid & (position >= 0), position, cache_length)
    return cache.at[slot, :, index].set(chunk.astype(cache.dtype), mode="drop")
