"""Laws of the pool: the same results however many workers, and real crashes and hangs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from w2sjax.envs import (
    EnvFailure,
    EnvPool,
    Household,
    Outcome,
    PlayedEpisode,
    PlayRequest,
    Reset,
    make_env,
    play,
)

FAULTY = "faulty_envs:Faulty"


def faulty_pool(num_slots=4, num_workers=2, options=(), **settings):
    return EnvPool(FAULTY, dict(options), num_slots=num_slots, num_workers=num_workers, **settings)


@pytest.fixture(scope="module")
def shared_pool():
    """Four slots in two workers: 0 and 2 in one, 1 and 3 in the other."""
    with faulty_pool(timeout_s=3.0, max_restarts=100) as pool:
        yield pool


@pytest.fixture
def pool(shared_pool):
    resets = shared_pool.reset({slot: f"task {slot}" for slot in range(4)})
    assert all(isinstance(reset, Reset) for reset in resets.values())
    return shared_pool


def pids(pool):
    return {
        slot: int(o.observation) for slot, o in pool.step(dict.fromkeys(range(4), "pid")).items()
    }


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pid, seconds=20.0):
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_alive(pid)


def test_own_environments_are_made_by_module_and_class():
    assert make_env(FAULTY, max_steps=3).max_steps == 3
    for name in ("nothing", "nothing:", ":Nothing", "no_such_module:Class", "faulty_envs:Nothing"):
        with pytest.raises(ValueError, match=r"env\.name"):
            make_env(name)
    with pytest.raises(ValueError, match=r"env\.options.*size"):
        make_env(FAULTY, size=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_are_those_of_the_environment(num_workers):
    env = Household(max_steps=12)
    tasks = dict(enumerate(env.task_ids("train", 5)))
    with EnvPool("household", {"max_steps": 12}, num_slots=5, num_workers=num_workers) as pool:
        assert pool.task_ids("train", 5) == list(tasks.values())
        # Slot by slot, a step each in turn, from the last slot to the first.
        resets = pool.reset(dict(reversed(tasks.items())))
        played = {
            slot: play(env, task, random_action_rate=0.3, seed=0) for slot, task in tasks.items()
        }
        for slot, episode in played.items():
            assert resets[slot] == Reset(episode.first_observation, env.instruction, 12)
        for step in range(12):
            running = {s: e for s, e in played.items() if step < len(e.actions)}
            outcomes = pool.step({s: e.actions[step] for s, e in running.items()})
            assert outcomes.keys() == running.keys()
            for slot, outcome in outcomes.items():
                assert outcome.observation == running[slot].observations[step]
                assert outcome.score == running[slot].scores[step]
        env.reset(tasks[3])
        pool.reset({3: tasks[3]})
        assert pool.admissible_actions([3]) == {3: env.admissible_actions()}
        # Whole episodes.
        requests = [PlayRequest(task, 0.3, seed) for task in tasks.values() for seed in range(3)]
        results = dict(pool.play(requests))
        assert [results[index] for index in range(15)] == [
            play(env, r.task_id, random_action_rate=r.random_action_rate, seed=r.seed)
            for r in requests
        ]
        assert pool.restarts == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_raising_environment_fails_alone(num_workers):
    with faulty_pool(num_workers=num_workers) as pool:
        pool.reset({0: "a", 1: "b", 2: "c"})
        outcomes = pool.step({0: "raise", 1: "hello", 2: "hello"})
        assert isinstance(outcomes[0], EnvFailure) and "as told" in outcomes[0].message
        assert outcomes[1] == outcomes[2] == Outcome("hello", 0.1, False, False)
        again = pool.step({0: "hello", 2: "more"})  # still failed until its next reset
        assert again[0] == outcomes[0] and again[2].score == 0.2
        assert pool.admissible_actions([0])[0] == outcomes[0]
        resets = pool.reset({0: "at reset: raise", 3: "d"})
        assert isinstance(resets[0], EnvFailure) and isinstance(resets[3], Reset)
        assert pool.reset({0: "e"})[0].first_observation == "task e"
        assert pool.step({0: "hi"})[0].observation == "hi"
        episodes = dict(pool.play([PlayRequest("fine"), PlayRequest("raise"), PlayRequest("fine")]))
        assert isinstance(episodes[1], EnvFailure) and "as told" in episodes[1].message
        assert episodes[0] == episodes[2] and isinstance(episodes[0], PlayedEpisode)
        assert pool.restarts == 0


def test_long_texts_pass(pool):
    action = "y" * 200_000
    outcomes = pool.step({0: "long", 1: action, 2: action, 3: "long"})
    assert len(outcomes[0].observation) == len(outcomes[3].observation) == 200_000
    assert outcomes[1].observation == outcomes[2].observation == action


@pytest.mark.parametrize("way", ["die", "exit"])
def test_a_worker_that_dies_in_a_step(pool, way):
    restarts, before = pool.restarts, pids(pool)
    outcomes = pool.step({0: way, 1: "hello"})
    assert isinstance(outcomes[0], EnvFailure) and "died (exit code " in outcomes[0].message
    assert outcomes[1].observation == "hello"
    # Slot 2 lived in the same process and learns it at its next step; slot 3 did not.
    outcomes = pool.step({2: "hello", 3: "hello"})
    assert isinstance(outcomes[2], EnvFailure) and outcomes[3].observation == "hello"
    assert isinstance(pool.step({0: "hello"})[0], EnvFailure)
    assert pool.restarts == restarts + 1
    pool.reset({0: "a", 2: "b"})
    after = pids(pool)
    assert after[0] == after[2] != before[0] and after[1] == before[1]
    assert not is_alive(before[0])


def test_kill_9_from_outside_between_steps(pool):
    restarts, before = pool.restarts, pids(pool)
    os.kill(before[1], signal.SIGKILL)
    outcomes = pool.step({0: "a", 1: "b"})
    assert outcomes[0].observation == "a"
    assert isinstance(outcomes[1], EnvFailure) and "exit code -9" in outcomes[1].message
    assert isinstance(pool.step({3: "c"})[3], EnvFailure)
    assert pool.restarts == restarts + 1
    assert isinstance(pool.reset({1: "a", 3: "b"})[3], Reset)


def test_kill_9_from_outside_during_a_step(pool):
    restarts, before = pool.restarts, pids(pool)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {before[0]}"])
    outcomes = pool.step({0: "sleep 1.5", 1: "sleep 0.1", 2: "queued"})
    killer.wait()
    assert isinstance(outcomes[0], EnvFailure) and isinstance(outcomes[2], EnvFailure)
    assert outcomes[1].observation == "sleep 0.1"
    assert pool.restarts == restarts + 1


def test_a_worker_that_hangs(pool):
    restarts, before = pool.restarts, pids(pool)
    start = time.monotonic()
    outcomes = pool.step({0: "hang", 1: "hello", 2: "queued"})
    assert 2.9 < time.monotonic() - start < 20
    assert isinstance(outcomes[0], EnvFailure) and "no answer for 3 s" in outcomes[0].message
    assert isinstance(outcomes[2], EnvFailure) and outcomes[1].observation == "hello"
    assert pool.restarts == restarts + 1 and not is_alive(before[0])
    assert isinstance(pool.reset({0: "at reset: sleep 0.1"})[0], Reset)


def test_time_is_counted_per_answer(pool):
    """Two slots of a worker that take 1.8 s each are no hang, nor is an episode of four seconds."""
    restarts = pool.restarts
    outcomes = pool.step({0: "sleep 1.8", 2: "sleep 1.8"})
    assert {outcome.observation for outcome in outcomes.values()} == {"sleep 1.8"}
    [(_, episode)] = pool.play([PlayRequest("sleep 1.0")])
    assert episode.observations == ("first",) + ("sleep 1.0",) * 4
    assert pool.restarts == restarts


def test_play_goes_on_over_crashes_and_hangs(pool):
    restarts = pool.restarts
    tasks = ["fine", "die", "fine", "hang", "raise", "long", "fine", "at reset: exit", "fine"]
    results = dict(pool.play([PlayRequest(task) for task in tasks]))
    assert results.keys() == set(range(len(tasks)))
    for index, task in enumerate(tasks):
        broke = task not in ("fine", "long")
        assert isinstance(results[index], EnvFailure if broke else PlayedEpisode), task
    assert pool.restarts == restarts + 3
    given_up = pool.step({0: "hello"})[0]
    assert isinstance(given_up, EnvFailure) and "given up" in given_up.message


def test_a_worker_plays_one_task_after_the_other(pool, monkeypatch):
    """What its environment found out about a task serves again; nobody idles at the end."""
    homes = {}
    submit = pool._submit

    def watched(home, requests):
        homes.setdefault(home, []).extend(index for _, index in requests)
        submit(home, requests)

    monkeypatch.setattr(pool, "_submit", watched)
    tasks = ["a", "a", "b", "b", "sleep 0.4", "a", "b"]
    assert sorted(index for index, _ in pool.play(list(map(PlayRequest, tasks)))) == [*range(7)]
    one, other = sorted(homes.values(), key=lambda played: played[0])
    assert one[:3] == [0, 1, 5] and other[:3] == [2, 3, 6]
    homes.clear()
    assert len(list(pool.play([PlayRequest("sleep 0.1")] * 5))) == 5
    assert min(map(len, homes.values())) == 2


def test_an_abandoned_play_leaves_no_trace(pool):
    episodes = pool.play([PlayRequest("fine")] * 6)
    next(episodes)
    assert pool.reset({0: "a"})[0].first_observation == "task a"
    assert pool.step({0: "hello"})[0].observation == "hello"
    with pytest.raises(RuntimeError, match="before the last episode"):
        list(episodes)


def test_workers_leave_ctrl_c_to_their_parent(pool):
    before = pids(pool)
    for pid in before.values():
        os.kill(pid, signal.SIGINT)
    assert pids(pool) == before


def test_workers_import_neither_the_main_module_nor_jax(pool):
    pool.reset({0: "a"})
    loaded = pool.step({0: "modules"})[0].observation.split()
    assert "faulty_envs" in loaded and "w2sjax.envs.worker" in loaded
    assert not {"jax", "chex", "pytest", "transformers"} & set(loaded)


def test_a_worker_that_keeps_dying_is_started_after_growing_pauses(monkeypatch):
    pauses = []
    with faulty_pool(num_slots=1, num_workers=1) as pool:
        monkeypatch.setattr("w2sjax.envs.pool.time.sleep", pauses.append)
        for _ in range(4):
            assert isinstance(pool.reset({0: "at reset: die"})[0], EnvFailure)
        assert pauses == [0.2, 0.4, 0.8]
        assert isinstance(pool.reset({0: "fine"})[0], Reset)
        assert isinstance(pool.step({0: "die"})[0], EnvFailure)
        assert pauses == [0.2, 0.4, 0.8] and pool.restarts == 5


def test_too_many_restarts_are_an_error_and_leave_no_process():
    with faulty_pool(num_slots=2, max_restarts=0) as pool:
        pool.reset({0: "a", 1: "b"})
        both = [int(o.observation) for o in pool.step({0: "pid", 1: "pid"}).values()]
        with pytest.raises(RuntimeError, match="max_restarts=0"):
            pool.step({0: "die"})
        assert not any(map(is_alive, both))
        with pytest.raises(RuntimeError, match="closed"):
            pool.reset({0: "a"})


def test_close_ends_all_processes_even_hanging_ones():
    pool = faulty_pool(num_slots=2)
    pool.reset({0: "a", 1: "b"})
    both = [int(o.observation) for o in pool.step({0: "pid", 1: "pid"}).values()]
    assert all(map(is_alive, both))
    episodes = pool.play([PlayRequest("fine"), PlayRequest("hang")])
    next(episodes)  # the other one is still at work
    pool.close()
    pool.close()
    assert not any(map(is_alive, both))
    with pytest.raises(RuntimeError, match="closed"):
        pool.task_ids("train", 1)
    with pytest.raises(RuntimeError, match="closed"):
        next(episodes)


PARENT = """
import signal
from w2sjax.envs import EnvPool

# No guard against being imported: no worker does.
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits deafness
with EnvPool("faulty_envs:Faulty", {}, num_slots=1, num_workers=1) as pool:
    pool.reset({0: "a"})
    print(pool.step({0: "pid"})[0].observation, flush=True)
    pool.step({0: "hang"})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_die_with_their_parent_even_while_they_hang(tmp_path, number):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    paths = [os.path.dirname(__file__), *filter(None, sys.path)]
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    line = parent.stdout.readline()
    assert line.strip().isdigit(), parent.communicate()[1]
    if number == signal.SIGINT:
        time.sleep(0.2)
        os.killpg(parent.pid, number)  # as a terminal does: everybody gets it
    else:
        parent.send_signal(number)
    errors = parent.communicate(timeout=30)[1]
    assert parent.returncode != 0
    assert wait_until_gone(int(line))
    assert number == signal.SIGKILL or errors.count("Traceback") == 1  # the parent's own, only


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_up_that_cannot_work_is_an_error_at_once(num_workers):
    settings = {"num_slots": 1, "num_workers": num_workers}
    with pytest.raises(ValueError, match=r"env\.options\.broken"):
        EnvPool(FAULTY, {"broken": "value"}, **settings)
    with pytest.raises((RuntimeError, OSError), match="no engine"):
        EnvPool(FAULTY, {"broken": "raise"}, **settings)
    with pytest.raises(ValueError, match="unknown environment 'housekeeping'"):
        EnvPool("housekeeping", {}, **settings)


def test_a_worker_that_dies_at_its_start_is_an_error():
    with pytest.raises(RuntimeError, match="exit code 7"):
        faulty_pool(num_slots=1, num_workers=1, options={"broken": "exit"})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_slots": 0}, "num_slots"),
        ({"num_workers": 5}, "num_workers"),
        ({"num_workers": -1}, "num_workers"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"max_restarts": -1}, "max_restarts"),
    ],
)
def test_wrong_arguments_are_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        EnvPool("household", {}, **{"num_slots": 4, "num_workers": 0, **wrong})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_wrong_requests_are_named(num_workers):
    with faulty_pool(num_slots=2, num_workers=num_workers) as pool:
        with pytest.raises(ValueError, match="unknown split 'valid'"):
            pool.task_ids("valid", 3)
        with pytest.raises(ValueError, match="slot 2"):
            pool.reset({2: "a"})
        with pytest.raises(ValueError, match=r"slot 1 .*reset"):
            pool.step({1: "a"})
        assert pool.task_ids("train", 2) == ["ok 0", "ok 1"]


def all_answers(pool):
    answers = {}
    while pool.outstanding:
        new = pool.poll(wait_s=0.5)
        assert not answers.keys() & new.keys()
        answers |= new
    return answers


def test_answers_come_as_they_are_ready(pool):
    """Slots 0 and 2 share a worker, which sleeps for the first; slot 1's answer does not wait."""
    pool.submit("step", {0: "sleep 0.6", 1: "a", 2: "b"})
    began = time.monotonic()
    assert pool.poll(wait_s=0.3).keys() == {1}
    assert pool.outstanding == 2 and time.monotonic() - began < 0.5
    with pytest.raises(ValueError, match="slot 2 still owes the answer to 'step'"):
        pool.submit("step", {3: "c", 2: "c"})
    pool.submit("actions", {1: ""})
    answers = all_answers(pool)
    assert answers[1] == ["step 1"]
    assert (answers[0].observation, answers[2].observation) == ("sleep 0.6", "b")
    assert pool.poll() == pool.poll(wait_s=0.0) == {} and not pool.outstanding
    pool.submit("reset", {0: "anew"})
    assert all_answers(pool) == {0: Reset("task anew", "Say something.", 5)}


@pytest.mark.parametrize(("how", "says"), [("die", "died"), ("hang", "gave no answer for 3 s")])
def test_what_breaks_while_others_go_on_is_told_once(pool, how, says):
    pool.submit("step", {0: how, 1: "a"})
    first = pool.poll(wait_s=2.0)
    assert first.pop(1).observation == "a" and (how == "die" or not first)  # a death shows at once
    pool.submit("step", {1: "b", 2: "queued behind"})  # slot 2 lives where slot 0 does
    answers = first | all_answers(pool)
    assert answers[1].observation == "b"
    assert says in answers[0].message and says in answers[2].message
    pool.submit("step", {0: "again", 3: "c"})  # the episode is lost until its next reset
    answers = all_answers(pool)
    assert says in answers[0].message and answers[3].observation == "c"
    pool.submit("reset", {0: "new"})
    assert isinstance(all_answers(pool)[0], Reset)


def test_an_abandoned_submit_leaves_no_trace(pool):
    pool.submit("step", {0: "sleep 0.2", 1: "a"})
    resets = pool.reset({1: "b", 2: "c"})
    assert resets.keys() == {1, 2} and not pool.outstanding
    failure = pool.step({0: "a", 1: "d"})
    assert isinstance(failure[0], EnvFailure) and "given up" in failure[0].message
    assert failure[1].observation == "d"


def test_environments_of_this_process_answer_at_once():
    with faulty_pool(num_workers=0) as pool:
        pool.submit("reset", {0: "a", 1: "at reset: raise"})
        answers = pool.poll()
        assert isinstance(answers[0], Reset) and isinstance(answers[1], EnvFailure)
        pool.submit("step", {0: "x"})
        assert pool.poll(wait_s=0.0)[0].observation == "x"
        with pytest.raises(ValueError, match="slot 2 has no episode"):
            pool.submit("step", {0: "y", 2: "x"})
        assert not pool.outstanding
