"""Packed trees on any mesh give the numbers of single sequences on one device, and no device ever
holds a whole parameter set.

On 8 virtual devices, in a process of their own.
"""

import os
import subprocess
import sys
import textwrap

from hf_cases import write_checkpoint

COMMON = """
    import dataclasses, re, functools, math
    import jax, jax.numpy as jnp, numpy as np, optax
    from w2sjax import parallel, train
    from w2sjax.batches import PairSequences, Sequence, pack_rows, pair_parts
    from w2sjax.losses import preference_loss, sft_loss
    from w2sjax.models import *
    from w2sjax.parallel import path_name

    assert jax.device_count() == 8
    SHAPE = ModelConfig(vocab_size=64, width=32, num_layers=3, num_heads=8, num_kv_heads=4,
                        mlp_width=64, tie_embeddings=False, qkv_bias=True)
    ROWS, LENGTH = 8, 32

    def batch(share=True):
        # Pairs from 7 trees, of which the first is split into two rows; or a row for each side.
        rng = np.random.default_rng(0)
        draw = lambda size: rng.integers(0, 64, size)
        pairs = []
        for leaves in (5, 3, 3, 3, 3, 3, 3):
            trunk = draw(6)
            sides = [np.concatenate([trunk, draw(8)]) for _ in range(leaves)]
            weights = np.concatenate([[0, 0, 0, 1, 0, 0, 0], np.ones(7)])
            pairs += [PairSequences(Sequence(sides[i], weights), Sequence(sides[i - 1], weights))
                      for i in range(leaves)]
        sequences, parts = pair_parts(pairs)
        packed = pack_rows(sequences, LENGTH if share else 14, share=share, parts=parts)
        assert packed.tokens.shape[0] == (ROWS if share else 64)
        tokens = [(7, 7, 1)] * len(pairs)
        extras = {"path_tokens": np.array(tokens, np.int32),
                  "ref_logps": rng.normal(-9, 3, (len(pairs), 3)).astype(np.float32)}
        return packed, extras

    def setup(config, mesh, tx, loss_fn=sft_loss):
        params = parallel.init_sharded(
            functools.partial(init_params, config), PARTITION_RULES, mesh, jax.random.key(0))
        frozen = None
        if config.lora is not None:
            # A zero B would hide A's gradient.
            params["lora"] = jax.tree.map(lambda x: x + 0.05, params["lora"])
            params, frozen = {"lora": params["lora"]}, {"base": params["base"]}
        shardings = parallel.param_shardings(params, PARTITION_RULES, mesh)
        state = train.init_state(params, tx, mesh=mesh, param_shardings=shardings)
        return state, frozen, train.make_train_step(make_score_fn(config), loss_fn, tx, mesh=mesh)
"""

SAMPLED = """
    # The same tokens on every mesh, from slots that are split over it.
    from w2sjax.sampling import SamplerSettings, make_sampler
    config = dataclasses.replace(SHAPE, lora=None)
    policy = make_policy(config)
    settings = SamplerSettings(64, 6, (99,), temperature=1.0)
    rng = np.random.default_rng(0)
    chunks = [np.concatenate([np.repeat(rng.integers(0, 64, (1, 20)), 16, 0),
                              rng.integers(0, 64, (16, 4))], axis=1), rng.integers(0, 64, (16, 5))]
    def sampled(sizes):
        devices = None if sizes else jax.devices()[:1]
        mesh = parallel.make_mesh(**sizes, devices=devices)
        params = parallel.init_sharded(
            functools.partial(init_params, config), PARTITION_RULES, mesh, jax.random.key(0))
        answers = []
        with jax.set_mesh(mesh):
            sampler = make_sampler(policy, settings, num_slots=16)
            state = sampler.init()
            for turn, chunk in enumerate(chunks):
                fed = np.arange(16) % 3 != 1 if turn else np.ones(16, bool)
                keys = jax.random.split(jax.random.key(turn), 16)
                state, result = sampler.turn(params, state, chunk, fed * chunk.shape[1],
                                             np.full(16, turn == 0), keys)
                answers.append(result.tokens.tolist())
        for keys, values in state.cache:
            for part in (keys, values):
                split = [a // b for a, b in zip(part.shape, part.sharding.shard_shape(part.shape))]
                rows = mesh.shape["data"] * mesh.shape["fsdp"]
                assert split == [rows, mesh.shape["tensor"], 1, 1], (sizes, split)
        return answers
    wanted = sampled({})
    for sizes in (dict(data=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)):
        assert sampled(sizes) == wanted, sizes
    print("all held")
"""

EQUAL = """
    import dataclasses
    tx = optax.sgd(1.0)  # the change of a parameter is its gradient
    dpo_loss = functools.partial(preference_loss, beta=0.1, sft_weight=0.2)
    for loss_fn, changes in (
        (dpo_loss, {}),
        (sft_loss, {"lora": Lora(4, targets=".")}),
        (sft_loss, {"window": 3, "local_layers": (True, False, True), "remat": "full"}),
    ):
        config = dataclasses.replace(SHAPE, **changes)
        results = []
        one = parallel.make_mesh(devices=jax.devices()[:1])
        meshes = [one, parallel.make_mesh(2, 2, 2)]
        if not changes:
            meshes += [parallel.make_mesh(*sizes) for sizes in ((8, 1, 1), (1, 8, 1), (2, 1, 4))]
            meshes.append(parallel.make_mesh(1, 1, 4, devices=jax.devices()[:4]))
        for mesh in meshes:
            state, frozen, step = setup(config, mesh, tx, loss_fn)
            before = jax.device_get(state.params)
            state, metrics = step(state, *batch(share=mesh is not one), frozen)
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
        text = step.lower(state, batch()[0], None, frozen).compile().as_text()
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


def test_trees_on_every_mesh_give_the_loss_and_gradients_of_sequences_on_one_device():
    on_eight_devices(EQUAL)


def test_slots_are_split_over_every_mesh_and_sample_the_same_tokens():
    on_eight_devices(SAMPLED)


def test_no_whole_parameter_set_is_gathered():
    on_eight_devices(NO_WHOLE_PARAMETERS, in_haste=False)


def test_a_checkpoint_is_read_into_shards_and_written_from_them(tmp_path):
    write_checkpoint(tmp_path / "model", "qwen2", num_attention_heads=4, vocab_size=96)
    on_eight_devices(LOADED, tmp_path / "model")
