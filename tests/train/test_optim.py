"""Laws of schedules and optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2sjax.train import (
    averaged_params,
    decay_mask,
    init_state,
    make_optimizer,
    make_schedule,
)

NAMES = ("adafactor", "adam", "adamw", "lion", "sgd")


def test_schedules_warm_up_and_come_down():
    for name in ("constant", "linear", "cosine"):
        rate = make_schedule(
            name, learning_rate=2.0, total_steps=10, warmup_steps=4, final_fraction=0.1
        )
        values = np.array([rate(step) for step in range(11)])
        np.testing.assert_allclose(values[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-5)
        assert values[10] == pytest.approx(2.0 if name == "constant" else 0.2, rel=1e-5)
        middle = {"constant": 2.0, "linear": 1.1, "cosine": 1.1}[name]
        assert values[7] == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_schedules_are_those_of_optax(schedule):
    rate = make_schedule(
        schedule, learning_rate=3e-3, total_steps=50, warmup_steps=10, final_fraction=0.2
    )
    down = (
        optax.linear_schedule(3e-3, 6e-4, 40)
        if schedule == "linear"
        else optax.cosine_decay_schedule(3e-3, 40, alpha=0.2)
    )
    theirs = optax.join_schedules([optax.linear_schedule(3e-3 / 11, 3e-3, 10), down], [10])
    for step in range(55):
        np.testing.assert_allclose(rate(step), theirs(step), rtol=2e-5)


def test_numbers_of_a_schedule_are_data_of_the_state():
    """Trainings of other lengths and rates run the same compiled update."""
    params = {"kernel": np.ones((2, 2), np.float32)}
    traces = 0

    def run(tx, rate, steps):
        state, seen = tx.init(params), []
        for _ in range(steps):
            updates, state = update(params, state, params)
            seen.append(float(-updates["kernel"][0, 0]))
        wanted = make_schedule("cosine", learning_rate=rate, total_steps=steps, warmup_steps=1)
        np.testing.assert_allclose(seen, [wanted(step) for step in range(steps)], rtol=1e-6)

    first = make_optimizer("sgd", learning_rate=0.5, total_steps=4, warmup_steps=1)

    @jax.jit
    def update(grads, state, params):
        nonlocal traces
        traces += 1
        return first.update(grads, state, params)

    run(first, 0.5, 4)
    run(make_optimizer("sgd", learning_rate=0.1, total_steps=9, warmup_steps=1), 0.1, 9)
    assert traces == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_comes_down_a_hill(name):
    tx = make_optimizer(name, learning_rate=0.1, total_steps=40, clip_norm=5.0)
    target = np.linspace(1.0, 2.0, 6, dtype=np.float32).reshape(2, 3)

    def height(params):
        return jnp.sum((params["kernel"] - target) ** 2)

    @jax.jit
    def descend(params):
        def update(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(height)(params), state, params)
            return (optax.apply_updates(params, updates), state), height(params)

        return jax.lax.scan(update, (params, tx.init(params)), length=40)[1]

    heights = descend({"kernel": np.full((2, 3), 0.5, np.float32)})
    assert heights[-1] < 0.5 * heights[0]


def test_only_matrices_decay():
    params = {
        "norm": {"scale": np.ones((3, 4)), "other": np.ones(4)},
        "dense": {"kernel": np.ones((4, 4)), "bias": np.ones((3, 4))},
    }
    assert decay_mask(params) == {
        "norm": {"scale": False, "other": False},
        "dense": {"kernel": True, "bias": False},
    }


@pytest.mark.parametrize("name", ("adamw", "lion", "sgd", "adafactor"))
def test_decay_is_learning_rate_times_parameter(name):
    tx = make_optimizer(
        name, learning_rate=0.5, total_steps=5, schedule="constant", weight_decay=0.1
    )
    params = {"kernel": np.full((2, 2), 3.0, np.float32), "bias": np.ones(2, np.float32)}
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 3.0, rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_clipping_bounds_the_global_norm():
    tx = make_optimizer("sgd", learning_rate=1.0, total_steps=5, schedule="constant", clip_norm=1.0)
    grads = {"a": np.float32([3.0]), "b": np.float32([4.0])}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adagrad"}, "optimizer must be one of .*adamw.*; got 'adagrad'"),
        ({"name": "adam", "weight_decay": 0.1}, "weight_decay must be 0 for adam"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup_steps": 9}, r"warmup_steps must be in \[0, total_steps\); got 9 of 9"),
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine; got 'step'"),
        ({"final_fraction": 2.0}, r"final_fraction must be in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_named(options, message):
    settings = {"name": "adamw", "learning_rate": 1e-3, "total_steps": 9} | options
    with pytest.raises(ValueError, match=message):
        make_optimizer(**settings)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="momentums"):
        make_optimizer("sgd", learning_rate=1.0, total_steps=2, momentums=0.9)


def test_the_average_follows_the_parameters_and_changes_nothing():
    numbers = dict(learning_rate=0.1, total_steps=20, weight_decay=0.1, schedule="constant")
    params = {"w": jnp.ones((3, 2)), "half": jnp.ones(4, jnp.bfloat16)}
    plain, averaged = (make_optimizer("adamw", **numbers, ema_decay=d) for d in (0.0, 0.75))
    states = [init_state(params, tx) for tx in (plain, averaged)]
    expected = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    rng = np.random.default_rng(0)
    for _ in range(6):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
        for index, tx in enumerate((plain, averaged)):
            state = states[index]
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            new = optax.apply_updates(state.params, updates)
            states[index] = state.replace(params=new, opt_state=opt_state)
        expected = jax.tree.map(
            lambda a, p: 0.75 * a + 0.25 * np.asarray(p, np.float32), expected, states[1].params
        )
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)
    assert averaged_params(states[0]) is states[0].params
    found = averaged_params(states[1])
    assert found["half"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
    assert np.abs(found["w"] - states[1].params["w"]).max() > 1e-2
    with pytest.raises(ValueError, match="ema_decay"):
        make_optimizer("adamw", **numbers, ema_decay=1.0)
