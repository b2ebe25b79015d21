"""Device meshes, and rules that split parameters over them. Knows no model."""

from w2sjax.parallel.mesh import AXES, batch_sharding, make_mesh, mesh_sizes, replicated
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
    "batch_sharding",
    "init_sharded",
    "make_mesh",
    "match_spec",
    "mesh_sizes",
    "param_shardings",
    "path_name",
    "replicated",
    "sharding_table",
]
