"""What training changes, as one pytree, born on the devices where it will live."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from w2sjax.parallel import batch_sharding, make_mesh, replicated


@chex.dataclass(frozen=True)
class TrainState:
    """Parameters, the optimizer's state, and the number of updates made."""

    params: Any  # pytree of arrays
    opt_state: Any  # what the optax transformation keeps
    step: chex.Array  # int32 [], updates made so far


def init_state(
    params: Any,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    param_shardings: Any | None = None,
) -> TrainState:
    """A training state at step 0.

    Args:
      params: pytree of arrays. They are copied: a train step consumes its state, and the caller's
        arrays (a reference policy, the start of the next run) stay as they are.
      tx: the optimizer.
      mesh: the devices; by default the first one alone.
      param_shardings: a NamedSharding for every parameter; by default each device holds all of
        them.

    Returns:
      TrainState. Optimizer arrays that have the shape of their parameter are sharded like it, all
      others are on every device.
    """
    mesh = mesh if mesh is not None else default_mesh()
    everywhere = replicated(mesh)
    if param_shardings is None:
        param_shardings = jax.tree.map(lambda _: everywhere, params)
    abstract_opt_state = jax.eval_shape(tx.init, params)
    opt_shardings = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, param, sharding: sharding if leaf.shape == param.shape else everywhere,
        abstract_opt_state,
        params,
        param_shardings,
        transform_non_params=lambda _: everywhere,
    )

    def init(params):
        return TrainState(
            params=jax.tree.map(jnp.copy, params),
            opt_state=tx.init(params),
            step=jnp.zeros((), jnp.int32),
        )

    out_shardings = TrainState(params=param_shardings, opt_state=opt_shardings, step=everywhere)
    return jax.jit(init, out_shardings=out_shardings)(jax.device_put(params, param_shardings))


def default_mesh() -> Mesh:
    """The first device alone.

    Raises:
      ValueError: if there are several processes, since a device belongs to one of them.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"there are {jax.process_count()} processes: give a mesh over the devices of all, "
            "such as parallel.make_mesh()."
        )
    return make_mesh(devices=jax.devices()[:1])


def row_sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
    """How the rows of a batch are split over the mesh.

    Args:
      mesh: the devices.
      stacked: the arrays are [K, S, L] rather than [S, L].

    Returns:
      The sharding.
    """
    sharding = batch_sharding(mesh)
    return NamedSharding(mesh, PartitionSpec(None, *sharding.spec)) if stacked else sharding


def check_rows(num_rows: int, mesh: Mesh) -> None:
    """Checks that a batch divides over the mesh.

    Args:
      num_rows: S.
      mesh: the devices.

    Raises:
      ValueError: if it does not.
    """
    axes = batch_sharding(mesh).spec[0]
    parts = math.prod(mesh.shape[name] for name in axes)
    if num_rows % parts:
        raise ValueError(
            f"{num_rows} rows do not divide over the {parts} devices that the mesh "
            f"{dict(mesh.shape)} splits rows over: make the row count a multiple of {parts}."
        )
