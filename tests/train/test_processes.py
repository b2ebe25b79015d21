"""Laws of several processes: they are one program, killed and stopped like one."""

import contextlib
import importlib.util
import json
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest
import tiny_lm

from w2sjax.checkpoints import TrainCheckpoints
from w2sjax.parallel import start_processes
from w2sjax.train import init_state


def start_pair(pause, workdir):
    """Two processes of 4 devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [start(address, process, 4, pause, workdir) for process in range(2)]


def start(address, process, devices, pause, workdir):
    return tiny_lm.start_program(
        *("join", address, 2, process, pause, workdir),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        # Started again, it need not compile again.
        JAX_COMPILATION_CACHE_DIR=str(workdir.parent / "xla"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )


def ended(program):
    printed, _ = program.communicate(timeout=80)
    return program.returncode, printed.splitlines()[-1].split()  # gloo prints before


def wait_for_lines(workdir, count, programs):
    deadline = time.monotonic() + 80
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert all(program.poll() is None for program in programs)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_killed_stopped_and_resumed_give_the_numbers_of_one(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    programs = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [program.kill() for program in programs])
        programs += start_pair(0.05, together)
        wait_for_lines(together, 8, programs)
        programs[1].send_signal(signal.SIGKILL)
        programs[1].wait()
        programs[0].kill()  # it would wait for the other one until the coordinator gives up
        programs[0].wait()

        programs[:] = start_pair(0.05, together)
        wait_for_lines(together, 13, programs)
        programs[0].terminate()  # one is told, both stop after the same update
        (code, stopped), other = ended(programs[0]), ended(programs[1])
        assert code == 143 and (code, stopped) == other and 13 <= int(stopped[0]) < 30

        programs[:] = [*start_pair(0, together), start("", 0, 8, 0, alone)]
        *pair, (code, one) = [ended(program) for program in programs]
        assert code == 0 and one[0] == "0"
        assert pair[0] == pair[1] == (0, [stopped[0], *pair[0][1][1:]])
        np.testing.assert_allclose(
            np.asarray(pair[0][1][1:], float), np.asarray(one[1:], float), rtol=1e-4
        )

    by_process = sorted((together / "checkpoints" / "30").rglob("ocdbt.process_*"))
    assert [folder.name[-1] for folder in by_process] == ["0", "1"]
    for folder in by_process:  # each wrote its own shards
        assert any(file.stat().st_size for file in (folder / "d").iterdir())

    written, wanted = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (together, alone)
    )
    assert [line["step"] for line in written] == list(range(1, 31))  # by one process alone
    for line, other in zip(written, wanted, strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    like = init_state(tiny_lm.init_params(), tiny_lm.make_tx(30))
    states = []
    for workdir in (together, alone):
        with TrainCheckpoints(workdir / "checkpoints", keep=2) as checkpoints:
            states.append(checkpoints.restore(30, like))
    for leaf, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)
    moved = states[0].params["mix"]["kernel"] - like.params["mix"]["kernel"]
    assert np.abs(moved).max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("host:1", None, None), "num_processes, process_id missing; give all of"),
        ((None, None, 0), "coordinator_address, num_processes missing"),
        (("host", 2, 0), "coordinator_address must be \"host:port\"; got 'host'"),
        (("host:1", 2, 2), "process_id must be in 0 … num_processes − 1 = 1; got 2"),
    ],
)
def test_what_does_not_join_is_named(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        start_processes(*arguments)


def test_a_slurm_step_is_joined_and_a_shell_in_a_job_is_not(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: joined.append(given))
    for name in ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")  # sbatch sets it in the script that calls srun
    assert start_processes() == 1 and not joined
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    start_processes()
    assert joined == [(None, None, None)]
    monkeypatch.setenv("SLURM_NTASKS", "1")  # srun --pty bash
    assert start_processes() == 1 and len(joined) == 1


def test_on_a_tpu_pod_the_others_are_found_and_one_host_is_alone(monkeypatch):
    joined, refusal = [], None

    def initialize(*given):
        joined.append(given)
        if refusal:
            raise ValueError(refusal)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *given: find_spec("json" if name == "libtpu" else name, *given),
    )
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert start_processes() == 4 and joined == [(None, None, None)]
    refusal = "coordinator_address should be defined."  # what JAX says where it finds no pod
    assert start_processes() == 1 and len(joined) == 2
    refusal = "Number of processes must be defined."
    with pytest.raises(ValueError, match=refusal):
        start_processes()
