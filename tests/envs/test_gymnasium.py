"""The bridge to Gymnasium, both ways."""

import importlib.util
import os
import subprocess
import sys
import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from w2sjax.envs import Env, EnvFailure, EnvPool, Household, PlayRequest, make_env, play
from w2sjax.envs.gymnasium_export import REPLACEMENT, TextEnv
from w2sjax.types import Status

GUESS = {"factory": "text_gym_envs:Guess", "max_steps": 5}
SCORED = GUESS | {"score_range": (0, 10), "success": "terminated"}
KWARGS = {"env": "household", "extra_info": ("admissible_actions", "expert_action")}
HOUSEHOLD = {
    "factory": "w2sjax.envs.gymnasium_export:TextEnv",
    "kwargs": KWARGS,
    "score": "info:score",
    "success": "info:success",
    "admissible_key": "admissible_actions",
    "expert_key": "expert_action",
}


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", ["household", "webshop"])
def test_gymnasium_s_own_checks_pass(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*alternative render modes.*")
        check_env(TextEnv(name, extra_info=("admissible_actions", "expert_action")))
        check_env(TextEnv(name, render_mode="ansi"))


def test_gymnasium_s_own_checks_pass_for_a_registered_id():
    gymnasium.register("Household-v0", entry_point="w2sjax.envs.gymnasium_export:TextEnv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("Household-v0", env="household", split="dev")
        check_env(env.unwrapped)
    assert env.reset(seed=1)[1]["task_id"].startswith("household/dev/")
    env.close()


@pytest.mark.parametrize("name", ["household", "webshop"])
def test_an_episode_is_ours(name):
    """Same task, same actions: same texts, and rewards that add up to the score."""
    ours = make_env(name)
    gym_env = TextEnv(name, split="dev", extra_info=("expert_action", "admissible_actions"))
    for task_id in ours.task_ids("dev", 6):
        played = play(ours, task_id, random_action_rate=0.4, seed=0)
        observation, info = gym_env.reset(options={"task_id": task_id})
        assert (observation, info["task_id"]) == (played.first_observation, task_id)
        assert gym_env.instruction == played.instruction
        ours.reset(task_id)
        total = 0.0
        for step, action in enumerate(played.actions, start=1):
            assert info["admissible_actions"] == ours.admissible_actions()
            assert info["expert_action"] == ours.expert_action()
            ours.step(action)
            observation, reward, terminated, truncated, info = gym_env.step(action)
            total += reward
            assert observation == played.observations[step - 1] == gym_env._text
            assert (info["score"], info["steps"]) == (played.scores[step - 1], step)
        assert total == pytest.approx(played.score)
        assert terminated == (played.status != Status.STEP_LIMIT)
        assert truncated == (played.status == Status.STEP_LIMIT)
        assert info["success"] == (played.status == Status.SUCCESS)
        assert ("expert_action" in info) == truncated


def test_seeds_draw_tasks():
    env = TextEnv(split="dev", num_tasks=50)
    drawn = [env.reset(seed=seed)[1]["task_id"] for seed in range(30)]
    assert drawn == [env.reset(seed=seed)[1]["task_id"] for seed in range(30)]
    assert len(set(drawn)) > 10 and set(drawn) <= set(Household().task_ids("dev", 50))
    env.reset(seed=7)
    after = [env.reset()[1]["task_id"] for _ in range(5)]
    env.reset(seed=7)
    assert after == [env.reset()[1]["task_id"] for _ in range(5)] and len(set(after)) > 1


class Odd(Household):
    """Says what no usual character set holds."""

    def step(self, action):
        outcome = super().step(action)
        return type(outcome)("bad \U0001fa91 \x00 " + "x" * 50, 0.0, False, False)


def test_what_the_space_cannot_hold_is_replaced_and_counted():
    env = TextEnv(Odd(), max_observation_length=20, render_mode="ansi")
    _, info = env.reset(seed=0)
    assert info["cut_characters"] > 0
    observation, *_, info = env.step("look")
    assert observation in env.observation_space and observation == env.render()
    assert observation == f"bad {REPLACEMENT} {REPLACEMENT} " + "x" * 12
    assert (info["replaced_characters"], info["cut_characters"]) == (2, 38)


def test_it_runs_in_gymnasium_s_vector_environments():
    make = lambda: TextEnv("household", split="dev")  # noqa: E731
    env = gymnasium.vector.SyncVectorEnv([make, make])
    first, _ = env.reset(seed=[1, 2])
    alone = [TextEnv("household", split="dev").reset(seed=seed)[0] for seed in (1, 2)]
    assert list(first) == alone
    _, rewards, *_ = env.step(("look", "inventory"))
    assert list(rewards) == [0.0, 0.0]
    env.close()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"extra_info.*'score'"):
        TextEnv(extra_info=("score",))
    with pytest.raises(ValueError, match=r"render_mode.*'human'"):
        TextEnv(render_mode="human")
    with pytest.raises(ValueError, match="endless"):
        TextEnv(num_tasks=None)
    with pytest.raises(ValueError, match="num_rooms"):
        TextEnv(options={"num_rooms": 3})
    with pytest.raises(ValueError, match="num_tasks"):
        TextEnv(num_tasks=0)
    env = TextEnv()
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look")
    with pytest.raises(ValueError, match=r"options.*'task'"):
        env.reset(options={"task": "household/dev/0"})


# ------------------------------------------------------------------------------------------- import


def test_others_follow_our_protocol():
    env = make_env("gymnasium", **SCORED)
    assert isinstance(env, Env) and env.max_steps == 5
    for call in (env.admissible_actions, env.expert_action, lambda: env.step("1")):
        with pytest.raises(RuntimeError, match="reset"):
            call()
    assert env.reset("gymnasium/3") == "guess a number"
    number = env._env.unwrapped._number
    outcome = env.step(str(number % 9 + 1))
    assert (outcome.score, outcome.done, outcome.success) == (0.0, False, False)
    assert outcome.observation in ("higher", "lower")
    outcome = env.step(str(number))
    assert (outcome.observation, outcome.done, outcome.success) == ("right", True, True)
    assert outcome.score == 0.9
    after = env.step("1")
    assert (after.score, after.done, after.success) == (0.9, True, True)
    env.close()
    env.close()


def test_an_id_brings_its_limit():
    env = make_env("gymnasium", id="text_gym_envs:Guess-v0")
    assert env.max_steps == 5
    env.reset("gymnasium/3")
    wrong = str(env._env.unwrapped._number % 9 + 1)
    for _ in range(7):  # no time limit of Gymnasium's is around it
        assert not env.step(wrong).done
    assert make_env("gymnasium", id="text_gym_envs:Guess-v0", max_steps=3).max_steps == 3


@pytest.mark.parametrize(
    ("options", "scores", "success"),
    [
        ({}, [0.0, 0.0, 1.0], True),
        ({"score_range": (0, 10)}, [0.0, 0.0, 0.8], False),
        ({"score_range": (0, 10), "success": "terminated"}, [0.0, 0.0, 0.8], True),
        (
            {"score": "info:points", "score_range": (0, 10), "success": "info:won"},
            [0.9, 0.8, 0.8],
            1,
        ),
        ({"score": "reward", "score_range": (-8, 8)}, [0.5, 0.5, 1.0], True),
        ({"score": "info:nothing"}, [0.0, 0.0, 0.0], False),
    ],
)
def test_scores_are_what_the_options_say(options, scores, success):
    env = make_env("gymnasium", **(GUESS | options))
    env.reset("gymnasium/3")
    number = env._env.unwrapped._number
    wrong = str(number % 9 + 1)
    outcomes = [env.step(action) for action in (wrong, wrong, str(number))]
    assert [outcome.score for outcome in outcomes] == scores
    assert outcomes[-1].success == success and outcomes[-1].done


def test_actions_outside_the_space_are_answered_here():
    env = make_env("gymnasium", **SCORED)
    env.reset("gymnasium/3")
    for action in ("", "12", "seven", "x" * 200_000, "\x00", "🪑"):
        outcome = env.step(action)
        assert "no action" in outcome.observation and not outcome.done
    free = make_env("gymnasium", check_actions=False, **SCORED)
    free.reset("gymnasium/3")
    with pytest.raises(ValueError, match="seven"):
        free.step("seven")


def test_without_an_expert_players_and_pools_say_so():
    env = make_env("gymnasium", **SCORED)
    env.reset("gymnasium/3")
    assert env.admissible_actions() == []
    with pytest.raises(NotImplementedError, match=r"env\.options\.expert_key"):
        env.expert_action()
    with EnvPool("gymnasium", SCORED, num_slots=1) as pool:
        ((_, failure),) = pool.play([PlayRequest("gymnasium/3")])
        assert isinstance(failure, EnvFailure) and "env.options.expert_key" in failure.message
        assert pool.reset({0: "gymnasium/3"})[0].first_observation == "guess a number"
    env = make_env("gymnasium", expert_key="best", admissible_key="legal", **SCORED)
    env.reset("gymnasium/3")
    assert env.admissible_actions() == [str(n) for n in range(1, 10)]
    assert env.step(env.expert_action()).success and env.admissible_actions() == []


def test_splits_are_ranges_of_seeds():
    env = make_env("gymnasium", splits={"train": (0, 5), "test": (5, 7)}, **GUESS)
    assert env.task_ids("test") == ["gymnasium/5", "gymnasium/6"]
    assert env.task_ids("train", 2) == ["gymnasium/0", "gymnasium/1"]
    with pytest.raises(ValueError, match=r"6 tasks .*'train'.* 5 in all"):
        env.task_ids("train", 6)
    with pytest.raises(ValueError, match=r"unknown split 'dev'"):
        env.task_ids("dev", 1)
    default = make_env("gymnasium", **GUESS)
    ids = [default.task_ids(split) for split in ("pretrain", "demos", "train", "dev", "test")]
    assert len(set().union(*ids)) == sum(map(len, ids))
    for task_id in ("gymnasium/x", "gymnasium/-1", "household/train/1", "gymnasium/" + "1" * 500):
        with pytest.raises(ValueError, match="no task id"):
            env.reset(task_id)


@pytest.mark.parametrize("name", ["household", "webshop"])
def test_there_and_back_again_is_the_same_episode(name):
    """Ours → Gymnasium → ours: texts, scores and verdicts of the inner task, step limit too."""
    inner = make_env(name)
    outer = make_env("gymnasium", **(HOUSEHOLD | {"kwargs": KWARGS | {"env": name}}))
    seen = set()
    for seed, task_id in enumerate(outer.task_ids("train", 60)):
        rate = (0.0, 0.4, 0.8)[seed % 3]
        there = play(outer, task_id, random_action_rate=rate, seed=seed)
        inner_id = outer._env.unwrapped._task_id
        assert inner.reset(inner_id) == there.first_observation
        assert (inner.instruction, inner.max_steps) == (there.instruction, outer.max_steps)
        for action, observation, score in zip(
            there.actions, there.observations, there.scores, strict=True
        ):
            outcome = inner.step(action)
            assert (outcome.observation, outcome.score) == (observation, score)
        seen.add(there.status)
        expected = Status.SUCCESS if outcome.success else Status.FAILED
        assert there.status == (expected if outcome.done else Status.STEP_LIMIT)
        assert outcome.done or len(there.actions) == inner.max_steps
    lost = {Status.FAILED} if name == "webshop" else set()  # in the household that is rare
    assert seen >= {Status.SUCCESS, Status.STEP_LIMIT} | lost


def test_returns_that_add_up_to_one_are_successes():
    options = HOUSEHOLD | {"score": "return", "success": "score"}
    env = make_env("gymnasium", **options)
    for task_id in env.task_ids("dev", 20):
        assert play(env, task_id, random_action_rate=0.0, seed=0).status == Status.SUCCESS


def test_it_plays_in_worker_processes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    options = SCORED | {"expert_key": "best"}
    with EnvPool("gymnasium", options, num_slots=1, num_workers=1) as pool:
        ((_, episode),) = pool.play([PlayRequest("gymnasium/3")])
    env = make_env("gymnasium", **options)
    assert episode == play(env, "gymnasium/3", random_action_rate=0.0, seed=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one of id and factory"),
        ({"id": "x", "factory": "y:z"}, "one of id and factory"),
        ({"id": "NoSuch-v7"}, r"env\.options\.id.*NoSuch"),
        ({"factory": "nowhere:Class"}, r"env\.options\.factory.*nowhere"),
        ({"factory": "text_gym_envs:no_environment"}, "not a gymnasium.Env"),
        ({"factory": "text_gym_envs:Guess", "kwargs": {"a": 1}}, r"factory.*'a': 1"),
        ({**GUESS, "kwargs": {"bad": "discrete"}}, "action space is Discrete"),
        ({**GUESS, "kwargs": {"bad": "dict"}}, r"observation space.*observation_key"),
        ({**GUESS, "observation_key": "text"}, "no entry 'text'"),
        ({**GUESS, "score": "best"}, r"env\.options\.score: .*'best'"),
        ({**GUESS, "success": "won"}, r"env\.options\.success: .*'won'"),
        ({**GUESS, "score_range": (1, 1)}, r"score_range.*\(1, 1\)"),
        ({**GUESS, "max_steps": 0}, r"max_steps.*0"),
        ({**GUESS, "splits": {"train": (3, 3)}}, r"splits.*'train'"),
        ({**GUESS, "splits": {"train": (0, 9), "dev": (8, 10)}}, "'train' and 'dev' share"),
        ({**GUESS, "splits": {}}, "no split"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        make_env("gymnasium", **options)


def test_wrong_answers_of_environments_are_named():
    env = make_env("gymnasium", **(GUESS | {"kwargs": {"bad": "bytes"}}))
    with pytest.raises(TypeError, match="got bytes"):
        env.reset("gymnasium/3")
    env = make_env("gymnasium", **(GUESS | {"kwargs": {"bad": "points"}, "score": "info:points"}))
    with pytest.raises(ValueError, match=r"info\['points'\].*'many'"):
        env.reset("gymnasium/3")
    env = make_env("gymnasium", factory="text_gym_envs:Guess")
    with pytest.raises(ValueError, match=r"env\.options\.max_steps"):
        env.reset("gymnasium/3")
    env = make_env("gymnasium", **(GUESS | {"kwargs": {"bad": "dict"}, "observation_key": "text"}))
    assert env.reset("gymnasium/3") == "guess a number"


def test_a_missing_package_says_what_to_do():
    code = (
        "import sys; sys.modules['gymnasium'] = None\n"
        "from w2sjax.envs import make_env\n"
        "for make in (lambda: make_env('gymnasium', id='x'),\n"
        "             lambda: __import__('w2sjax.envs.gymnasium_export')):\n"
        "    try:\n        make()\n"
        "    except ImportError as error:\n        print(error)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.count("pip install -e '.[gymnasium]'") == 2, done.stderr
    assert importlib.util.find_spec("gymnasium") is not None
