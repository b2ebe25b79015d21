"""Optimizers and schedules of optax by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

_NEVER_DECAYED = ("bias", "scale")  # leaf names; they stay undecayed when layers are stacked


def _adafactor(**options) -> optax.GradientTransformation:
    # Without a learning rate optax's adafactor gives what to add; the others, what to subtract.
    return optax.chain(optax.adafactor(learning_rate=None, **options), optax.scale(-1.0))


def _sgd(momentum: float = 0.0) -> optax.GradientTransformation:
    return optax.trace(momentum) if momentum else optax.identity()


# name → what turns gradients into a direction, before weight decay and learning rate
_DIRECTIONS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adafactor": _adafactor,
    "adam": optax.scale_by_adam,
    "adamw": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "sgd": _sgd,
}
OPTIMIZERS = tuple(sorted(_DIRECTIONS))
SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(
    schedule: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Learning rate as a function of the number of updates made.

    Linear warm-up, learning_rate · (t + 1) / (warmup_steps + 1), then `constant`, or from the peak
    to `final_fraction` of it at `total_steps`, in a straight line (`linear`) or half a cosine
    (`cosine`, Loshchilov and Hutter 2017).

    Args:
      schedule: the name.
      learning_rate: the peak.
      total_steps: length of training in updates.
      warmup_steps: updates below the peak, 0 ≤ warmup_steps < total_steps.
      final_fraction: in [0, 1]; not used by `constant`.

    Returns:
      An optax schedule.

    Raises:
      ValueError: on an unknown name or impossible numbers.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0; got {learning_rate}.")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be in [0, total_steps); got {warmup_steps} of {total_steps}."
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction must be in [0, 1]; got {final_fraction}.")
    return lambda count: _rate(
        schedule, final_fraction, count, learning_rate, total_steps, warmup_steps
    )


def _rate(schedule, final_fraction, count, peak, total_steps, warmup_steps) -> chex.Array:
    """The schedule; all numbers but `final_fraction` may be traced."""
    count = jnp.asarray(count, jnp.float32)
    warming = (count + 1) / (warmup_steps + 1)
    done = jnp.clip((count - warmup_steps) / (total_steps - warmup_steps), 0, 1)
    if schedule == "constant":
        left = jnp.ones_like(done)
    elif schedule == "linear":
        left = 1 - done
    else:
        left = 0.5 * (1 + jnp.cos(jnp.pi * done))
    below = final_fraction + (1 - final_fraction) * left
    return peak * jnp.where(count < warmup_steps, warming, below)


class RateState(NamedTuple):
    """Where training is in its schedule. The numbers are data, not part of the compiled program:
    runs that differ in nothing else share one train step.
    """

    count: chex.Array  # int32 [], updates made
    peak: chex.Array  # float32 []
    total_steps: chex.Array  # int32 []
    warmup_steps: chex.Array  # int32 []
    learning_rate: chex.Array  # float32 [], of the last update


def _scale_by_rate(
    schedule: str, final_fraction: float, learning_rate: float, total_steps: int, warmup_steps: int
) -> optax.GradientTransformation:
    def init(params):
        del params
        return RateState(
            count=jnp.zeros((), jnp.int32),
            peak=jnp.asarray(learning_rate, jnp.float32),
            total_steps=jnp.asarray(total_steps, jnp.int32),
            warmup_steps=jnp.asarray(warmup_steps, jnp.int32),
            learning_rate=jnp.zeros((), jnp.float32),
        )

    def update(updates, state, params=None):
        del params
        numbers = (state.count, state.peak, state.total_steps, state.warmup_steps)
        rate = _rate(schedule, final_fraction, *numbers)
        updates = jax.tree.map(lambda leaf: -rate.astype(leaf.dtype) * leaf, updates)
        count = optax.safe_increment(state.count)
        return updates, state._replace(count=count, learning_rate=rate)

    return optax.GradientTransformation(init, update)


class AverageState(NamedTuple):
    """Parameters averaged over training."""

    average: Any  # pytree of the parameters' shapes and dtypes, float32 at least


def _average_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters after each update; changes none."""

    def wide(leaf):
        return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))

    def init(params):
        return AverageState(jax.tree.map(wide, params))

    def update(updates, state, params=None):
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(jax.tree.map(wide, new), state.average, 1 - decay)
        return updates, AverageState(average)

    return optax.GradientTransformation(init, update)


def averaged_params(state: Any) -> Any:
    """The parameters to keep of a training state: their moving average where the optimizer has one
    (`ema_decay`), else the last ones; in their own dtypes.

    Args:
      state: a `TrainState`.

    Returns:
      pytree of arrays.
    """

    def is_average(node):
        return isinstance(node, AverageState)

    for node in jax.tree.leaves(state.opt_state, is_leaf=is_average):
        if is_average(node):
            return jax.tree.map(lambda a, p: a.astype(p.dtype), node.average, state.params)
    return state.params


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: on matrices, not on vectors, nor on leaves called `bias` or
    `scale`.

    Args:
      params: pytree of arrays.

    Returns:
      The same tree of booleans.
    """

    def decayed(path, leaf) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
        return jnp.ndim(leaf) >= 2 and name not in _NEVER_DECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    final_fraction: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    ema_decay: float = 0.0,
    **options: float,
) -> optax.GradientTransformation:
    """An optimizer: clip, direction, decoupled weight decay, learning rate, in this order.

    The state holds the schedule's numbers and the learning rate of the last update
    (`RateState`, where the train step's metric `learning_rate` comes from). So optimizers that
    differ in `learning_rate`, `total_steps` and `warmup_steps` alone have the same update function,
    and one `TrainStep` serves states that were made by any of them.

    Args:
      name: adamw, adam, lion, sgd or adafactor.
      learning_rate, total_steps, warmup_steps, schedule, final_fraction: as in `make_schedule`.
      weight_decay: each update subtracts learning_rate · weight_decay · parameter where
        `decay_mask` says so.
      clip_norm: gradients are scaled down to this global norm; None leaves them.
      ema_decay: d, keeps an average of the parameters, a ← d·a + (1 − d)·parameters after each
        update (`averaged_params`); 0 keeps none.
      **options: of the direction in optax, such as b1, b2, eps (adam, adamw, lion), momentum (sgd),
        or adafactor's.

    Returns:
      An optax transformation.

    Raises:
      ValueError: on an unknown name or impossible numbers, or weight decay with `adam` (say adamw).
      TypeError: on an option that the optimizer does not have.
    """
    if name not in _DIRECTIONS:
        raise ValueError(f"optimizer must be one of {', '.join(_DIRECTIONS)}; got {name!r}.")
    if weight_decay < 0 or (weight_decay and name == "adam"):
        raise ValueError(
            f"weight_decay must be 0 for adam (adamw has it) and not negative; got {weight_decay}."
        )
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0, or None; got {clip_norm}.")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay}.")
    numbers = {
        "learning_rate": learning_rate,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
    }
    make_schedule(schedule, final_fraction=final_fraction, **numbers)  # checks them
    parts = [_DIRECTIONS[name](**options)]
    if clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, decay_mask))
    parts.append(_scale_by_rate(schedule, final_fraction, **numbers))
    if ema_decay:
        parts.append(_average_parameters(ema_decay))
    return optax.chain(*parts)
