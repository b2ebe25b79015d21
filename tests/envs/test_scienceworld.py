"""Real ScienceWorld: one JVM for all tests here, as in a worker process."""

import itertools
import os
import random
import shutil
import statistics
import time

import pytest

from w2sjax.envs import java, scienceworld, scienceworld_jvm, scienceworld_tasks, scienceworld_trim
from w2sjax.envs.base import Env
from w2sjax.envs.scienceworld import ScienceWorld
from w2sjax.envs.scienceworld_expert import make_plan
from w2sjax.envs.scienceworld_jvm import Simulator
from w2sjax.envs.scienceworld_tasks import (
    ETO_SPLITS,
    OFFICIAL_SPLITS,
    PUBLISHED_TASKS,
    SHORT_TASKS,
    TASKS,
    split_variations,
)
from w2sjax.envs.scienceworld_trim import Played


@pytest.fixture(scope="module")
def simulator():
    """Keeps the module's JVM alive; a bare simulator for those who ask the package itself."""
    with_jvm = Simulator(512)
    yield with_jvm
    pid = with_jvm.pid
    with_jvm.close()
    with_jvm.close()
    assert not os.path.exists(f"/proc/{pid}"), "the JVM outlived its last simulator"


@pytest.fixture(scope="module")
def env(simulator):
    made = ScienceWorld()
    yield made
    made.close()
    made.close()


def _run_expert(env, task_id, deviations=()):
    """Plays the expert, with given actions instead of its own at given steps; the last outcome."""
    env.reset(task_id)
    for step in range(env.max_steps):
        wanted = env.expert_action()
        outcome = env.step(dict(deviations).get(step, wanted))
        if outcome.done:
            break
    return outcome


@pytest.mark.parametrize("task", SHORT_TASKS)
def test_expert_wins(env, task):
    assert isinstance(env, Env)
    ids = [task_id for task_id in env.task_ids("test") if task_id.split("/")[1] == task][:2]
    for task_id in ids:
        outcome = _run_expert(env, task_id)
        assert (outcome.done, outcome.success, outcome.score) == (True, True, 1.0), task_id


def test_long_plans_are_trimmed_to_fit_their_limits(simulator):
    """The package's own path is longer than the published step limit; the plan is not, and wins."""
    task, variation = "identify-life-stages-1", 10
    gold = simulator.gold_actions(task, variation, "easy")
    plan = make_plan(simulator, task, variation, "easy", True)
    assert len(plan) <= TASKS[task][1] < len(gold)
    simulator.load(task, variation, "easy")
    for step in plan:
        _, raw, completed = simulator.step(step.action)
    assert completed and raw == 1.0


def test_melting_point_is_measured_until_it_is_known(simulator):
    """Variation 60: liquid still below -10 degrees; the gold player says "above"."""
    task = ("measure-melting-point-unknown-substance", 60, "easy")
    plan = [step.action for step in make_plan(simulator, *task, True)]
    simulator.load(*task)
    *_, (reading, *_), (_, score, completed) = map(simulator.step, plan)
    assert completed and score == 1.0 and plan[-1] == "focus on purple box"
    assert int(reading.split("temperature of ")[1].split()[0]) < -10
    assert len(plan) <= scienceworld_tasks.TASKS[task[0]][1]


def test_plans_are_kept_between_runs(tmp_path, simulator, monkeypatch):
    """Found once, read afterwards; a broken file is made again, a folder without rights is none."""
    monkeypatch.setattr(scienceworld, "_plans", {})
    made = []
    monkeypatch.setattr(
        scienceworld, "make_plan", lambda *args: made.append(args[1:]) or make_plan(*args)
    )

    def first_action(cache_dir):
        scienceworld._plans.clear()
        env = ScienceWorld(cache_dir=str(cache_dir))
        env.reset(env.task_ids("train", 1)[0])
        action = env.expert_action()
        env.close()
        return action

    action = first_action(tmp_path)
    assert first_action(tmp_path) == action and len(made) == 1
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    for broken in ("", "[]", "[[1, 2]]", "{}", '["ab"]', "[" * 100_000):
        file.write_text(broken)
        made.clear()
        assert first_action(tmp_path) == action and len(made) == 1
    (tmp_path / "file").write_text("")
    assert first_action(tmp_path / "file") == action  # and a warning
    assert first_action("") == action
    with pytest.raises(ValueError, match="cache_dir"):
        ScienceWorld(cache_dir=3)


def test_proposals_are_shorter_and_keep_the_order():
    """Each proposal is the plan with actions left out, or waits put together."""
    replies = {"open oven": "The oven is already open.", "sing": "No known action matches"}
    actions = ["teleport to kitchen", "look around", "teleport to hallway", "look around"]
    actions += ["open oven", "sing", "pick up pot", *["wait1"] * 7, "examine pot", "wait1", "wait1"]
    actions += ["use thermometer on pot", "focus on pot", *["wait1"] * 4, "focus on cup"]
    plan = [Played(action, "", replies.get(action, "Done.")) for action in actions]
    for task in ("grow-plant", "boil"):
        made = list(scienceworld_trim.proposals(task, plan))
        assert made and len({tuple(proposal) for proposal in made}) == len(made)
        for proposal in made:
            assert len(proposal) < len(actions)
            left = iter(actions)
            assert all(action in left for action in proposal if action != "wait"), proposal
    clean = next(scienceworld_trim.proposals("grow-plant", plan))
    assert clean[:3] == ["teleport to hallway", "look around", "pick up pot"]
    waits = next(scienceworld_trim.proposals("boil", plan)).count("wait")
    assert waits == 1  # the first run goes, the last is waited for
    assert list(scienceworld_trim.proposals("boil", plan[:12])) == []


def test_a_question_stays_or_goes_with_its_answer():
    """Left alone, a question takes the next action for its answer, and nothing happens."""
    asked, failed = "Ambiguous request: Please enter the number", "No known action matches"
    steps = [("move pea to jar", asked), ("0", "You move the pea."), ("move pea to pot", asked)]
    steps += [("move seed to pot", failed), ("0", failed), ("activate sink", "It is activated.")]
    steps += [(f"pour jug into pot {index}", "You pour.") for index in range(9)]
    plan = [Played(action, "", reply) for action, reply in steps]
    shorter = next(scienceworld_trim.proposals("mendelian-genetics-known-plant", plan))
    kept = [action for action, _ in (*steps[:2], *steps[5:])]
    assert shorter == kept


def test_a_long_look_at_one_thing_is_waited_through():
    """A block that slides for 700 steps has to be seen at the bottom, once."""
    actions = [
        "move block to plane",
        *["look at plane"] * 42,
        *["look at floor"] * 2,
        "focus on it",
    ]
    plan = [Played(action, "", "Done.") for action in actions]
    (shorter,) = scienceworld_trim.proposals("inclined-plane-determine-angle", plan)
    waiting = ["wait"] * 5 + ["look at plane"]
    assert shorter == ["move block to plane", *waiting, *["look at floor"] * 2, "focus on it"]


@pytest.mark.parametrize(
    "deviations",
    [
        {1: "teleport to workshop"},  # led away between going there and looking
        {3: "teleport to bedroom", 4: "focus on bed"},  # led away with the plant, focus lost
        {2: "pick up cup", 3: "nonsense"},
    ],
)
def test_expert_comes_back_after_other_actions(env, deviations):
    env_task = "scienceworld/find-plant/230"
    assert _run_expert(env, env_task, deviations).success


def test_expert_answers_an_ambiguous_request(env):
    task_id = "scienceworld/lifespan-longest-lived/30"  # an orange in the hand, one in the kitchen
    env.reset(task_id)
    env.step("teleport to kitchen")
    assert env.step("look at orange").observation.startswith("Ambiguous request")
    assert env.admissible_actions() == ["0", "1"]
    for _ in range(6):
        outcome = env.step(env.expert_action())
        if outcome.done:
            break
    assert outcome.success


def test_wrong_focus_fails_with_score_zero(env):
    env.reset("scienceworld/lifespan-shortest-lived/5")
    assert env.step("teleport to outside").score > 0
    outcome = env.step("focus on axe")
    assert (outcome.done, outcome.success, outcome.score) == (True, False, 0.0)
    after = env.step("look around")
    assert (after.done, after.success, after.score) == (True, False, 0.0)


def test_best_score_outlives_a_wrong_focus(simulator):
    """The published evaluation counts the highest score of an episode, and no success by it."""
    best = ScienceWorld(score="best")
    best.reset("scienceworld/lifespan-shortest-lived/5")
    before = best.step("teleport to outside").score
    outcome = best.step("focus on axe")
    assert (outcome.done, outcome.success, outcome.score) == (True, False, before)
    assert best.raw_score == -1.0 and before > 0
    best.close()


def test_scores_are_the_package_s(env, simulator):
    """The same plan through the bare simulator gives the same scores."""
    task_id = "scienceworld/lifespan-longest-lived-then-shortest-lived/7"
    env.reset(task_id)
    simulator.load("lifespan-longest-lived-then-shortest-lived", 7, "easy")
    for _ in range(env.max_steps):
        action = env.expert_action()
        outcome = env.step(action)
        text, raw, completed = simulator.step(action)
        assert (outcome.score, outcome.done) == (max(0.0, raw), completed)
        assert outcome.observation.split() == text.split()  # compacted, but nothing lost
        if completed:
            break
    assert completed and raw == 1.0


def test_odd_actions_get_an_answer(env):
    env.reset("scienceworld/find-plant/3")
    score = env.step("teleport to kitchen").score
    odd = [
        "",
        " ",
        "\n",
        "look around\nfocus on agent",
        "x" * 200_000,
        "\x00",
        "a\x00b",
        "🌱",
        "\ud800",
    ]
    odd += ["(.*)[", "Action: look around", "focus on", "LOOK AROUND", "\t", "move", "7"]
    for action in odd:
        outcome = env.step(action)
        assert outcome.observation.strip() and not outcome.done
        assert outcome.score == score
    assert "kitchen" in env.step("look around").observation  # and it goes on


def test_reset_task_is_blocked(env):
    env.reset("scienceworld/find-plant/3")
    score = env.step("teleport to kitchen").score
    for action in ("reset task", "Reset   TASK", "reset\ttask"):
        outcome = env.step(action)
        assert outcome.observation.startswith("No known action") and outcome.score == score
    assert "reset task" not in env.admissible_actions()


def test_text_is_a_function_of_the_actions(env):
    """Same actions, same text: also with the expert and the admissible actions asked in between."""
    actions = ["look around", "teleport to greenhouse", "look around", "wait", "look in bee hive"]
    actions += ["open bee hive", "look around", "teleport to outside", "look around"]
    texts = []
    for asks in (False, True):
        text = [env.reset("scienceworld/find-plant/17")]
        for action in actions:
            if asks:
                env.expert_action()
                env.admissible_actions()
            text.append(env.step(action).observation)
        texts.append(text)
    assert texts[0] == texts[1]


def test_simulators_of_one_jvm_do_not_see_each_other(simulator):
    """Turn by turn as one by one, with tasks that differ in simplifications and live on chance."""
    jobs = [
        ("grow-plant", 7, ""),
        ("power-component", 1, "easy"),
        ("mendelian-genetics-known-plant", 2, "easy"),
    ]
    actions = ["teleport to greenhouse", "look around", "wait", "look around"]
    actions += ["teleport to workshop", "look around", "go to hallway"]
    actions += ["connect battery anode to red wire terminal 1", "pick up seed jar"]

    def play(job):
        simulator.load(*job)
        return [simulator.look(), *(simulator.step(action) for action in actions)]

    alone = [play(job) for job in jobs]
    others = [Simulator(512) for _ in jobs]
    assert {other.pid for other in others} == {simulator.pid}
    together = []
    for other, job in zip(others, jobs, strict=True):
        other.load(*job)
        together.append([other.look()])
    for action in actions:
        for index in random.Random(action).sample(range(len(jobs)), len(jobs)):
            together[index].append(others[index].step(action))
        others[0].valid_actions()
    for other in others:
        other.close()
    assert together == alone


def test_long_answers_do_not_wait_for_acknowledgements(simulator):
    """Of more than py4j's buffer of 8 kB: 0.2 ms; 44 ms without TCP_NODELAY."""
    simulator.load("find-plant", 0, "easy")
    long = simulator._jvm.gateway.jvm.java.lang.StringBuilder("a" * 30_000)
    waits = []
    for _ in range(20):
        start = time.perf_counter()
        assert len(long.toString()) == 30_000
        waits.append(time.perf_counter() - start)
    assert statistics.median(waits) < 0.02


def test_random_numbers_go_on_where_they_stopped():
    """The state found from two outputs gives these outputs (java.util.Random with seed 5)."""
    first, second, third = -1157408321, 758500184, 379066948
    state = scienceworld_jvm._lcg_state(first & 0xFFFFFFFF, second & 0xFFFFFFFF)
    assert state == 5 ^ 0x5DEECE66D
    for output in (first, second, third):
        state = (state * 0x5DEECE66D + 0xB) & ((1 << 48) - 1)
        assert state >> 16 == output & 0xFFFFFFFF


def test_admissible_actions_mean_something(env):
    task_id = "scienceworld/find-non-living-thing/10"
    env.reset(task_id)
    actions = env.admissible_actions()
    assert actions == sorted(set(actions)) and env.admissible_actions() == actions
    assert 30 < len(actions) < 250
    valid = set(env._simulator.valid_actions())
    assert len(valid & set(actions)) > 0.6 * len(actions)  # the others name things in other words
    for action in random.Random(0).sample(actions, 12):
        env.reset(task_id)
        assert not env.step(action).observation.startswith(("No known", "Unknown")), action


def test_splits_are_disjoint_and_official(env, simulator):
    for task in ("lifespan-longest-lived", "find-plant", "identify-life-stages-2", "boil"):
        folds = simulator.folds(task)
        cut = {split: split_variations(task, split) for split in OFFICIAL_SPLITS}
        assert cut["dev"] == folds["dev"] and cut["test"] == folds["test"]
        assert sorted(cut["pretrain"] + cut["demos"] + cut["train"]) == folds["train"]
        for one, other in itertools.combinations(cut.values(), 2):
            assert not set(one) & set(other)
    assert len(env.task_ids("train")) >= 150
    ids = env.task_ids("test")
    assert env.task_ids("test", 40) == ids[:40] and len(set(ids)) == len(ids)
    assert {task_id.split("/")[1] for task_id in ids[:40]} == set(SHORT_TASKS)  # a fair prefix


def test_published_splits_and_their_overlaps():
    """Sizes, 54 common pairs and no test pair elsewhere: figures known of the published files."""
    sizes = {s: sum(len(split_variations(task, s)) for task in TASKS) for s in ETO_SPLITS}
    assert sizes == {"eto_train": 1483, "eto_dev": 194, "eto_test": 211}
    assert len(PUBLISHED_TASKS) == 24 and set(PUBLISHED_TASKS) < set(TASKS)
    for split in ETO_SPLITS:
        for task, (count, _) in TASKS.items():
            numbers = split_variations(task, split)
            assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(count))
            assert bool(numbers) == (task in PUBLISHED_TASKS)
            official = {"eto_dev": "dev", "eto_test": "test"}.get(split)
            assert official is None or set(numbers) <= set(split_variations(task, official))
    common = scienceworld_tasks.overlaps()
    assert common["eto_train", "eto_dev"] == 54
    assert common["dev", "eto_train"] == 357
    assert common["test", "eto_test"] == sizes["eto_test"]
    assert [names for names in common if "eto_test" in names] == [("test", "eto_test")]
    counted = sum(common[split, "eto_train"] for split in OFFICIAL_SPLITS[:4])
    assert counted == sizes["eto_train"]


def test_published_splits_are_played_like_others():
    all_tasks = ScienceWorld(tasks="all")
    ids = all_tasks.task_ids("eto_test")
    assert len(set(ids)) == 211 and ids[:50] == all_tasks.task_ids("eto_test", 50)
    assert {task_id.split("/")[1] for task_id in ids} == set(PUBLISHED_TASKS)
    with pytest.raises(ValueError, match=r"1 tasks of split 'eto_dev'.* 0 there"):
        ScienceWorld(tasks="mendelian-genetics-known-plant").task_ids("eto_dev", 1)


def test_names_of_tasks_are_official(simulator):
    import scienceworld.constants

    assert sorted(scienceworld.constants.ID2TASK.values()) == sorted(TASKS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": "find-plants"}, "find-plants"),
        ({"simplification": "simple"}, "simple"),
        ({"heap_mb": 1}, "heap_mb"),
        ({"score": "worst"}, "worst"),
        ({"max_steps": {"boil": 0}}, "boil"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        ScienceWorld(**options)


@pytest.mark.parametrize(
    "task_id", ["", "find-plant/3", "scienceworld/find-plant/300", "scienceworld/x/1"]
)
def test_wrong_task_ids_are_named(env, task_id):
    with pytest.raises(ValueError, match="task_id"):
        env.reset(task_id)
    with pytest.raises(ValueError, match="split"):
        env.task_ids("testing")
    with pytest.raises(ValueError, match="9999"):
        env.task_ids("test", 9999)


def test_missing_java_and_packages_say_what_to_do(monkeypatch):
    monkeypatch.setenv(java.JAVA_VARIABLE, "/nowhere/java")
    with pytest.raises(FileNotFoundError, match="/nowhere/java"):
        ScienceWorld()
    monkeypatch.delenv(java.JAVA_VARIABLE)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[scienceworld\]'"):
        java.find_java()
    with pytest.raises(ImportError, match=r"pip install -e '\.\[scienceworld\]'"):
        ScienceWorld()


def test_a_dead_jvm_is_an_error_and_the_next_reset_starts_another():
    own = ScienceWorld(tasks="find-plant", heap_mb=128)  # a heap of its own: a JVM of its own
    own.reset("scienceworld/find-plant/0")
    pid = own._simulator.pid
    own._simulator._jvm.process.kill()
    own._simulator._jvm.process.wait()
    with pytest.raises(RuntimeError, match=f"{pid}"):
        own.step("look around")
    assert "Your task" in own.reset("scienceworld/find-plant/0")
    own.close()
    with pytest.raises(RuntimeError, match="reset"):
        own.step("look around")
