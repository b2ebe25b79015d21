"""Several processes, each with its own devices, as one JAX program."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from w2sjax.parallel.mesh import make_mesh


def start_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Joins this process with the others of the same job; before anything else is done with JAX.

    On TPU pods, and in a SLURM step (`srun`) of several tasks, the three are found; elsewhere give
    them all, to each process its own `process_id`. On the CPU, processes talk through gloo.

    Args:
      coordinator_address: "host:port" of process 0, with a free port.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Returns:
      How many processes there are; 1 where nothing was given and nothing found.

    Raises:
      ValueError: only some of the three are given, or they do not go together.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"several processes: {', '.join(missing)} missing; give all of "
            f"{', '.join(given)}, or none of them (TPU pods and SLURM need none)."
        )
    if not missing:
        _check(coordinator_address, num_processes, process_id)
    elif not _in_slurm_step() and importlib.util.find_spec("libtpu") is None:
        return 1
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except ValueError as error:
        if "coordinator_address" not in str(error):  # what it says where it finds no cluster
            raise
        return 1
    return jax.process_count()


def _in_slurm_step() -> bool:
    """Whether srun started this process as one of several; a shell inside a job is none of them."""
    started = {"SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"} <= os.environ.keys()
    return started and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def across_processes(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process holds whole, spread over a mesh of several processes.

    Each process hands its own devices their parts, and nothing is sent between them.

    Args:
      tree: pytree of numpy arrays, the same in every process.
      sharding: where the arrays shall live.

    Returns:
      The tree of `jax.Array`; as it was where the mesh lies within this process, since jit then
      places the arrays itself.
    """
    if sharding.is_fully_addressable:
        return tree
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf, leaf.shape), tree
    )


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh on this process's devices, for what it does on its own.

    Its axes are the mesh's, as long as its part of each. Where these devices are no block of the
    mesh (a row of `tensor` goes on in another process), they all lie along `data`.
    """
    try:
        return mesh.local_mesh
    except ValueError:
        return make_mesh(devices=jax.local_devices())


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f'coordinator_address must be "host:port"; got {coordinator_address!r}.')
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id must be in 0 … num_processes − 1 = {num_processes - 1}; got {process_id}."
        )
