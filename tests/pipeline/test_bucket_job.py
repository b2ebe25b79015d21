"""The main job in a bucket (tests/train/bucket.py): it needs no disk, and is a job like others."""

import json
import os
import subprocess
import sys
from pathlib import Path

from w2sjax.sampling import read_trajectories


def test_cut_off_and_without_a_disk_it_goes_on_from_the_bucket(tmp_path):
    """Trainings go on from their checkpoints, rollouts from their blocks; finished stages stay,
    also where the bucket's files are copied to a disk.
    """
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("bucket_job.py"), tmp_path],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "first, cut off: trained from [], sampled []",
        "second, cut off: trained from [5, 0, 0], sampled [8]",
        "rollouts: episodes.000000.jsonl key.json",
        "third: trained from [0], sampled [8, 8, 8, 4]",
        "fourth: trained from [], sampled []",
        "copied: trained from [], sampled []",
    ]
    assert not (tmp_path / "home").exists()
    copy = tmp_path / "copy"
    assert len(read_trajectories(copy / "rollouts" / "episodes.jsonl")) == 24
    (metrics,) = copy.glob("cache/pretrained_weak-*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert (copy / "train" / "sft_all" / "hf" / "config.json").is_file()
    names = {path.name for path in copy.rglob("*")}
    assert "report.md" in names and not names & {"states", "key.json", "failed.json"}
