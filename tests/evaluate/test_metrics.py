"""Laws of the metrics: pairing, undefined PGR, crashes that are never scored."""

import numpy as np
import pytest

from w2sjax.evaluate import (
    compare,
    mean_interval,
    paired_difference,
    pgr_interval,
    pool_runs,
    task_scores,
)
from w2sjax.types import Status, Trajectory


def episode(task, status, score):
    return Trajectory(task, 0, "e", "p", 0, "", "", (), status, score)


def test_crashes_are_counted_and_never_scored():
    episodes = [
        episode("a", Status.SUCCESS, 1.0),
        episode("a", Status.ENV_ERROR, 0.0),
        episode("b", Status.POLICY_ERROR, 0.0),
        episode("c", Status.STEP_LIMIT, 0.5),
    ]
    scores = task_scores(episodes, ["a", "b", "c"])
    assert scores.unscored == 2
    np.testing.assert_array_equal(scores.reward, [1.0, np.nan, 0.5])
    np.testing.assert_array_equal(scores.success, [1.0, np.nan, 0.0])
    assert mean_interval(scores.reward).mean == 0.75


def test_success_is_the_environments_verdict_and_not_a_score():
    scores = task_scores([episode("a", Status.FAILED, 1.0)], ["a"])
    assert scores.success[0] == 0 and scores.reward[0] == 1


def test_episode_of_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="'z'"):
        task_scores([episode("z", Status.SUCCESS, 1.0)], ["a"])


def test_a_task_without_an_episode_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="'b'"):
        task_scores([episode("a", Status.SUCCESS, 1.0)], ["a", "b"])


def test_pgr_is_0_at_weak_and_1_at_the_ceiling():
    rng = np.random.default_rng(0)
    weak, ceiling = rng.random(200) * 0.5, 0.5 + rng.random(200) * 0.5
    zero, one = pgr_interval(weak, weak, ceiling), pgr_interval(ceiling, weak, ceiling)
    assert (zero.mean, zero.low, zero.high) == (0, 0, 0)
    assert (one.mean, one.low, one.high) == (1, 1, 1)


def test_pgr_is_undefined_where_the_ceiling_does_not_beat_the_weak_policy():
    weak, ceiling = np.full(10, 0.5), np.full(10, 0.5)
    result = pgr_interval(np.ones(10), weak, ceiling)
    assert result.mean is None and "does not beat" in result.note


def test_pgr_has_no_interval_where_the_gap_is_within_noise():
    rng = np.random.default_rng(1)
    weak = rng.integers(0, 2, 100).astype(float)
    ceiling = weak.copy()
    ceiling[:3] = 1 - ceiling[:3]
    ceiling[3] = 1.0
    if ceiling.mean() <= weak.mean():
        ceiling[4:8] = 1.0
    result = pgr_interval(weak + 0.1, weak, ceiling)
    assert result.low is None and "noise" in result.note


def test_pairing_removes_what_tasks_have_in_common():
    rng = np.random.default_rng(2)
    hard = rng.random(300)
    paired = paired_difference(hard + 0.01, hard)
    assert paired.low == pytest.approx(0.01) and paired.high == pytest.approx(0.01)
    alone = mean_interval(hard)
    assert alone.high - alone.low > 0.02


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = (rng.random(100) < 0.3).astype(float)
        interval = mean_interval(values, num_resamples=500, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199


def test_compare_has_pgr_1_for_the_ceiling_and_says_what_is_missing():
    def scores(rate):
        values = (np.arange(50) < 50 * rate).astype(float)
        return task_scores(
            [
                episode(f"t{i}", Status.SUCCESS if v else Status.FAILED, v)
                for i, v in enumerate(values)
            ],
            [f"t{i}" for i in range(50)],
        )

    rows = compare({"weak": scores(0.2), "sft_success": scores(0.5), "ceiling": scores(0.8)})
    assert rows["ceiling"]["pgr"]["mean"] == pytest.approx(1)
    assert rows["sft_success"]["pgr_success"]["mean"] == pytest.approx(0.5)
    assert rows["ceiling"]["difference"]["mean"] == pytest.approx(0.3)
    assert "difference" not in rows["sft_success"]
    rows = compare({"weak": scores(0.2)})
    assert rows["weak"]["pgr"]["mean"] is None and "ceiling" in rows["weak"]["pgr"]["note"]


def test_pooled_runs_have_the_mean_of_their_means_and_a_wider_interval_where_runs_differ():
    rng = np.random.default_rng(4)
    base = (rng.random(300) < 0.4).astype(float)
    alike = mean_interval(np.stack([base] * 3))
    apart = mean_interval(np.stack([base, np.zeros(300), np.ones(300)]))
    assert alike.mean == pytest.approx(base.mean())
    assert apart.mean == pytest.approx((base.mean() + 1) / 3)
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_a_crash_in_one_run_leaves_the_other_runs_of_the_task():
    values = np.array([[1.0, np.nan], [0.0, 1.0]])
    assert mean_interval(values).mean == pytest.approx(2 / 3)


def test_runs_with_other_tasks_cannot_be_pooled():
    one = task_scores([episode("a", Status.SUCCESS, 1.0)], ["a"])
    two = task_scores([episode(t, Status.SUCCESS, 1.0) for t in "ab"], ["a", "b"])
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        pool_runs([one, two])
