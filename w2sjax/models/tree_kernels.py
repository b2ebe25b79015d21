"""Block-sparse attention within rows of token trees: work follows what tokens may see, not L².

Pallas kernels for GPU (`w2sjax.models.tree_gpu`) and TPU (`w2sjax.models.tree_tpu`) behind one
function with its own backward pass, after FlashAttention (arXiv 2307.08691): scores are never
stored, and blocks of which no pair may attend are never read.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from w2sjax.models import tree_gpu, tree_tpu
from w2sjax.models.tree_blocks import BlockTable, block_table
from w2sjax.models.tree_tile import Scoring

Axes = str | tuple[str, ...] | None  # of a mesh
_KINDS = {"gpu": tree_gpu, "tpu": tree_tpu}


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `_attend` is compiled for."""

    kind: str
    scoring: Scoring
    interpret: bool


def default_block(kind: str, *, dtype: jnp.dtype, width: int, group: int) -> int:
    """Tokens of a block that suit a kind of device.

    Args:
      kind: "gpu" or "tpu".
      dtype: of keys and values.
      width: of one head (E).
      group: query heads per key/value head (G).

    Returns:
      A block that `tree_attention` takes.
    """
    if kind == "gpu":
        return tree_gpu.default_block(dtype, width)
    return tree_tpu.default_block(group, width)


def tree_attention(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    positions: chex.Array,
    subtree_end: chex.Array,
    *,
    kind: str,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    block: int | None = None,
    table: BlockTable | None = None,
    split: tuple[Axes, Axes] | None = None,
    interpret: bool = False,
) -> chex.Array:
    """Attention of the tokens of a row to those on their own path: `j <= i < subtree_end[j]`.

    Equal to `attention.attend` with `subtree_mask`, forward and backward, up to rounding. A query
    that sees nothing gets zeros and gives no gradient. Products of float32 are as precise as
    `jax.default_matmul_precision` says, sums are float32.

    Args:
      query: float [S, L, H, E].
      key: the same dtype, [S, L, K, E]; query head `h` reads key/value head `h // (H / K)`.
      value: as `key`.
      positions: int32 [S, L], along each token's own path; read where there is a window.
      subtree_end: int32 [S, L], first index past the token's subtree; 0 for padding.
      kind: "gpu" (Triton) or "tpu" (Mosaic).
      scale: multiplies the scores.
      window: tokens further back than this, by position, are not seen; None for all.
      softcap: c, scores become c·tanh(score / c).
      block: tokens of a block, `default_block` where None: a power of two of 16 or more on GPU, a
        multiple of 16 on TPU. Rows are padded to a multiple of it here.
      table: `block_table` of these rows, for callers with several layers; made here where None.
      split: axes of the current mesh (`jax.set_mesh`) that rows and key/value heads are split over;
        each device then runs the kernels on its part, which the compiler cannot arrange by itself.
        None on one device.
      interpret: run in Pallas's interpreter on any backend, slowly; then any block will do.

    Returns:
      float [S, L, H, E].

    Raises:
      ValueError: an unknown kind, a block that the kind cannot do, or a table made for another
        block, window or row length.
    """
    rows, length, heads, width = query.shape
    chex.assert_shape([key, value], (rows, length, None, width))
    chex.assert_equal_shape([key, value])
    chex.assert_shape([positions, subtree_end], (rows, length))
    chex.assert_is_divisible(heads, key.shape[2])
    if kind not in _KINDS:
        raise ValueError(f"tree attention has kernels for {list(_KINDS)}, not for {kind!r}")
    if block is None:
        group = heads // key.shape[2]
        block = default_block(kind, dtype=key.dtype, width=width, group=group)
        block = table.block if table is not None else block
    if not interpret:
        _KINDS[kind].check(block)
    if table is None:
        table = block_table(positions, subtree_end, block=block, window=window)
    blocks = -(-length // block)
    made_for, wanted = (table.block, table.window), (block, window)
    if made_for != wanted or table.keys.count.shape != (rows, blocks):
        raise ValueError(
            f"the table is for (block, window) {made_for} and blocks {table.keys.count.shape}; "
            f"these rows need {wanted} and {(rows, blocks)}"
        )

    static = _Static(kind, Scoring(scale, softcap, window), interpret)
    attend = functools.partial(_attend_rows, static=static)
    if split is not None:
        by_row = PartitionSpec(split[0])
        by_head = PartitionSpec(split[0], None, split[1], None)
        attend = jax.shard_map(
            attend,
            in_specs=(by_head, by_head, by_head, by_row, by_row, by_row),
            out_specs=by_head,
            check_vma=False,  # what a kernel varies over cannot be told from outside
        )
    return attend(query, key, value, positions, subtree_end, table)


def _attend_rows(query, key, value, positions, subtree_end, table, *, static):
    """`tree_attention` of whole rows and heads: fills the last block and cuts it off again."""
    length = query.shape[1]
    missing = table.keys.count.shape[1] * table.block - length

    def whole_blocks(values):
        past_end = [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2)
        return jnp.pad(values, past_end) if missing else values

    tree = (whole_blocks(positions), whole_blocks(subtree_end), table)
    mixed = _attend(*(whole_blocks(x) for x in (query, key, value)), tree, static)
    return mixed[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, tree, static):
    return _forward(query, key, value, tree, static)[0]


def _forward(query, key, value, tree, static):
    out, total = _KINDS[static.kind].forward(
        query, key, value, *tree, static.scoring, static.interpret
    )
    return out, (query, key, value, tree, out, total)


def _backward(static, saved, gradient):
    query, key, value, tree, out, total = saved
    mean = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=-1)
    by_inputs = _KINDS[static.kind].backward(
        query,
        key,
        value,
        *tree,
        static.scoring,
        static.interpret,
        total,
        jnp.swapaxes(mean, 1, 2),
        gradient,
    )
    return *by_inputs, None


_attend.defvjp(_forward, _backward)
