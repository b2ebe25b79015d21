"""Reward, success, performance gap recovered, and their bootstrap intervals.

Everything is paired by task: one resampling of tasks serves all methods of a comparison, so that
the interval of a difference or of a PGR is that of the difference, not of two independent means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

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

    # float64 [B], or [K, B] over K runs: mean score of scored episodes, in [0, 1]
    reward: np.ndarray
    success: np.ndarray  # float64, likewise: share of scored episodes that succeeded
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
      ValueError: a trajectory of a task that is not in `task_ids`, or a task without any.
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
    seen = {trajectory.task_id for trajectory in trajectories}
    absent = [task for task in task_ids if task not in seen]
    if absent:
        raise ValueError(f"{len(absent)} evaluated tasks have no episode, {absent[0]!r} first")
    count = total[:, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        reward, success = total[:, 1] / count, total[:, 2] / count
    return Scores(
        reward=reward,
        success=success,
        unscored=unscored,
        mean_steps=steps / max(1.0, float(count.sum())),
    )


def _bootstrap(
    statistic: Callable[..., np.ndarray],
    values: Sequence[np.ndarray],
    *,
    num_resamples: int,
    confidence: float,
    seed: int,
) -> tuple[float, np.ndarray, Callable[[np.ndarray], tuple[float, float]]]:
    """The statistic of the means, its resampled values, and how to cut an interval from those.

    Runs (training seeds) and tasks are both drawn with replacement, the same ones for all `values`,
    so that an interval over several runs covers the choice of the seed as well, as far as a handful
    of seeds can tell (it is a normal-range interval, not a t one).

    Args:
      statistic: maps the mean of each of `values`, float [n] each, to float [n].
      values: float [K, B] each (runs by tasks), the same runs and tasks; NaN is left out of means.
      num_resamples: draws.
      confidence: two-sided coverage.
      seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    num_runs, num_tasks = values[0].shape
    # How often each run and task is drawn. With few runs plain resampling understates how far runs
    # differ, by (K − 1) / K: their deviations from one draw each are scaled up by its inverse root.
    runs = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_resamples)
    if num_runs > 1:
        runs = 1 + (runs - 1) * np.sqrt(num_runs / (num_runs - 1))
    tasks = rng.multinomial(num_tasks, np.full(num_tasks, 1 / num_tasks), size=num_resamples)
    means = []
    for value in values:
        total = np.einsum("nk,kb,nb->n", runs, np.nan_to_num(value), tasks, optimize=True)
        count = np.einsum("nk,kb,nb->n", runs, (~np.isnan(value)) * 1.0, tasks, optimize=True)
        means.append(total / np.maximum(count, 1e-9))
    estimate = statistic(*(np.nanmean(value, keepdims=True)[0] for value in values))[0]
    tail = 100 * (1 - confidence) / 2

    def interval(draws: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(draws, [tail, 100 - tail])
        return float(low), float(high)

    return float(estimate), statistic(*means), interval


def _only_common(*values: np.ndarray) -> list[np.ndarray]:
    """float [K, B] each, NaN wherever any of them is; tasks that are NaN in every run are
    dropped.
    """
    stacked = np.stack([np.atleast_2d(value) for value in values]).astype(np.float64)
    stacked[:, np.isnan(stacked).any(axis=0)] = np.nan
    return list(stacked[:, :, ~np.isnan(stacked[0]).all(axis=0)])


def mean_interval(
    values: np.ndarray, *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean with a percentile bootstrap interval; NaN values are left out.

    Args:
      values: float [B], one value a task, or [K, B] for K runs on the same tasks.
      num_resamples: bootstrap draws.
      confidence: two-sided coverage.
      seed: of the resampling.

    Returns:
      Interval; undefined, with a note, where no task has a value.
    """
    (kept,) = _only_common(values)
    if not kept.size:
        return Interval(None, None, None, "no scored episode")
    estimate, draws, interval = _bootstrap(
        lambda mean: mean, [kept], num_resamples=num_resamples, confidence=confidence, seed=seed
    )
    return Interval(estimate, *interval(draws))


def paired_difference(
    values: np.ndarray,
    reference: np.ndarray,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of `values − reference` over tasks (and runs), paired; shapes as in `mean_interval`."""
    return mean_interval(
        np.asarray(values) - reference,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
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
    """Performance gap recovered, (w2s − weak) / (ceiling − weak) (Burns et al., arXiv 2312.09390).

    Args:
      values: float [B] or [K, B], as in `mean_interval`; so are `weak` and `ceiling`, on the same
        tasks (and of the same runs).
      weak: the weak policy.
      ceiling: the strong model trained on expert data.
      num_resamples: bootstrap draws. Draws whose ceiling does not beat their weak policy have no
        PGR; when more than 2.5 % of them are such, there is no interval, since the gap is not
        distinguishable from none.
      confidence: two-sided coverage.
      seed: of the resampling.

    Returns:
      Interval; undefined, with a note, where ceiling ≤ weak.
    """
    kept = _only_common(values, weak, ceiling)
    if not kept[0].size:
        return Interval(None, None, None, "no task was scored for all three policies")
    gap = float(np.nanmean(kept[2]) - np.nanmean(kept[1]))
    if gap <= 0:
        note = f"the ceiling does not beat the weak policy (gap {gap:.3f})"
        return Interval(None, None, None, note)

    def recovered(value, low, high):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(high > low, (value - low) / (high - low), np.nan)

    estimate, draws, interval = _bootstrap(
        recovered, kept, num_resamples=num_resamples, confidence=confidence, seed=seed
    )
    defined = draws[~np.isnan(draws)]
    if len(defined) < 0.975 * len(draws):
        note = "the gap between ceiling and weak is within noise: no interval"
        return Interval(estimate, None, None, note)
    return Interval(estimate, *interval(defined))


def pool_runs(runs: Sequence[Scores]) -> Scores:
    """Several runs (training seeds) of one method on the same tasks as one record [K, B].

    Raises:
      ValueError: the runs have different numbers of tasks.
    """
    sizes = {len(run.reward) for run in runs}
    if len(sizes) != 1:
        raise ValueError(
            f"runs to pool must have the same tasks; numbers of tasks: {sorted(sizes)}"
        )
    return Scores(
        reward=np.stack([run.reward for run in runs]),
        success=np.stack([run.success for run in runs]),
        unscored=sum(run.unscored for run in runs),
        mean_steps=float(np.mean([run.mean_steps for run in runs])),
    )


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
