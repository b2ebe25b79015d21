"""Functions of batches that stay so under `jax.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def batched(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a function of one item from one of a batch; `jax.vmap` of it calls that on the whole
    batch.

    Plain `vmap` would turn the control flow of a single item into that of a batch: both sides of
    each condition, loops as long as the longest. A function written for batches knows better.

    Args:
      function: a pytree with leading axis B → a pytree with leading axis B, row by row. No closure
        over tracers of the caller's `vmap`.

    Returns:
      The function of one item; works under `jit` and any number of `vmap`s.
    """
    batch = jax.custom_batching.custom_vmap(function)

    @batch.def_vmap
    def _rule(axis_size, in_batched, inputs):
        def flat(x, is_batched):
            if not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        result = batch(jax.tree.map(flat, inputs, in_batched[0]))
        result = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    def single(inputs):
        result = batch(jax.tree.map(lambda x: x[None], inputs))
        return jax.tree.map(lambda x: x[0], result)

    return single
