"""Attention within rows of token tries, at a cost that follows what is visible.

Depth first, the queries that see a token are its own subtree: one stretch of the row that begins
at the token. So the queries that see any token of a block of keys lie in one stretch too, from the
block's first token to the furthest end of its subtrees. Keys are gone through block by block, each
with its stretch of queries cut into tiles; sums and peaks of the softmax are carried along (online
softmax, arXiv 1805.02867), and the backward pass computes weights again from the log-sum-exp of
each query (FlashAttention-2, arXiv 2307.08691). No mask and no scores of a whole row exist.

This is the form for any backend, in plain XLA; kernels for accelerators are in `tree_kernels`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from w2sjax.parallel import on_each_device, row_axes, tensor_axis

_MASKED = -1e30
_NO_PEAK = -1e29  # above _MASKED, so that what is masked weighs exp(−1e30 + 1e29) = 0


class Options(NamedTuple):
    """What is the same for all rows."""

    window: int | None  # how many tokens each sees, itself included; None for all
    scale: float  # multiplies the scores
    softcap: float | None  # c, scores become c·tanh(score / c)


def attend_tree(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    positions: chex.Array,
    subtree_end: chex.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> chex.Array:
    """Softmax attention of each token to its ancestors and itself.

    Token i sees token j of its row exactly when `j <= i < subtree_end[j]` and, with a window,
    `positions[i] - positions[j] < window`. A token that sees nothing (padding) gets zeros.

    Args:
      query: float [S, L, H, E].
      key: float [S, L, K, E]; query head `h` reads key/value head `h // (H / K)`.
      value: float [S, L, K, E].
      positions: int32 [S, L], of each token on its own path; read where there is a window.
      subtree_end: int32 [S, L].
      window: tokens that each sees, itself included; None for all.
      scale: multiplies the scores; `E ** -0.5` where None.
      softcap: c, scores become c·tanh(score / c).

    Returns:
      float [S, L, H, E] in the dtype of `value`.
    """
    rows, length, heads, width = query.shape
    chex.assert_shape([key, value], (rows, length, None, width))
    chex.assert_shape([positions, subtree_end], (rows, length))
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads do not divide over {key.shape[2]} key heads")
    spare = -length % _block(length)
    query, key, value, positions, subtree_end = (
        jnp.pad(array, ((0, 0), (0, spare), *((0, 0),) * (array.ndim - 2)))
        for array in (query, key, value, positions, subtree_end)
    )
    options = Options(window, width**-0.5 if scale is None else scale, softcap)
    return _attend(options, query, key, value, positions, subtree_end)[:, :length]


def _block(length: int) -> int:
    """Keys of a block: small ones waste less where branches are short, large ones loop less."""
    return 128 if length >= 2048 else min(64, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, query, key, value, positions, subtree_end):
    return _forward(options, query, key, value, positions, subtree_end)[0]


def _specs(query, key) -> tuple[PartitionSpec, PartitionSpec]:
    """Of [S, L, heads, E] and of [S, L]: each device has its own rows and its own heads."""
    rows = row_axes(query.shape[0]) or None
    axis = tensor_axis(query.shape[2], key.shape[2])
    return PartitionSpec(rows, None, axis), PartitionSpec(rows)


def _forward(options, query, key, value, positions, subtree_end):
    heads, rows = _specs(query, key)
    compute = on_each_device(
        functools.partial(_local_forward, options), (heads,) * 3 + (rows,) * 2, (heads, heads)
    )
    mixed, normalizer = compute(query, key, value, positions, subtree_end)
    return mixed, (query, key, value, positions, subtree_end, mixed, normalizer)


def _backward(options, kept, cotangent):
    query, key, *_ = kept
    heads, rows = _specs(query, key)
    in_specs = (heads,) * 3 + (rows,) * 2 + (heads,) * 3
    compute = on_each_device(functools.partial(_local_backward, options), in_specs, (heads,) * 3)
    return (*compute(*kept, cotangent), None, None)


_attend.defvjp(_forward, _backward)


class _Tiles(NamedTuple):
    """Pairs of a block of keys and a stretch of queries that it is visible to."""

    width: int  # queries
    block: chex.Array  # int32 [tiles], which block of keys
    start: chex.Array  # int32 [tiles], the first query
    count: chex.Array  # int32 [], how many there are; later entries are not


class _Rows:
    """All rows as one long row of T tokens, and the tiles that have to be computed."""

    def __init__(self, options, query, key, positions, subtree_end):
        rows, length, heads, self.head_size = query.shape
        self.options = options
        self.shape = query.shape
        self.key_heads = key.shape[2]
        self.groups = heads // self.key_heads
        self.block = _block(length)
        self.dtype = key.dtype
        first = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
        self.positions = positions.ravel()
        self.ends = jnp.where(subtree_end > 0, first + subtree_end, 0).ravel()
        self.tiles = self._find_tiles(length)

    def _find_tiles(self, length: int) -> list[_Tiles]:
        """Wide tiles as far as they go, then narrow ones."""
        block, per_row = self.block, length // self.block
        first = jnp.arange(self.ends.size // block, dtype=jnp.int32) * block
        left = jnp.maximum(self.ends.reshape(-1, block).max(axis=1) - first, 0)
        wide = 4 * block
        found, start = [], first
        for width, most in ((wide, per_row // 4), (block, min(4, per_row))):
            number = left // width if width == wide else -(-left // width)
            if most:
                found.append(self._listed(width, start, number, most))
            start, left = start + number * width, left - number * width
        return found

    def _listed(self, width, start, number, most) -> _Tiles:
        blocks = jnp.arange(number.size, dtype=jnp.int32)
        block = jnp.repeat(blocks, number, total_repeat_length=number.size * most)
        before = jnp.cumsum(number) - number
        place = jnp.arange(block.size, dtype=jnp.int32) - before[block]
        start, count = start[block] + place * width, jnp.sum(number)
        if self.options.window is not None:
            # A tile whose nearest query is too far from the last key is of no use.
            by_block = self.positions.reshape(-1, self.block)
            nearest = by_block.min(axis=1)[
                (start // self.block)[:, None] + jnp.arange(width // self.block)
            ].min(axis=1)
            near = nearest - by_block.max(axis=1)[block] < self.options.window
            near &= jnp.arange(block.size) < count
            order = jnp.argsort(~near, stable=True)
            block, start, count = block[order], start[order], jnp.sum(near)
        return _Tiles(width, block, start.astype(jnp.int32), count)

    def queries_last(self, array):
        """[S, L, H, E] → [K, E, G, T]: a stretch of queries is a slice of the last axis."""
        array = array.reshape(-1, self.key_heads, self.groups, array.shape[-1])
        return array.transpose(1, 3, 2, 0)

    def queries_first(self, array):
        """[K, E, G, T] → [S, L, H, E]."""
        return array.transpose(3, 0, 2, 1).reshape(*self.shape[:3], array.shape[1])

    def key_blocks(self, array):
        """[S, L, K, E] → [blocks, K, keys of a block, E]."""
        blocks = array.reshape(-1, self.block, self.key_heads, array.shape[-1])
        return blocks.swapaxes(1, 2)

    def from_key_blocks(self, blocks):
        """[blocks, K, keys of a block, E] → [S, L, K, E]."""
        return blocks.swapaxes(1, 2).reshape(*self.shape[:2], self.key_heads, blocks.shape[-1])

    def scores(self, keys, queries, tile: _Tiles, number):
        """float32 [K, keys, G, queries] of one tile, capped but not masked, and who sees whom,
        bool [keys, 1, queries].
        """
        scores = _product("kce,kew->kcw", keys, queries)
        scores = scores.reshape(*scores.shape[:2], self.groups, tile.width)
        if self.options.softcap is not None:
            scores = self.options.softcap * jnp.tanh(scores / self.options.softcap)
        first_key, first_query = tile.block[number] * self.block, tile.start[number]
        j = first_key + jnp.arange(self.block, dtype=jnp.int32)[:, None]
        i = first_query + jnp.arange(tile.width, dtype=jnp.int32)[None]
        ends = jax.lax.dynamic_slice(self.ends, (first_key,), (self.block,))[:, None]
        seen = (j <= i) & (i < ends)
        if self.options.window is not None:
            at = jax.lax.dynamic_slice(self.positions, (first_key,), (self.block,))[:, None]
            own = jax.lax.dynamic_slice(self.positions, (first_query,), (tile.width,))[None]
            seen &= own - at < self.options.window
        return scores, seen[:, None]


def _product(equation, left, right):
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _cut(array, start, width):
    """[K, X, G, T] → [K, X, G · width]."""
    heads, features, groups, _ = array.shape
    cut = jax.lax.dynamic_slice(array, (0, 0, 0, start), (heads, features, groups, width))
    return cut.reshape(heads, features, groups * width)


def _put(array, part, start, width):
    """`_cut`'s inverse: the array with this part replaced."""
    heads, features, groups, _ = array.shape
    part = part.reshape(heads, features, groups, width)
    return jax.lax.dynamic_update_slice(array, part, (0, 0, 0, start))


def _local_forward(options, query, key, value, positions, subtree_end):
    rows = _Rows(options, query, key, positions, subtree_end)
    queries, keys = rows.queries_last(query * options.scale), rows.key_blocks(key)
    ones = jnp.ones((*value.shape[:3], 1), value.dtype)  # sums the weights along with the values
    values = rows.key_blocks(jnp.concatenate([value, ones], axis=-1))
    heads, width, groups, total = queries.shape
    peak = jnp.full((heads, 1, groups, total), _NO_PEAK, jnp.float32)
    mixed = jnp.zeros((heads, width + 1, groups, total), jnp.float32)
    state = (peak, mixed)
    for tile in rows.tiles:

        def body(number, state, tile=tile):
            peak, mixed = state
            block, span = tile.block[number], (tile.start[number], tile.width)
            scores, seen = rows.scores(keys[block], _cut(queries, *span), tile, number)
            scores = jnp.where(seen, scores, _MASKED).reshape(heads, rows.block, -1)
            old = _cut(peak, *span)
            new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
            weights = jnp.exp(scores - new).astype(value.dtype)
            part = _cut(mixed, *span) * jnp.exp(old - new)
            part += _product("kce,kcw->kew", values[block], weights)
            return _put(peak, new, *span), _put(mixed, part, *span)

        state = jax.lax.fori_loop(0, tile.count, body, state)
    peak, mixed = state
    total_weight = mixed[:, width:]
    sees = total_weight > 0
    total_weight = jnp.where(sees, total_weight, 1.0)
    mixed = jnp.where(sees, mixed[:, :width] / total_weight, 0.0)
    normalizer = jnp.where(sees, peak + jnp.log(total_weight), -_MASKED)
    return rows.queries_first(mixed).astype(value.dtype), rows.queries_first(normalizer)


def _local_backward(
    options, query, key, value, positions, subtree_end, mixed, normalizer, cotangent
):
    rows = _Rows(options, query, key, positions, subtree_end)
    queries, keys = rows.queries_last(query * options.scale), rows.key_blocks(key)
    values = rows.key_blocks(value)
    above = rows.queries_last(cotangent)
    own = jnp.sum(cotangent.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
    own, normalizer = rows.queries_last(own), rows.queries_last(normalizer)
    heads = rows.key_heads
    into = (
        jnp.zeros(queries.shape, jnp.float32),
        jnp.zeros(keys.shape, jnp.float32),
        jnp.zeros(values.shape, jnp.float32),
    )
    for tile in rows.tiles:

        def body(number, into, tile=tile):
            into_query, into_key, into_value = into
            block, span = tile.block[number], (tile.start[number], tile.width)
            these, upper = _cut(queries, *span), _cut(above, *span)
            scores, seen = rows.scores(keys[block], these, tile, number)
            weights = jnp.where(seen, scores, _MASKED).reshape(heads, rows.block, -1)
            weights = jnp.exp(weights - _cut(normalizer, *span))
            change = _product("kce,kew->kcw", values[block], upper) - _cut(own, *span)
            change = weights * change
            if options.softcap is not None:
                capped = scores.reshape(change.shape) / options.softcap
                change = change * (1 - jnp.square(capped))
            change, weights = change.astype(rows.dtype), weights.astype(rows.dtype)
            into_value = into_value.at[block].add(_product("kcw,kew->kce", weights, upper))
            into_key = into_key.at[block].add(_product("kcw,kew->kce", change, these))
            part = _cut(into_query, *span) + _product("kce,kcw->kew", keys[block], change)
            return _put(into_query, part, *span), into_key, into_value

        into = jax.lax.fori_loop(0, tile.count, body, into)
    into_query, into_key, into_value = into
    into_query = rows.queries_first(into_query * options.scale)
    return (
        into_query.astype(query.dtype),
        rows.from_key_blocks(into_key).astype(key.dtype),
        rows.from_key_blocks(into_value).astype(value.dtype),
    )
