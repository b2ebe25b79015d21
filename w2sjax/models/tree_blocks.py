"""Which blocks of a row of token trees see each other: the work list of block-sparse attention.

Letters: `S` rows, `L` tokens of a row, `n` blocks of a row; the last block may hang over the end of
the row.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("blocks", "whole", "count"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class BlockList:
    """For each block, those on the other side that it meets; wholly visible ones come first."""

    blocks: chex.Array  # int32 [S, n, n]; past `count` the last one that counts is repeated
    whole: chex.Array  # int32 [S, n], how many are met by every pair of tokens: no mask needed
    count: chex.Array  # int32 [S, n], how many are met at all, `whole` included


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "queries"),
    meta_fields=("block", "window"),
)
@dataclasses.dataclass(frozen=True)
class BlockTable:
    """What each block of a row sees and is seen by; from `block_table`."""

    keys: BlockList  # for each block of queries, the blocks of keys that it sees
    queries: BlockList  # for each block of keys, the blocks of queries that see it
    block: int  # tokens in a block
    window: int | None  # the window it was made for


def block_table(
    positions: chex.Array, subtree_end: chex.Array, *, block: int, window: int | None
) -> BlockTable:
    """Which blocks of keys each block of queries sees, and the reverse.

    Token i may attend to token j exactly when `j <= i < subtree_end[j]` and, where there is a
    window, `positions[i] - positions[j] < window`. A block of keys before the block of queries is
    seen as soon as one of its subtrees reaches into the queries, so without a window the table is
    exact: a pair of blocks is listed if and only if a pair of their tokens may attend. With a
    window, pairs are left out that the largest and smallest positions of the blocks rule out. Work
    and memory are S·n² (and the sort that lists them), never L².

    Args:
      positions: int32 [S, L], along each token's own path.
      subtree_end: int32 [S, L], first index past the token's subtree; 0 for padding.
      block: tokens in a block.
      window: tokens that each sees by position, itself included; None for all.

    Returns:
      A `BlockTable` with n = ceil(L / block).
    """
    chex.assert_rank([positions, subtree_end], 2)
    chex.assert_equal_shape([positions, subtree_end])
    rows, length = subtree_end.shape
    num_blocks = -(-length // block)
    past_end = ((0, 0), (0, num_blocks * block - length))
    shape = (rows, num_blocks, block)
    ends = jnp.pad(subtree_end, past_end).reshape(shape)
    positions = jnp.pad(positions, past_end, mode="edge").reshape(shape)
    real = ends > jnp.arange(num_blocks * block, dtype=jnp.int32).reshape(shape[1:])

    query = jnp.arange(num_blocks, dtype=jnp.int32)[:, None]
    key = query.T
    start = query * block
    longest = jnp.where(real, ends, 0).max(axis=-1)[:, None, :]
    shortest = ends.min(axis=-1)[:, None, :]
    seen = jnp.where(key == query, longest > 0, (key < query) & (longest > start))
    whole = (key < query) & (shortest >= start + block)
    if window is not None:
        nearest = jnp.where(real, positions, jnp.iinfo(jnp.int32).min // 2).max(axis=-1)
        seen &= positions.min(axis=-1)[:, :, None] - nearest[:, None, :] < window
        farthest = positions.min(axis=-1)[:, None, :]
        whole &= positions.max(axis=-1)[:, :, None] - farthest < window
    whole &= seen
    keys, queries = _listed(seen, whole), _listed(seen.mT, whole.mT)
    return BlockTable(keys, queries, block, window)


def _listed(seen: chex.Array, whole: chex.Array) -> BlockList:
    """The columns that each row of the bool [S, n, n] has set, the `whole` ones first."""
    order = jnp.argsort(2 - seen.astype(jnp.int32) - whole, axis=-1, stable=True).astype(jnp.int32)
    count = seen.sum(axis=-1, dtype=jnp.int32)
    last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[..., None], axis=-1)
    listed = jnp.arange(seen.shape[-1]) < count[..., None]
    return BlockList(jnp.where(listed, order, last), whole.sum(axis=-1, dtype=jnp.int32), count)
