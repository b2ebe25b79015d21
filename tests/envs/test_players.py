"""Laws of whole episodes."""

import pytest

from w2sjax.envs import Household, play
from w2sjax.types import Status


def test_the_same_arguments_give_the_same_episode():
    task_id = "household/train/3"
    first = play(Household(), task_id, random_action_rate=0.5, seed=1)
    env = Household()
    play(env, "household/train/9", random_action_rate=1.0, seed=1)
    assert play(env, task_id, random_action_rate=0.5, seed=1) == first
    others = [play(env, task_id, random_action_rate=0.5, seed=seed) for seed in range(2, 8)]
    assert any(other.actions != first.actions for other in others)


def test_rate_zero_is_the_expert():
    env = Household()
    for task_id in env.task_ids("demos", 12):
        episode = play(env, task_id, random_action_rate=0.0, seed=0)
        env.reset(task_id)
        for action in episode.actions:
            assert action == env.expert_action()
            env.step(action)
        assert episode.status is Status.SUCCESS and episode.score == 1.0


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_an_episode_is_what_the_environment_said(rate):
    env = Household(max_steps=11)
    statuses = set()
    for task_id in env.task_ids("train", 60):
        episode = play(env, task_id, random_action_rate=rate, seed=2)
        assert episode.first_observation == env.reset(task_id)
        assert episode.instruction == env.instruction and episode.task_id == task_id
        assert len(episode.actions) <= 11
        known = set()
        for i, action in enumerate(episode.actions):
            known.update(env.admissible_actions())
            assert action in known
            outcome = env.step(action)
            assert outcome.observation == episode.observations[i]
            assert outcome.score == episode.scores[i]
            assert outcome.done == (i == len(episode.actions) - 1) or i == 10
        assert episode.score == outcome.score
        expected = Status.SUCCESS if outcome.success else Status.FAILED
        assert episode.status is (expected if outcome.done else Status.STEP_LIMIT)
        statuses.add(episode.status)
    assert Status.STEP_LIMIT in statuses and (rate == 1.0 or Status.SUCCESS in statuses)


def test_the_rate_is_the_share_of_random_steps():
    env = Household()
    shares = {}
    for rate in (0.0, 0.3, 1.0):
        own = total = 0
        for task_id in env.task_ids("dev", 150):
            episode = play(env, task_id, random_action_rate=rate, seed=0)
            env.reset(task_id)
            for action in episode.actions:
                own += action == env.expert_action()
                total += 1
                env.step(action)
        shares[rate] = own / total
    # A random action is the expert's own about once in eleven.
    assert shares[0.0] == 1.0 and 0.68 < shares[0.3] < 0.78 and shares[1.0] < 0.15


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_an_impossible_rate_is_named(rate):
    with pytest.raises(ValueError, match="random_action_rate"):
        play(Household(), "household/dev/0", random_action_rate=rate, seed=0)
