"""Which whole trajectories to imitate."""

from __future__ import annotations

import chex
import jax.numpy as jnp


@chex.dataclass(frozen=True)
class TrajectoryChoice:
    """Trajectories of one task, best first."""

    trajectory: chex.Array  # int32 [K], trajectory ids; 0 where the mask is False
    mask: chex.Array  # bool [K]
    num_ineligible: chex.Array  # int32 [], trajectories that the mask or the minimum kept out
    num_left_out: chex.Array  # int32 [], eligible ones beyond K


def best_trajectories(
    returns: chex.Array,
    lengths: chex.Array,
    *,
    max_count: int,
    min_return: float | None = None,
    mask: chex.Array | None = None,
) -> TrajectoryChoice:
    """Chooses the trajectories of highest return; among equals the shorter, then the first.

    Args:
      returns: float [R].
      lengths: int32 [R], steps.
      max_count: K of the result; R takes all (rejection sampling with `mask=success`).
      min_return: trajectories below it are not eligible; no minimum where None.
      mask: bool [R], eligible trajectories (real ones, successes, …); all where None.

    Returns:
      `TrajectoryChoice`.

    Example:
      >>> returns, lengths = jnp.array([0.0, 1.0, 1.0]), jnp.array([4, 9, 5])
      >>> best_trajectories(returns, lengths, max_count=1).trajectory.tolist()
      [2]
    """
    chex.assert_rank([returns, lengths], 1)
    chex.assert_equal_shape([returns, lengths])
    eligible = jnp.ones(returns.shape, bool) if mask is None else mask.astype(bool)
    chex.assert_equal_shape([returns, eligible])
    present = jnp.sum(jnp.ones(returns.shape, jnp.int32))
    if min_return is not None:
        eligible = eligible & (returns >= min_return)
    order = jnp.lexsort((lengths, -returns, ~eligible)).astype(jnp.int32)
    count = jnp.sum(eligible, dtype=jnp.int32)
    take = min(max_count, returns.shape[0])
    chosen = jnp.pad(order[:take], (0, max_count - take))
    valid = jnp.arange(max_count) < jnp.minimum(count, take)
    return TrajectoryChoice(
        trajectory=jnp.where(valid, chosen, 0),
        mask=valid,
        num_ineligible=present.astype(jnp.int32) - count,
        num_left_out=jnp.maximum(count - max_count, 0),
    )
