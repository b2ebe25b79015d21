"""How much a choice promises: UCT and PUCT, on arrays of any shape."""

from __future__ import annotations

import chex
import jax.numpy as jnp


def uct(value_sum: chex.Array, visits: chex.Array, total: chex.Array, weight: float) -> chex.Array:
    """Q + w·sqrt(ln Σ / N); +∞ for what was never visited (Kocsis & Szepesvári 2006).

    Args:
      value_sum: float, sum of the choice's returns.
      visits: N, same dtype as `value_sum`.
      total: Σ, visits of all choices of the node.
      weight: w.

    Returns:
      Scores, the broadcast shape.
    """
    visited = visits > 0
    n = jnp.where(visited, visits, 1)
    spread = jnp.sqrt(jnp.log(jnp.maximum(total, 1)) / n)
    return jnp.where(visited, value_sum / n + weight * spread, jnp.inf)


def puct(
    value_sum: chex.Array,
    visits: chex.Array,
    total: chex.Array,
    weight: float,
    prior: chex.Array,
) -> chex.Array:
    """Q + w·P·sqrt(Σ) / (1 + N), with Q = 0 for what was never visited (Silver et al. 2017).

    Args:
      value_sum: float, sum of the choice's returns.
      visits: N, same dtype as `value_sum`.
      total: Σ, visits of all choices of the node.
      weight: w.
      prior: P of the choice.

    Returns:
      Scores, the broadcast shape.
    """
    return value_sum / jnp.maximum(visits, 1) + weight * prior * jnp.sqrt(total) / (1 + visits)


def add_compensated(
    total: chex.Array, carry: chex.Array, term: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """One step of Kahan summation: float32 sums of 10⁶ terms stay right to the last digits.

    In float64 this is the plain sum, which needs no help, and then equals Python's, bit by bit.

    Args:
      total: the sum so far.
      carry: what rounding has added to it so far.
      term: what is added.

    Returns:
      The new sum and carry.
    """
    if total.dtype == jnp.float64:
        return total + term, carry
    corrected = term - carry
    new = total + corrected
    return new, (new - total) - corrected
