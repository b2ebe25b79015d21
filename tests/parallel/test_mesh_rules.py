"""Laws of meshes and sharding rules; the ones on 8 devices run in a process of their own."""

import doctest
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from w2sjax.models import PARTITION_RULES, PRESETS, init_params
from w2sjax.parallel import (
    batch_sharding,
    init_sharded,
    make_mesh,
    match_spec,
    param_shardings,
    sharding_table,
)
from w2sjax.parallel import (
    mesh as mesh_lib,
)

ONE = jax.devices()[:1]

EIGHT_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from w2sjax.models import PARTITION_RULES, ModelConfig, init_params, make_apply_fn
    from w2sjax.parallel import *

    assert jax.device_count() == 8
    config = ModelConfig(vocab_size=16, width=32, num_layers=1, num_heads=4, num_kv_heads=4,
                         mlp_width=32, tie_embeddings=False)
    init_fn = lambda key: init_params(config, key)
    apply_fn = make_apply_fn(config)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (8, 6), 0, 16))
    loss = lambda params, tokens: (apply_fn(params, tokens) ** 2).mean()
    value_and_grad = jax.value_and_grad(loss)
    key = jax.random.key(0)
    one = make_mesh(devices=jax.devices()[:1])
    results = []
    for mesh in (one, make_mesh(), make_mesh(2, 2, 2)):
        params = init_sharded(init_fn, PARTITION_RULES, mesh, key)
        shardings = param_shardings(params, PARTITION_RULES, mesh)
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings)):
            assert leaf.sharding == sharding
        step = jax.jit(value_and_grad, in_shardings=(shardings, batch_sharding(mesh)))
        results.append((params, *step(params, tokens)))
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.shape == (1, 16, 16)
    title, *rows, total = sharding_table(params, PARTITION_RULES, mesh).splitlines()
    assert title.endswith("bytes per device")
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)]
    assert [int(row.split()[-1].replace(",", "")) for row in rows] == held
    assert int(total.split()[-1].replace(",", "")) == sum(held)
    assert 4 * sum(held) < 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    assert make_mesh(-1, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(2, 1, -1).shape == {"data": 2, "fsdp": 1, "tensor": 4}
    for sizes, words in (((3, 1, 1), "8"), ((-1, 3, 1), "8 devices"), ((2, 2, 1), "needs 4")):
        try:
            make_mesh(*sizes)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(sizes)
    try:
        param_shardings({"norm": jnp.ones(6)}, [("norm", jax.P("tensor"))], make_mesh(1, 2, 4))
    except ValueError as error:
        assert "norm" in str(error) and "(6,)" in str(error), error
    else:
        raise AssertionError
    print("all held")
"""


def test_meshes_of_eight_devices_agree_with_one():
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all held"


def test_examples_in_docstrings_hold():
    result = doctest.testmod(mesh_lib)
    assert result.attempted and not result.failed


def test_first_matching_rule_wins():
    rules = [(r"key/kernel$", PartitionSpec("fsdp")), (r"kernel", PartitionSpec())]
    assert match_spec("a/key/kernel", (4, 4), rules) == PartitionSpec("fsdp")
    assert match_spec("a/query/kernel", (4, 4), rules) == PartitionSpec()
    assert match_spec("step", (), rules) == PartitionSpec()


def test_unmatched_parameters_are_named():
    with pytest.raises(ValueError, match=r"layers_0/extra/bias.*\(4,\)"):
        param_shardings(
            {"layers_0": {"extra": {"bias": jnp.ones(4)}}}, PARTITION_RULES, make_mesh(devices=ONE)
        )


@pytest.mark.parametrize(
    ("spec", "words"), [(PartitionSpec("model"), "'model'"), (PartitionSpec(None, None), "entries")]
)
def test_impossible_specs_name_the_parameter(spec, words):
    with pytest.raises(ValueError, match=rf"scale.*{words}"):
        param_shardings({"scale": jnp.ones(4)}, [("scale", spec)], make_mesh(devices=ONE))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((0, 1, 1), "data"), ((-1, -1, 1), "data and fsdp"), ((1, 1, -2), "tensor")],
)
def test_impossible_sizes_name_the_axis(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(*sizes, devices=ONE)


def test_the_models_rules_name_every_parameter_and_the_table_sums_up():
    mesh = make_mesh(devices=ONE)
    for config in PRESETS.values():
        abstract = jax.eval_shape(lambda key, c=config: init_params(c, key), jax.random.key(0))
        lines = sharding_table(abstract, PARTITION_RULES, mesh).splitlines()
        assert len(lines) == len(jax.tree.leaves(abstract)) + 2
        assert int(lines[-1].split()[-1].replace(",", "")) == 4 * config.num_params


def test_one_device_is_a_mesh_of_one():
    mesh = make_mesh(devices=ONE)
    params = init_sharded(
        lambda key: {"norm": {"scale": jax.random.normal(key, (4,))}},
        PARTITION_RULES,
        mesh,
        jax.random.key(0),
    )
    assert params["norm"]["scale"].sharding.mesh == mesh
    assert jax.device_put(jnp.ones((2, 3)), batch_sharding(mesh)).shape == (2, 3)
