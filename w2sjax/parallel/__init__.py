"""Device meshes, rules that split parameters over them, and processes. Knows no model."""

from w2sjax.parallel.hosts import across_processes, local_mesh, start_processes
from w2sjax.parallel.mesh import (
    AXES,
    batch_sharding,
    make_mesh,
    mesh_sizes,
    on_each_device,
    replicated,
    row_axes,
    tensor_axis,
)
from w2sjax.parallel.rules import (
    Rules,
    init_sharded,
    match_spec,
    param_shardings,
    path_name,
    sharding_table,
)

__all__ = [
    "AXES",
    "Rules",
    "across_processes",
    "batch_sharding",
    "init_sharded",
    "local_mesh",
    "make_mesh",
    "match_spec",
    "mesh_sizes",
    "on_each_device",
    "param_shardings",
    "path_name",
    "replicated",
    "row_axes",
    "sharding_table",
    "start_processes",
    "tensor_axis",
]
