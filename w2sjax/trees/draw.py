"""A tree as lines of text, for terminals and documentation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from w2sjax.types import TrajectoryTree


def draw_tree(
    tree: TrajectoryTree,
    label: Callable[[int], str] | None = None,
    *,
    max_nodes: int = 200,
) -> str:
    """Draws one tree (no batch axis), a line per node, children below their parent.

    Args:
      tree: the tree; read on the host.
      label: node → the text of its line; key, count and mean return where None.
      max_nodes: lines to draw at most; a last line says how many nodes were left out.

    Returns:
      The lines, joined.
    """
    first = np.asarray(tree.first_child)
    num = np.asarray(tree.num_children)
    count = np.asarray(tree.data_count)
    total = np.asarray(tree.return_sum)
    key = np.asarray(tree.step_key)

    def default(node: int) -> str:
        name = "root" if node == 0 else f"step {key[node]}"
        return f"{name}  n={count[node]} mean={total[node] / max(count[node], 1):.2f}"

    label = default if label is None else label
    lines = []
    stack = [(0, "", "")]  # node, indentation of its own line, indentation of its children's lines
    while stack and len(lines) < max_nodes:
        node, own, below = stack.pop()
        lines.append(own + label(node))
        children = range(first[node], first[node] + num[node])
        for child in reversed(children):
            last = child == children[-1]
            stack.append(
                (child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))
            )
    left_out = int(tree.num_nodes) - len(lines)
    if left_out:
        lines.append(f"… {left_out} more nodes")
    return "\n".join(lines)
