"""Laws of a run: cut and resumed is uninterrupted; what is not a number stops it."""

import json
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm

from w2sjax.checkpoints import TrainCheckpoints
from w2sjax.losses import sft_loss
from w2sjax.train import TrainingInterrupted, fit, init_state, make_train_step
from w2sjax.train.termination import raise_lost_interrupt, remembered_interrupts


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(tiny_lm.score_fn, sft_loss, tiny_lm.make_tx())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, train_step):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    seen = []
    result = tiny_lm.run(
        workdir, train_step=train_step, on_step=lambda step, total, _: seen.append((step, total))
    )
    return workdir, tiny_lm.digest(result.state), result.metrics, seen


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_reports_every_update_and_keeps_the_last_checkpoints(uninterrupted):
    workdir, _, last, seen = uninterrupted
    assert seen == [(step, 12) for step in range(1, 13)]
    written = lines(workdir)
    assert [line["step"] for line in written] == list(range(1, 13))
    assert written[-1] == {"step": 12, **last}
    assert written[-1]["loss"] < written[0]["loss"]
    with TrainCheckpoints(workdir / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [10, 12]


@pytest.mark.parametrize("stop_at", (3, 8))
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, train_step, uninterrupted, stop_at):
    def stop(step, total, metrics):
        if step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_lm.run(tmp_path, train_step=train_step, on_step=stop)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "los')  # as a kill leaves it
    result = tiny_lm.run(tmp_path, train_step=train_step)
    assert result.start_step == (stop_at // 5) * 5
    assert tiny_lm.digest(result.state) == uninterrupted[1]
    wanted = (uninterrupted[0] / "metrics.jsonl").read_bytes()
    assert (tmp_path / "metrics.jsonl").read_bytes() == wanted
    again = tiny_lm.run(tmp_path, train_step=train_step)  # nothing is left to do
    assert again.start_step == 12 and again.metrics == {}
    assert tiny_lm.digest(again.state) == uninterrupted[1]


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    victim = tiny_lm.start_program("run", 0.05, tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 13:
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert not (tmp_path / "killed" / "final").exists()
    survivor = tiny_lm.start_program("run", 0, tmp_path / "killed", tmp_path / "whole")
    survivor.communicate(timeout=240)
    assert survivor.returncode == 0
    started, final = (tmp_path / "killed" / "final").read_text().split()
    assert int(started) in (5, 10, 15, 20)  # 10 may not have been whole yet
    assert f"0 {final}" == (tmp_path / "whole" / "final").read_text()
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_saves_and_stops(signum, tmp_path, train_step, uninterrupted):
    """At log_every = 2, update 2 is reported during update 4, whose end is past: 5 is the last."""

    def terminate(step, total, metrics):
        if step == 2:
            signal.raise_signal(signum)

    before = signal.signal(signum, lambda *_: pytest.fail("not for the caller's handler"))
    try:
        mine = signal.getsignal(signum)
        with pytest.raises(TrainingInterrupted, match="after update 5 of 12; the state is in") as e:
            tiny_lm.run(tmp_path, train_step=train_step, on_step=terminate, checkpoint_every=100)
        assert signal.getsignal(signum) is mine
    finally:
        signal.signal(signum, before)
    assert (
        e.value.step == 5
        and e.value.signum == signum
        and str(tmp_path / "checkpoints") in str(e.value)
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    with TrainCheckpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [5]
    result = tiny_lm.run(tmp_path, train_step=train_step)
    assert result.start_step == 5
    assert tiny_lm.digest(result.state) == uninterrupted[1]
    wanted = (uninterrupted[0] / "metrics.jsonl").read_bytes()
    assert (tmp_path / "metrics.jsonl").read_bytes() == wanted


def test_an_interrupt_lost_in_a_finalizer_stops_the_next_run(tmp_path, train_step, monkeypatch):
    lost = []

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with remembered_interrupts():
            monkeypatch.setattr(sys, "unraisablehook", lost.append)
            Finalized()
            assert lost[0].exc_type is KeyboardInterrupt
            with pytest.raises(KeyboardInterrupt):
                tiny_lm.run(tmp_path, train_step=train_step)
            assert not (tmp_path / "metrics.jsonl").exists()
            raise_lost_interrupt()  # told once
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)  # any other one is raised where it comes
        raise_lost_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_at_the_end_is_not_swallowed(tmp_path, train_step):
    def terminate(step, total, metrics):
        if step == total:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after update 12 of 12"):
        tiny_lm.run(tmp_path, train_step=train_step, on_step=terminate)
    assert tiny_lm.run(tmp_path, train_step=train_step).start_step == 12


def test_handlers_belong_to_the_main_thread_and_to_runs_that_can_save(tmp_path, train_step):
    seen = []

    def look(step, total, metrics):
        seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(
        target=lambda: tiny_lm.run(tmp_path, train_step=train_step, on_step=look)
    )
    thread.start()
    thread.join()
    fit(
        init_state(tiny_lm.init_params(), tiny_lm.make_tx()),
        train_step,
        tiny_lm.make_loader(),
        total_steps=1,
        on_step=look,
    )
    assert seen == [before] * 13


def test_terminated_and_resumed_equals_uninterrupted(tmp_path):
    victim = tiny_lm.start_program("run", 0.05, tmp_path / "ended")
    metrics = tmp_path / "ended" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 11:
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    victim.terminate()
    stopped = int(victim.communicate(timeout=240)[0])
    assert victim.returncode == 143 and 11 <= stopped < 30
    with TrainCheckpoints(tmp_path / "ended" / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == stopped
    survivor = tiny_lm.start_program("run", 0, tmp_path / "ended", tmp_path / "whole")
    survivor.communicate(timeout=240)
    assert survivor.returncode == 0
    started, final = (tmp_path / "ended" / "final").read_text().split()
    assert int(started) == stopped
    assert f"0 {final}" == (tmp_path / "whole" / "final").read_text()
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_run_goes_on_over_another_mesh(tmp_path):
    """Saved on data = 8, restored on fsdp = 4 × tensor = 2: the uninterrupted run's numbers."""
    program = tiny_lm.start_program(
        "remesh", tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8"
    )
    printed, _ = program.communicate(timeout=240)
    assert program.returncode == 0
    assert printed.splitlines() == ["from 5", *["shard (2, 4)"] * 2, "equal True True"]


def test_a_run_in_a_bucket_is_like_one_on_disk(tmp_path):
    """States, metrics and parameters under gs:// paths, by way of bucket.py."""
    program = tiny_lm.start_program("bucket", tmp_path)
    printed, _ = program.communicate(timeout=240)
    assert program.returncode == 0
    assert printed.splitlines() == [
        "published 5",
        "from 5",
        "equal True",
        "metrics True",
        "steps [5, 10, 12] 5",  # the loss falls, and the highest was asked for
        "params True {'steps': 12}",
    ]


def test_the_best_checkpoint_and_the_newest_stay(tmp_path, train_step, uninterrupted):
    losses = {line["step"]: line["loss"] for line in lines(uninterrupted[0])}
    for mode, choose in (("min", min), ("max", max)):
        tiny_lm.run(
            tmp_path / mode,
            train_step=train_step,
            checkpoint_every=1,
            keep=1,
            best_metric="loss",
            best_mode=mode,
        )
        best = choose(losses, key=losses.get)
        with TrainCheckpoints(
            tmp_path / mode / "checkpoints", keep=1, best_metric="loss", best_mode=mode
        ) as checkpoints:
            assert checkpoints.best_step() == best
            assert checkpoints.steps() == sorted({best, 12})
    with pytest.raises(ValueError, match=r"'reward' is not measured; there are \['grad_norm'"):
        tiny_lm.run(tmp_path / "none", train_step=train_step, best_metric="reward")
    with pytest.raises(ValueError, match="give checkpoint_dir"):
        fit(None, train_step, tiny_lm.make_loader(), total_steps=1, best_metric="loss")


class SpoiledLoader:
    """From step 8 on (update 9), token weights are infinite."""

    def __init__(self):
        self._loader = tiny_lm.make_loader()

    def batch(self, step):
        loaded = self._loader.batch(step)
        if step < 8:
            return loaded
        weights = loaded.batch.loss_weight
        spoiled = np.where(weights > 0, np.float32(np.inf), weights)
        return loaded._replace(batch=loaded.batch.replace(loss_weight=spoiled))


def test_not_a_number_stops_with_step_and_ids_and_keeps_the_last_good_state(
    tmp_path, train_step, uninterrupted
):
    ids = ", ".join(map(str, tiny_lm.make_loader().batch(8).ids))
    with pytest.raises(FloatingPointError, match=rf"step 9: loss is nan.*data ids {ids}\.") as info:
        tiny_lm.run(tmp_path, train_step=train_step, loader=SpoiledLoader(), log_every=4)
    assert "checkpoint of step 5" in str(info.value)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    with TrainCheckpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [5]
    result = tiny_lm.run(tmp_path, train_step=train_step)  # with good data it goes on
    assert tiny_lm.digest(result.state) == uninterrupted[1]


def test_a_run_without_checkpoints_and_files(train_step, uninterrupted):
    result = fit(
        init_state(tiny_lm.init_params(), tiny_lm.make_tx()),
        train_step,
        tiny_lm.make_loader(),
        total_steps=12,
    )
    assert tiny_lm.digest(result.state) == uninterrupted[1]
    assert result.metrics == uninterrupted[2]


def test_metrics_are_fetched_in_windows(train_step):
    """Between fetches the host runs ahead: reports come after each `log_every` updates."""
    made, reported = [], []

    class Watched:
        def batch(self, step):
            made.append(step)
            return loader.batch(step)

    loader = tiny_lm.make_loader()
    fit(
        init_state(tiny_lm.init_params(), tiny_lm.make_tx()),
        train_step,
        Watched(),
        total_steps=10,
        log_every=4,
        on_step=lambda step, total, metrics: reported.append((len(made), step)),
    )
    assert [count for count, _ in reported] == [4] * 3 + [8] * 4 + [10] * 3
    assert [step for _, step in reported] == list(range(1, 11))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, train_step):
    tiny_lm.run(tmp_path, train_step=train_step, total_steps=2)
    params = tiny_lm.init_params()
    params["mix"]["kernel"] = jnp.zeros((8, 9))
    tx = tiny_lm.make_tx()
    with pytest.raises(ValueError, match=r"params/mix/kernel: \[8, 8\] .* \[8, 9\] in the model"):
        fit(
            init_state(params, tx),
            train_step,
            tiny_lm.make_loader(),
            total_steps=2,
            checkpoint_dir=tmp_path / "checkpoints",
            checkpoint_every=5,
        )


def test_what_does_not_go_together_is_named(tmp_path, train_step):
    with pytest.raises(ValueError, match="checkpoint_dir and checkpoint_every go together"):
        tiny_lm.run(tmp_path, train_step=train_step, checkpoint_every=0)
    with pytest.raises(ValueError, match="log_every must be at least 1"):
        tiny_lm.run(tmp_path, train_step=train_step, log_every=0)
    tiny_lm.run(tmp_path, train_step=train_step, total_steps=3)
    with pytest.raises(ValueError, match="holds step 3, past total_steps = 2"):
        tiny_lm.run(tmp_path, train_step=train_step, total_steps=2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a line of metrics"):
        tiny_lm.run(tmp_path, train_step=train_step, total_steps=3)


def test_caller_keeps_its_parameters(train_step):
    params = tiny_lm.init_params()
    before = tiny_lm.digest(params)
    fit(init_state(params, tiny_lm.make_tx()), train_step, tiny_lm.make_loader(), total_steps=2)
    assert tiny_lm.digest(params) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
