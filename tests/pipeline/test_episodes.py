"""Files of episodes are filled block by block, and go on where they were cut off."""

from typing import NamedTuple

import pytest

from w2sjax.config import default_config
from w2sjax.envs import PlayRequest
from w2sjax.pipeline import episodes as pipeline_episodes
from w2sjax.pipeline.episodes import Episodes
from w2sjax.sampling import read_trajectories
from w2sjax.types import Status, Step, Trajectory

HOUSEHOLD = {"families": ("look", "put"), "num_object_types": 4, "max_steps": 8}


class Asked(NamedTuple):
    """A request."""

    task_id: str


TASKS = ("a", "a", "b", "a", "b", "c", "a", "c")
NUMBERS = (0, 1, 0, 2, 1, 0, 3, 1)  # how many times the task came before
BLOCK = 3


class Maker:
    """Makes episodes that say in which call they were made, the last one first."""

    def __init__(self, fail_at=None):
        self.starts = []
        self.fail_at = fail_at

    def __call__(self, block, done):
        if done == self.fail_at:
            raise ConnectionError("cut off")
        self.starts.append(done)
        assert [r.task_id for r in block] == list(TASKS[done : done + BLOCK])
        made = [
            Trajectory(
                task_id=request.task_id,
                rollout=number,
                env="e",
                policy="p",
                seed=done,
                instruction="",
                first_observation=f"{request.task_id}, {number}",
                steps=(Step("Action: x", "x", "seen"),),
                status=Status.FAILED,
                score=0.0,
            )
            for request, number in zip(block, NUMBERS[done : done + BLOCK], strict=True)
        ]
        return made[::-1]


def in_blocks(path, make):
    return pipeline_episodes._in_blocks(path, [Asked(task) for task in TASKS], BLOCK, make)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "episodes.jsonl"
    make = Maker()
    episodes = in_blocks(path, make)
    assert make.starts == [0, 3, 6]
    assert [(t.task_id, t.rollout) for t in episodes] == list(zip(TASKS, NUMBERS, strict=True))
    assert read_trajectories(path) == episodes
    return path.read_bytes()


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("lines", range(len(TASKS) + 1))
def test_whole_blocks_stay_and_a_partial_one_is_repeated(uninterrupted, tmp_path, lines, torn):
    path = tmp_path / "episodes.jsonl"
    written = uninterrupted.splitlines(keepends=True)
    rest = written[lines][:40] if torn and lines < len(TASKS) else b""
    path.write_bytes(b"".join(written[:lines]) + rest)
    make = Maker()
    episodes = in_blocks(path, make)
    done = lines == len(TASKS)
    assert make.starts == ([] if done else list(range(lines // BLOCK * BLOCK, len(TASKS), BLOCK)))
    assert path.read_bytes() == uninterrupted
    assert read_trajectories(path) == episodes
    assert [p.name for p in tmp_path.iterdir()] == ["episodes.jsonl"]


def test_a_block_that_breaks_costs_only_itself(uninterrupted, tmp_path):
    path = tmp_path / "episodes.jsonl"
    with pytest.raises(ConnectionError):
        in_blocks(path, Maker(fail_at=3))
    assert len(read_trajectories(path)) == BLOCK
    make = Maker()
    in_blocks(path, make)
    assert make.starts == [3, 6] and path.read_bytes() == uninterrupted


def test_played_rollouts_are_numbered_across_blocks(tmp_path, monkeypatch):
    """Copies of a task in several blocks, whole and cut off, give the file of one large block."""
    c = default_config()
    c.env.options.update(HOUSEHOLD)
    players = Episodes(c)

    def play(name, block, written=None):
        monkeypatch.setattr(pipeline_episodes, "_PLAYED_BLOCK", block)
        directory = tmp_path / name
        directory.mkdir()
        if written is not None:
            (directory / "episodes.jsonl").write_bytes(written)
        with players.pool(slots=1) as pool:
            x, y, z = pool.task_ids("train", 3)
            requests = [
                PlayRequest(task, 0.3, seed=seed)
                for seed, task in enumerate([x, x, x, y, z, y, x, z])
            ]
            facts = players.play(directory, pool, requests, policy_name="player")
        assert (facts["episodes"], facts["unscored"]) == (8, 0)
        return directory / "episodes.jsonl", requests

    path, requests = play("one_block", 256)
    whole = path.read_bytes()
    episodes = read_trajectories(path)
    assert [t.task_id for t in episodes] == [r.task_id for r in requests]
    assert [t.seed for t in episodes] == list(range(8))
    assert [t.rollout for t in episodes] == [0, 1, 2, 0, 0, 1, 3, 1]
    assert play("blocks", 2)[0].read_bytes() == whole
    cut = b"".join(whole.splitlines(keepends=True)[:5]) + b'{"format": 1, "task'
    assert play("cut", 2, cut)[0].read_bytes() == whole
