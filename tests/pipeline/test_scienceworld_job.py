"""The main job on real ScienceWorld, in worker processes, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

from w2sjax.sampling import read_trajectories
from w2sjax.types import Status

ROOT = Path(__file__).parents[2]


def test_the_main_job_runs_on_real_scienceworld(tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "launch.py", "--config=configs/scienceworld.py:smoke"]
    command += [f"--workdir={workdir}", "--config.methods=('weak', 'sft_all')"]
    command += ["--config.models.strong=tiny", "--config.batches.shapes=1"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ
        | {"W2SJAX_CACHE": str(tmp_path / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    methods = json.loads((workdir / "report.json").read_text())["methods"]
    assert set(methods) == {"weak", "sft_all"}
    assert methods["weak"]["pgr"]["mean"] is None  # no ceiling was trained
    experts = read_trajectories(workdir / "demonstrations" / "episodes.jsonl")
    assert all(episode.status is Status.SUCCESS for episode in experts)
    rollouts = read_trajectories(workdir / "rollouts" / "episodes.jsonl")
    assert len(rollouts) == 10 and all(episode.status.scored for episode in rollouts)
    assert all("Your task is" in episode.first_observation for episode in rollouts)
