"""The task axis over 1, 2 and 8 devices: equal results, by shard_map and by sharded inputs."""

import os
import subprocess
import sys

SCRIPT = """
import functools, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from w2sjax import search, trees

rng = np.random.default_rng(0)
keys = rng.integers(0, 2, (16, 4, 4)).astype(np.int32)
lengths = rng.integers(0, 5, (16, 4)).astype(np.int32)
returns = (rng.integers(0, 5, (16, 4)) / 4).astype(np.float32)

@jax.vmap
def work(keys, lengths, returns):
    tree = trees.build_tree(keys, lengths, returns, max_nodes=17)
    result = search.run_mcts(tree, num_simulations=30)
    return tree, result, search.best_path(tree, result.node_values)

wanted = jax.jit(work)(keys, lengths, returns)  # on one device
for number in (2, 8):
    mesh = jax.make_mesh((number,), ("task",), axis_types=(AxisType.Auto,))
    split = P("task")
    mapped = jax.shard_map(work, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    sharded = jax.device_put((keys, lengths, returns), NamedSharding(mesh, split))
    results = [jax.jit(mapped)(*sharded)]
    if number == 2:
        results.append(jax.jit(work)(*sharded))
    for result in results:
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(result), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
print("equal on", len(jax.devices()), "devices")
"""


def test_devices_give_equal_results():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal on 8 devices" in done.stdout
