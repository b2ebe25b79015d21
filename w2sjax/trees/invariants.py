"""What every tree must satisfy, checked on the host."""

from __future__ import annotations

import numpy as np

from w2sjax.types import TrajectoryTree


def check_invariants(tree: TrajectoryTree) -> None:
    """Checks one tree (no batch axis) on the host; for tests and for trees from elsewhere.

    Args:
      tree: arrays that can be turned into numpy arrays.

    Raises:
      ValueError: names the first law that fails and the node.
    """
    arrays = {name: np.asarray(getattr(tree, name)) for name in tree.__dataclass_fields__}
    t = type("Arrays", (), arrays)
    capacity, count = t.parent.shape[0], int(t.num_nodes)
    node = np.arange(capacity)
    real = node < count
    inner = real & (node > 0)
    nodes_of = t.trajectory_node
    through = nodes_of[nodes_of >= 0]
    counted = np.bincount(through, minlength=capacity)
    children = np.bincount(t.parent[inner], minlength=capacity)
    child_sum = np.zeros(capacity, np.int64)
    np.add.at(child_sum, t.parent[inner], t.data_count[inner])
    up = np.where(inner, t.parent, 0)
    complete = int(t.overflow) == 0
    held = t.terminal_count + child_sum
    in_range = np.where(inner & (up >= 0), t.first_child[up], 0)

    _require((t.parent[inner] >= 0) & (t.parent[inner] < node[inner]), "parent[v] < v", node[inner])
    _require(t.depth[inner] == t.depth[up[inner]] + 1, "depth = depth(parent) + 1", node[inner])
    _require(np.diff(t.depth[real]) >= 0, "breadth-first: depth never falls", node[real][1:])
    _require(np.diff(t.parent[real]) >= 0, "children are contiguous", node[real][1:])
    _require(children == t.num_children, "num_children counts the children", node)
    _require(
        (node >= in_range)[inner] & (node < in_range + t.num_children[up])[inner],
        "children lie at first_child … first_child + num_children − 1",
        node[inner],
    )
    _require((t.first_child >= 0) == (t.num_children > 0), "first_child is −1 iff a leaf", node)
    _require(counted == t.data_count, "data_count counts trajectories through the node", node)
    law = held == t.data_count if complete else held <= t.data_count
    _require(law[real], "data_count = terminal_count + Σ data_count of children", node[real])
    present = int((nodes_of[:, 0] >= 0).sum())
    ends = int(t.terminal_count.sum())
    _require(np.array([t.data_count[0] == present]), "data_count(root) = trajectories", node)
    _require(np.array([ends == present or not complete]), "Σ terminal_count = trajectories", node)
    has_data = real & (t.data_count > 0)
    _require(
        nodes_of[t.representative[has_data], t.depth[has_data]] == node[has_data],
        "the representative passes through the node at its depth",
        node[has_data],
    )
    for name, blank in (
        ("parent", -1),
        ("depth", 0),
        ("step_key", 0),
        ("data_count", 0),
        ("return_sum", 0),
        ("terminal_count", 0),
        ("terminal_return_sum", 0),
        ("first_child", -1),
        ("num_children", 0),
        ("representative", -1),
    ):
        _require(arrays[name][~real] == blank, f"padding is inert: {name} = {blank}", node[~real])


def _require(holds: np.ndarray, law: str, nodes: np.ndarray) -> None:
    if not np.all(holds):
        raise ValueError(f"tree: not true at node {nodes[np.argmin(holds)]}: {law}")
