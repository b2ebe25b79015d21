"""Played episodes become trajectories in the order of their requests."""

import pytest

from w2sjax.chat import ChatTemplate, parse_answer, train_bpe
from w2sjax.envs import EnvPool, PlayRequest, make_env
from w2sjax.sampling import TrajectoryWriter, play_episodes, read_trajectories
from w2sjax.types import Status


def _requests(count=12, rate=0.3):
    tasks = make_env("household").task_ids("train", count // 2)
    return [PlayRequest(tasks[i % len(tasks)], rate, seed=i) for i in range(count)]


def _play(requests, num_workers=0):
    with EnvPool("household", {}, num_slots=2, num_workers=num_workers) as pool:
        return play_episodes(pool, requests, env_name="household", policy_name="player")


def test_episodes_are_answers_of_an_agent():
    requests = _requests()
    episodes = _play(requests)
    assert [(t.task_id, t.seed) for t in episodes] == [(r.task_id, r.seed) for r in requests]
    assert [t.rollout for t in episodes] == [0] * 6 + [1] * 6
    for t in episodes:
        assert (t.env, t.policy, t.error) == ("household", "player", "")
        assert all(parse_answer(s.answer) == (None, s.action) for s in t.steps)
        assert all(s.answer_ids is None for s in t.steps)
        assert sum(s.reward for s in t.steps) == pytest.approx(t.score)


def test_experts_succeed():
    assert {t.status for t in _play(_requests(rate=0.0))} == {Status.SUCCESS}


def test_order_and_content_do_not_depend_on_workers():
    requests = _requests()
    assert _play(requests, num_workers=2) == _play(requests)


def test_progress_counts_every_episode():
    requests = _requests(4)
    reports = []
    with EnvPool("household", {}, num_slots=1) as pool:
        play_episodes(
            pool, requests, env_name="e", policy_name="p", progress=lambda *r: reports.append(r)
        )
    assert reports == [(i, 4) for i in range(1, 5)]


def test_an_environment_that_breaks_is_recorded_and_not_scored():
    good = _requests(2)
    requests = [good[0], PlayRequest("household/nowhere/x", 0.0, seed=5), good[1]]
    before, broken, after = _play(requests)
    assert [before, after] == _play(good)
    assert broken.status is Status.ENV_ERROR
    assert broken.error
    assert (broken.steps, broken.score, broken.seed) == ((), 0.0, 5)


def test_they_are_stored_and_tokenised_like_any_other(tmp_path):
    episodes = _play(_requests(4))
    with TrajectoryWriter(tmp_path / "a.jsonl") as writer:
        for episode in episodes:
            writer.write(episode)
    assert read_trajectories(tmp_path / "a.jsonl") == episodes
    template = ChatTemplate(train_bpe([t.first_observation for t in episodes], vocab_size=300))
    for episode in episodes:
        out = template.encode_trajectory(episode)
        said = template.tokenizer.decode(out.tokens[out.loss_mask])
        assert said == "".join(f"{step.answer}<|end|>" for step in episode.steps)
