"""Reward, success, performance gap recovered, and their bootstrap intervals.

Everything is paired by task: one resampling of tasks serves all methods of a comparison, so that
the interval of a difference or of a PGR is that of the difference, not of two independent means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from w2sjax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided percentile interval; `mean` is None where it is undefined."""

    mean: float | None
    low: float | None
    high: float | None
    note: str = ""  # why it is undefined

    def as_dict(self) -> dict[str, float | str | None]:
        """JSON form; the note only where there is one."""
        record: dict[str, float | str | None] = {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
        }
        return record | ({"note": self.note} if self.note else {})


@dataclasses.dataclass(frozen=True)
class Scores:
    """One policy's results per task, in a fixed order of tasks.

    Tasks none of whose episodes could be scored are NaN: crashes are counted, never scored.
    """

    reward: np.ndarray  # float64 [B], mean score over the task's scored episodes, in [0, 1]
    success: np.ndarray  # float64 [B], share of its scored episodes that succeeded
    unscored: int  # episodes that broke (env_error, policy_error)
    mean_steps: float  # environment steps per scored episode


def task_scores(trajectories: Sequence[Trajectory], task_ids: Sequence[str]) -> Scores:
    """Averages episodes per task.

    Args:
      trajectories: episodes of one policy in one evaluation mode, in any order.
      task_ids: the B tasks, which fix the order of the result.

    Returns:
      Scores, with NaN where a task has no scored episode.

    Raises:
      ValueError: a trajectory of a task that is not in `task_ids`.
    """
    index = {task: i for i, task in enumerate(task_ids)}
    total = np.zeros((len(task_ids), 3))
    steps = 0
    unscored = 0
    for trajectory in trajectories:
        if trajectory.task_id not in index:
            raise ValueError(f"task {trajectory.task_id!r} is not among the evaluated tasks")
        if not trajectory.status.scored:
            unscored += 1
            continue
        total[index[trajectory.task_id]] += (1.0, trajectory.score, float(trajectory.success))
        steps += len(trajectory.steps)
    count = total[:, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        reward, success = total[:, 1] / count, total[:, 2] / count
    return Scores(
        reward=reward,
        success=success,
        unscored=unscored,
        mean_steps=steps / max(1.0, float(count.sum())),
    )


def _resamples(num_tasks: int, num_resamples: int, seed: int) -> np.ndarray:
    """int64 [num_resamples, num_tasks]: task indices drawn with replacement."""
    return np.random.default_rng(seed).integers(num_tasks, size=(num_resamples, num_tasks))


def _interval(estimate: float, draws: np.ndarray, confidence: float) -> Interval:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(mean=float(estimate), low=float(low), high=float(high))


def mean_interval(
    values: np.ndarray, *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over tasks with a percentile bootstrap interval; NaN tasks are left out.

    Args:
      values: float [B], one value a task.
      num_resamples: bootstrap draws.
      confidence: two-sided coverage.
      seed: of the resampling.

    Returns:
      Interval; undefined, with a note, where no task has a value.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(None, None, None, "no scored episode")
    draws = values[_resamples(len(values), num_resamples, seed)].mean(axis=1)
    return _interval(values.mean(), draws, confidence)


def paired_difference(
    values: np.ndarray,
    reference: np.ndarray,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over tasks of `values − reference`, both float [B]; tasks where either is NaN are left
    out.
    """
    return mean_interval(
        values - reference, num_resamples=num_resamples, confidence=confidence, seed=seed
    )


def pgr_interval(
    values: np.ndarray,
    weak: np.ndarray,
    ceiling: np.ndarray,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Performance gap recovered, (w2s − weak) / (ceiling − weak) (Burns et al. 2023, arXiv
    2312.09390).

    Args:
      values, weak, ceiling: float [B], one value a task, same tasks; NaN tasks are left out.
      num_resamples: bootstrap draws over tasks. Draws whose ceiling does not beat their weak policy
        have no PGR; when more than 2.5 % of them are such, the interval is undefined, since the gap
        is not distinguishable from none.
      confidence: two-sided coverage.
      seed: of the resampling.

    Returns:
      Interval; undefined, with a note, where ceiling ≤ weak.
    """
    kept = ~(np.isnan(values) | np.isnan(weak) | np.isnan(ceiling))
    values, weak, ceiling = values[kept], weak[kept], ceiling[kept]
    if not len(values):
        return Interval(None, None, None, "no task was scored for all three policies")
    gap = float(ceiling.mean() - weak.mean())
    if gap <= 0:
        return Interval(
            None, None, None, f"the ceiling does not beat the weak policy (gap {gap:.3f})"
        )
    rows = _resamples(len(values), num_resamples, seed)
    gaps = (ceiling - weak)[rows].mean(axis=1)
    gains = (values - weak)[rows].mean(axis=1)
    estimate = float((values.mean() - weak.mean()) / gap)
    defined = gaps > 0
    if defined.mean() < 0.975:
        note = "the gap between ceiling and weak is within noise: no interval"
        return Interval(estimate, None, None, note)
    return _interval(estimate, gains[defined] / gaps[defined], confidence)


def compare(
    scores: Mapping[str, Scores],
    *,
    weak: str = "weak",
    ceiling: str = "ceiling",
    reference: str = "sft_success",
    num_resamples: int = 2000,
) -> dict[str, dict]:
    """All of a table's rows for one evaluation mode.

    Args:
      scores: results per method on the same tasks.
      weak, ceiling: the methods that PGR is measured between; where one is absent, PGR is
      undefined.
      reference: the method that paired differences are taken to.
      num_resamples: bootstrap draws.

    Returns:
      method → {reward, success, pgr (on reward), pgr_success, difference (of success to the
      reference), difference_to_weak, unscored, mean_steps}; intervals as dicts.
    """
    rows = {}
    options = {"num_resamples": num_resamples}
    for name, result in scores.items():
        row = {
            "reward": mean_interval(result.reward, **options),
            "success": mean_interval(result.success, **options),
        }
        for key, field in (("pgr", "reward"), ("pgr_success", "success")):
            missing = [other for other in (weak, ceiling) if other not in scores]
            if missing:
                row[key] = Interval(None, None, None, f"{' and '.join(missing)} not evaluated")
            else:
                row[key] = pgr_interval(
                    getattr(result, field),
                    getattr(scores[weak], field),
                    getattr(scores[ceiling], field),
                    **options,
                )
        for key, other in (("difference", reference), ("difference_to_weak", weak)):
            if other in scores and other != name:
                row[key] = paired_difference(result.success, scores[other].success, **options)
        rows[name] = {key: value.as_dict() for key, value in row.items()}
        rows[name] |= {"unscored": result.unscored, "mean_steps": result.mean_steps}
    return rows
