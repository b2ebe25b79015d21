"""Episodes are made block by block, by however many processes, and go on where they were cut off.

Here the processes take turns; tests/pipeline/test_processes_job.py runs real ones.
"""

import contextlib
import itertools
import re
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath

from w2sjax import models
from w2sjax.chat import ChatTemplate, train_bpe
from w2sjax.config import default_config
from w2sjax.envs import PlayRequest, make_env
from w2sjax.pipeline import episodes as pipeline_episodes
from w2sjax.pipeline.blocks import EPISODES, join_episodes
from w2sjax.pipeline.episodes import Episodes
from w2sjax.sampling import CollectStats, EpisodeRequest, read_trajectories
from w2sjax.types import Status, Step, Trajectory

HOUSEHOLD = {"families": ("look", "put"), "num_object_types": 4, "max_steps": 8}


class Asked(NamedTuple):
    """A request."""

    task_id: str


TASKS = ("a", "a", "b", "a", "b", "c", "a", "c")
NUMBERS = (0, 1, 0, 2, 1, 0, 3, 1)  # how many times the task came before
BLOCK = 3
STARTS = (0, 3, 6)


class Maker:
    """Makes episodes that say in which call they were made, the last one first."""

    def __init__(self, fail_at=None, left=-1):
        self.starts, self.made = [], []
        self.fail_at, self.left = fail_at, left  # cut off before a call, or after so many episodes

    def __call__(self, wanted, on_done, progress):
        if wanted[0] == self.fail_at:
            raise ConnectionError("cut off")
        self.starts.append(wanted[0])
        self.made += wanted
        start = wanted[0] // BLOCK * BLOCK
        made = [
            Trajectory(
                task_id=TASKS[index],
                rollout=NUMBERS[index],
                env="e",
                policy="p",
                seed=start,
                instruction="",
                first_observation=f"{TASKS[index]}, {NUMBERS[index]}",
                steps=(Step("Action: x", "x", "seen"),),
                status=Status.FAILED,
                score=0.0,
            )
            for index in wanted
        ]
        for episode in made[::-1]:
            if self.left == 0:
                raise ConnectionError("cut off")
            self.left -= 1
            on_done(episode)
        progress(len(made), "")


def process(index, count, check=lambda: None):
    return SimpleNamespace(index=index, count=count, check=check)


def in_blocks(directory, make, one=None):
    """One process's share of the stage."""
    episodes = Episodes(default_config(), one or process(0, 1))
    requests = [Asked(task) for task in TASKS]
    return episodes._in_blocks(epath.Path(directory), "title", requests, BLOCK, make)


def by_all(directory, make, count=1):
    """The whole stage by so many processes, the last one first; returns the facts."""
    shares = [in_blocks(directory, make, process(i, count)) for i in reversed(range(count))]
    return join_episodes(epath.Path(directory), shares)


def block_file(directory, start):
    return directory / f"episodes.{start // BLOCK:06d}.jsonl"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(the file of a stage that one process made, its blocks)."""
    directory = tmp_path_factory.mktemp("whole")
    make = Maker()
    share = in_blocks(directory, make)
    assert make.starts == list(STARTS)
    blocks = [block_file(directory, start).read_bytes() for start in STARTS]
    facts = join_episodes(epath.Path(directory), [share])
    assert (facts["episodes"], facts["statuses"]) == (8, {"failed": 8})
    assert [path.name for path in directory.iterdir()] == [EPISODES]
    episodes = read_trajectories(directory / EPISODES)
    assert [(t.task_id, t.rollout) for t in episodes] == list(zip(TASKS, NUMBERS, strict=True))
    return (directory / EPISODES).read_bytes(), blocks


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("there", list(itertools.product((True, False), repeat=3)))
def test_blocks_that_are_there_stay_with_however_many_processes(
    uninterrupted, tmp_path, there, count
):
    whole, blocks = uninterrupted
    for start, block, kept in zip(STARTS, blocks, there, strict=True):
        if kept:
            block_file(tmp_path, start).write_bytes(block)
    make = Maker()
    by_all(tmp_path, make, count)
    assert sorted(make.starts) == [
        start for start, kept in zip(STARTS, there, strict=True) if not kept
    ]
    assert (tmp_path / EPISODES).read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [EPISODES]


def test_each_process_makes_its_own_blocks(tmp_path):
    made = []
    for index in range(2):
        make = Maker()
        in_blocks(tmp_path, make, process(index, 2))
        made.append(make.starts)
    assert made == [[0, 6], [3]]


@pytest.mark.parametrize("kept", ["torn", "none", "another"])
def test_a_damaged_block_is_repeated(uninterrupted, tmp_path, kept):
    whole, blocks = uninterrupted
    damaged = {"torn": blocks[1][:-20], "none": b"", "another": blocks[0]}[kept]
    for start, block in zip(STARTS, (blocks[0], damaged, blocks[2]), strict=True):
        block_file(tmp_path, start).write_bytes(block)
    make = Maker()
    by_all(tmp_path, make)
    assert make.starts == [3] and (tmp_path / EPISODES).read_bytes() == whole


def test_a_block_that_breaks_costs_only_itself(uninterrupted, tmp_path):
    with pytest.raises(ConnectionError):
        in_blocks(tmp_path, Maker(fail_at=3))
    make = Maker()
    by_all(tmp_path, make)
    assert make.starts == [3, 6] and (tmp_path / EPISODES).read_bytes() == uninterrupted[0]


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("left", range(8))
def test_no_episode_on_disk_is_made_again(uninterrupted, tmp_path, left, torn):
    with pytest.raises(ConnectionError):
        in_blocks(tmp_path, Maker(left=left))
    (log,) = tmp_path.glob("*.unfinished")
    assert log.read_bytes().count(b"\n") == left % BLOCK
    lost = 0
    if torn and left % BLOCK:
        log.write_bytes(log.read_bytes()[:-9])
        lost = 1
    make = Maker()
    by_all(tmp_path, make, 2)
    assert len(make.made) == len(set(make.made)) == len(TASKS) - left + lost
    assert (tmp_path / EPISODES).read_bytes() == uninterrupted[0]
    assert [path.name for path in tmp_path.iterdir()] == [EPISODES]


def test_an_episode_that_cannot_be_read_back_is_named(tmp_path):
    with pytest.raises(ConnectionError):
        in_blocks(tmp_path, Maker(left=5))
    (log,) = tmp_path.glob("*.unfinished")
    log.write_bytes(b"{}\n" + log.read_bytes())
    with pytest.raises(ValueError, match=r"episodes.000001.unfinished:1: .*or delete the file"):
        in_blocks(tmp_path, Maker())


@pytest.mark.parametrize("blocks_left", range(4))
def test_joined_blocks_are_not_made_again(uninterrupted, tmp_path, blocks_left):
    """Cut off while the blocks, just joined, were being deleted."""
    whole, blocks = uninterrupted
    (tmp_path / EPISODES).write_bytes(whole)
    for start, block in list(zip(STARTS, blocks, strict=True))[3 - blocks_left :]:
        block_file(tmp_path, start).write_bytes(block)
    make = Maker()
    by_all(tmp_path, make, 2)
    assert make.starts == [] and (tmp_path / EPISODES).read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [EPISODES]


def test_another_process_that_failed_is_noticed_before_the_next_block(tmp_path):
    make = Maker()

    def check():
        if make.starts:
            raise RuntimeError("process 1 failed")

    with pytest.raises(RuntimeError, match="process 1 failed"):
        in_blocks(tmp_path, make, process(0, 2, check))
    assert make.starts == [0]


def test_played_episodes_do_not_depend_on_blocks_and_processes(tmp_path, monkeypatch):
    """Copies of a task in several blocks, whole and cut off, give the file of one large block."""
    c = default_config()
    c.env.options.update(HOUSEHOLD)

    def play(name, block, count=1, written=None):
        monkeypatch.setattr(pipeline_episodes, "_PLAYED_BLOCK", block)
        directory = epath.Path(tmp_path / name)
        directory.mkdir()
        if written is not None:
            (directory / "episodes.000000.jsonl").write_bytes(written)
        shares = []
        for index in range(count):
            players = Episodes(c, process(index, count))
            with players.pool(slots=1) as pool:
                x, y, z = pool.task_ids("train", 3)
                requests = [
                    PlayRequest(task, 0.3, seed=seed)
                    for seed, task in enumerate([x, x, x, y, z, y, x, z])
                ]
                shares.append(players.play(directory, pool, requests, policy_name="player"))
            players.close()
        facts = join_episodes(directory, shares)
        assert (facts["episodes"], facts["unscored"]) == (8, 0)
        return directory / EPISODES, requests, facts

    path, requests, facts = play("one_block", 256)
    whole = path.read_bytes()
    episodes = read_trajectories(path)
    assert [t.task_id for t in episodes] == [r.task_id for r in requests]
    assert [t.seed for t in episodes] == list(range(8))
    assert [t.rollout for t in episodes] == [0, 1, 2, 0, 0, 1, 3, 1]
    assert play("blocks", 2)[0].read_bytes() == whole
    three, _, same = play("three", 2, count=3)
    assert three.read_bytes() == whole and same == facts
    cut = b"".join(whole.splitlines(keepends=True)[:2]) + b'{"format": 1, "task'
    assert play("cut", 3, count=2, written=cut)[0].read_bytes() == whole


def test_choosing_among_admissible_actions_is_scored_by_the_model_itself(tmp_path, monkeypatch):
    """Household, a model of random weights: what is recorded is the softmax over what could be
    done of the full forward pass's log-probabilities. Progress is told on the way."""
    told = []
    monkeypatch.setattr(
        pipeline_episodes.report,
        "progress_bar",
        lambda *about: contextlib.nullcontext(lambda *news: told.append((about, news))),
    )
    c = default_config()
    c.env.options.max_steps = 3
    c.env.workers = 0
    c.sampler.slots, c.sampler.actions, c.models.max_length = 4, "admissible", 400
    env = make_env("household", **c.env.options)
    tasks = list(env.task_ids("train", 2))
    texts = [env.instruction, *(env.reset(task) for task in tasks), *env.admissible_actions()] * 5
    template = ChatTemplate(train_bpe([*texts, "Action: look"], vocab_size=400))
    shape = dict(vocab_size=template.vocab_size, max_length=1024)
    config = models.preset("tiny", **shape)
    policy, params = models.make_policy(config), models.init_params(config, jax.random.key(0))
    with (
        contextlib.closing(Episodes(c, process(0, 1))) as episodes,
        episodes.pool(slots=4) as pool,
    ):
        share = episodes.sample(
                epath.Path(tmp_path), "title", template, policy, params, pool,
                [EpisodeRequest(task, r) for task in tasks for r in range(3)],
                draws={"temperature": 50.0}, policy_name="weak", seed=0,
            )  # fmt: skip
    about, (count, note) = told[-1]
    assert (about, count) == (("title", 6, "episodes"), 6)
    assert re.fullmatch(r"\d+ tokens/s, model \d+%, environment \d+%", note)
    join_episodes(epath.Path(tmp_path), [share])
    played = read_trajectories(tmp_path / EPISODES)
    assert len(played) == 6 and len({tuple(s.action for s in t.steps) for t in played}) > 3
    env.reset(played[0].task_id)
    context = template.encode_start(played[0].instruction, played[0].first_observation)
    scores = {}
    for action in env.admissible_actions():
        answer = template.encode_answer(f"Action: {action}")
        tokens = np.array([[*context, *answer]], np.int32)
        logps = jax.nn.log_softmax(policy.apply_fn(params, tokens)[0, len(context) - 1 : -1])
        own = np.take_along_axis(np.asarray(logps), tokens[0, len(context) :, None], axis=1)
        scores[action] = float(own.sum())
    total = np.logaddexp.reduce(list(scores.values()))
    first = played[0].steps[0]
    assert first.answer_logp == pytest.approx(scores[first.action] - total, abs=1e-3)


def test_the_progress_note_says_how_fast_and_where_the_time_goes():
    stats = CollectStats(sampled_tokens=501, seconds=2.0, model_seconds=1.5, env_seconds=0.2)
    note = pipeline_episodes._share_text(stats)
    assert note == "250 tokens/s, model 75%, environment 10%"
    assert "0 tokens/s" in pipeline_episodes._share_text(CollectStats())
