"""Ordered rules from a parameter's path to how it is split over a mesh.

A rule is (regex, `PartitionSpec`); the first one whose regex is found in the path
("layers/attention/query/kernel") decides. A parameter that no rule names is an error: nothing is
replicated by accident. Rules are plain data that a model brings along.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, PartitionSpec]]


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as text: "layers/attention/query/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def match_spec(name: str, shape: Sequence[int], rules: Rules) -> PartitionSpec:
    """The spec of the first rule that names the parameter.

    Args:
      name: the parameter's path.
      shape: its shape.
      rules: ordered (regex, spec); regexes are searched for anywhere in the path.

    Returns:
      The spec. Scalars and arrays of one element need no rule: they are replicated.

    Raises:
      ValueError: no rule matches, or the spec has more entries than the parameter has axes.
    """
    if math.prod(shape) == 1:
        return PartitionSpec()
    for pattern, spec in rules:
        if re.search(pattern, name):
            if len(spec) > len(shape):
                raise ValueError(
                    f"rule {pattern!r} gives parameter {name} the spec {spec}, which has more "
                    f"entries than its shape {tuple(shape)}"
                )
            return spec
    raise ValueError(
        f"no sharding rule matches parameter {name} of shape {tuple(shape)}; add a rule for it "
        "(PartitionSpec() replicates)"
    )


def param_shardings(abstract_params: chex.ArrayTree, rules: Rules, mesh: Mesh) -> Any:
    """How each parameter is split over the mesh.

    Args:
      abstract_params: pytree of arrays or `jax.ShapeDtypeStruct`.
      rules: ordered (regex, spec).
      mesh: the mesh that the specs' axes belong to.

    Returns:
      Pytree of `NamedSharding`, of the structure of `abstract_params`.

    Raises:
      ValueError: a parameter without a rule; a spec with an axis that the mesh lacks; a dimension
        that its mesh axes don't divide. The message names the parameter.
    """

    def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = match_spec(name, leaf.shape, rules)
        for dimension, axes in zip(leaf.shape, spec, strict=False):
            ways = _ways(name, spec, axes, mesh)
            if dimension % ways:
                raise ValueError(
                    f"parameter {name} of shape {tuple(leaf.shape)}: spec {spec} would split "
                    f"{dimension} into {ways} equal parts; choose other mesh sizes"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, abstract_params)


def init_sharded(
    init_fn: Callable[[chex.PRNGKey], chex.ArrayTree],
    rules: Rules,
    mesh: Mesh,
    key: chex.PRNGKey,
) -> chex.ArrayTree:
    """Draws parameters that are born split: no device ever holds more than its own part.

    Args:
      init_fn: `key → params`, traceable.
      rules: ordered (regex, spec).
      mesh: where the parameters live.
      key: PRNG key.

    Returns:
      The parameters, as `init_fn(key)` gives them, on the mesh.
    """
    shardings = param_shardings(jax.eval_shape(init_fn, key), rules, mesh)
    return jax.jit(init_fn, out_shardings=shardings)(key)


def sharding_table(abstract_params: chex.ArrayTree, rules: Rules, mesh: Mesh) -> str:
    """A table to read: parameter, shape, spec, bytes per device, and their sum in the last line.

    Args:
      abstract_params: pytree of arrays or `jax.ShapeDtypeStruct`.
      rules: ordered (regex, spec).
      mesh: the mesh.

    Returns:
      Text of one line per parameter.
    """
    shardings = jax.tree.leaves(param_shardings(abstract_params, rules, mesh))
    rows, total = [("parameter", "shape", "spec", "bytes per device")], 0
    for (path, leaf), sharding in zip(
        jax.tree.leaves_with_path(abstract_params), shardings, strict=True
    ):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += size
        spec = ", ".join(str(axes) for axes in sharding.spec) or "replicated"
        shape = " × ".join(str(dimension) for dimension in leaf.shape) or "scalar"
        rows.append((path_name(path), shape, spec, f"{size:,}"))
    rows.append(("sum", "", "", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column == 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _ways(name: str, spec: PartitionSpec, axes: Any, mesh: Mesh) -> int:
    """Into how many parts one entry of a spec splits its dimension."""
    axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(
                f"parameter {name}: spec {spec} names the mesh axis {axis!r}; the mesh has "
                f"{', '.join(mesh.shape)}"
            )
    return math.prod(mesh.shape[axis] for axis in axes)
