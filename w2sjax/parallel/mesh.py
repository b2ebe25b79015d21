"""Device meshes with the project's three axes.

`data` splits the batch, `fsdp` splits the batch and the parameters' storage, `tensor` splits single
matrix products. One device is a mesh of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor` in automatic (compiler-chosen) sharding mode.

    Args:
      data: size of the data axis; −1 fills with the devices that the other axes leave.
      fsdp: the same, for the fsdp axis.
      tensor: the same, for the tensor axis. At most one of the three may be −1.
      devices: devices to use; all of `jax.devices()` by default.

    Returns:
      The mesh.

    Raises:
      ValueError: a size that is neither −1 nor positive, two sizes of −1, or sizes whose product is
        not the number of devices.

    Example:
      >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(data, fsdp, tensor, num_devices=len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def mesh_sizes(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, num_devices: int
) -> dict[str, int]:
    """The sizes of the axes over so many devices, which need not be there.

    Args:
      data, fsdp, tensor: as in `make_mesh`.
      num_devices: how many there are to be.

    Returns:
      Axis → size, without −1.

    Raises:
      ValueError: as in `make_mesh`.

    Example:
      >>> mesh_sizes(fsdp=4, num_devices=8)
      {'data': 2, 'fsdp': 4, 'tensor': 1}
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name} must be -1 (fill) or >= 1, got {size}")
    fills = [name for name, size in sizes.items() if size == -1]
    if len(fills) > 1:
        raise ValueError(f"only one mesh axis may be -1 (fill), got {' and '.join(fills)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fills:
        if num_devices % fixed:
            raise ValueError(
                f"mesh {_describe(sizes)}: {num_devices} devices cannot be divided by {fixed}, "
                f"the product of the given sizes, to fill {fills[0]}"
            )
        sizes[fills[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise ValueError(
            f"mesh {_describe(sizes)} needs {fixed} devices, there are {num_devices}; "
            "set one size to -1 to fill"
        )
    return sizes


def row_axes(num_rows: int) -> tuple[str, ...]:
    """The axes of the set mesh (`jax.set_mesh`) that split so many rows.

    Args:
      num_rows: S.

    Returns:
      ("data", "fsdp"), or () where no mesh of the project is set, it is one device, or the rows do
      not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(axis not in mesh.shape for axis in AXES) or mesh.size == 1:
        return ()
    return () if num_rows % (mesh.shape["data"] * mesh.shape["fsdp"]) else ("data", "fsdp")


def tensor_axis(*sizes: int) -> str | None:
    """The axis of the set mesh that splits dimensions of these sizes, "tensor", or None where it
    cannot split them all or no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape.get("tensor", 1)
    return "tensor" if ways > 1 and not any(size % ways for size in sizes) else None


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """A function of local parts, run by every device of the set mesh on its own.

    For code that the partitioner should not take apart, such as kernels and loops. The result is
    not to be differentiated: give forward and backward pass each their own.

    Args:
      function: of arrays, one part each; may reduce over the mesh's axes.
      in_specs, out_specs: as in `jax.shard_map`.

    Returns:
      The function of whole arrays; `function` itself where no mesh of several devices is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its leading axis is split over `data` and `fsdp` together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole, such as step counters and metrics."""
    return NamedSharding(mesh, PartitionSpec())


def _describe(sizes: dict[str, int]) -> str:
    return " × ".join(f"{name}={size}" for name, size in sizes.items())
