"""Tree attention on GPU: Pallas kernels for the Triton backend.

One program per row, head and block walks exactly the blocks that its list in the `BlockTable`
names, first those that need no mask. Letters as in `w2sjax.models.attention`, plus `B` (tokens of a
block) and `n` (blocks of a row); L is a multiple of B here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from w2sjax.models import tree_tile
from w2sjax.models.tree_blocks import BlockList, BlockTable
from w2sjax.models.tree_tile import Scoring, Side, dot

_TILE_BYTES = 16384  # of one block of keys: a few of them fit the shared memory of any recent GPU
_ROW_BYTES = 128  # of one number per token: larger tiles of scores spill out of the registers


def default_block(dtype: jnp.dtype, width: int) -> int:
    """Tokens of a block that is kept in shared memory and registers for this width of a head."""
    size = jnp.dtype(dtype).itemsize
    return max(16, min(_ROW_BYTES // size, _TILE_BYTES // (_padded(width) * size)))


def check(block: int) -> None:
    """Raises ValueError for a block that Triton cannot do."""
    if block < 16 or block & (block - 1):
        raise ValueError(f"tree attention on GPU needs blocks of a power of two >= 16, got {block}")


def forward(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    positions: chex.Array,
    subtree_end: chex.Array,
    table: BlockTable,
    scoring: Scoring,
    interpret: bool,
) -> tuple[chex.Array, chex.Array]:
    """Mixed values, and the log-sum-exp of each query's scores.

    Args:
      query: float [S, L, H, E].
      key: float [S, L, K, E].
      value: float [S, L, K, E].
      positions: int32 [S, L].
      subtree_end: int32 [S, L].
      table: of the same rows.
      scoring: how scores come about.
      interpret: run in Pallas's interpreter.

    Returns:
      float [S, L, H, E] of the dtype of `value`, and float32 [S, H, L].
    """
    rows, length, heads, width = query.shape
    group = heads // key.shape[2]
    call = _Call(rows, length, width, key.dtype, table, heads, group, interpret)
    return call(
        functools.partial(_forward_kernel, block=table.block, width=width, scoring=scoring),
        table.keys,
        [(query, call.own), (key, call.shared), (value, call.shared)],
        [(positions, call.row), (subtree_end, call.row)],
        [
            (jax.ShapeDtypeStruct(query.shape, value.dtype), call.own),
            (jax.ShapeDtypeStruct((rows, heads, length), jnp.float32), call.own_scalars),
        ],
    )


def backward(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    positions: chex.Array,
    subtree_end: chex.Array,
    table: BlockTable,
    scoring: Scoring,
    interpret: bool,
    total: chex.Array,
    mean: chex.Array,
    gradient: chex.Array,
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Gradients by query, key and value.

    Args:
      query, key, value, positions, subtree_end, table, scoring, interpret: as in `forward`.
      total: float32 [S, H, L], the log-sum-exp from `forward`.
      mean: float32 [S, H, L], each query's result times its gradient, summed over E.
      gradient: float [S, L, H, E], by the result.

    Returns:
      Arrays of the shapes and dtypes of `query`, `key` and `value`.
    """
    rows, length, heads, width = query.shape
    group = heads // key.shape[2]
    static = dict(block=table.block, width=width, scoring=scoring)
    places = [positions, subtree_end]

    call = _Call(rows, length, width, key.dtype, table, heads, group, interpret)
    (by_query,) = call(
        functools.partial(_query_kernel, **static),
        table.keys,
        [(query, call.own), (key, call.shared), (value, call.shared), (gradient, call.own)],
        [(total, call.own_scalars), (mean, call.own_scalars), *((x, call.row) for x in places)],
        [(jax.ShapeDtypeStruct(query.shape, query.dtype), call.own)],
    )
    call = _Call(rows, length, width, key.dtype, table, heads // group, 1, interpret)
    grouped = pl.BlockSpec((None, length, group, call.width), lambda i, h, s: (s, 0, h, 0))
    scalars = pl.BlockSpec((None, group, length), lambda i, h, s: (s, h, 0))
    by_key, by_value = call(
        functools.partial(_key_kernel, **static, group=group),
        table.queries,
        [(query, grouped), (key, call.own), (value, call.own), (gradient, grouped)],
        [(total, scalars), (mean, scalars), *((x, call.row) for x in places)],
        [
            (jax.ShapeDtypeStruct(key.shape, key.dtype), call.own),
            (jax.ShapeDtypeStruct(value.shape, value.dtype), call.own),
        ],
    )
    return by_query, by_key, by_value


class _Call:
    """A grid of one program per block, head and row, and what parts of arrays a program gets."""

    def __init__(
        self,
        rows: int,
        length: int,
        width: int,
        dtype: jnp.dtype,
        table: BlockTable,
        heads: int,
        group: int,
        interpret: bool,
    ):
        block, blocks = table.block, length // table.block
        self.grid = (blocks, heads, rows)
        self.width = _padded(width)
        self.interpret = interpret
        tile_bytes = block * self.width * jnp.dtype(dtype).itemsize
        self.warps = 8 if block >= 64 and tile_bytes >= _TILE_BYTES else 4
        # its own block; the whole row of the key head that it reads; and one scalar per token
        self.own = pl.BlockSpec((None, block, None, self.width), lambda i, h, s: (s, i, h, 0))
        self.shared = pl.BlockSpec(
            (None, length, None, self.width), lambda i, h, s: (s, 0, h // group, 0)
        )
        self.own_scalars = pl.BlockSpec((None, None, block), lambda i, h, s: (s, h, i))
        self.row = pl.BlockSpec((None, length), lambda i, h, s: (s, 0))

    def __call__(
        self,
        kernel: Callable[..., None],
        todo: BlockList,
        arrays: list[tuple[chex.Array, pl.BlockSpec]],
        scalars: list[tuple[chex.Array, pl.BlockSpec]],
        results: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    ) -> list[chex.Array]:
        blocks = self.grid[0]
        lists = [
            (todo.blocks, pl.BlockSpec((None, None, blocks), lambda i, h, s: (s, i, 0))),
            (todo.whole, pl.BlockSpec((None, blocks), lambda i, h, s: (s, 0))),
            (todo.count, pl.BlockSpec((None, blocks), lambda i, h, s: (s, 0))),
        ]
        inputs = [*lists, *arrays, *scalars]
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in results],
            out_shape=[shape for shape, _ in results],
            compiler_params=triton.CompilerParams(num_warps=self.warps, num_stages=2),
            interpret=self.interpret,
        )(*(array for array, _ in inputs))


def _padded(width: int) -> int:
    """Columns of a tile: Triton's are powers of two, and its products take 16 or more."""
    return max(16, pl.next_power_of_2(width))


def _load(ref, width: int) -> chex.Array:
    """A tile [B, padded width], zeros past the width of a head."""
    if ref.shape[-1] == width:
        return triton.load(ref)
    return triton.load(ref, mask=(jnp.arange(ref.shape[-1]) < width)[None, :], other=0.0)


def _store(ref, values: chex.Array, width: int) -> None:
    """Writes a tile [B, padded width] up to the width of a head."""
    mask = None if ref.shape[-1] == width else (jnp.arange(ref.shape[-1]) < width)[None, :]
    triton.store(ref, values.astype(ref.dtype), mask=mask)


def _side(number, block: int, axis: int, positions, ends, scoring: Scoring) -> Side:
    """The tokens of a block along an axis of a tile; of queries where `ends` is None."""
    tokens = pl.ds(number * block, block)

    def along(values):
        return values[:, None] if axis == 0 else values[None, :]

    return Side(
        along(number * block + jnp.arange(block, dtype=jnp.int32)),
        None if scoring.window is None else along(positions[tokens]),
        None if ends is None else along(ends[tokens]),
    )


def _walk(todo, step: Callable, carry, times: int = 1):
    """Runs `step(number, turn, masked, carry)` for the listed blocks, each `times` times."""
    blocks, whole, count = todo
    own = pl.program_id(0)
    bounds = (0, whole[own] * times, count[own] * times)

    def body(masked, t, carry):
        return step(blocks[jax.lax.div(t, times)], jax.lax.rem(t, times), masked, carry)

    for masked in (False, True):
        begin, end = bounds[masked : masked + 2]
        carry = jax.lax.fori_loop(begin, end, functools.partial(body, masked), carry)
    return carry


def _forward_kernel(
    blocks, whole, count, query, key, value, positions, ends, out, total, *, block, width, scoring
):
    tile = _load(query, width)
    queries = _side(pl.program_id(0), block, 0, positions, None, scoring)

    def step(number, turn, masked, carry):
        peak, weight, mixed = carry
        tokens = pl.ds(number * block, block)
        sides = (queries, _side(number, block, 1, positions, ends, scoring)) if masked else ()
        products = dot(tile, _load(key.at[tokens, :], width), (1, 1))  # [B queries, B keys]
        scores = tree_tile.scores(products, scoring, *sides)
        higher = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.exp(scores - higher[:, None])
        shrink = jnp.exp(peak - higher)
        values = _load(value.at[tokens, :], width)
        added = dot(weights.astype(values.dtype), values, (1, 0))
        return higher, weight * shrink + weights.sum(axis=1), mixed * shrink[:, None] + added

    start = (
        jnp.full((block,), tree_tile.LOWEST, jnp.float32),
        jnp.zeros((block,), jnp.float32),
        jnp.zeros((block, query.shape[-1]), jnp.float32),
    )
    peak, weight, mixed = _walk((blocks, whole, count), step, start)
    weight = jnp.where(weight == 0, 1.0, weight)  # of queries that see nothing
    _store(out, mixed / weight[:, None], width)
    total[...] = peak + jnp.log(weight)


def _query_kernel(
    blocks,
    whole,
    count,
    query,
    key,
    value,
    gradient,
    total,
    mean,
    positions,
    ends,
    by_query,
    *,
    block,
    width,
    scoring,
):
    tile, rising = _load(query, width), _load(gradient, width)
    totals, means = total[...][:, None], mean[...][:, None]
    queries = _side(pl.program_id(0), block, 0, positions, None, scoring)

    def step(number, turn, masked, carry):
        tokens = pl.ds(number * block, block)
        sides = (queries, _side(number, block, 1, positions, ends, scoring)) if masked else ()
        keys = _load(key.at[tokens, :], width)
        scores = tree_tile.scores(dot(tile, keys, (1, 1)), scoring, *sides)
        weights = jnp.exp(scores - totals)
        by_weight = dot(rising, _load(value.at[tokens, :], width), (1, 1)) - means
        by_product = tree_tile.score_gradients(scores, weights, by_weight, scoring)
        return carry + dot(by_product.astype(keys.dtype), keys, (1, 0))

    start = jnp.zeros((block, query.shape[-1]), jnp.float32)
    _store(by_query, _walk((blocks, whole, count), step, start), width)


def _key_kernel(
    blocks,
    whole,
    count,
    query,
    key,
    value,
    gradient,
    total,
    mean,
    positions,
    ends,
    by_key,
    by_value,
    *,
    block,
    width,
    scoring,
    group,
):
    tile, values = _load(key, width), _load(value, width)
    keys = _side(pl.program_id(0), block, 0, positions, ends, scoring)

    def step(number, head, masked, carry):
        by_key, by_value = carry
        tokens = pl.ds(number * block, block)
        sides = (_side(number, block, 1, positions, None, scoring), keys) if masked else ()
        queries = _load(query.at[tokens, head, :], width)
        rising = _load(gradient.at[tokens, head, :], width)
        products = dot(tile, queries, (1, 1))  # [B keys, B queries]
        scores = tree_tile.scores(products, scoring, *sides)
        weights = jnp.exp(scores - total[head, tokens][None, :])
        by_value += dot(weights.astype(rising.dtype), rising, (1, 0))
        by_weight = dot(values, rising, (1, 1)) - mean[head, tokens][None, :]
        by_product = tree_tile.score_gradients(scores, weights, by_weight, scoring)
        by_key += dot(by_product.astype(queries.dtype), queries, (1, 0))
        return by_key, by_value

    zeros = jnp.zeros((block, key.shape[-1]), jnp.float32)
    results = _walk((blocks, whole, count), step, (zeros, zeros), times=group)
    _store(by_key, results[0], width)
    _store(by_value, results[1], width)
