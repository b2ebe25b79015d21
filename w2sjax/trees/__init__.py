"""Trajectory trees: trajectories of one task merged by common prefixes, as fixed-size arrays.

`intern_steps` turns text into integer keys on the host; `build_tree` turns keys into a
`TrajectoryTree` under `jax.jit`; `check_invariants` says in words what a tree must satisfy.
"""

from w2sjax.trees.build import build_tree, end_values, path_lengths
from w2sjax.trees.compress import BranchTable, compress_chains
from w2sjax.trees.draw import draw_tree
from w2sjax.trees.invariants import check_invariants
from w2sjax.trees.keys import MERGE_ON, StepInterner, StepKeys, intern_steps
from w2sjax.types import TrajectoryTree

__all__ = [
    "MERGE_ON",
    "BranchTable",
    "StepInterner",
    "StepKeys",
    "TrajectoryTree",
    "build_tree",
    "check_invariants",
    "compress_chains",
    "draw_tree",
    "end_values",
    "intern_steps",
    "path_lengths",
]
