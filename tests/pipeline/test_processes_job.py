"""launch.py with several processes, and told to end: as its users start it, on a tiny config."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from w2sjax.pipeline.storage import read_json, write_json
from w2sjax.sampling import read_trajectories

ROOT = Path(__file__).parents[2]
TINY = (
    "--config=configs/household.py:smoke",
    "--config.evaluate.modes=('greedy',)",
    "--config.evaluate.headline=greedy",
    "--config.models.weak=tiny",
    "--config.models.strong=tiny",
    "--config.pretrain.tasks=60",
    "--config.pretrain.weak_steps=30",
    "--config.pretrain.strong_steps=5",
    "--config.weak.steps=5",
    "--config.train.steps=5",
    "--config.rollouts.per_task=2",
    "--config.sampler.slots=8",
    "--config.sampler.block=8",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of its own, and programs that compile fast."""
    return os.environ | {
        "W2SJAX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(environment, workdir, *flags, devices=4, methods="('weak','sft_all')"):
    flags = (*TINY, f"--config.methods={methods}", f"--workdir={workdir}", *flags)
    return subprocess.Popen(
        [sys.executable, "launch.py", *flags],
        cwd=ROOT,
        env=environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(happens, *programs):
    deadline = time.monotonic() + 300
    while not happens():
        for program in programs:
            assert program.poll() is None, program.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_pair(environment, workdir, *flags, meanwhile=lambda *pair: None):
    """[(exit status, output, errors)] of two processes of 2 devices each that share a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
    flags += (address, "--num_processes=2")
    pair = [
        start(environment, workdir, *flags, f"--process_id={process}", devices=2)
        for process in range(2)
    ]
    try:
        meanwhile(*pair)
        outputs = [program.communicate(timeout=300) for program in pair]
    finally:
        for program in pair:
            program.kill()
    return [(program.returncode, *output) for program, output in zip(pair, outputs, strict=True)]


def without_logps(episode):
    steps = (dataclasses.replace(step, answer_logp=None) for step in episode.steps)
    return dataclasses.replace(episode, steps=tuple(steps))


def test_processes_cut_off_and_resumed_in_other_numbers_make_one_job(environment, tmp_path):
    """One process, told to end; two, of which one breaks; two again; and one beside them.

    Devices are four all the time, so each goes on where the others were. Only the first process
    reports. With another config both end, and say why.
    """
    workdir = tmp_path / "run"
    program = start(environment, workdir)
    cache = Path(environment["W2SJAX_CACHE"])
    wait_until(
        lambda: any(p.stat().st_size for p in cache.glob("pretrained*.partial/metrics.jsonl")),
        program,
    )
    program.send_signal(signal.SIGTERM)
    _, errors = program.communicate(timeout=100)
    assert program.returncode == 143, errors
    assert "SIGTERM stopped training after update" in errors and "Traceback" not in errors

    # The second process cannot write its block.
    blocks = workdir / "rollouts.partial"
    in_the_way = blocks / "episodes.000001.jsonl.tmp"

    def put_in_the_way(*pair):
        wait_until((blocks / "key.json").exists, *pair)
        in_the_way.mkdir()

    first, second = run_pair(environment, workdir, meanwhile=put_in_the_way)
    assert (first[0], second[0]) == (1, 1), first[2] + second[2]
    assert "error: process 1 failed in stage rollouts: IsADirectoryError" in first[2]
    assert f"error: [Errno 21] Is a directory: '{in_the_way}'" in second[2]
    assert "Traceback" not in first[2] + second[2]
    in_the_way.rmdir()
    kept = [read_trajectories(path) for path in sorted(blocks.glob("episodes.*.jsonl"))]
    assert len(kept) in (1, 2) and not (blocks / "episodes.000001.jsonl").exists()
    kept += [read_trajectories(path) for path in blocks.glob("episodes.*.unfinished")]

    first, second = run_pair(environment, workdir)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    record = read_json(workdir / "report.json")
    assert set(record["methods"]) == {"weak", "sft_all"}
    assert "seconds per stage" in first[1] and "seconds per stage" not in second[1]
    assert "training, sft_all" in first[1] and "training, sft_all" not in second[1]
    assert not list(workdir.rglob("*.partial")) and not list(workdir.rglob("states"))
    assert not list(workdir.rglob("share.*")) and not (workdir / "failed.json").exists()
    lines = (workdir / "train" / "sft_all" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5
    episodes = read_trajectories(workdir / "rollouts" / "episodes.jsonl")
    assert episodes[:8] == kept[0]
    facts = read_json(workdir / "rollouts" / "manifest.json")["facts"]
    assert facts["episodes"] == sum(facts["statuses"].values()) == len(episodes) == 24
    assert facts["sampling"]["episodes"] == 24 - sum(map(len, kept))  # nothing twice

    # The same weak policy with one process, which makes both blocks: the same episodes, whose
    # log-probabilities are equal but for rounding, as slots are split over other devices.
    alone = tmp_path / "alone"
    shutil.copytree(workdir / "weak", alone / "weak")
    settings = read_json(workdir / "config.json")
    settings["config"]["methods"] = ["weak"]
    write_json(alone / "config.json", settings)
    program = start(environment, alone, methods="('weak',)")
    printed, errors = program.communicate(timeout=300)
    assert program.returncode == 0, errors
    assert re.search(r"^weak +already there$", printed, re.M)
    for stage in ("demonstrations", "evaluate/weak.greedy"):
        mine, theirs = (
            read_trajectories(path / stage / "episodes.jsonl") for path in (workdir, alone)
        )
        assert list(map(without_logps, mine)) == list(map(without_logps, theirs)), stage
        logps = [
            [step.answer_logp or 0.0 for episode in episodes for step in episode.steps]
            for episodes in (mine, theirs)
        ]
        assert logps[0] == pytest.approx(logps[1], abs=1e-4)

    first, second = run_pair(environment, workdir, "--config.seed=7")
    assert first[0] == second[0] == 1
    assert "config.seed: was 0, now 7" in first[2]
    assert "process 0 was refused: ValueError" in second[2] and "now 7" in second[2]


def test_part_of_the_flags_is_refused(environment, tmp_path):
    program = start(environment, tmp_path / "run", "--num_processes=2")
    _, errors = program.communicate(timeout=100)
    assert program.returncode == 1
    assert "error: several processes: coordinator_address, process_id missing; give all" in errors
    assert not (tmp_path / "run").exists()
