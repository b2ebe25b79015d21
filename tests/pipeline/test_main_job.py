"""The main job as its users start it: launch.py on the smoke config, cut off, resumed, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from w2sjax.config import METHODS
from w2sjax.sampling import read_trajectories

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/household.py:smoke"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of its own, shared by the runs of this file."""
    return os.environ | {"W2SJAX_CACHE": str(tmp_path_factory.mktemp("cache"))}


def launch(environment, workdir, *flags, config=CONFIG):
    return subprocess.run(
        [sys.executable, "launch.py", config, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """(workdir, what was printed) of a whole run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = launch(environment, workdir)
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir, result.stdout


def methods(workdir):
    return json.loads((workdir / "report.json").read_text())["methods"]


def test_every_method_has_intervals_in_both_modes(finished):
    workdir, _ = finished
    table = methods(workdir)
    assert set(table) == set(METHODS)
    for row in table.values():
        for record in (row, row["modes"]["greedy"], row["modes"]["sampled"]):
            for metric in ("reward", "success"):
                low, mean, high = (record[metric][k] for k in ("low", "mean", "high"))
                assert 0 <= low <= mean <= high <= 1
            assert set(record["pgr"]) >= {"mean", "low", "high"}


def test_report_says_what_was_run_and_where_the_time_went(finished):
    workdir, printed = finished
    report = json.loads((workdir / "report.json").read_text())
    stages = report["stages"]
    for name in ("transcripts", "weak", "rollouts", "trees", "search", "targets", "train/tree_dpo"):
        assert stages[name]["seconds"] >= 0
    text = (workdir / "report.md").read_text()
    for method in METHODS:
        assert f"| {method} |" in text and method in printed
    assert "seconds per stage" in printed and str(workdir) in printed
    for name in stages:
        directory = workdir / name
        assert directory.is_dir() or name in ("transcripts", "pretrained_weak", "pretrained_strong")
    assert not list(workdir.rglob("*.partial"))


def test_rollouts_can_be_read_and_are_in_canonical_order(finished):
    workdir, _ = finished
    episodes = read_trajectories(workdir / "rollouts" / "episodes.jsonl")
    ids = [(t.task_id, t.rollout) for t in episodes]
    settings = json.loads((workdir / "config.json").read_text())["config"]
    rollouts = settings["rollouts"]["per_task"]
    assert len(set(ids)) == len(ids) == settings["tasks"]["train"] * rollouts
    tasks = list(dict.fromkeys(task for task, _ in ids))
    assert [rollout for _, rollout in ids] == list(range(rollouts)) * len(tasks)


def test_smoke_takes_at_most_a_minute(finished):
    """60 s on two free cores is what it is made for; the bound allows for a busy machine."""
    report = json.loads((finished[0] / "report.json").read_text())
    assert sum(stage["seconds"] for stage in report["stages"].values()) < 150


def test_a_second_run_skips_everything_and_reports_the_same(finished, environment):
    workdir, _ = finished
    before = methods(workdir)
    result = launch(environment, workdir)
    assert result.returncode == 0, result.stderr
    assert methods(workdir) == before
    assert "training," not in result.stdout


def test_the_table_command_prints_the_same_numbers(finished, environment):
    workdir, _ = finished
    result = subprocess.run(
        [sys.executable, "-m", "w2sjax.report", str(workdir)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for row in methods(workdir).values():
        assert f"{row['success']['mean']:.3f} [" in result.stdout
        assert f"{row['modes']['greedy']['reward']['mean']:.3f} [" in result.stdout


def lines(path):
    """How many lines a file has; −1 where nothing is."""
    if path.is_dir():
        return 0
    return path.read_bytes().count(b"\n") if path.exists() else -1


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_numbers(
    finished, environment, tmp_path
):
    """kill −9 at three moments and Ctrl-C at one, spread over the run; then the same command."""
    workdir = tmp_path / "run"
    command = [sys.executable, "launch.py", CONFIG, f"--workdir={workdir}"]
    episodes = workdir / "rollouts.partial" / "episodes.000000.unfinished"
    moments = [(episodes, 5, signal.SIGKILL)]
    moments += [(workdir / "train/tree_awr.partial", 0, signal.SIGKILL)]
    moments += [(workdir / "train/dpo.partial", 0, signal.SIGINT)]
    moments += [(workdir / "evaluate/weak.greedy.partial", 0, signal.SIGKILL)]
    for path, count, how in moments:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Started in the background, this test would hand an ignored Ctrl-C down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 300
        while lines(path) < count:
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline, f"{path} did not get so far"
            time.sleep(0.01)
        process.send_signal(how)
        printed = process.communicate(timeout=120)[0].decode()
        assert process.returncode != 0, f"{path}: {printed[-4000:]}"
        if path == episodes:
            kept = episodes.read_bytes().split(b"\n")[:-1]
        assert not (workdir / "report.json").exists()
    result = launch(environment, workdir)
    assert result.returncode == 0, result.stdout + result.stderr
    assert methods(workdir) == methods(finished[0])
    assert set(kept) <= set((workdir / "rollouts" / "episodes.jsonl").read_bytes().split(b"\n"))
    for name in ("rollouts", "evaluate/mcts.greedy"):
        played = [
            [(t.task_id, t.rollout, t.status, [step.answer for step in t.steps]) for t in some]
            for run in (workdir, finished[0])
            if (some := read_trajectories(run / name / "episodes.jsonl"))
        ]
        assert played[0] == played[1]


def test_a_workdir_of_another_config_is_refused_with_the_difference(finished, environment):
    workdir, _ = finished
    result = launch(environment, workdir, "--config.train.steps=43")
    assert result.returncode != 0
    assert "config.train.steps: was" in result.stderr and "now 43" in result.stderr
    assert "--start_over" in result.stderr and "Traceback" not in result.stderr
    assert (workdir / "report.json").exists()


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.train.stepz=3", "stepz"),
        ("--config.train.steps=many", "train.steps"),
        ("--config.train.steps=0", "config.train.steps"),
        ("--config.env.name=kitchen", "env.name"),
        ("--config.models.strong=huge", "huge"),
    ],
)
def test_bad_settings_fail_at_once_and_are_named(flag, says, environment, tmp_path):
    result = launch(environment, tmp_path / "run", flag)
    assert result.returncode != 0
    assert says in result.stderr + result.stdout


def test_an_unwritable_workdir_is_named(environment, tmp_path):
    (tmp_path / "file").write_text("")
    result = launch(environment, tmp_path / "file" / "run")
    assert result.returncode != 0 and "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_method_without_targets_says_which_stage_starved(environment, tmp_path):
    result = launch(
        environment,
        tmp_path / "run",
        "--config.methods=('weak', 'dpo')",
        "--config.tasks.train=2",
        "--config.rollouts.per_task=1",
        "--config.evaluate.modes=('sampled',)",
    )
    assert result.returncode != 0
    assert "nothing to train on" in result.stderr and "Traceback" not in result.stderr
