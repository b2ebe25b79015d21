"""A small language model, data and a run for the tests of `train`; also a program to kill.

`python tiny_lm.py run PAUSE WORKDIR ...` trains in each WORKDIR (resuming what is there), `PAUSE`
seconds slower per update, and writes a hash of the final state to WORKDIR/final; SIGTERM makes it
print the update it stopped after and exit with 143.
`python tiny_lm.py remesh WORKDIR` prints whether a run that goes on over another mesh of 8 devices
gives the numbers of the uninterrupted one.
`python tiny_lm.py join ADDRESS COUNT ID PAUSE WORKDIR` trains as process ID of COUNT over a mesh of
8 devices; prints the update it went on from and what scoring gave. ADDRESS "" is a single process.
`python tiny_lm.py bucket WORKDIR` prints whether a run in a bucket, cut and resumed, ends like one
in WORKDIR.
`python tiny_lm.py mesh` prints whether a mesh of 4 devices gives the numbers of one device.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import time

import bucket
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec

from w2sjax.batches import Sequence, sft_batches
from w2sjax.checkpoints import TrainCheckpoints, load_metadata, load_params, save_params
from w2sjax.losses import score_from_logits, sft_loss
from w2sjax.parallel import make_mesh, param_shardings, start_processes
from w2sjax.train import (
    TrainingInterrupted,
    fit,
    init_state,
    make_optimizer,
    make_sequence_scorer,
    make_train_step,
)

VOCABULARY, WIDTH, ROW_LENGTH = 24, 8, 24


def start_program(*arguments, **environment):
    """Starts this file as a program of its own, on the CPU, compiling as conftest.py has it."""
    root = pathlib.Path(__file__).parents[2]
    fixed = {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env=os.environ | fixed | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def apply_fn(params, tokens, *, positions, subtree_end):
    """Embedding, mean over the visible tokens, one hidden layer: logits float32 [S, L, V]."""
    embedded = params["embed"]["table"][tokens] + 0.1 * jnp.sin(positions)[..., None]
    index = jnp.arange(tokens.shape[1])
    visible = (index[None] <= index[:, None]) & (index[:, None] < subtree_end[:, None])
    weight = visible / jnp.maximum(visible.sum(-1, keepdims=True), 1)
    mean = weight @ embedded
    hidden = jnp.tanh(mean @ params["mix"]["kernel"] + params["mix"]["bias"])
    return (hidden + embedded) @ params["out"]["kernel"]


score_fn = score_from_logits(apply_fn)


def init_params(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)

    return {
        "embed": {"table": normal(VOCABULARY, WIDTH)},
        "mix": {"kernel": normal(WIDTH, WIDTH), "bias": normal(WIDTH)},
        "out": {"kernel": normal(WIDTH, VOCABULARY)},
    }


def make_sequences(count, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length = int(rng.integers(4, 12))
        weights = np.ones(length, np.float32)
        weights[: int(rng.integers(1, 3))] = 0
        result.append(Sequence(rng.integers(0, VOCABULARY, length), weights))
    return result


def make_loader(**options):
    options = {"sequences_per_batch": 12, "total_steps": 30, "seed": 1, "num_shapes": 1} | options
    return sft_batches(make_sequences(30), **options)


def make_tx(total_steps=12):
    return make_optimizer(
        "adamw",
        learning_rate=1e-2,
        total_steps=total_steps,
        warmup_steps=1,
        weight_decay=0.1,
        clip_norm=1.0,
    )


RULES = (
    ("mix/kernel", PartitionSpec("fsdp", "tensor")),
    ("bias", PartitionSpec()),
    ("", PartitionSpec("fsdp")),
)


def run(workdir, *, train_step=None, total_steps=12, on_step=None, mesh=None, **options):
    """One training run in `workdir`, with checkpoints and metrics."""
    tx = make_tx(total_steps)
    workdir = epath.Path(workdir)
    shardings = None if mesh is None else param_shardings(init_params(), RULES, mesh)
    return fit(
        init_state(init_params(), tx, mesh=mesh, param_shardings=shardings),
        train_step or make_train_step(score_fn, sft_loss, tx, mesh=mesh),
        options.pop("loader", None) or make_loader(),
        total_steps=total_steps,
        checkpoint_dir=workdir / "checkpoints",
        checkpoint_every=options.pop("checkpoint_every", 5),
        metrics_path=workdir / "metrics.jsonl",
        log_every=options.pop("log_every", 2),
        on_step=on_step,
        **options,
    )


def digest(tree):
    """Equal only for trees with equal bits."""
    value = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]:
        value.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return value.hexdigest()


def _run_program(pause, workdirs):
    step = make_train_step(score_fn, sft_loss, make_tx(30))
    for workdir in workdirs:
        result = _run_or_exit(pause, workdir, train_step=step)
        (pathlib.Path(workdir) / "final").write_text(f"{result.start_step} {digest(result.state)}")


def _run_or_exit(pause, workdir, **options):
    try:
        return run(
            workdir,
            total_steps=30,
            log_every=1,
            on_step=lambda step, total, metrics: time.sleep(pause),
            **options,
        )
    except TrainingInterrupted as stopped:
        print(stopped.step)
        sys.exit(143)


def _join_program(address, count, process, pause, workdir):
    if address:
        assert start_processes(address, count, process) == count
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    loader = make_loader(sequences_per_batch=32, num_rows=4, micro_batches=2)
    step = make_train_step(score_fn, sft_loss, make_tx(30), mesh=mesh, accumulate=2)
    result = _run_or_exit(pause, workdir, train_step=step, mesh=mesh, loader=loader)
    scorer = make_sequence_scorer(score_fn, rows_per_batch=8, row_length=ROW_LENGTH, mesh=mesh)
    scores = scorer(result.state.params, make_sequences(20))
    print(result.start_step, *(f"{score:.9g}" for score in scores))


def _mesh_program():
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    shardings = param_shardings(init_params(), RULES, mesh)
    tx = make_tx()
    loader = make_loader(num_rows=2, micro_batches=2)
    losses = []
    for options, sharded in (({}, {}), ({"mesh": mesh}, {"param_shardings": shardings})):
        state = init_state(init_params(), tx, **options, **sharded)
        step = make_train_step(score_fn, sft_loss, tx, accumulate=2, **options)
        metrics = []
        for number in range(2):
            loaded = loader.batch(number)
            state, values = step(state, loaded.batch, loaded.extras)
            metrics.append([float(values["loss"]), float(values["grad_norm"])])
        losses.append(metrics)
        kernel = state.params["embed"]["table"]
        print("shards", len({str(shard.index) for shard in kernel.addressable_shards}))
        moment = state.opt_state[1].mu["embed"]["table"]
        print("moments like parameters", moment.sharding == kernel.sharding)
    print("equal", np.allclose(losses[0], losses[1], rtol=1e-5))


def _bucket_program(workdir):
    bucket.open_bucket()
    step = make_train_step(score_fn, sft_loss, make_tx())
    whole = run(workdir, train_step=step)
    there = epath.Path("gs://bucket/deep/run")

    def stop(step, total, metrics):
        if step == 7:  # update 5 was followed by a checkpoint, which publishes the metrics
            print("published", (there / "metrics.jsonl").read_text().count("\n"))
            raise KeyboardInterrupt

    best = {"best_metric": "loss", "best_mode": "max"}
    try:
        run(there, train_step=step, log_every=1, on_step=stop, **best)
    except KeyboardInterrupt:
        rest = run(there, train_step=step, **best)
    print("from", rest.start_step)
    print("equal", digest(rest.state) == digest(whole.state))
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    print("metrics", (there / "metrics.jsonl").read_text() == text)
    with TrainCheckpoints(there / "checkpoints", keep=2, **best) as checkpoints:
        print("steps", checkpoints.steps(), checkpoints.best_step())
    save_params(os.fspath(there / "params"), rest.state.params, {"steps": 12})
    again = load_params(there / "params", rest.state.params)
    print("params", digest(again) == digest(rest.state.params), load_metadata(there / "params"))


def _remesh_program(workdir):
    def stop(step, total, metrics):
        if step == 7:
            raise KeyboardInterrupt

    def go(name, mesh, **options):
        loader = make_loader(sequences_per_batch=16, num_rows=8)
        return run(workdir / name, mesh=mesh, loader=loader, log_every=1, **options)

    data = make_mesh(data=8)
    whole = go("whole", data)
    try:
        go("cut", data, on_step=stop)
    except KeyboardInterrupt:
        rest = go("cut", make_mesh(data=1, fsdp=4, tensor=2))
    print("from", rest.start_step)
    for tree in (rest.state.params, rest.state.opt_state[1].mu):
        print("shard", tree["mix"]["kernel"].addressable_shards[0].data.shape)
    same = jax.tree.map(
        lambda one, other: np.allclose(one, other, rtol=1e-4, atol=1e-6), whole.state, rest.state
    )
    print("equal", jax.tree.all(same), np.isclose(whole.metrics["loss"], rest.metrics["loss"]))


if __name__ == "__main__":
    if sys.argv[1] == "run":
        _run_program(float(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1] == "join":
        _address, _count, _process, _pause, _workdir = sys.argv[2:]
        _join_program(_address, int(_count), int(_process), float(_pause), _workdir)
    elif sys.argv[1] == "bucket":
        _bucket_program(sys.argv[2])
    elif sys.argv[1] == "remesh":
        _remesh_program(pathlib.Path(sys.argv[2]))
    else:
        _mesh_program()
