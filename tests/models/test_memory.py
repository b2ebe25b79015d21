"""The memory plan against what the compiler says, and what follows from a mesh.

As a program, `python test_memory.py` does the same on 8 devices.
"""

import dataclasses
import doctest
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from w2sjax import losses, models, parallel, train
from w2sjax.batches import pack_rows
from w2sjax.models import memory

CONFIG = models.ModelConfig(
    vocab_size=1000,
    width=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    mlp_width=384,
    compute_dtype="float32",
    attention="xla",
    tie_embeddings=False,
)
LORA = models.Lora(rank=8)
WIDE_HEAD = dict(vocab_size=32000, width=64, mlp_width=192, num_layers=2)
ONE = dict(data=1, fsdp=1, tensor=1)
# Least and most that an estimate may be of what the compiler reserves.
FACTORS = (0.8, 1.3)


def optimizer(name="adamw", **options):
    return train.make_optimizer(name, learning_rate=1e-3, total_steps=10, clip_norm=1.0, **options)


def shaped(tree, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def compile_quickly(lowered):
    """With slow machine code: how memory is laid out is decided before that."""
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def compiled_training(config, tx, sizes, rows, length):
    """(bytes of parameters and optimizer state, bytes of everything) on one device."""
    mesh = parallel.make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
    everywhere, by_row = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    params = models.abstract_params(config)
    params = shaped(params, parallel.param_shardings(params, models.PARTITION_RULES, mesh))
    frozen = {} if config.lora is None else {"base": params["base"]}
    trained = params if config.lora is None else {"lora": params["lora"]}
    score_fn = models.make_score_fn(config)

    def update(state, frozen, batch):
        """As `train.TrainStep`'s."""

        def loss(params):
            output = losses.sft_loss(score_fn({**frozen, **params}, batch), batch, {})
            return output.loss_sum, output.denominator

        params, opt_state = state
        grads, denominator = jax.grad(loss, has_aux=True)(params)
        grads = jax.tree.map(lambda grad: grad / denominator, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        state = optax.apply_updates(params, updates), opt_state
        return state, optax.tree_utils.tree_norm(grads)

    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), trained)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
    made = jax.eval_shape(
        functools.partial(train.init_state, tx=tx, mesh=mesh, param_shardings=shardings), zeros
    )
    opt_shardings = jax.tree.map(
        lambda leaf: leaf.sharding,
        train.init_state(zeros, tx, mesh=mesh, param_shardings=shardings).opt_state,
    )
    state = trained, shaped(made.opt_state, opt_shardings)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_row),
        pack_rows([], length, num_rows=rows),
    )
    jitted = jax.jit(
        update,
        donate_argnums=0,
        out_shardings=((shardings, opt_shardings), everywhere),
    )
    with jax.set_mesh(mesh):
        found = compile_quickly(jitted.lower(state, frozen, batch)).memory_analysis()
    parts = sizes["data"] * sizes["fsdp"]
    # positions, ends (where attention reads them), tokens, predecessors, weights, counts
    used = rows // parts * length * 4 * 6
    return found.argument_size_in_bytes - used, found.argument_size_in_bytes + (
        found.temp_size_in_bytes
    )


def compare(config, sizes, rows, length):
    """Estimate over measurement: of parameters and optimizer state, and of everything."""
    tx = optimizer()
    plan = models.plan_memory(config, tx, mesh=sizes, rows=rows, row_length=length)
    held, everything = compiled_training(config, tx, sizes, rows, length)
    return (plan.parameters + plan.optimizer) / held, plan.training / everything


def assert_close(config, sizes, rows, length):
    held, everything = compare(config, sizes, rows, length)
    print(f"{sizes} {rows} × {length}: held {held:.3f}, everything {everything:.2f}")
    assert held == pytest.approx(1, abs=0.01)
    assert FACTORS[0] < everything < FACTORS[1]


@pytest.mark.parametrize(
    ("changes", "rows", "length"),
    [
        (dict(remat="none"), 4, 512),
        (dict(remat="full", num_kv_heads=2, qk_norm=True), 8, 256),
        (dict(remat="dots", lora=LORA), 8, 256),
        (dict(remat="attention", tie_embeddings=True, lora=LORA), 8, 256),
        (dict(remat="full", width=256, mlp_width=1024), 1, 16),  # parameters are the most
        (dict(remat="none", attention="tree"), 4, 512),
        (dict(remat="full", num_kv_heads=2, qk_norm=True, attention="tree"), 8, 256),
        (dict(remat="dots", lora=LORA, attention="tree"), 8, 256),
        # The head is the most.
        (dict(remat="full", attention="tree") | WIDE_HEAD, 4, 512),
        (dict(remat="full", attention="tree", tie_embeddings=True) | WIDE_HEAD, 4, 512),
        (dict(remat="full", attention="tree", lora=LORA) | WIDE_HEAD, 4, 512),
    ],
)
def test_the_estimate_is_near_what_the_compiler_reserves(changes, rows, length):
    assert_close(dataclasses.replace(CONFIG, **changes), ONE, rows, length)


def test_adafactors_small_state_is_counted_as_it_is():
    tx = optimizer("adafactor")
    plan = models.plan_memory(CONFIG, tx, mesh=ONE, rows=1, row_length=8)
    state = train.init_state(models.init_params(CONFIG, jax.random.key(0)), tx)
    assert plan.optimizer == sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert plan.optimizer < plan.parameters


@pytest.mark.parametrize("lora", [None, LORA, models.Lora(rank=4, targets=".")])
@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["xla", "tree"])
def test_activations_are_what_autodiff_keeps(lora, remat, dtype, attention):
    """Its residuals with an axis over layers that are not parameters; no compiler is asked."""
    rows, length = 2, 64
    config = dataclasses.replace(
        CONFIG,
        lora=lora,
        remat=remat,
        compute_dtype=dtype,
        param_dtype=dtype,
        num_layers=3,
        attention=attention,
    )
    params = models.abstract_params(config)
    trained = params if lora is None else {"lora": params["lora"]}
    frozen = {} if lora is None else {"base": params["base"]}
    apply_fn = models.make_apply_fn(config)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    kept = jax.eval_shape(
        lambda trained, frozen, tokens: jax.vjp(
            lambda trained: apply_fn({**frozen, **trained}, tokens), trained
        )[1],
        trained,
        frozen,
        tokens,
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    stacked = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(kept)
        if leaf.shape[:1] == (3,) and leaf.size >= 3 * rows * length and leaf.shape not in shapes
        if leaf.size % (3 * rows * length) == 0
    )
    plan = models.plan_memory(config, optimizer(), mesh=ONE, rows=rows, row_length=length)
    mask = length if attention == "xla" else 0
    rest = rows * length * (mask + (8 + config.dtype.itemsize) * config.width)
    assert plan.activations - rest == pytest.approx(stacked, rel=0.03)


def test_the_plan_follows_the_mesh():
    config = dataclasses.replace(CONFIG, vocab_size=1024, remat="full")
    plan = functools.partial(
        models.plan_memory, config, optimizer(), row_length=64, slots=8, cache_length=128
    )
    one = plan(mesh=ONE, rows=16)
    data = plan(mesh=ONE | {"data": 8}, rows=16)
    assert (data.parameters, data.optimizer) == (one.parameters, one.optimizer)
    assert data.activations == one.activations / 8
    assert data.logits < one.logits  # of a chunk, which is no smaller, and the stream's gradient
    assert data.cache == one.cache / 8
    assert plan(mesh=ONE | {"data": 16}, rows=16).cache == one.cache  # 8 slots do not divide
    fsdp = plan(mesh=ONE | {"fsdp": 8}, rows=16)
    assert one.parameters / 8 < fsdp.parameters < one.parameters / 7
    assert one.gradients / 8 < fsdp.gradients < one.gradients / 7
    assert fsdp.activations == one.activations / 8
    tensor = plan(mesh=ONE | {"tensor": 8}, rows=16)
    assert tensor.parameters == fsdp.parameters
    assert tensor.cache == one.cache / 8 and tensor.logits < one.logits / 3
    assert one.activations == tensor.activations  # only what is between two blocks, whole


def test_adapters_alone_have_gradients_and_optimizer_state():
    config = dataclasses.replace(CONFIG, lora=LORA)
    plan = models.plan_memory(config, optimizer(), mesh=ONE, rows=1, row_length=8)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(config)["lora"]))
    assert plan.gradients == 4 * adapters
    assert plan.parameters == 4 * (config.num_params + adapters)
    assert plan.optimizer == pytest.approx(8 * adapters, abs=64)


def test_sampling_takes_what_the_loop_over_tokens_reserves():
    config, slots, length = CONFIG, 8, 256
    policy = models.make_policy(config)

    def answer(params, cache, tokens):
        def step(carry):
            count, cache, tokens = carry
            start = jnp.full(slots, count, jnp.int32)
            logits, cache = policy.decode_fn(params, cache, tokens[:, None], start, start * 0)
            return count + 1, cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.while_loop(lambda carry: carry[0] < length, step, (0, cache, tokens))

    cache = jax.eval_shape(functools.partial(policy.init_cache, slots, length))
    tokens = jax.ShapeDtypeStruct((slots,), jnp.int32)
    lowered = jax.jit(answer, donate_argnums=1).lower(models.abstract_params(config), cache, tokens)
    found = compile_quickly(lowered).memory_analysis()
    plan = models.plan_memory(
        config, optimizer(), mesh=ONE, rows=1, row_length=8, slots=slots, cache_length=length
    )
    assert plan.parameters + plan.cache == pytest.approx(found.argument_size_in_bytes, rel=0.01)
    assert plan.step == pytest.approx(found.temp_size_in_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("mesh", "rows", "words"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 1}, 6, "6 rows.*multiple of 4"),
        ({"data": 1, "fsdp": 1, "tensor": 16}, 1, "embed/embedding.*16 equal parts"),
        ({"data": 1}, 1, "fsdp"),
    ],
)
def test_what_cannot_be_split_is_named(mesh, rows, words):
    with pytest.raises(ValueError, match=words):
        models.plan_memory(CONFIG, optimizer(), mesh=mesh, rows=rows, row_length=8)


def test_a_large_model_is_planned_at_once_and_nothing_is_allocated():
    config = models.preset("llama-2-13b", compute_dtype="bfloat16")
    plan = models.plan_memory(
        config, optimizer(), mesh={"data": 1, "fsdp": 8, "tensor": 8}, rows=32, row_length=4096
    )
    assert plan.parameters == pytest.approx(4 * 13.016e9 / 64, rel=0.01)


def test_examples_in_docstrings_hold():
    result = doctest.testmod(memory)
    assert result.attempted and not result.failed


def test_eight_devices_need_what_the_plan_says_of_each():
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all held"


if __name__ == "__main__":
    assert jax.device_count() == 8
    on_eight = dataclasses.replace(CONFIG, vocab_size=1024, remat="full", width=256, mlp_width=512)
    for axes in ((1, 8, 1), (1, 1, 8), (2, 2, 2)):
        assert_close(on_eight, dict(zip(parallel.AXES, axes, strict=True)), 16, 128)
    with_lora = dataclasses.replace(on_eight, lora=LORA)
    assert_close(with_lora, dict(data=1, fsdp=8, tensor=1), 16, 128)
    print("all held")
