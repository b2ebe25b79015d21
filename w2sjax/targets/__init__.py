"""What the strong model is trained on, as indices and weights: pairs, choices and advantages."""

from w2sjax.targets.advantages import edge_advantages, step_weights
from w2sjax.targets.pairs import PAIRINGS, PairSet, branch_pairs, trajectory_pairs
from w2sjax.targets.sft import TrajectoryChoice, best_trajectories

__all__ = [
    "PAIRINGS",
    "PairSet",
    "TrajectoryChoice",
    "best_trajectories",
    "branch_pairs",
    "edge_advantages",
    "step_weights",
    "trajectory_pairs",
]
