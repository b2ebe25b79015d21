"""Attention: rotary positions, who sees whom, and grouped-query attention behind one function.

Shape letters are the project's (`w2sjax.types`), plus `M` (keys that may be attended to), `C`
(tokens of a chunk), `G` (query heads per key/value head; `H == K * G`) and `E` (width of one head).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from w2sjax.models import kernels, tree_kernels
from w2sjax.models.tree_attention import attend_tree
from w2sjax.models.tree_blocks import BlockTable, block_table
from w2sjax.parallel import row_axes, tensor_axis

_MASKED = -1e30  # finite, so that rows without any visible key stay finite too
_BLOCK = 192  # least number of queries in a block of `attend_backwards`


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("positions", "cos", "sin", "mask", "subtree_end", "table", "valid", "slots"),
    meta_fields=("window", "implementation"),
)
@dataclasses.dataclass(frozen=True)
class View:
    """Where tokens stand and what they see; from `row_view` or `cache_view`."""

    positions: chex.Array  # int32 [S, L]
    cos: chex.Array  # float32 [S, L, E/2]
    sin: chex.Array  # float32 [S, L, E/2]
    mask: chex.Array | None  # bool [S, L, M]; None where no mask is needed
    subtree_end: chex.Array | None  # int32 [S, L]; None where a mask says who sees whom
    table: BlockTable | None  # for the implementation "pallas" alone
    valid: chex.Array | None  # bool [S, L], tokens to write into the cache; None without one
    slots: chex.Array | None  # int32 [S], which slots of the cache the rows are; None for all
    window: int | None  # how many tokens each sees, itself included; None for all
    implementation: str  # what attends, from `resolve`


Cache = tuple[chex.Array, chex.Array]  # keys float [S, K, E, M] and values float [S, K, M, E]


def row_view(
    positions: chex.Array,
    subtree_end: chex.Array | None,
    *,
    frequencies: Sequence[float],
    window: int | None,
    implementation: str,
    block: int | None = None,
) -> View:
    """Tokens of a row that attend to earlier ones of the same row.

    Args:
      positions: int32 [S, L].
      subtree_end: int32 [S, L], see `subtree_mask`; None where each row is one sequence.
      frequencies: of the rotary pairs, E / 2 of them, in radians per position.
      window: tokens further back than this, by position, are not seen; None for all.
      implementation: what will attend, from `resolve`.
      block: tokens of a block of "pallas".

    Returns:
      A `View`.
    """
    ends = subtree_end
    if ends is None:
        ends = jnp.full(positions.shape, positions.shape[1], jnp.int32)
    cos, sin = _angles(positions, frequencies)
    seen = dict(mask=None, subtree_end=None, table=None)
    if implementation == "tree":
        seen["subtree_end"] = ends
    elif implementation == "pallas":
        seen["subtree_end"] = ends
        seen["table"] = block_table(positions, ends, block=block, window=window)
    elif implementation == "xla" or subtree_end is not None:
        seen["mask"] = subtree_mask(ends)
        if window is not None:
            seen["mask"] &= positions[:, :, None] - positions[:, None, :] < window
    return View(
        positions,
        cos,
        sin,
        valid=None,
        slots=None,
        window=window,
        implementation=implementation,
        **seen,
    )


def cache_view(
    positions: chex.Array,
    valid: chex.Array,
    *,
    frequencies: Sequence[float],
    window: int | None,
    cache_length: int,
    slots: chex.Array | None = None,
) -> View:
    """Tokens of a chunk that attend to what the cache holds, themselves included.

    Args:
      positions: int32 [S, C], increasing along C.
      valid: bool [S, C], tokens that are written.
      frequencies: of the rotary pairs, E / 2 of them, in radians per position.
      window: tokens further back than this are not seen; None for all.
      cache_length: positions that the cache holds (M).
      slots: int32 [S], the slots of the cache that the rows are; None: all of them, in order.

    Returns:
      A `View`.
    """
    mask = cache_mask(positions, cache_length)
    if window is not None:
        past = positions[:, :, None] - jnp.arange(cache_length, dtype=jnp.int32)
        mask &= past < window
    cos, sin = _angles(positions, frequencies)
    return View(positions, cos, sin, mask, None, None, valid, slots, window, "xla")


def _angles(positions: chex.Array, frequencies: Sequence[float]) -> tuple[chex.Array, chex.Array]:
    """Cosines and sines of what each pair turns by, float32 [S, L, E/2]."""
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(values: chex.Array, view: View) -> chex.Array:
    """Rotates pairs of features by an angle proportional to the token's position.

    Feature `e` is paired with feature `e + E/2`, the layout of Hugging Face checkpoints (RoFormer,
    arXiv 2104.09864).

    Args:
      values: float [S, L, heads, E].
      view: of the same tokens.

    Returns:
      Array of the shape and dtype of `values`; computed in float32.
    """
    cos, sin = view.cos[:, :, None], view.sin[:, :, None]
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


def attend_view(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    view: View,
    *,
    cache: Cache | None = None,
    scale: float,
    softcap: float | None = None,
) -> tuple[chex.Array, Cache | None]:
    """The one way to attend: rotates queries and keys, then mixes the values that each token sees.

    Args:
      query: float [S, L, H, E].
      key: float [S, L, K, E]; query head `h` reads key/value head `h // (H / K)`.
      value: float [S, L, K, E].
      view: where the tokens stand and what they see.
      cache: keys and values so far; the tokens' own are written there first.
      scale: multiplies the scores.
      softcap: c, scores become c·tanh(score / c).

    Returns:
      float [S, L, H, E], and the updated cache where one was given.
    """
    query, key = rotate(query, view), rotate(key, view)
    options = dict(scale=scale, softcap=softcap)
    if cache is not None:
        keys, values = cache = write_cache(
            cache, key, value, view.positions, view.valid, view.slots
        )
        if view.slots is not None:
            keys, values = (jnp.take(part, view.slots, axis=0, mode="clip") for part in cache)
        return attend(query, keys, values, view.mask, **options), cache
    if view.implementation == "tree":
        tree = dict(window=view.window, **options)
        return attend_tree(query, key, value, view.positions, view.subtree_end, **tree), None
    if view.implementation == "pallas":
        split = (row_axes(len(query)) or None, tensor_axis(query.shape[2], key.shape[2]))
        mixed = tree_kernels.tree_attention(
            query,
            key,
            value,
            view.positions,
            view.subtree_end,
            kind=jax.default_backend(),
            window=view.window,
            table=view.table,
            split=None if jax.sharding.get_abstract_mesh().size <= 1 else split,
            **options,
        )
        return mixed, None
    seen = dict(mask=view.mask, window=view.window)
    if view.implementation == "cudnn":
        return kernels.cudnn(query, key, value, scale=scale, **seen), None
    if view.implementation == "splash":
        return kernels.splash(query, key, value, **seen, **options), None
    keys, values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
    return attend_backwards(query, keys, values, view.mask, **options), None


def attend(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    mask: chex.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> chex.Array:
    """Softmax attention with grouped queries; keys and values are never repeated per query head.

    The softmax runs in float32. A query that may see no key at all gets zeros, not NaN, and takes
    nothing from any value. Keys come transposed and the queries of a group are one matrix: in that
    layout XLA on CPU runs both products fastest, and without a copy of the cache.

    Args:
      query: float [S, L, H, E].
      key: float [S, K, E, M]; query head `h` reads key/value head `h // (H / K)`.
      value: float [S, K, M, E].
      mask: bool [S, L, M], True where the query may attend to the key.
      scale: multiplies the scores; `E ** -0.5` where None.
      softcap: c, scores become c·tanh(score / c).

    Returns:
      float [S, L, H, E] in the dtype of `value`.
    """
    rows, length, heads, width = query.shape
    groups, keys = value.shape[1], value.shape[2]
    chex.assert_shape(key, (rows, groups, width, keys))
    chex.assert_shape(value, (rows, groups, keys, width))
    chex.assert_shape(mask, (rows, length, keys))
    scale = width**-0.5 if scale is None else scale
    query = jnp.swapaxes(query * scale, 1, 2).reshape(rows, groups, -1, width)
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)  # [S, K, G * L, M]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(rows, groups, -1, length, keys)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak).reshape(rows, groups, -1, keys)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed = (mixed / total).reshape(rows, heads, length, width)
    mixed = jnp.where(mask.any(axis=-1)[:, None, :, None], mixed, 0.0)
    return jnp.swapaxes(mixed, 1, 2).astype(value.dtype)


def num_blocks(length: int) -> int:
    """How many blocks of queries `attend_backwards` cuts a row of this many tokens into."""
    return max(1, length // _BLOCK)


def attend_backwards(
    query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array, **options: float | None
) -> chex.Array:
    """`attend` within a row, where no query sees a later key: long rows take nearly half the work.

    Queries go in blocks, each with the keys up to its own end alone.

    Args:
      query, key, value: as in `attend`, of the same L tokens.
      mask: bool [S, L, L], False wherever the key is later than the query.
      **options: as in `attend`.

    Returns:
      float [S, L, H, E].
    """
    length = query.shape[1]
    blocks = num_blocks(length)
    bounds = [length * block // blocks for block in range(blocks + 1)]
    parts = [
        attend(
            query[:, start:end],
            key[..., :end],
            value[:, :, :end],
            mask[:, start:end, :end],
            **options,
        )
        for start, end in itertools.pairwise(bounds)
    ]
    return jnp.concatenate(parts, axis=1) if blocks > 1 else parts[0]


def write_cache(
    cache: Cache,
    key: chex.Array,
    value: chex.Array,
    position: chex.Array,
    valid: chex.Array,
    slots: chex.Array | None = None,
) -> Cache:
    """Writes a chunk's keys and values into the cache, in place where its buffers are donated.

    Tokens that are not valid, and positions and slots past the end of the cache, are dropped:
    nothing is clamped onto a position that another token owns.

    Args:
      cache: keys float [all slots, K, E, M] and values float [all slots, K, M, E].
      key: float [S, C, K, E].
      value: float [S, C, K, E].
      position: int32 [S, C], increasing along C.
      valid: bool [S, C].
      slots: int32 [S], the slots that the rows are; None: all of them, in order.

    Returns:
      The updated (keys, values).
    """
    keys, values = cache
    num_slots, _, cache_length, _ = values.shape
    chex.assert_shape([position, valid], key.shape[:2])
    slots = jnp.arange(num_slots, dtype=jnp.int32) if slots is None else slots
    chex.assert_shape(slots, key.shape[:1])
    slot = slots[:, None]
    index = jnp.where(valid & (position >= 0), position, cache_length)
    keys = keys.at[slot, :, :, index].set(key.astype(keys.dtype), mode="drop")
    values = values.at[slot, :, index].set(value.astype(values.dtype), mode="drop")
    return keys, values


def resolve(
    implementation: str, *, dtype: jnp.dtype, softcap: float | None, packed: bool = True
) -> str:
    """Which implementation a name stands for on this backend.

    "auto" is, for rows that hold sequences or trees, "pallas" on GPU and TPU and "tree" elsewhere;
    for rows that are one whole sequence each, "splash" on TPU and "cudnn" on GPU, where cuDNN can
    do it.

    Args:
      implementation: "auto", "xla", "tree", "pallas", "cudnn" or "splash".
      dtype: what the model computes in.
      softcap: of the scores, or None.
      packed: whether rows hold more than one sequence.

    Returns:
      One of the names but "auto".

    Raises:
      ValueError: the implementation cannot do this or not on this backend, with the reason.
    """
    backend = jax.default_backend()
    cudnn_problem = None
    if softcap is not None:
        cudnn_problem = f"cannot cap scores (softcap {softcap})"
    elif dtype == jnp.float32:
        cudnn_problem = "computes in bfloat16 alone, and the model in float32"
    if implementation == "auto":
        trees = "pallas" if backend in ("gpu", "tpu") else "tree"
        whole = {"tpu": "splash", "gpu": trees if cudnn_problem else "cudnn"}
        return trees if packed else whole.get(backend, trees)
    kernels_on = {"cudnn": ("gpu",), "splash": ("tpu",), "pallas": ("gpu", "tpu")}
    needed = kernels_on.get(implementation, (backend,))
    problem = None
    if backend not in needed:
        problem = f"needs a {' or '.join(needed).upper()}; this backend is {backend!r}"
    if implementation == "cudnn":
        problem = cudnn_problem or problem
    if problem:
        raise ValueError(f"attention {implementation!r} {problem}; choose 'auto' or 'xla'")
    return implementation
