"""ALFWorld on the real engine: procedural games, and files as the official ones have them."""

import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from w2sjax.envs import (
    EnvPool,
    PlayRequest,
    alfworld_engine,
    alfworld_files,
    alfworld_games,
    alfworld_patches,
    play,
)
from w2sjax.envs.alfworld import SPLITS, ALFWorld
from w2sjax.envs.alfworld_engine import NOTHING, Engine
from w2sjax.envs.alfworld_games import FAMILIES, draw_game
from w2sjax.envs.base import Env
from w2sjax.envs.cache import default_cache

_WORDS = ("go", "to", "take", "put", "move", "open", "from", "in/on", "cabinet", "1", "\n", "\t")
SMALL = {"receptacles": 6, "clutter": 3, "cache_dir": ""}


@pytest.fixture(scope="module")
def env():
    made = ALFWorld(**SMALL)
    yield made
    made.close()
    made.close()


# ------------------------------------------------------------------------------------------ games


def test_ids_are_balanced_prefixes_and_say_everything(env):
    assert isinstance(env, Env)
    ids = env.task_ids("train", 60)
    assert env.task_ids("train", 12) == ids[:12] and len(set(ids)) == 60
    families = [task_id.split("/")[3] for task_id in ids]
    assert families == list(FAMILIES) * 10
    other = ALFWorld(families=("put",), clutter=0, cache_dir="", floor_plans=(1, 7))
    for task_id in ids[:6]:
        assert other.reset(task_id) == env.reset(task_id)
        assert other.admissible_actions() == env.admissible_actions()
    other.close()
    assert env.task_ids("test", 4) == env.task_ids("seen", 4)


def test_a_game_is_a_function_of_its_id_in_every_process():
    code = (
        "from w2sjax.envs.alfworld_games import draw_game, scenes, FAMILIES;"
        "print([draw_game('dev', f, scenes('dev', f)[3], 8, 5, 7) for f in FAMILIES])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    games = [
        draw_game("dev", family, alfworld_games.scenes("dev", family)[3], 8, 5, 7)
        for family in FAMILIES
    ]
    assert process.stdout.strip() == str(games), process.stderr  # hashes of texts differ there


def test_splits_share_no_game_and_unseen_shares_no_scene():
    """In the smallest games, where the same ones would be drawn again and again."""
    drawn = {}
    for split in ("pretrain", "demos", "train", "dev", "seen"):
        for number in range(40):
            game = draw_game(split, "put", 419, 4, 0, number)  # a scene of three receptacles
            drawn.setdefault(split, set()).add(game.problem)
    assert sum(map(len, drawn.values())) == len(set.union(*drawn.values()))
    assert len(drawn["pretrain"]) < 40  # they did repeat
    for family in FAMILIES:
        unseen = set(alfworld_games.scenes("unseen", family))
        assert unseen and not unseen & set(alfworld_games.scenes("train", family))


@pytest.mark.parametrize("family", FAMILIES)
def test_games_are_as_their_options_say(family):
    for number in range(20):
        scene = alfworld_games.scenes("train", family)[number]
        game = draw_game("train", family, scene, 5, 2, number)
        before_goal = game.problem.partition("(:goal")[0]
        assert 1 <= before_goal.count("- receptacle\n") <= 5
        wanted = 2 if family == "two" else 1
        thing = game.params["object_target"]
        assert wanted <= len(re.findall(rf"\(objectType \S+ {thing}Type\)", before_goal)) <= 3
        assert thing.lower() in game.goal
        assert "UNKNOWN GOAL" not in game.data()["grammar"]


def test_a_small_world_without_games_of_a_family_says_so(env):
    kitchens = ALFWorld(floor_plans=(7, 8), cache_dir="")
    with pytest.raises(ValueError, match=r"floor_plans.*'look'.*\[7, 8\]"):
        kitchens.task_ids("train", 6)
    with pytest.raises(ValueError, match="unseen"):
        ALFWorld(floor_plans=(7,), families=("put",), cache_dir="").task_ids("unseen", 1)


# ------------------------------------------------------------------------------------------ engine


def test_text_is_that_of_the_package_s_own_stack():
    """The same actions through alfworld's and textworld's untouched code."""
    import textworld
    import textworld.envs.pddl
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

    stock = AlfredDemangler(
        env=textworld.envs.pddl.PddlEnv(textworld.EnvInfos(admissible_commands=True, won=True))
    )
    rng = random.Random(0)
    engine = Engine()
    verbs = {"go"}
    for family, receptacles in (("cool", 6), ("look", 9), ("two", None)):
        scene = alfworld_games.scenes("train", family)[7]
        data = draw_game("train", family, scene, receptacles, 8, 0).data()
        stock.load(data)
        theirs = stock.reset()
        ours = engine.start(data)
        for _ in range(12):
            text = theirs["feedback"].replace("-= Welcome to TextWorld, ALFRED! =-", "")
            assert ours.split() == text.split()
            commands = theirs["admissible_commands"]
            assert engine.commands == [command.strip() for command in commands]
            assert engine.won == theirs["won"]
            rare = [command for command in commands if command.split()[0] not in verbs]
            command = rng.choice(rare or commands)
            verbs.add(command.split()[0])
            theirs, _, _ = stock.step(command)
            ours = engine.step(command)
    assert verbs > {"examine", "look", "inventory", "open", "take"}, verbs
    engine.give()


def test_patches_are_gone_outside_our_calls(env):
    import fast_downward
    import textworld.envs.pddl.textgen as textgen

    before = (textgen.copy_context, textgen.EvalSymbol.derive, fast_downward.pddl2sas)
    argv = list(sys.argv)
    env.reset(env.task_ids("dev", 1)[0])
    env.step("look")
    with pytest.raises(ValueError), alfworld_patches.patched():
        assert textgen.copy_context is not before[0]
        raise ValueError
    assert (textgen.copy_context, textgen.EvalSymbol.derive, fast_downward.pddl2sas) == before
    assert sys.argv == argv


def test_another_version_of_the_engine_is_left_as_it_is(monkeypatch):
    import textworld

    monkeypatch.setattr(textworld, "__version__", "2.0.0")
    names = [name for _, name, _ in alfworld_patches._patches.__wrapped__()]
    assert names == ["derive"]  # no eval, whatever the version


def test_steps_take_milliseconds():
    """5 ms a step is the aim; the bound allows for a busy machine."""
    env = ALFWorld(cache_dir="", families=("put",), floor_plans=(12,))
    medians = []
    for number in range(3):
        env.reset(env.task_ids("train", 3)[number])
        times = []
        for action in random.Random(number).choices(env.admissible_actions(), k=15):
            start = time.perf_counter()
            env.step(action)
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    env.close()
    assert min(medians) < 0.010


def test_an_engine_is_used_again():
    first = ALFWorld(**SMALL)
    first.reset(first.task_ids("train", 1)[0])
    engine = first._engine
    first.close()
    second = ALFWorld(**SMALL)
    second.reset(second.task_ids("train", 1)[0])
    assert second._engine is engine
    second.close()
    with pytest.raises(RuntimeError, match="reset"):
        second.step("look")


def test_engines_load_a_small_copy_of_the_library_each():
    """And play games of their own at the same time."""
    from fast_downward import interface

    path = interface.DOWNWARD_LIB_PATH
    whole = Path(path).stat().st_size
    engines = [Engine(), Engine()]
    part = alfworld_patches._loaded_part(Path(path))
    assert len(part) < whole / 10 and path == interface.DOWNWARD_LIB_PATH
    games = [draw_game("train", "put", 7, 5, 2, number).data() for number in range(2)]
    alone = []
    for game in games:
        alone.append([engines[0].start(game), engines[0].step("look"), engines[0].facts()])
    for engine, game, expected in zip(engines, games, alone, strict=True):
        assert engine.start(game) == expected[0]
    for engine, expected in zip(engines, alone, strict=True):
        assert [engine.step("look"), engine.facts()] == expected[1:]
        engine.give()
    assert alfworld_patches._loaded_part(Path(__file__)) is None  # no library: taken as it is


@pytest.mark.parametrize(
    "code",
    ["__import__('pathlib').Path({!r}).touch()", "o.__class__", "(1).real", "'a' *"],
)
def test_a_game_file_runs_no_code(tmp_path, code):
    """The package calls eval on expressions of a game's grammar."""
    target = tmp_path / "touched"
    data = draw_game("train", "put", 7, 5, 0, 0).data()
    code = code.format(str(target))
    data["grammar"] = data["grammar"].replace(
        '"rhs": "Your task is to', f'"rhs": "{{{code}}} Your task is to'
    )
    engine = Engine()
    with pytest.raises(ValueError, match="cannot load the game"):
        engine.start(data)
    assert not target.exists()
    data = draw_game("train", "put", 7, 5, 0, 0).data()
    assert "Your task is to" in engine.start(data)  # and it goes on
    engine.give()


# ----------------------------------------------------------------------------------------- episode


def test_experts_win(env):
    for expert in ("oracle", "searcher"):
        made = ALFWorld(**SMALL, expert=expert)
        for split in ("train", "unseen"):
            for task_id in made.task_ids(split, 12):
                episode = play(made, task_id, random_action_rate=0.0, seed=0)
                assert episode.status == "success", (expert, task_id)
                assert episode.scores[-1] == 1.0 and set(episode.scores[:-1]) <= {0.0}
        made.close()


@pytest.mark.parametrize("expert", ["oracle", "searcher"])
def test_experts_play_on_from_any_state(expert):
    made = ALFWorld(**SMALL, expert=expert)
    rng = random.Random(1)
    for task_id in made.task_ids("dev", 12):
        made.reset(task_id)
        for _ in range(20):
            if made.step(rng.choice(made.admissible_actions())).done:
                break
        for _ in range(30):
            if made.step(made.expert_action()).done:
                break
        assert made.step("look").success, task_id
    made.close()


def test_the_searcher_takes_only_what_it_has_seen():
    made = ALFWorld(**SMALL, expert="searcher")
    for task_id in made.task_ids("train", 12):
        text = made.reset(task_id)
        while True:
            action = made.expert_action()
            if action.startswith("take "):
                thing = action.removeprefix("take ").partition(" from ")[0]
                assert f" {thing}" in text, (task_id, action)
            outcome = made.step(action)
            text += outcome.observation
            if outcome.done:
                break
    made.close()


def test_the_package_s_explorer_plays_and_is_repeatable():
    made = ALFWorld(**SMALL, expert="explorer")
    random.seed(5)
    state = random.getstate()
    ids = made.task_ids("train", 12)
    first = [play(made, task_id, random_action_rate=0.0, seed=0) for task_id in ids]
    assert random.getstate() == state
    random.seed(6)
    assert [play(made, task_id, random_action_rate=0.0, seed=0) for task_id in ids[:4]] == first[:4]
    assert sum(episode.status == "success" for episode in first) >= 11
    assert first[5].status == "success"  # two things: lost without the repair
    made.close()


def test_observations_and_the_end(env):
    task_id = env.task_ids("train", 1)[0]
    observation = env.reset(task_id)
    assert "Welcome" not in observation and "\n\n" not in observation
    assert observation.splitlines()[-1].startswith("Your task is to: ")
    actions = env.admissible_actions()
    assert actions == sorted(set(actions)) and "help" not in actions and "look" in actions
    assert "Available commands" in env.step("help").observation
    while not (outcome := env.step(env.expert_action())).done:
        assert (outcome.score, outcome.success) == (0.0, False)
    assert (outcome.score, outcome.success) == (1.0, True)
    assert env.admissible_actions() == [] and env.expert_action() == "look"
    after = env.step("look")
    assert (after.observation, after.done, after.score) == (NOTHING, True, 1.0)


@pytest.fixture(scope="module")
def started(env):
    env.reset(env.task_ids("dev", 3)[2])
    env.step(next(a for a in env.admissible_actions() if a.startswith("go to ")))
    return env


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(text="")
@example(text="x" * 200_000)
@example(text="\x00")
@example(text="look\nlook")
@example(text="🍎 \ud800")
@example(text="put a in b")
@example(text="take {o} from #intro#")
@given(
    text=st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(_WORDS),
            max_size=8,
        ).map(" ".join),
    )
)
def test_any_text_gets_an_answer_and_changes_nothing_unless_it_means_something(started, text):
    if started._command(text) is not None:
        return  # it means something: not odd
    before = started._engine.facts()
    outcome = started.step(text)
    assert (outcome.observation, outcome.done, outcome.score) == (NOTHING, False, 0.0)
    assert started._engine.facts() == before
    assert "You are facing" in started.step(" LOOK ").observation  # case and spaces do not matter


def test_both_wordings_of_putting_mean_the_same(env):
    for task_id in env.task_ids("train", 6):
        env.reset(task_id)
        for _ in range(env.max_steps):
            action = env.expert_action()
            if action.startswith("move "):
                break
            assert not env.step(action).done or "look" in task_id
        else:
            continue
        words = action.removeprefix("move ").split(" to ")
        for wording in ("put {} in/on {}", "put {} in {}", "move {} to {}", "PUT {} on {}"):
            assert env._command(wording.format(*words)) == action
        assert env._command(f"put {words[1]} in {words[0]}") is None


def test_a_worker_process_plays_it_as_this_one_does(env):
    with EnvPool("alfworld", SMALL, num_slots=2, num_workers=1) as pool:
        ids = pool.task_ids("pretrain", 6)
        requests = [PlayRequest(task_id, 0.3, 1) for task_id in ids]
        played = dict(pool.play(requests))
        starts = pool.reset({0: ids[0], 1: ids[1]})
        outcomes = pool.step({0: "look", 1: "inventory"})
    for index, request in enumerate(requests):
        assert played[index] == play(env, request.task_id, random_action_rate=0.3, seed=1)
    for slot, action in enumerate(("look", "inventory")):  # two engines of one process
        assert starts[slot].first_observation == env.reset(ids[slot])
        assert outcomes[slot] == env.step(action)


# ------------------------------------------------------------------------------------------- files


def _official(folder, count=8):
    """A data folder in the official layout, in the older wording, of procedural games."""
    made = ALFWorld(cache_dir=str(folder / "drawn"), receptacles=6, clutter=2)
    texts = {}
    for split, name in (("train", "train"), ("seen", "valid_seen"), ("unseen", "valid_unseen")):
        for task_id in made.task_ids(split, count):
            texts[task_id] = made.reset(task_id)
        drawn = folder / "drawn" / f"version_{alfworld_games.VERSION}" / split
        drawn.rename(folder / name)
        for path in (folder / name).glob("*/*/game.tw-pddl"):
            data = json.loads(path.read_text())
            wording = data["grammar"].replace('"move {o} to {r}"', '"put {o} in/on {r}"')
            assert wording != data["grammar"]
            path.write_text(json.dumps(data | {"grammar": wording}))
    made.close()
    return texts


def test_official_files_are_found_and_played(tmp_path, monkeypatch):
    texts = _official(tmp_path)
    official = ALFWorld(games="official", data_dir=str(tmp_path), families=("put", "two", "heat"))
    ids = {split: official.task_ids(split) for split in SPLITS}
    assert len(ids["seen"]) == len(ids["unseen"]) == 4 and ids["test"] == ids["seen"]
    cut = [task for split in ("pretrain", "demos", "dev", "train") for task in ids[split]]
    assert len(cut) == len(set(cut)) == 4  # of eight, in three of six families
    for task_id in ids["seen"] + ids["unseen"]:
        assert official.reset(task_id) in texts.values()
        while not (outcome := official.step(official.expert_action())).done:
            assert outcome.observation != NOTHING
        assert outcome.success
    official.reset(ids["seen"][0])
    while not (action := official.expert_action()).startswith("put "):
        official.step(action)
    assert official._command(action.replace("put", "move").replace("in/on", "to")) == action
    with pytest.raises(ValueError, match=r"99 tasks of split 'seen'.* 4 there"):
        official.task_ids("seen", 99)
    explorer = ALFWorld(games="official", data_dir=str(tmp_path), expert="explorer")
    for task_id in ids["unseen"]:
        assert play(explorer, task_id, random_action_rate=0.0, seed=0).status == "success"
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert set(ids["unseen"]) <= set(ALFWorld(games="official").task_ids("unseen"))
    for made in (official, explorer):
        made.close()


def test_official_games_that_cannot_serve_are_left_out_or_named(tmp_path):
    _official(tmp_path, count=6)
    seen = tmp_path / "valid_seen"
    one, two, three, *_ = sorted(seen.iterdir())
    one.rename(seen / one.name.replace("None", "AppleSliced"))
    game = next(two.iterdir()) / "game.tw-pddl"
    game.write_text(json.dumps(json.loads(game.read_text()) | {"solvable": False}))
    official = ALFWorld(games="official", data_dir=str(tmp_path))
    ids = official.task_ids("seen")
    assert len(ids) == 4
    traj = next(three.iterdir()) / "traj_data.json"
    task_id = next(task_id for task_id in ids if three.name in task_id)
    for content, said in (("{", "traj_data.json"), ('{"task_type": "cook"}', "task_type.*cook")):
        traj.write_text(content)
        with pytest.raises(ValueError, match=said):
            official.reset(task_id)
    game = next(three.iterdir()) / "game.tw-pddl"
    game.write_text("[]")
    with pytest.raises(ValueError, match=r"game.tw-pddl: expected a JSON object"):
        official.reset(task_id)


def test_no_official_games_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="alfworld-download"):
        ALFWorld(games="official")


def test_the_package_reads_the_files_that_are_kept(tmp_path, monkeypatch):
    """alfworld's own AlfredTWEnv finds them and takes them for solvable."""
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    made = ALFWorld(cache_dir=str(tmp_path), receptacles=6, clutter=2)
    for task_id in made.task_ids("train", 6):
        made.reset(task_id)
    made.close()
    config = {
        "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
        "dataset": {"data_path": str(tmp_path), "num_train_games": -1},
    }
    assert AlfredTWEnv(config).num_games == 6


def test_processes_that_write_the_same_game_agree(tmp_path):
    game = draw_game("train", "put", 7, 5, 2, 0)
    barrier = threading.Barrier(8)
    folders, errors = [], []

    def write():
        barrier.wait()
        try:
            folders.append(alfworld_files.keep_game(tmp_path, "train", "5-2-0", game))
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set(folders)) == 1
    assert list(folders[0].parent.iterdir()) == [folders[0]]  # nothing left beside it
    assert json.loads((folders[0] / "game.tw-pddl").read_text()) == game.data()
    assert (folders[0] / "initial_state.pddl").read_text() == game.problem
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cache_dir"):
        alfworld_files.keep_game(tmp_path / "file", "train", "5-2-0", game)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("W2SJAX_CACHE", str(tmp_path / "here"))
    made = ALFWorld(receptacles=4, clutter=0)
    made.reset(made.task_ids("demos", 1)[0])
    made.close()
    assert len(list((tmp_path / "here").rglob("game.tw-pddl"))) == 1
    monkeypatch.setenv("W2SJAX_CACHE", "gs://bucket/folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache("procedural_alfworld") == tmp_path / "xdg/w2sjax/procedural_alfworld"


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"games": "real"}, "games"),
        ({"expert": "planner"}, "expert"),
        ({"families": ("put", "cook")}, "families"),
        ({"families": "put"}, "families"),
        ({"floor_plans": (7, 31)}, "floor_plans"),
        ({"floor_plans": "7"}, "floor_plans"),
        ({"floor_plans": ([7],)}, "floor_plans"),
        ({"floor_plans": ()}, "floor_plans"),
        ({"data_dir": 3}, "data_dir"),
        ({"cache_dir": False}, "cache_dir"),
        ({"receptacles": 3}, "receptacles"),
        ({"clutter": -1}, "clutter"),
        ({"max_steps": 0}, "max_steps"),
        ({"instruction": ""}, "instruction"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=f"env.options.{said}"):
        ALFWorld(**options)


@pytest.mark.parametrize(
    "task_id",
    [
        "",
        "alfworld/procedural/train/put/7/8-4",
        "alfworld/procedural/test/put/7/8-4/0",  # ids say "seen"
        "alfworld/procedural/train/heat/301/8-4/0",  # no kitchen
        "alfworld/procedural/train/put/7/8-4/-1",
        "alfworld/procedural/train/put/7/3-4/0",
        "alfworld/procedural/unseen/put/7/8-4/0",
        "household/train/0",
    ],
)
def test_wrong_task_ids_are_named(env, task_id):
    with pytest.raises(ValueError, match="task_id"):
        env.reset(task_id)


@pytest.mark.parametrize("name", ["train/../../etc", "valid_seen/..", "nowhere/a/b", "train/a/b"])
def test_task_ids_lead_nowhere_else(tmp_path, name):
    (tmp_path / "train").mkdir()
    official = ALFWorld(games="official", data_dir=str(tmp_path))
    for task_id in (f"alfworld/official/{name}", f"alfworld/official/{name}/trial"):
        with pytest.raises(ValueError, match="task_id"):
            official.reset(task_id)


def test_splits_and_counts_are_checked(env):
    with pytest.raises(ValueError, match="testing"):
        env.task_ids("testing", 1)
    with pytest.raises(ValueError, match="endless"):
        env.task_ids("train")
    with pytest.raises(ValueError, match="-1"):
        env.task_ids("train", -1)


def test_missing_packages_say_what_to_do(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(alfworld_engine.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[alfworld\]'"):
        ALFWorld()
    monkeypatch.setattr(alfworld_games.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[alfworld\]'"):
        alfworld_games.package_folder()
