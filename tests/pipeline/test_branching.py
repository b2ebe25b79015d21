"""Rollouts in rounds: the same ones with however many processes and interruptions, for the same
tokens as plain ones; and targets that learn each step as often as it was sampled.
"""

import concurrent.futures
import dataclasses
import importlib.util
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from w2sjax import pipeline
from w2sjax.config import default_config, validate
from w2sjax.pipeline import branching
from w2sjax.pipeline.blocks import EPISODES, sampled_tokens
from w2sjax.pipeline.branching import choose_prefixes, join_rounds, next_round, sample_rounds
from w2sjax.pipeline.episodes import Episodes
from w2sjax.pipeline.forest import build_forest, make_targets, room, search_forest
from w2sjax.pipeline.processes import Processes
from w2sjax.pipeline.storage import read_json
from w2sjax.sampling import EpisodeRequest, read_trajectories
from w2sjax.types import Status, Step, Trajectory

TASKS = tuple(f"task {i}" for i in range(7))
NUMBERS = ("episodes", "seconds", "sampled_tokens", "model_seconds", "env_seconds", "speaking")
NUMBERS += ("slot_steps", "repeated")


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def make_settings(**changes):
    c = default_config()
    c.sampler.block = 4
    c.rollouts.update(dict(branching="uct", per_task=6, root_rollouts=3, per_round=2) | changes)
    validate(c)
    return c.lock()


def act(request):
    """An episode that is a function of the request; "b" then "c" succeeds, eight steps are all."""
    rng = random.Random(f"{request.task_id} {request.rollout}")
    steps = list(request.prefix)
    path = "".join(step.action for step in steps)
    while len(path) < 8 and not path.endswith("bc"):
        action = rng.choice("aabc")
        path += action
        ids = tuple(range(rng.randint(1, 5)))
        steps.append(Step(f"Action: {action}", action, f"after {path}", 0.0, ids, -1.0))
    success = path.endswith("bc")
    broke = request.task_id == "task 3" and request.rollout < 4
    return Trajectory(
        task_id=request.task_id,
        rollout=request.rollout,
        env="e",
        policy="weak",
        seed=0,
        instruction="",
        first_observation=request.task_id,
        steps=() if broke else tuple(steps),
        status=Status.ENV_ERROR if broke else Status.SUCCESS if success else Status.STEP_LIMIT,
        score=float(success and not broke),
        start=0 if broke else len(request.prefix),
    )


class CutOff(Exception):
    """The job was killed."""


def sample_all(directory, config, processes=None, blocks_left=10**9):
    """One process's share of all rounds; it is cut off after so many blocks."""
    processes = processes or SimpleNamespace(
        index=0, count=1, check=lambda: None, wait=lambda find: find() or pytest.fail("no block")
    )
    episodes = Episodes(config, processes)
    left, made = iter(range(blocks_left)), []

    def sample(requests, title, first_block=0):
        def make(wanted, on_done, progress):
            if next(left, None) is None:
                raise CutOff
            for request in (requests[index] for index in wanted):
                made.append((request.task_id, request.rollout))
                on_done(act(request))

        share = episodes._in_blocks(
            directory, title, requests, config.sampler.block, make,
            numbers=[r.rollout for r in requests], first_block=first_block,
        )  # fmt: skip
        return share | {"sampling": dict.fromkeys(NUMBERS, len(requests))}

    return sample_rounds(directory, TASKS, sample, config, processes), made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the joined file, facts) of an uninterrupted process."""
    directory = epath.Path(tmp_path_factory.mktemp("whole"))
    config = make_settings()
    share, made = sample_all(directory, config)
    facts = join_rounds(directory, [share], settings=config.rollouts)
    assert [path.name for path in directory.iterdir()] == [EPISODES]
    assert len(made) == len(set(made)) == facts["episodes"]
    return (directory / EPISODES).read_bytes(), facts


def test_rollouts_are_numbered_and_start_where_earlier_ones_went(whole, tmp_path):
    (tmp_path / "a").write_bytes(whole[0])
    episodes = read_trajectories(tmp_path / "a")
    assert list(dict.fromkeys(t.task_id for t in episodes)) == list(TASKS)
    for task in TASKS:
        mine = [t for t in episodes if t.task_id == task]
        assert [t.rollout for t in mine] == list(range(len(mine))) and len(mine) >= 5
        for t in mine:
            earlier = [e for e in mine if e.rollout < t.rollout]
            assert t.start == 0 or any(e.steps[: t.start] == t.steps[: t.start] for e in earlier)
            assert t.rollout >= 3 or t.start == 0
            assert not t.start or t.start < len(t.steps)
    assert {t.start for t in episodes} >= {0, 1, 2, 3}


def test_they_cost_what_plain_ones_would(whole):
    _, facts = whole
    budget = facts["branching"]["token_budget"]
    assert budget == facts["root"]["sampled_tokens"] * 2
    assert abs(facts["sampled_tokens"] - budget) < 0.1 * budget
    assert facts["episodes"] > 6 * len(TASKS)
    assert facts["root"]["episodes"] == 3 * len(TASKS)
    branching = facts["branching"]
    assert branching["sampled_tokens"] + facts["root"]["sampled_tokens"] == facts["sampled_tokens"]
    assert branching["from_the_root"] < branching["rollouts"] and branching["mean_start"] > 0


def test_the_other_budget_counts_rollouts(tmp_path):
    config = make_settings(budget="rollouts", per_round=4)
    share, _ = sample_all(epath.Path(tmp_path), config)
    facts = join_rounds(epath.Path(tmp_path), [share], settings=config.rollouts)
    assert facts["episodes"] == 6 * len(TASKS)
    assert facts["sampled_tokens"] < facts["branching"]["token_budget"]
    counts = Counter(t.task_id for t in read_trajectories(tmp_path / EPISODES))
    assert set(counts.values()) == {6}  # no task gets two more than another


@pytest.mark.parametrize("blocks", [1, 5, 6, 8, 11])
def test_cut_off_anywhere_they_go_on_to_the_same_end(whole, tmp_path, blocks):
    directory, config = epath.Path(tmp_path), make_settings()
    with pytest.raises(CutOff):
        sample_all(directory, config, blocks_left=blocks)
    assert len(list(tmp_path.glob("*.jsonl"))) == blocks
    kept = sum(len(read_trajectories(path)) for path in tmp_path.iterdir())
    share, made = sample_all(directory, config)
    facts = join_rounds(directory, [share], settings=config.rollouts)
    assert (tmp_path / EPISODES).read_bytes() == whole[0]
    assert len(made) == facts["episodes"] - kept
    # Cut off once more, after they were joined.
    share, made = sample_all(directory, config)
    assert not made and join_rounds(directory, [share], settings=config.rollouts)
    assert (tmp_path / EPISODES).read_bytes() == whole[0]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_make_the_same_rollouts(whole, tmp_path, count):
    """Threads stand for them; each waits for the others' blocks of a round."""
    directory, config = epath.Path(tmp_path), make_settings()

    def one(index):
        me = Processes(directory)
        me.index, me.count, me._poll_s = index, count, 0.01
        return sample_all(directory, config, me)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        ends = list(pool.map(one, range(count)))
    made = [set(made) for _, made in ends]
    assert all(made) and len(set.union(*made)) == sum(map(len, made))
    facts = join_rounds(directory, [share for share, _ in ends], settings=config.rollouts)
    assert (tmp_path / EPISODES).read_bytes() == whole[0]
    assert facts["branching"] == whole[1]["branching"]


def test_an_environment_that_does_not_repeat_itself_is_refused():
    config = make_settings()
    done = [act(EpisodeRequest(task, r)) for task in TASKS for r in range(3)]
    requests, is_last = next_round(done, TASKS, config.rollouts, merge_on="action")
    assert len(requests) == 2 * len(TASKS) and not is_last
    error = branching.NOT_DETERMINISTIC + " at step 1"
    made = [dataclasses.replace(act(r), status=Status.ENV_ERROR, error=error) for r in requests]
    with pytest.raises(ValueError, match=r"'maze' does not repeat itself .*at step 1.*'none'"):
        branching._check_replays(made, "maze")
    branching._check_replays([*made, *done], "maze")


def test_tasks_without_a_tree_begin_at_the_root():
    config = make_settings()
    broken = [act(EpisodeRequest("task 3", r)) for r in range(3)]
    assert choose_prefixes(broken, config.rollouts, merge_on="action") == {}
    requests, _ = next_round(
        [*broken, *(act(EpisodeRequest("task 1", r)) for r in range(3))],
        ("task 1", "task 3"),
        config.rollouts,
        merge_on="action",
    )
    assert [(r.task_id, r.rollout) for r in requests] == [
        ("task 1", 3), ("task 1", 4), ("task 3", 3), ("task 3", 4)
    ]  # fmt: skip
    assert requests[0].prefix and not any(r.prefix for r in requests[2:])


@pytest.mark.parametrize("budget", ["rollouts", "tokens"])
def test_solved_tasks_get_no_more_rollouts_and_the_others_their_share(budget):
    """All from the root; in the order of rounds, so nothing depends on what ends first."""
    config = make_settings(branching="none", stop_after=2, budget=budget)
    done = [act(EpisodeRequest(task, r)) for task in TASKS for r in range(3)]
    is_last, rounds = False, 0
    while not is_last:
        wins = {task: sum(t.success for t in done if t.task_id == task) for task in TASKS}
        requests, is_last = next_round(done, TASKS, config.rollouts, merge_on="action")
        assert not any(request.prefix for request in requests)
        assert all(wins[request.task_id] < 2 for request in requests)
        numbers = [(r.task_id, r.rollout) for r in requests]
        assert len(set(numbers)) == len(numbers)
        assert not {(t.task_id, t.rollout) for t in done} & set(numbers)
        done += [act(request) for request in requests]
        rounds += 1
        assert rounds < 40
    counts = {task: sum(t.task_id == task for t in done) for task in TASKS}
    stopped = [task for task in TASKS if sum(t.success for t in done if t.task_id == task) >= 2]
    assert stopped and min(counts[task] for task in stopped) < 6
    if budget == "rollouts":
        assert max(counts.values()) <= 6
        assert all(counts[task] == 6 for task in TASKS if task not in stopped)
    else:
        root = [t for t in done if t.rollout < 3]
        assert sampled_tokens(done) <= 2 * sampled_tokens(root) * 1.2
    everything = make_settings(branching="none", stop_after=1, budget=budget)
    won = [t for t in done if t.success][:1]
    assert next_round(won, [won[0].task_id], everything.rollouts, merge_on="action") == ([], True)


# ---------------------------------------------------------------------------------- what is learned


def rollout(number, path, start, status):
    steps = tuple(Step(f"Action: {a}", a, f"saw {a}") for a in path)
    return Trajectory(
        task_id="t", rollout=number, env="e", policy="weak", seed=0, instruction="",
        first_observation="", steps=steps, status=status, score=float(status is Status.SUCCESS),
        start=start,
    )  # fmt: skip


EPISODES_OF_ONE = [
    rollout(0, "abcd", 0, Status.FAILED),
    rollout(1, "xy", 0, Status.FAILED),
    rollout(2, "abef", 2, Status.SUCCESS),  # goes on from a failure
    rollout(3, "abeg", 3, Status.SUCCESS),  # and this from that success
    rollout(4, "abh", 2, Status.FAILED),
    rollout(5, "xyz", 1, Status.POLICY_ERROR),
    rollout(6, "abez", 2, Status.SUCCESS),
]


def test_each_step_is_learned_as_often_as_it_was_sampled():
    forest = build_forest(EPISODES_OF_ONE, merge_on="action_observation")
    values = search_forest(forest, num_simulations=30, exploration_weight=1.0, discount=1.0)
    made = make_targets(forest, values, default_config().targets, seed=0)
    weights = {name: made[name][0]["step_weights"] for name in ("sft_all", "sft_success")}
    own = ["1111", "11", "0011", "0001", "001", "", "0011"]
    np.testing.assert_array_equal(weights["sft_all"], [[*map(int, w.ljust(4, "0"))] for w in own])
    # Successes whole, but what rollouts 3 and 6 replay is learned from rollout 2 already.
    learned = ["", "", "1111", "0001", "", "", "0011"]
    np.testing.assert_array_equal(
        weights["sft_success"], [[*map(int, w.ljust(4, "0"))] for w in learned]
    )
    awr = made["tree_awr"][0]["step_weights"]
    assert not awr[weights["sft_all"] == 0].any() and awr[2, 2:].all()
    # The way to the start is as likely as the rollouts from the root say: half of them.
    root, first = values["mean_values"][0, 0], values["mean_values"][0, 1]
    assert first == pytest.approx(0.5) and root == pytest.approx(0.25)


def test_the_gate_sees_rollouts_from_the_root_alone():
    forest = build_forest(EPISODES_OF_ONE, merge_on="action_observation")
    gate = default_config().gate
    assert room(forest, gate)["sampled_success"] == pytest.approx(0.5)
    facts = room(forest, gate, root_rollouts=2)
    assert (facts["sampled_success"], facts["tasks_with_success"]) == (0.0, 1.0)
    assert any("sampled_success is 0.0" in warning for warning in facts["warnings"])


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match=r"root_rollouts \(9\) must be at most .*per_task \(6\)"):
        make_settings(root_rollouts=9)
    with pytest.raises(ValueError, match="branching is 'puct'; it must be one of none, uct"):
        make_settings(branching="puct")


# ------------------------------------------------------------------------------------- the main job


def test_the_main_job_goes_on_inside_a_round(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "configs" / "household.py"
    spec = importlib.util.spec_from_file_location("household_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("smoke").unlock()
    c.cache_dir = str(tmp_path / "cache")
    c.models.weak = c.models.strong = "tiny"
    c.methods, c.evaluate.modes = ("weak", "sft_all"), ("sampled",)
    c.pretrain.tasks, c.pretrain.weak_steps, c.pretrain.strong_steps = 60, 25, 3
    c.weak.steps = c.train.steps = 5
    c.tasks.train = c.tasks.held_out = 6
    c.rollouts.update(dict(branching="uct", per_task=4, root_rollouts=2, per_round=1))
    c.sampler.slots, c.sampler.block = 4, 4
    report = pipeline.run(c.lock(), tmp_path / "whole")
    facts = read_json(tmp_path / "whole" / "rollouts" / "manifest.json")["facts"]
    assert facts["root"]["episodes"] == 12 and facts["branching"]["rollouts"] >= 12
    assert facts["branching"]["not_deterministic"] == facts["unscored"] == 0
    episodes = read_trajectories(tmp_path / "whole" / "rollouts" / "episodes.jsonl")
    assert any(t.start for t in episodes)
    assert sampled_tokens(episodes) == facts["sampling"]["sampled_tokens"]

    calls, real = [], branching.read_blocks

    def cut_off(directory, requests, size, first_block):
        calls.append(first_block)
        if len(calls) == 2:  # the second round was made, but for its last block
            blocks = sorted(directory.glob("episodes.*.jsonl"))
            assert len(blocks) > first_block + 1
            blocks[-1].unlink()
            raise OSError("cut off")
        return real(directory, requests, size, first_block)

    monkeypatch.setattr(branching, "read_blocks", cut_off)
    with pytest.raises(OSError, match="cut off"):
        pipeline.run(c, tmp_path / "cut")
    monkeypatch.setattr(branching, "read_blocks", real)
    again = pipeline.run(c, tmp_path / "cut")
    for name in ("rollouts", "evaluate/sft_all.sampled"):
        one, two = (tmp_path / run / name / "episodes.jsonl" for run in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes(), name
    assert again["methods"] == report["methods"]
