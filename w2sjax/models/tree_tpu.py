"""Tree attention on TPU: Pallas kernels for the Mosaic backend.

The `BlockTable` is fetched ahead as scalars, and index maps read from it which block to bring in
next; a grid step past a block's list computes nothing and fetches nothing, and the grid is only as
deep as the longest list. Tiles lie with keys down and queries across, so that one number per query
is one row of lanes; the query heads of a group are one matrix. Letters as in
`w2sjax.models.attention`, plus `B` (tokens of a block), `n` (blocks of a row) and `Q` (queries of a
block, `G * B`); L is a multiple of B here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from w2sjax.models import tree_tile
from w2sjax.models.tree_blocks import BlockList, BlockTable
from w2sjax.models.tree_tile import Scoring, Side, dot

_LANES = 128
_LEAST_BLOCK = 16  # rows of a register of bfloat16
_TILE_NUMBERS = 2**18  # scores or queries: 1 MiB of float32, of which a few are alive at once


def default_block(group: int, width: int) -> int:
    """Tokens of a block, so that what a step keeps for a group of query heads fits VMEM."""
    sizes = (512, 256, 128, 64, 32)
    wide = -(-width // _LANES) * _LANES
    return next((b for b in sizes if group * b * max(b, wide) <= _TILE_NUMBERS), _LEAST_BLOCK)


def check(block: int) -> None:
    """Raises ValueError for a block that Mosaic cannot do."""
    if block % _LEAST_BLOCK:
        raise ValueError(
            f"tree attention on TPU needs blocks of a multiple of {_LEAST_BLOCK}, got {block}"
        )


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
    call = _Call.of(query, key, table, interpret)
    out, total = call(
        functools.partial(_forward_kernel, block=table.block, scoring=scoring),
        table.keys,
        [
            (call.by_group(query), call.own_queries),
            (_by_head(key), call.listed_keys),
            (_by_head(value), call.listed_keys),
            (call.query_scalars(positions), call.own_query_scalars),
            (call.key_scalars(positions), call.listed_key_scalars),
            (call.key_scalars(subtree_end), call.listed_key_scalars),
        ],
        [
            (call.queries_shape(value.dtype), call.own_queries),
            (call.totals_shape(), call.own_totals),
        ],
        [(1, call.across), (1, call.across), (call.width, call.across)],
    )
    return call.from_group(out), call.from_totals(total)


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
    call = _Call.of(query, key, table, interpret)
    queries, gradients = call.by_group(query), call.by_group(gradient)
    keys, values = _by_head(key), _by_head(value)
    totals, means = call.totals(total), call.totals(mean)
    query_positions = call.query_scalars(positions)
    key_positions, ends = call.key_scalars(positions), call.key_scalars(subtree_end)
    static = dict(block=table.block, scoring=scoring)
    (by_query,) = call(
        functools.partial(_query_kernel, **static),
        table.keys,
        [
            (queries, call.own_queries),
            (keys, call.listed_keys),
            (values, call.listed_keys),
            (gradients, call.own_queries),
            (totals, call.own_totals),
            (means, call.own_totals),
            (query_positions, call.own_query_scalars),
            (key_positions, call.listed_key_scalars),
            (ends, call.listed_key_scalars),
        ],
        [(call.queries_shape(query.dtype), call.own_queries)],
        [(call.width, call.across)],
    )
    by_key, by_value = call(
        functools.partial(_key_kernel, **static),
        table.queries,
        [
            (queries, call.listed_queries),
            (keys, call.own_keys),
            (values, call.own_keys),
            (gradients, call.listed_queries),
            (totals, call.listed_totals),
            (means, call.listed_totals),
            (query_positions, call.listed_query_scalars),
            (key_positions, call.own_key_scalars),
            (ends, call.own_key_scalars),
        ],
        [
            (jax.ShapeDtypeStruct(keys.shape, key.dtype), call.own_keys),
            (jax.ShapeDtypeStruct(values.shape, value.dtype), call.own_keys),
        ],
        [(call.block, call.width)] * 2,
    )
    return call.from_group(by_query), _by_head(by_key), _by_head(by_value)


def _by_head(values: chex.Array) -> chex.Array:
    """[S, L, K, E] to [S, K, L, E], and back."""
    return jnp.swapaxes(values, 1, 2)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A grid of (row, key head, own block, step along its list): layouts, and parts of arrays."""

    rows: int
    blocks: int
    block: int
    heads: int
    group: int
    width: int
    interpret: bool

    @classmethod
    def of(cls, query, key, table: BlockTable, interpret: bool) -> _Call:
        rows, length, heads, width = query.shape
        group = heads // key.shape[2]
        blocks = length // table.block
        return cls(rows, blocks, table.block, key.shape[2], group, width, interpret)

    @property
    def across(self) -> int:
        """Queries of a block (Q)."""
        return self.group * self.block

    # --- layouts --------------------------------------------------------------------------------

    def queries_shape(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """Of queries by group."""
        shape = (self.rows, self.heads, self.blocks, self.across, self.width)
        return jax.ShapeDtypeStruct(shape, dtype)

    def totals_shape(self) -> jax.ShapeDtypeStruct:
        """Of one float per query."""
        shape = (self.rows, self.heads, self.blocks, 1, self.across)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def by_group(self, values: chex.Array) -> chex.Array:
        """[S, L, H, E] to [S, K, n, Q, E]."""
        shape = (self.rows, self.blocks, self.block, self.heads, self.group, self.width)
        values = jnp.transpose(values.reshape(shape), (0, 3, 1, 4, 2, 5))
        return values.reshape(*values.shape[:3], self.across, self.width)

    def from_group(self, values: chex.Array) -> chex.Array:
        """[S, K, n, Q, E] to [S, L, H, E]."""
        shape = (self.rows, self.heads, self.blocks, self.group, self.block, self.width)
        values = jnp.transpose(values.reshape(shape), (0, 2, 4, 1, 3, 5))
        return values.reshape(self.rows, -1, self.heads * self.group, self.width)

    def totals(self, values: chex.Array) -> chex.Array:
        """[S, H, L] to [S, K, n, 1, Q]."""
        shape = (self.rows, self.heads, self.group, self.blocks, self.block)
        return jnp.swapaxes(values.reshape(shape), 2, 3).reshape(self.totals_shape().shape)

    def from_totals(self, values: chex.Array) -> chex.Array:
        """[S, K, n, 1, Q] to [S, H, L]."""
        shape = (self.rows, self.heads, self.blocks, self.group, self.block)
        return jnp.swapaxes(values.reshape(shape), 2, 3).reshape(
            self.rows, self.heads * self.group, -1
        )

    def query_scalars(self, values: chex.Array) -> chex.Array:
        """[S, L] to [S, n, 1, Q], once for each head of a group."""
        values = values.reshape(self.rows, self.blocks, 1, self.block)
        return jnp.tile(values, (1, 1, 1, self.group))

    def key_scalars(self, values: chex.Array) -> chex.Array:
        """[S, L] to [S, n, 1, B]."""
        return values.reshape(self.rows, self.blocks, 1, self.block)

    # --- parts of arrays for one step of the grid -----------------------------------------------

    def _own(self, s, h, i, t, *todo):
        return i

    def _listed(self, s, h, i, t, blocks, whole, count):
        return blocks[(s * self.blocks + i) * self.blocks + t]

    def _queries(self, which: Callable) -> pl.BlockSpec:
        shape = (None, None, None, self.across, self.width)
        return pl.BlockSpec(shape, lambda s, h, *rest: (s, h, which(s, h, *rest), 0, 0))

    def _totals(self, which: Callable) -> pl.BlockSpec:
        shape = (None, None, None, 1, self.across)
        return pl.BlockSpec(shape, lambda s, h, *rest: (s, h, which(s, h, *rest), 0, 0))

    def _keys(self, which: Callable) -> pl.BlockSpec:
        shape = (None, None, self.block, self.width)
        return pl.BlockSpec(shape, lambda s, h, *rest: (s, h, which(s, h, *rest), 0))

    def _scalars(self, which: Callable, size: int) -> pl.BlockSpec:
        shape = (None, None, 1, size)
        return pl.BlockSpec(shape, lambda s, h, *rest: (s, which(s, h, *rest), 0, 0))

    own_queries = property(lambda self: self._queries(self._own))
    listed_queries = property(lambda self: self._queries(self._listed))
    own_totals = property(lambda self: self._totals(self._own))
    listed_totals = property(lambda self: self._totals(self._listed))
    own_keys = property(lambda self: self._keys(self._own))
    listed_keys = property(lambda self: self._keys(self._listed))
    own_query_scalars = property(lambda self: self._scalars(self._own, self.across))
    listed_query_scalars = property(lambda self: self._scalars(self._listed, self.across))
    own_key_scalars = property(lambda self: self._scalars(self._own, self.block))
    listed_key_scalars = property(lambda self: self._scalars(self._listed, self.block))

    def __call__(
        self,
        kernel: Callable[..., None],
        todo: BlockList,
        inputs: list[tuple[chex.Array, pl.BlockSpec]],
        results: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        sums: list[tuple[int, int]],
    ) -> list[chex.Array]:
        steps = jnp.maximum(todo.count.max(), 1)  # one step at least, to write zeros
        return pl.pallas_call(
            functools.partial(kernel, blocks_of_row=self.blocks),
            grid_spec=tpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(self.rows, self.heads, self.blocks, steps),
                in_specs=[spec for _, spec in inputs],
                out_specs=[spec for _, spec in results],
                scratch_shapes=[tpu.VMEM(shape, jnp.float32) for shape in sums],
            ),
            out_shape=[shape for shape, _ in results],
            compiler_params=tpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
            ),
            interpret=self.interpret,
        )(
            todo.blocks.reshape(-1),
            todo.whole.reshape(-1),
            todo.count.reshape(-1),
            *(array for array, _ in inputs),
        )


def _queries(number, block: int, positions, scoring: Scoring) -> Side:
    """The queries of a block, across a tile."""
    place = jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1)
    return Side(
        number * block + jax.lax.rem(place, jnp.int32(block)),
        None if scoring.window is None else positions[...],
        None,
    )


def _keys(number, block: int, positions, ends, scoring: Scoring) -> Side:
    """The keys of a block, down a tile."""
    return Side(
        number * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0),
        None if scoring.window is None else positions[...].reshape(block, 1),
        ends[...].reshape(block, 1),
    )


def _walk(todo, blocks_of_row: int, step: Callable[[jax.Array, jax.Array, bool], None]) -> None:
    """Runs `step(own block, listed block, masked)` while this program's list lasts."""
    blocks, whole, count = todo
    own, t = pl.program_id(2), pl.program_id(3)
    place = pl.program_id(0) * blocks_of_row + own

    @pl.when(t < whole[place])
    def _():
        step(own, blocks[place * blocks_of_row + t], False)

    @pl.when((whole[place] <= t) & (t < count[place]))
    def _():
        step(own, blocks[place * blocks_of_row + t], True)


def _at_start(action: Callable[[], None]) -> None:
    pl.when(pl.program_id(3) == 0)(action)


def _at_end(action: Callable[[], None]) -> None:
    pl.when(pl.program_id(3) == pl.num_programs(3) - 1)(action)


def _forward_kernel(
    blocks,
    whole,
    count,
    query,
    key,
    value,
    query_positions,
    key_positions,
    ends,
    out,
    total,
    peak,
    weight,
    mixed,
    *,
    blocks_of_row,
    block,
    scoring,
):
    @_at_start
    def _():
        peak[...] = jnp.full_like(peak, tree_tile.LOWEST)
        weight[...] = jnp.zeros_like(weight)
        mixed[...] = jnp.zeros_like(mixed)

    def step(own, other, masked):
        sides = ()
        if masked:
            sides = (
                _queries(own, block, query_positions, scoring),
                _keys(other, block, key_positions, ends, scoring),
            )
        products = dot(key[...], query[...], (1, 1))  # [B, Q]
        scores = tree_tile.scores(products, scoring, *sides)
        before = peak[...]
        higher = jnp.maximum(before, scores.max(axis=0, keepdims=True))
        weights = jnp.exp(scores - higher)
        shrink = jnp.exp(before - higher)
        peak[...] = higher
        weight[...] = weight[...] * shrink + weights.sum(axis=0, keepdims=True)
        mixed[...] = mixed[...] * shrink + dot(value[...], weights.astype(value.dtype), (0, 0))

    _walk((blocks, whole, count), blocks_of_row, step)

    @_at_end
    def _():
        sums = jnp.where(weight[...] == 0, 1.0, weight[...])  # of queries that see nothing
        out[...] = (mixed[...] / sums).T.astype(out.dtype)
        total[...] = peak[...] + jnp.log(sums)


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
    query_positions,
    key_positions,
    ends,
    by_query,
    summed,
    *,
    blocks_of_row,
    block,
    scoring,
):
    @_at_start
    def _():
        summed[...] = jnp.zeros_like(summed)

    def step(own, other, masked):
        sides = ()
        if masked:
            sides = (
                _queries(own, block, query_positions, scoring),
                _keys(other, block, key_positions, ends, scoring),
            )
        scores = tree_tile.scores(dot(key[...], query[...], (1, 1)), scoring, *sides)
        weights = jnp.exp(scores - total[...])
        by_weight = dot(value[...], gradient[...], (1, 1)) - mean[...]
        by_product = tree_tile.score_gradients(scores, weights, by_weight, scoring)
        summed[...] += dot(key[...], by_product.astype(key.dtype), (0, 0))  # [E, Q]

    _walk((blocks, whole, count), blocks_of_row, step)

    @_at_end
    def _():
        by_query[...] = summed[...].T.astype(by_query.dtype)


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
    query_positions,
    key_positions,
    ends,
    by_key,
    by_value,
    summed_key,
    summed_value,
    *,
    blocks_of_row,
    block,
    scoring,
):
    @_at_start
    def _():
        summed_key[...] = jnp.zeros_like(summed_key)
        summed_value[...] = jnp.zeros_like(summed_value)

    def step(own, other, masked):
        sides = ()
        if masked:
            sides = (
                _queries(other, block, query_positions, scoring),
                _keys(own, block, key_positions, ends, scoring),
            )
        scores = tree_tile.scores(dot(key[...], query[...], (1, 1)), scoring, *sides)
        weights = jnp.exp(scores - total[...])
        summed_value[...] += dot(weights.astype(gradient.dtype), gradient[...], (1, 0))
        by_weight = dot(value[...], gradient[...], (1, 1)) - mean[...]
        by_product = tree_tile.score_gradients(scores, weights, by_weight, scoring)
        summed_key[...] += dot(by_product.astype(query.dtype), query[...], (1, 0))

    _walk((blocks, whole, count), blocks_of_row, step)

    @_at_end
    def _():
        by_key[...] = summed_key[...].astype(by_key.dtype)
        by_value[...] = summed_value[...].astype(by_value.dtype)
