"""launch.py with several processes, and told to end: as its users start it, on a tiny config."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from w2sjax.pipeline.manifests import read_json

ROOT = Path(__file__).parents[2]
TINY = (
    "--config=configs/household.py:smoke",
    "--config.methods=('weak','sft_all')",
    "--config.pretrain.tasks=60",
    "--config.pretrain.weak_steps=30",
    "--config.pretrain.strong_steps=30",
    "--config.weak.steps=5",
    "--config.train.steps=5",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of its own; processes of one device each, which compile fast."""
    return os.environ | {
        "W2SJAX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(environment, workdir, *flags):
    return subprocess.Popen(
        [sys.executable, "launch.py", *TINY, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_pair(environment, workdir, *flags):
    """[(exit status, output, errors)] of two processes that share a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
    pair = [
        start(environment, workdir, *flags, address, "--num_processes=2", f"--process_id={process}")
        for process in range(2)
    ]
    try:
        outputs = [program.communicate(timeout=300) for program in pair]
    finally:
        for program in pair:
            program.kill()
    return [(program.returncode, *output) for program, output in zip(pair, outputs, strict=True)]


def test_told_to_end_it_saves_and_says_so_and_two_processes_make_it_all(environment, tmp_path):
    """SIGTERM to a single process; then two of them, whose mesh is another, make all stages.

    Only the first one reports. With another config both end, and say why.
    """
    workdir = tmp_path / "run"
    program = start(environment, workdir)
    cache = Path(environment["W2SJAX_CACHE"])
    deadline = time.monotonic() + 200
    while not any(path.stat().st_size for path in cache.glob("pretrained*.partial/metrics.jsonl")):
        assert program.poll() is None, program.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    program.send_signal(signal.SIGTERM)
    _, errors = program.communicate(timeout=100)
    assert program.returncode == 143, errors
    assert "SIGTERM stopped training after update" in errors and "Traceback" not in errors

    first, second = run_pair(environment, workdir)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    record = read_json(workdir / "report.json")
    assert set(record["methods"]) == {"weak", "sft_all"}
    assert "seconds per stage" in first[1] and "seconds per stage" not in second[1]
    assert "training, sft_all" in first[1] and "training, sft_all" not in second[1]
    assert not list(workdir.rglob("*.partial"))
    assert not list(workdir.rglob("states"))
    lines = (workdir / "train" / "sft_all" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5

    first, second = run_pair(environment, workdir, "--config.seed=7")
    assert first[0] == second[0] == 1
    assert "config.seed: was 0, now 7" in first[2]
    assert "process 0 was refused" in second[2]


def test_a_cloud_workdir_is_refused(environment):
    _, errors = start(environment, "gs://bucket/run").communicate(timeout=100)
    assert "error: --workdir gs://bucket/run is a cloud path" in errors
    assert not (ROOT / "gs:").exists()


def test_part_of_the_flags_is_refused(environment, tmp_path):
    program = start(environment, tmp_path / "run", "--num_processes=2")
    _, errors = program.communicate(timeout=100)
    assert program.returncode == 1
    assert "error: several processes: coordinator_address, process_id missing; give all" in errors
    assert not (tmp_path / "run").exists()
