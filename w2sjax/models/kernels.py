"""Attention by fused kernels: cuDNN's on GPU, splash attention on TPU. Scores are never stored."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)


def cudnn(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    *,
    mask: chex.Array | None,
    window: int | None,
    scale: float,
) -> chex.Array:
    """cuDNN's flash attention, by `jax.nn.dot_product_attention`.

    Args:
      query: bfloat16 or float16 [S, L, H, E].
      key: the same dtype, [S, L, K, E].
      value: as `key`.
      mask: bool [S, L, L], which then decides alone; None for causal attention, which skips what no
        query sees.
      window: tokens that each sees, itself included, where `mask` is None.
      scale: multiplies the scores.

    Returns:
      [S, L, H, E].
    """
    options = {}
    if mask is not None:
        options["mask"] = mask[:, None]
    else:
        options["is_causal"] = True
        options["local_window_size"] = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, scale=scale, implementation="cudnn", **options
    )


def splash(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    *,
    mask: chex.Array | None,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> chex.Array:
    """Splash attention (Pallas), which skips blocks of queries and keys that do not see each other.

    Args:
      query: float [S, L, H, E], L a multiple of 128.
      key: float [S, L, K, E].
      value: as `key`.
      mask: bool [S, L, L], which then decides alone; None for causal attention.
      window: tokens that each sees, itself included, where `mask` is None.
      scale: multiplies the scores.
      softcap: c, scores become c·tanh(score / c).
      interpret: run the kernel's Python on any backend, slowly.

    Returns:
      [S, L, H, E].

    Raises:
      ValueError: L is no multiple of 128.
    """
    rows, length, heads, width = query.shape
    groups = key.shape[2]
    if length % 128:
        raise ValueError(
            f"attention 'splash' needs rows of a multiple of 128 tokens, got {length}; choose "
            "another row length, or attention 'xla'"
        )
    block = next(size for size in (512, 256, 128) if length % size == 0)
    make = functools.partial(
        splash_attention_kernel.make_splash_mqa_single_device,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def one_row(query, key, value, mask):
        """[K, G, L, E], [K, L, E], [K, L, E]."""
        if mask is None:
            kind = splash_attention_mask.LocalMask(
                (length, length), (None if window is None else window - 1, 0), 0
            )
            seen = splash_attention_mask.MultiHeadMask([kind] * (heads // groups))
        else:
            seen = jnp.broadcast_to(mask, (heads // groups, length, length))
        return jax.vmap(make(seen))(query, key, value)

    query = jnp.moveaxis(query * scale, 1, 2).reshape(rows, groups, -1, length, width)
    key, value = jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)
    mixed = jax.vmap(one_row)(query, key, value, mask)
    return jnp.moveaxis(mixed.reshape(rows, heads, length, width), 1, 2)
