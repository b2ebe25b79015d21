"""Real TextWorldExpress: one JVM for all tests here, as in a worker process."""

import multiprocessing
import os
import random
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from w2sjax.envs import textworld_express_games as games
from w2sjax.envs.base import Env, make_env
from w2sjax.envs.players import play
from w2sjax.envs.textworld_express import TextWorldExpress
from w2sjax.envs.textworld_express_expert import room_in
from w2sjax.envs.textworld_express_games import FOLDS, GAMES, SPLITS
from w2sjax.envs.textworld_express_jvm import Simulator
from w2sjax.types import Status

ALL = [f"{game}:{preset}" for game, about in GAMES.items() for preset in about.presets]


@pytest.fixture(scope="module")
def simulator():
    """Keeps the module's JVM alive; a bare simulator for those who ask the package itself."""
    with_jvm = Simulator(256)
    yield with_jvm
    pid = with_jvm.pid
    with_jvm.close()
    with_jvm.close()
    assert not os.path.exists(f"/proc/{pid}"), "the JVM outlived its last simulator"


@pytest.fixture(scope="module")
def env(simulator):
    made = TextWorldExpress(games=ALL)
    yield made
    made.close()
    made.close()


def _ids(env, pair, split, count):
    game, _, preset = pair.partition(":")
    wanted = f"textworld_express/{game}/{preset}/"
    return [task_id for task_id in env.task_ids(split) if task_id.startswith(wanted)][:count]


@pytest.mark.parametrize("pair", ALL)
def test_expert_wins_within_the_step_limit(env, pair):
    assert isinstance(env, Env)
    for split in ("train", "test"):
        for task_id in _ids(env, pair, split, 2):
            episode = play(env, task_id, random_action_rate=0.0, seed=0)
            assert (episode.status, episode.score) == (Status.SUCCESS, 1.0), episode
            assert not any("Unknown action" in text for text in episode.observations)


@pytest.mark.parametrize("pair", ["twc:medium", "coin:easy", "mapreader:easy", "twc:hard"])
def test_expert_wins_after_any_other_actions(env, pair):
    """These games cannot be lost: ten random actions, then the expert alone."""
    for seed, task_id in enumerate(_ids(env, pair, "dev", 3)):
        rng = random.Random(seed)
        env.reset(task_id)
        for _ in range(10):
            outcome = env.step(rng.choice([*env.admissible_actions(), "nonsense"]))
            if outcome.done:
                break
        for _ in range(40):
            if outcome.done:
                break
            outcome = env.step(env.expert_action())
        assert outcome.success, task_id


def test_expert_fetches_what_was_put_away(env):
    """A thing in a wrong, closed place: the gold player would not look there."""
    task_id = _ids(env, "cookingworld:easy", "train", 1)[0]
    env.reset(task_id)
    wanted = ""
    while not wanted:
        action = env.expert_action()
        env.step(action)
        thing = action.removeprefix("take ")
        wanted = thing if thing != action and thing not in ("cookbook", "knife") else ""
    env.step("open dishwasher")
    assert env.step(f"put {wanted} in dishwasher").observation.startswith("You put")
    env.step("close dishwasher")
    outcome = None
    for _ in range(20):
        outcome = env.step(env.expert_action())
        if outcome.done:
            break
    assert outcome.success


def test_expert_of_a_lost_game_goes_on_without_a_plan(env):
    """Where nothing wins any more the expert has no plan, but still an answer."""
    env.reset("textworld_express/peckingorder/default/10022")  # two things of one name
    for _ in range(3):
        action = env.expert_action()
        assert action in env.admissible_actions()
        env.step(action)


@pytest.mark.parametrize("pair", ["arithmetic:default", "sorting:default", "simonsays:default"])
def test_failures_end_the_episode_with_score_zero(env, pair):
    lost = 0
    for task_id in _ids(env, pair, "train", 4):
        episode = play(env, task_id, random_action_rate=1.0, seed=1)
        if episode.status == Status.FAILED:
            lost += 1
            assert episode.score == 0.0 and len(episode.actions) <= env.max_steps
            assert env.step("look around").done and env.admissible_actions() == []
            assert env.expert_action() == "look around"
    assert lost


def test_scores_and_texts_are_the_package_s(env, simulator):
    """The same actions through the bare simulator give the same, scores cut off at 0."""
    for pair in ("twc:default", "cookingworld:medium", "peckingorder:default"):
        game, preset = pair.split(":")
        task_id = _ids(env, pair, "dev", 1)[0]
        env.reset(task_id)
        text = games.parameter_text(game, preset, {})
        simulator.start(game, text, int(task_id.split("/")[-1]), "dev")
        rng = random.Random(pair)
        for _ in range(15):
            action = rng.choice(env.admissible_actions())
            outcome, view = env.step(action), simulator.step(action)
            assert outcome.score == max(0.0, view.score)
            assert outcome.observation.split() == view.observation.split()
            assert outcome.done == (view.success or view.failure)
            if outcome.done:
                break


@hypothesis.settings(max_examples=25, deadline=None, database=None)
@hypothesis.given(st.data())
def test_odd_actions_change_nothing(env, data):
    task_id = data.draw(st.sampled_from(_ids(env, "twc:easy", "train", 3)))
    odd = data.draw(st.one_of(st.text(max_size=40), st.text(st.characters(), min_size=150)))
    first = env.reset(task_id)
    admissible = env.admissible_actions()
    for action in (odd, "🍎" * 50_000, "\x00", "a\x00b", "", "look around\ntake key", "\ud800"):
        if action.strip().lower() in admissible:
            continue
        outcome = env.step(action)
        assert outcome.observation.startswith("Unknown action") and not outcome.done
        assert env.admissible_actions() == admissible
    assert env.step("LOOK \t Around").observation in first  # case and spaces do not matter
    assert env.step("look around" + " " * 200_000).observation in first


def test_text_is_a_function_of_the_actions(env):
    """Same actions, same text: also with the expert asked in between, and sorting's shared things.

    The other environment plays the same problem at the same time.
    """
    other = TextWorldExpress(games=["sorting", "twc:medium"])
    for pair in ("sorting:default", "twc:medium"):
        task_id = _ids(env, pair, "train", 1)[0]
        texts = []
        for asks in (False, True):
            rng = random.Random(0)
            text = [env.reset(task_id)]
            other.reset(task_id)
            for _ in range(6):
                action = rng.choice(env.admissible_actions())
                if asks:
                    env.expert_action()
                    other.step(other.expert_action())
                text.append(env.step(action))
                if text[-1].done:
                    break
            texts.append(text)
        assert texts[0] == texts[1]
    other.close()


def test_splits_are_disjoint_and_official(env, simulator):
    server = simulator._server
    official = {
        "train": list(server.getSeedsTrain()),
        "dev": list(server.getSeedsDev()),
        "test": list(server.getSeedsTest()),
    }
    assert {name: list(seeds) for name, seeds in FOLDS.items()} == official
    cut = {split: set(games.split_seeds(split)) for split in SPLITS}
    assert cut["dev"] == set(official["dev"]) and cut["test"] == set(official["test"])
    assert cut["demos"] | cut["train"] == set(official["train"])
    assert sum(map(len, cut.values())) == len(set().union(*cut.values()))
    ids = env.task_ids("train")
    assert env.task_ids("train", 40) == ids[:40] and len(set(ids)) == len(ids)
    pairs = [":".join(task_id.split("/")[1:3]) for task_id in ids[: len(ALL)]]
    assert pairs == ALL  # a fair prefix


def test_parameters_and_ranges_are_the_package_s(simulator):
    """What is in range here, the package takes; what lies just outside, it refuses."""
    assert sorted(simulator._server.getGameNames()) == sorted(GAMES)
    for game, about in GAMES.items():
        for name, (low, high) in about.parameters.items():
            for value in (low, high):
                if game != "mapreader":  # its largest maps take seconds
                    simulator.start(game, f"{name}={value}", 0, "train")
            if (low, high) == (0, 1) or name in ("numItemsToPutAway", "gameLength"):
                continue  # the package takes more there: flags, no items, games without end
            for value in (low - 1, high + 1):
                with pytest.raises(ValueError, match=game):
                    simulator.start(game, f"{name}={value}", 0, "train")


def test_parameters_change_the_game(simulator):
    small = TextWorldExpress("coin", parameters={"coin": {"numLocations": 1, "includeDoors": 0}})
    first = small.reset(small.task_ids("train", 1)[0])
    assert "To the" not in first and "coin" in first.splitlines()[1]
    assert room_in(first.splitlines()[1])
    assert small.step("take coin").success
    small.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"games": "chess"}, "chess"),
        ({"games": "twc:cozy"}, "cozy.*easy"),
        ({"games": ()}, "games"),
        ({"games": "twc,twc"}, "different"),
        ({"parameters": {"coin": {"numRooms": 3}}, "games": "coin"}, "numRooms.*numLocations"),
        ({"parameters": {"coin": {"numLocations": 12}}, "games": "coin"}, "1 to 11.*12"),
        ({"parameters": {"coin": {"numLocations": True}}, "games": "coin"}, "True"),
        ({"parameters": {"coin": {}}, "games": "twc"}, "coin.*twc"),
        ({"max_steps": {"twc": 0}}, "twc"),
        ({"max_steps": {"twc": "9"}}, "'9'"),
        ({"heap_mb": 1}, "heap_mb"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        TextWorldExpress(**options)


@pytest.mark.parametrize(
    "task_id",
    ["", "twc/easy/3", "textworld_express/twc/cozy/3", "textworld_express/twc/easy/30000"],
)
def test_wrong_task_ids_are_named(env, task_id):
    with pytest.raises(ValueError, match="task_id"):
        env.reset(task_id)
    with pytest.raises(ValueError, match="split"):
        env.task_ids("testing")
    with pytest.raises(ValueError, match="999999"):
        env.task_ids("test", 999_999)


def test_a_dead_jvm_is_an_error_and_the_next_reset_starts_another():
    own = TextWorldExpress(heap_mb=128)  # a heap of its own: a JVM of its own
    task_id = own.task_ids("train", 1)[0]
    own.reset(task_id)
    pid = own._simulator.pid
    own._simulator._jvm.process.kill()
    own._simulator._jvm.process.wait()
    with pytest.raises(RuntimeError, match=f"{pid}"):
        own.step("look around")
    assert "task" in own.reset(task_id)
    own.close()
    with pytest.raises(RuntimeError, match="reset"):
        own.step("look around")


def _win_one(task_id, results):
    env = make_env("textworld_express", games="coin:easy")
    results.put((play(env, task_id, random_action_rate=0.0, seed=0).status, env._simulator.pid))
    env.close()


def test_a_spawned_worker_has_a_jvm_of_its_own(env, simulator):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_win_one, args=(_ids(env, "coin:easy", "dev", 1)[0], results))
    worker.start()
    status, pid = results.get(timeout=60)
    worker.join(30)
    assert status == Status.SUCCESS and pid != simulator.pid
    assert not os.path.exists(f"/proc/{pid}")


def test_nothing_is_printed_at_the_end():
    """No noise of a broken pipe: one JVM was closed, another ends with the process."""
    code = """
from w2sjax.envs.base import make_env
for heap_mb in (100, 200):
    env = make_env("textworld_express", heap_mb=heap_mb)
    env.reset(env.task_ids("train", 1)[0])
    env.step(env.expert_action())
    if heap_mb == 100:
        env.close()
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout == ran.stderr == ""
