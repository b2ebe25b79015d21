"""How good a policy is on held-out tasks, and how much of the gap to expert play it closed."""

from w2sjax.evaluate.metrics import (
    Interval,
    Scores,
    compare,
    mean_interval,
    paired_difference,
    pgr_interval,
    pool_runs,
    task_scores,
)

__all__ = [
    "Interval",
    "Scores",
    "compare",
    "mean_interval",
    "paired_difference",
    "pgr_interval",
    "pool_runs",
    "task_scores",
]
