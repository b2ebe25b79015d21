"""`python -m w2sjax.envs`: playing by hand, and the expert's check."""

import io
import json
import os
import subprocess
import sys

import pytest

from w2sjax.envs import Outcome
from w2sjax.envs.__main__ import main, parse_options, printable
from w2sjax.envs.check import tree_memory_mb

HERE = __name__


class Scripted:
    """Ends when it hears "win" or "lose"; the task's id says how its expert goes wrong."""

    name = "scripted"
    instruction = "Say \x1b[31mwin\x07."
    max_steps = 3

    def __init__(self, *, observation: str = "again \x1b[2J\u202e", broken: bool = False):
        self._observation = observation
        if broken:
            raise ImportError("scripted needs a package: pip install it")

    def task_ids(self, split, count=None):
        ids = {"train": ["good", "slow", "raises", "good 2"], "dev": ["good"], "none": []}
        if split not in ids or (count or 0) > len(ids[split]):
            raise ValueError(f"split {split!r} has no {count} tasks")
        return ids[split][:count]

    def reset(self, task_id):
        self._task = task_id
        return f"task {task_id}\x9b"

    def step(self, action):
        if action in ("win", "lose"):
            return Outcome(f"you {action}", float(action == "win"), True, action == "win")
        return Outcome(f"{self._observation}|{action}|", 0.25, False, False)

    def admissible_actions(self):
        return ["lose\x00", "win"]

    def expert_action(self):
        if self._task == "raises":
            raise RuntimeError("lost \x1b[1m")
        return "wait" if self._task == "slow" else "win"

    def close(self):
        pass


@pytest.fixture
def play(monkeypatch, capsys):
    """Plays with some lines on standard input; what was printed."""

    def run(*arguments, lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["play", *arguments])
        return capsys.readouterr().out

    return run


def test_a_task_is_played_to_its_end(play):
    out = play(f"{HERE}:Scripted", lines=["hello there", ":score", "win", "never heard"])
    assert "task good" in out and "|hello there|" in out
    assert "score 0.25 after 1 of 3 steps" in out
    assert out.rstrip().endswith("success, score 1, 2 steps")
    assert "never heard" not in out
    assert "failed, score 0, 1 steps" in play(f"{HERE}:Scripted", lines=["lose"])


def test_commands_answer_and_cost_no_step(play):
    lines = [":actions", ":expert", ":help", ":nonsense", ":score", " :quit "]
    out = play(f"{HERE}:Scripted", "--task=slow", lines=lines)
    assert "> :actions\nlose\\x00\nwin\n> :expert\nwait\n" in out
    assert out.count(":quit    ") == 2  # :help, and what is no command
    assert "score 0 after 0 of 3 steps" in out and "given up with score 0 after 0 steps" in out


def test_the_end_of_the_input_and_the_step_limit_end_it(play):
    assert "given up" in play(f"{HERE}:Scripted", "--split=dev", lines=["a"])
    out = play(f"{HERE}:Scripted", "--index=3", lines=["a", "b", "c", "d"])
    assert "task good 2," in out and "|c|" in out and "|d|" not in out
    assert "the step limit of 3 is reached; score 0.25" in out


def test_control_characters_of_an_environment_do_not_reach_the_terminal(play):
    out = play(f"{HERE}:Scripted", lines=["hello \x1b]0;title\x07", ":actions"])
    assert all(char.isprintable() or char == "\n" for char in out)
    assert "\\x1b[31mwin\\x07" in out and "task good\\x9b" in out and "\\u202e" in out
    assert printable("é\n🌱\ud800\t") == "é\n🌱\\ud800\\t"


def test_options_are_data(play):
    texts = ["a=1", 'b=["x", 2.5]', "c=true", 'd="1"', "e=find-plant", "f=x=y", "g=", "h=(1, 2)"]
    texts.append("i=" + "[" * 100_000)
    options = parse_options(texts)
    assert options.pop("i") == "[" * 100_000
    assert options == {
        "a": 1, "b": ["x", 2.5], "c": True, "d": "1", "e": "find-plant", "f": "x=y", "g": "",
        "h": "(1, 2)",
    }  # fmt: skip
    assert "hi|a|" in play(f"{HERE}:Scripted", "--option=observation=hi", lines=["a"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["play", "nowhere"], "unknown environment 'nowhere'"),
        (["play", "household", "--option=steps=3"], "steps"),
        (["play", "household", "--option=max_steps"], "key=value"),
        (["play", "household", "--option=max_steps=3", "--option=max_steps=4"], "twice"),
        (["play", "household", "--task=household/x/1"], "unknown split 'x'"),
        (["play", f"{HERE}:Scripted", "--option=broken=true"], "pip install it"),
        (["check", f"{HERE}:Scripted", "--splits=train,x"], "split 'x'"),
        (["check", f"{HERE}:Scripted", "--splits=none"], "'none' has no tasks"),
    ],
)
def test_errors_are_one_line_that_says_what(arguments, said):
    with pytest.raises(SystemExit, match=said) as raised:
        main(arguments)
    assert str(raised.value).startswith("error: ")


@pytest.mark.parametrize(
    "arguments", [["--tasks=0"], ["--at-least=2"], ["--json=/nowhere/at/all.json"]]
)
def test_wrong_arguments_of_check_are_refused_before_it_starts(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["check", f"{HERE}:Scripted", *arguments])
    assert raised.value.code == 2
    assert arguments[0].partition("=")[0] in capsys.readouterr().err


def test_check_counts_failures_and_says_which(tmp_path, capsys):
    target = tmp_path / "check.json"
    main(["check", f"{HERE}:Scripted", "--splits=train,dev,dev", f"--json={target}", "--tasks=4"])
    found = json.loads(target.read_text())
    assert found["success"] == pytest.approx(3 / 5) and found["tasks"] == 5
    train, dev = found["splits"]["train"], found["splits"]["dev"]
    assert train["success"] == 0.5 and train["steps"] == 5 and dev["tasks"] == 1
    assert train["score"] == pytest.approx((1 + 0.25 + 0 + 1) / 4)
    assert train["failures"][0].startswith("slow: step_limit")
    assert train["failures"][1].startswith("raises: RuntimeError: lost")
    assert found["steps_per_second"] > 0 and found["memory_mb"] > 0
    out = capsys.readouterr().out
    assert "raises" in out and "lost \\x1b[1m" in out and "success 0.600 of 5 tasks" in out


def test_check_fails_below_its_bound(capsys):
    main(["check", "household", "--tasks=20", "--at-least=1"])
    assert "success 1.000 of 60 tasks" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"0\.500 is below 0\.9"):
        main(["check", f"{HERE}:Scripted", "--splits=train", "--tasks=4", "--at-least=0.9"])


def test_it_is_a_command():
    command = [sys.executable, "-m", "w2sjax.envs", "play", "household", "--split=dev"]
    run = subprocess.run(command, input="look\n:quit\n", text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("You are in a") == 2
    command[3:] = ["check", "household", "--tasks=2", "--splits=x"]
    run = subprocess.run(command, text=True, capture_output=True)
    assert run.returncode == 1 and "unknown split 'x'" in run.stderr


def test_memory_is_that_of_the_process_tree():
    before = tree_memory_mb()
    code = "x = bytearray(80_000_000); x[::4096] = b'1' * len(x[::4096]); print(1); input()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"1\n"
        assert tree_memory_mb() - before > 70
    finally:
        child.communicate(os.linesep.encode())
