"""Any mesh gives the numbers of one device, and no device ever holds a whole parameter set.

On 8 virtual devices, in a process of their own.
"""

import os
import subprocess
import sys
import textwrap

from hf_cases import write_checkpoint

COMMON = """
    import re, functools, math
    import jax, jax.numpy as jnp, numpy as np, optax
    from w2sjax import parallel, train
    from w2sjax.losses import sft_loss
    from w2sjax.models import *
    from w2sjax.parallel import path_name
    from w2sjax.types import PackedBatch

    assert jax.device_count() == 8
    SHAPE = ModelConfig(vocab_size=64, width=32, num_layers=3, num_heads=8, num_kv_heads=4,
                        mlp_width=64, tie_embeddings=False, qkv_bias=True)
    ROWS, LENGTH = 8, 16

    def batch(rows=ROWS):
        rng = np.random.default_rng(0)
        index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH))
        ends = np.where(index < 9, 9, np.where(index < 14, 14, 0)).astype(np.int32)
        positions = np.where(index < 9, index, np.where(index < 14, index - 9, 0))
        weight = ((positions > 0) & (ends > 0)).astype(np.float32)
        return PackedBatch(
            tokens=rng.integers(0, 64, (rows, LENGTH)).astype(np.int32),
            positions=positions.astype(np.int32), subtree_end=ends,
            predecessor=np.maximum(index - 1, 0), loss_weight=weight,
            sequence_id=np.where(ends > 0, index // 9, -1).astype(np.int32))

    def setup(config, mesh, tx):
        params = parallel.init_sharded(
            functools.partial(init_params, config), PARTITION_RULES, mesh, jax.random.key(0))
        frozen = None
        if config.lora is not None:
            # A zero B would hide A's gradient.
            params["lora"] = jax.tree.map(lambda x: x + 0.05, params["lora"])
            params, frozen = {"lora": params["lora"]}, {"base": params["base"]}
        shardings = parallel.param_shardings(params, PARTITION_RULES, mesh)
        state = train.init_state(params, tx, mesh=mesh, param_shardings=shardings)
        return state, frozen, train.make_train_step(make_apply_fn(config), sft_loss, tx, mesh=mesh)
"""

EQUAL = """
    import dataclasses
    tx = optax.sgd(1.0)  # the change of a parameter is its gradient
    for changes in ({}, {"lora": Lora(4, targets=".")},
                    {"window": 3, "local_layers": (True, False, True), "remat": "full"}):
        config = dataclasses.replace(SHAPE, **changes)
        results = []
        one = parallel.make_mesh(devices=jax.devices()[:1])
        meshes = [one, parallel.make_mesh(2, 2, 2)]
        if not changes:
            meshes += [parallel.make_mesh(*sizes) for sizes in ((8, 1, 1), (1, 8, 1), (2, 1, 4))]
        for mesh in meshes:
            state, frozen, step = setup(config, mesh, tx)
            before = jax.device_get(state.params)
            state, metrics = step(state, batch(), None, frozen)
            after = jax.device_get(state.params)
            results.append((float(metrics["loss"]), jax.tree.map(np.subtract, before, after)))
        loss, gradient = results[0]
        for mesh, (other_loss, other) in zip(meshes[1:], results[1:]):
            assert abs(loss - other_loss) < 1e-5 * abs(loss), (mesh.shape, loss, other_loss)
            for (path, a), b in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(other)):
                scale = np.abs(a).max()
                assert scale > 1e-6, path_name(path)
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * scale,
                                           err_msg=f"{path_name(path)} {mesh.shape}")
    print("all held")
"""

NO_WHOLE_PARAMETERS = """
    tx = optax.adamw(1e-3)
    for sizes in ((1, 8, 1), (2, 2, 2)):
        mesh = parallel.make_mesh(*sizes)
        state, frozen, step = setup(SHAPE, mesh, tx)
        text = step.lower(state, batch(), None, frozen).compile().as_text()
        stacked = {leaf.shape for leaf in jax.tree.leaves(state.params["layers"])
                   if leaf.ndim > 2}
        gathered = [tuple(map(int, dims.split(","))) for dims in re.findall(
            r"= \\(?\\w+\\[([\\d,]+)\\][^=]*? all-gather(?:-start)?\\(", text)]
        assert gathered, "fsdp gathers each layer's parameters"
        largest_layer = max(math.prod(shape[1:]) for shape in stacked)
        others = max(state.params["embed"]["embedding"].size, state.params["head"]["kernel"].size)
        for shape in gathered:
            assert math.prod(shape) <= max(largest_layer, others), (sizes, shape)
        # The residual stream is never whole on one device.
        whole = ROWS * LENGTH * SHAPE.width
        assert not any(math.prod(s) >= whole and s[-1] == SHAPE.width and s[0] == ROWS
                       for s in gathered), gathered
    print("all held")
"""

LOADED = """
    import sys
    path = sys.argv[1]
    mesh = parallel.make_mesh(2, 2, 2)
    config, whole = load_hf(path)
    same, split = load_hf(path, mesh=mesh)
    shardings = parallel.param_shardings(whole, PARTITION_RULES, mesh)
    for a, b, sharding in zip(*map(jax.tree.leaves, (whole, split, shardings))):
        assert b.sharding == sharding
        np.testing.assert_array_equal(a, b)
    save_hf(path + "_again", config, split)
    again = load_hf(path + "_again")[1]
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    print("all held")
"""


def on_eight_devices(code, *arguments, in_haste=True):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(in_haste),
    }
    program = textwrap.dedent(COMMON) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all held")


def test_every_mesh_gives_the_loss_and_gradients_of_one_device():
    on_eight_devices(EQUAL)


def test_no_whole_parameter_set_is_gathered():
    on_eight_devices(NO_WHOLE_PARAMETERS, in_haste=False)


def test_a_checkpoint_is_read_into_shards_and_written_from_them(tmp_path):
    write_checkpoint(tmp_path / "model", "qwen2", num_attention_heads=4, vocab_size=96)
    on_eight_devices(LOADED, tmp_path / "model")
