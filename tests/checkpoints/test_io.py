"""Laws of checkpoints: what was written comes back, and what does not belong is refused by name."""

import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from etils import epath

from w2sjax.checkpoints import (
    CheckpointMismatchError,
    TrainCheckpoints,
    absolute_path,
    load_metadata,
    load_params,
    save_params,
)


def make_params():
    rng = np.random.default_rng(0)
    return {
        "layer": {
            "kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
            "scale": jnp.asarray(rng.normal(size=6), jnp.bfloat16),
        },
        "table": jnp.arange(5, dtype=jnp.int32),
    }


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "deep" / "params"
    save_params(directory, make_params(), {"width": 6, "names": ["a", "b"]})
    return directory


def test_what_was_written_comes_back(saved):
    same(load_params(saved, abstract(make_params())), make_params())
    assert load_metadata(saved) == {"width": 6, "names": ["a", "b"]}


def test_arrays_come_back_in_the_dtype_asked_for(saved):
    like = abstract(make_params())
    like["layer"]["kernel"] = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)
    kernel = load_params(saved, like)["layer"]["kernel"]
    np.testing.assert_array_equal(
        np.asarray(kernel), np.asarray(make_params()["layer"]["kernel"].astype(jnp.bfloat16))
    )


def test_a_checkpoint_of_another_model_is_named(saved):
    like = abstract(make_params())
    like["layer"]["kernel"] = jax.ShapeDtypeStruct((4, 7), jnp.float32)
    like["more"] = like.pop("table")
    with pytest.raises(CheckpointMismatchError) as info:
        load_params(saved, like)
    message = str(info.value)
    assert "layer/kernel: [4, 6] in the checkpoint, [4, 7] in the model" in message
    assert "more: missing in the checkpoint, the model has [5]" in message
    assert "table: [5] in the checkpoint, the model has no such parameter" in message
    assert "layer/scale" not in message


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: the directory does not exist"):
        load_params(tmp_path / "nowhere", {})
    with pytest.raises(FileNotFoundError, match="holds no parameters"):
        load_metadata(tmp_path)


def test_nothing_is_overwritten_unasked(tmp_path):
    save_params(tmp_path / "p", {"a": jnp.zeros(2)})
    with pytest.raises(FileExistsError, match="exists already"):
        save_params(tmp_path / "p", {"a": jnp.ones(2)})
    save_params(tmp_path / "p", {"a": jnp.ones(2)}, overwrite=True)
    like = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    np.testing.assert_array_equal(load_params(tmp_path / "p", like)["a"], [1, 1])


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    @jax.jit
    def start():
        return {"w": jnp.arange(2_000_000, dtype=jnp.float32), "step": jnp.int32(0)}

    advance = jax.jit(
        lambda state: {"w": state["w"] + 1, "step": state["step"] + 1}, donate_argnums=0
    )
    state = start()
    with TrainCheckpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            state = advance(state)
            checkpoints.save(step, state)
    with TrainCheckpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest_step() == 3
        for step in (1, 2, 3):
            restored = checkpoints.restore(step, state)
            assert int(restored["step"]) == step
            np.testing.assert_array_equal(restored["w"], np.arange(2_000_000) + step)


def test_only_the_last_ones_stay_and_torn_ones_are_not_seen(tmp_path):
    state = {"w": jnp.zeros(3)}
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (5, 10, 15):
            checkpoints.save(step, state)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 15]
    torn = tmp_path / "20.orbax-checkpoint-tmp"  # as a kill leaves it
    torn.mkdir()
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 15
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; it has \[10, 15\]"):
            checkpoints.restore(5, state)
        checkpoints.save(20, state)
    assert not torn.exists() and (tmp_path / "20").exists()
    with pytest.raises(ValueError, match="keep must be at least 1"):
        TrainCheckpoints(tmp_path, keep=0)


def test_cloud_paths_stay_as_they_are_and_cut_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(absolute_path("a/b")) == str(absolute_path(pathlib.Path("a/b"))) == f"{tmp_path}/a/b"
    for path in ("gs://bucket/run", epath.Path("gs://bucket") / "run"):
        assert os.fspath(absolute_path(path)) == "gs://bucket/run"
    with pytest.raises(ValueError, match=r"gs:/bucket/run looks like a cloud path that pathlib"):
        TrainCheckpoints(pathlib.Path("gs://bucket/run"), keep=1)


def test_orbax_is_silent_at_info_and_others_are_not(tmp_path, caplog):
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        with caplog.at_level(logging.INFO, logger="absl"):
            save_params(tmp_path / "p", make_params())
            load_params(tmp_path / "p", make_params())
            with TrainCheckpoints(tmp_path / "c", keep=1) as checkpoints:
                checkpoints.save(1, make_params())
            absl_logging.info("heard")
    finally:
        absl_logging.set_verbosity(before)
    assert [record.getMessage() for record in caplog.records] == ["heard"]


@pytest.mark.parametrize(
    ("mode", "kept", "best"),
    [("min", {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 3, 5]}, 3), ("max", None, 4)],
)
def test_the_best_by_a_metric_stay_and_the_newest_always(tmp_path, mode, kept, best):
    """Law: kept = the `keep` best so far, the later one of equals, and the newest."""
    losses = {1: 3.0, 2: 1.0, 3: 1.0, 4: 9.0, 5: 2.0}
    sign = 1 if mode == "min" else -1
    options = {"keep": 2, "best_metric": "loss", "best_mode": mode}
    for step, loss in losses.items():
        with TrainCheckpoints(tmp_path, **options) as checkpoints:  # it is known after a restart
            checkpoints.save(step, {"w": jnp.full(2, step)}, {"loss": loss, "other": 0.0})
            checkpoints.wait()
            seen = sorted(range(1, step + 1), key=lambda s: (sign * losses[s], -s))
            wanted = sorted({*seen[:2], step})
            assert checkpoints.steps() == wanted
            assert kept is None or wanted == kept[step]
            assert checkpoints.latest_step() == step
            assert checkpoints.best_step() == seen[0]
    with TrainCheckpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.best_step() == best
        restored = checkpoints.restore(best, {"w": jnp.zeros(2, jnp.int32)})
        np.testing.assert_array_equal(restored["w"], [best, best])


def test_without_the_metric_is_worse_than_any_and_no_metric_is_refused(tmp_path):
    state = {"w": jnp.zeros(2)}
    with TrainCheckpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state, {"reward": 5.0})  # unused: not asked for
        with pytest.raises(ValueError, match="give best_metric"):
            checkpoints.best_step()
    options = {"keep": 2, "best_metric": "reward", "best_mode": "max"}
    with TrainCheckpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.best_step() is None
        for step, reward in ((3, -7.0), (4, float("nan")), (5, -8.0), (6, float("nan"))):
            checkpoints.save(step, state, {"reward": reward})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 5, 6] and checkpoints.best_step() == 3
        with pytest.raises(ValueError, match=r"step 7 have no 'reward'.* they have \['loss'\]"):
            checkpoints.save(7, state, {"loss": 1.0})
    with pytest.raises(ValueError, match='best_mode must be "min" or "max"; got \'lowest\''):
        TrainCheckpoints(tmp_path, keep=1, best_metric="loss", best_mode="lowest")
