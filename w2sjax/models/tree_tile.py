"""What the attention kernels compute on one tile of scores, whichever side the queries lie on."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

LOWEST = -1e30  # where running maxima start, and the log-sum-exp of a query that sees nothing
_MASKED = -2e30  # exp(_MASKED - LOWEST) is 0, so a query that has seen nothing yet adds nothing


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores come about; static in the kernels."""

    scale: float  # multiplies the products of queries and keys
    softcap: float | None  # c, scores become c·tanh(score / c)
    window: int | None  # tokens that each sees by position, itself included


@dataclasses.dataclass(frozen=True)
class Side:
    """The queries or keys of a tile; arrays are columns or rows that broadcast over the tile."""

    index: chex.Array  # int32, place in the row
    position: chex.Array | None  # int32; None without a window
    end: chex.Array | None  # int32, `subtree_end`; None for queries


def dot(first: chex.Array, second: chex.Array, contract: tuple[int, int]) -> chex.Array:
    """Product of two matrices over an axis of each, summed in float32."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(first, second, axes, preferred_element_type=jnp.float32)


def scores(
    products: chex.Array, scoring: Scoring, queries: Side | None = None, keys: Side | None = None
) -> chex.Array:
    """Scaled, capped and, where both sides are given, masked scores.

    Args:
      products: float32, queries times keys, either way round.
      scoring: how.
      queries: of the tile; None where every pair may attend.
      keys: of the tile; None where every pair may attend.

    Returns:
      float32, the shape of `products`.
    """
    values = products * scoring.scale
    if scoring.softcap is not None:
        values = scoring.softcap * jnp.tanh(values / scoring.softcap)
    if queries is None or keys is None:
        return values
    visible = (keys.index <= queries.index) & (queries.index < keys.end)
    if scoring.window is not None:
        visible &= queries.position - keys.position < scoring.window
    return jnp.where(visible, values, _MASKED)


def score_gradients(
    values: chex.Array, weights: chex.Array, gradients: chex.Array, scoring: Scoring
) -> chex.Array:
    """From gradients by weights, less their mean, to gradients by the products.

    Args:
      values: float32, from `scores`.
      weights: float32, their softmax; 0 where masked.
      gradients: float32, by the weights, less each query's weighted mean of them.
      scoring: how the scores came about.

    Returns:
      float32, the shape of `values`.
    """
    slope = scoring.scale
    if scoring.softcap is not None:
        # a masked value would overflow its square and make NaN of the 0 that it is multiplied by
        capped = jnp.maximum(values, -scoring.softcap) / scoring.softcap
        slope = scoring.scale * (1 - capped * capped)
    return weights * gradients * slope
