"""What does tree packing gain? Steps on whole tries against steps on single trajectories, and TRL.

    python benchmarks/packing.py [--quick] [--json FILE] [--episodes FILE]
        [--sizes s,m] [--leaves 2,16] [--parts leaves,deep,real,trl] [--only "sft, 1 of 2048"]
        [--rounds 5] [--trajectories 64]

**Against this library's own unpacked batches** (`packing="none"`: a row per trajectory, attention
without L × L scores, output layer on learned tokens alone): forward, backward, clip, AdamW in
float32, laying out the batch included; SFT with every second turn of 16 tokens learned, and DPO
whose loss falls on the leaves. Shapes: a trunk of 512 tokens with 2 to 64 leaves of 128; deep trees
(a trunk of 1024, three levels of branching by 3; one of 2048 with 16 leaves of 64); and real trees:
rollouts of household's players (8, 16 and 64 a task), of ScienceWorld's where it is installed, or
the episodes of a run (--episodes; grouped by task, up to 64 each).

**Against TRL's DPO** (torch), where it is installed: the same pairs, the same checkpoint; its
reference is computed in each step, as it does by default, and is timed apart.

Two ratios say what is possible. `ideal` is tokens of all trajectories over tokens laid out. Not all
work shrinks like that: a leaf's tokens attend to more than a trunk's, and tokens that no two
trajectories share cost the output layer as much as before. `possible` counts that: matrix work of
both sides (projections, attention over visible pairs, output layer), as FLOPs.

Contenders alternate; times are medians; memory is what XLA reserves for temporaries. Ratios above 1
say that packing is faster; `packed_vs_unpacked_real` is the smallest of all real trees.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contenders as peers
import jax
import jax.numpy as jnp
import numpy as np

from w2sjax import batches, losses, models, train
from w2sjax.batches import PairSequences
from w2sjax.types import PackedBatch

PARTS = ("leaves", "deep", "real", "trl")
_MEASURE_S = 60.0  # of a workload, at most, but for two rounds; not where --rounds is given
_TURN = 16  # tokens of a turn in made-up trajectories; every second one is the agent's


@dataclasses.dataclass(frozen=True)
class Workload:
    """Trajectories of some trees, as one batch."""

    title: str
    sequences: list[batches.Sequence]
    kind: str  # "sft" or "dpo"; for the latter, neighbours are chosen and rejected

    def loader(self, packing: str) -> batches.BatchLoader:
        options = dict(total_steps=1, seed=0, packing=packing)
        if self.kind == "sft":
            count = len(self.sequences)
            return batches.sft_batches(self.sequences, sequences_per_batch=count, **options)
        pairs = [
            PairSequences(*pair)
            for pair in zip(self.sequences[::2], self.sequences[1::2], strict=True)
        ]
        reference = np.zeros((len(pairs), 3), np.float32)
        return batches.preference_batches(
            pairs, pairs_per_batch=len(pairs), extras={"ref_logps": reference}, **options
        )

    def loss(self) -> losses.LossFn:
        if self.kind == "sft":
            return losses.sft_loss
        return functools.partial(losses.preference_loss, beta=peers.BETA)


def made_up_tree(levels: Sequence[tuple[int, int]], vocab_size: int, kind: str) -> Workload:
    """A tree of random tokens.

    Args:
      levels: from the root down, (branches, tokens of each).
      vocab_size: V.
      kind: "sft": every second turn is learned; "dpo": what follows the last branching.
    """
    rng = np.random.default_rng(0)
    paths = [np.zeros(0, np.int32)]
    for branches, length in levels:
        paths = [
            np.concatenate([path, rng.integers(3, vocab_size, length, dtype=np.int32)])
            for path in paths
            for _ in range(branches)
        ]
    place = np.arange(len(paths[0]))
    learned = place >= len(place) - levels[-1][1] if kind == "dpo" else place // _TURN % 2 == 1
    sequences = [batches.Sequence(path, learned) for path in paths]
    if len(sequences) % 2 and kind == "dpo":
        sequences.pop()
    shape = " × ".join(f"{branches} of {length}" for branches, length in levels)
    return Workload(f"{kind}, {shape}", sequences, kind)


# ------------------------------------------------------------------------------------ real trees


def played_episodes(env: str, options: dict[str, Any], *, tasks: int, rollouts: int):
    """Rollouts of an environment's own players of mixed skill, task by task."""
    from w2sjax.envs import EnvPool, PlayRequest
    from w2sjax.sampling import play_episodes

    pool = EnvPool(env, options, num_slots=8, num_workers=0 if env == "household" else 2)
    try:
        rng = random.Random(0)
        requests = [
            PlayRequest(task, rng.uniform(0.05, 0.7), copy)
            for task in pool.task_ids("train", tasks)
            for copy in range(rollouts)
        ]
        return play_episodes(pool, requests, env_name=env, policy_name="player")
    finally:
        pool.close()


def real_workload(title: str, episodes, *, tasks: int, rollouts: int) -> Workload:
    """SFT on all rollouts of some tasks, with a tokenizer trained on their text."""
    from w2sjax.chat import ChatTemplate, train_bpe
    from w2sjax.pipeline.training import to_sequences

    texts = []
    for episode in episodes:
        texts += [episode.instruction, episode.first_observation]
        texts += [text for step in episode.steps for text in (step.answer, step.observation)]
    template = ChatTemplate(train_bpe(texts, vocab_size=1024))
    by_task: dict[str, list] = {}
    for episode in episodes:
        by_task.setdefault(episode.task_id, []).append(episode)
    chosen = [group[:rollouts] for group in by_task.values() if len(group) >= rollouts][:tasks]
    examples = to_sequences(template, [e for group in chosen for e in group], 10**6)
    return Workload(f"sft, {title}, {rollouts} rollouts", examples.items, "sft")


def real_workloads(quick: bool, episodes_file: str | None, trajectories: int) -> list[Workload]:
    """What there is here: a run's episodes, or household and ScienceWorld played on the spot."""
    # rollouts → tasks in a batch
    counts = {rollouts: trajectories // rollouts for rollouts in (8, 16, 64)}
    counts = {8: 2} if quick else {rollouts: tasks for rollouts, tasks in counts.items() if tasks}
    if episodes_file:
        from w2sjax.sampling import read_trajectories

        episodes = read_trajectories(Path(episodes_file))
        sources = {Path(episodes_file).parent.name: (episodes, counts)}
    else:
        options = dict(num_object_types=6, max_receptacles=3, num_distractors=2, max_steps=14)
        options["instruction"] = "Act in the room to reach the goal."
        sources = {}
        play = functools.partial(played_episodes, tasks=8, rollouts=max(counts))
        sources["household"] = (play("household", options), counts)
        try:
            import scienceworld  # noqa: F401 (whether it is installed)
        except ImportError:
            print("ScienceWorld is left out: pip install -e '.[scienceworld]'", flush=True)
        else:
            if not quick:
                tasks = ("find-plant", "lifespan-longest-lived", "find-non-living-thing")
                options = dict(tasks=tasks, simplification="easy", heap_mb=512)
                sources["ScienceWorld"] = (play("scienceworld", options), counts)
    return [
        workload
        for title, (episodes, counts) in sources.items()
        for rollouts, tasks in counts.items()
        if (workload := real_workload(title, episodes, tasks=tasks, rollouts=rollouts)).sequences
    ]


# ------------------------------------------------------------------------------------- measuring


def matrix_work(config: models.ModelConfig, batch: PackedBatch) -> float:
    """FLOPs of a forward pass that the batch's tokens ask for, padding left out."""
    used = np.asarray(batch.subtree_end) > 0
    table = config.vocab_size * config.width
    inner = config.num_params - table * (1 if config.tie_embeddings else 2)
    visible = int(np.where(used, batch.positions + 1, 0).sum())
    attended = config.num_heads * config.head_size * config.num_layers * visible
    learned = int(np.count_nonzero(batch.loss_count))
    return 2.0 * inner * int(used.sum()) + 4.0 * attended + 2.0 * table * learned


def make_step(config: models.ModelConfig, workload: Workload, packing: str):
    """(function that makes one update and returns its loss, bytes of temporaries, batch,
    sharing)."""
    loader = workload.loader(packing)
    tx = peers.optimizer()
    step = train.make_train_step(models.make_score_fn(config), workload.loss(), tx)
    params = jax.jit(functools.partial(models.init_params, config))(jax.random.key(0))
    held = [train.init_state(params, tx)]
    loaded = loader.batch(0)
    compiled = step.lower(held[0], loaded.batch, loaded.extras, None).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes

    def update() -> float:
        loaded = loader.batch(0)
        state, metrics = compiled(held.pop(), loaded.batch, loaded.extras, None)
        held.append(jax.block_until_ready(state))
        return float(metrics["loss"])

    return update, memory, loaded.batch, loader.sharing()


def measure(
    config: models.ModelConfig, workload: Workload, rounds: int, most_s: float
) -> dict[str, Any]:
    """Packed against unpacked; their first losses must be equal. Fewer rounds, but two, where so
    many do not fit into `most_s` seconds.
    """
    made = {packing: make_step(config, workload, packing) for packing in ("tree", "none")}
    start = time.perf_counter()
    first = {packing: update() for packing, (update, *_) in made.items()}
    np.testing.assert_allclose(first["tree"], first["none"], rtol=1e-4)
    if (fitting := most_s / (time.perf_counter() - start)) < rounds:
        rounds = max(2, int(fitting))
    times = peers.alternating({packing: update for packing, (update, *_) in made.items()}, rounds)
    packed, plain = (statistics.median(times[packing]) for packing in ("tree", "none"))
    work = {packing: matrix_work(config, batch) for packing, (_, _, batch, _) in made.items()}
    row = {
        "title": workload.title,
        "trajectories": len(workload.sequences),
        "tokens": sum(map(len, workload.sequences)),
        "ideal": made["tree"][3],
        "possible": work["none"] / work["tree"],
        "measured": plain / packed,
        "of_best": min(times["none"]) / min(times["tree"]),
        "packed_s": packed,
        "unpacked_s": plain,
        "packed_mb": made["tree"][1] / 1e6,
        "unpacked_mb": made["none"][1] / 1e6,
    }
    row["over_ideal"] = row["measured"] / row["ideal"]
    row["over_possible"] = row["measured"] / row["possible"]
    print(
        "  {title:44s} {tokens:6d} tokens: ideal {ideal:5.2f}, possible {possible:5.2f}, measured"
        " {measured:5.2f} ({over_ideal:.0%} of ideal, {over_possible:.0%} of possible);"
        " {packed_s:6.2f} s and {packed_mb:5.0f} MB instead of {unpacked_s:6.2f} s and"
        " {unpacked_mb:5.0f} MB".format(**row),
        flush=True,
    )
    return row


def against_trl(size: str, *, leaves: int, rounds: int) -> dict[str, float] | None:
    """DPO on a trunk of 512 with so many leaves of 128; None where TRL is not installed."""
    try:
        import trl  # noqa: F401 (whether it is installed)
    except ImportError as error:
        print(f"TRL is left out: {error}", flush=True)
        return None
    shape = peers.SHAPES[size]
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.integers, 3, shape["vocab_size"], dtype=np.int32)
    trunk = np.broadcast_to(draw(512), (leaves // 2, 512))
    pairs = peers.Pairs(trunk, draw((leaves // 2, 128)), draw((leaves // 2, 128)))
    with tempfile.TemporaryDirectory() as directory:
        paths = peers.write_checkpoints(Path(directory), shape)
        contenders = {"ours": packed_contender(*paths, pairs), "trl": peers.trl(*paths, pairs)}
        for contender in contenders.values():
            contender.reference()
        first = {name: contender.dpo() for name, contender in contenders.items()}
        np.testing.assert_allclose(first["ours"], first["trl"], rtol=peers.TOLERANCE)
        functions = {
            (name, kind): getattr(contender, kind)
            for kind in ("reference", "dpo")
            for name, contender in contenders.items()
        }
        times = peers.alternating(functions, rounds)
    middle = {key: statistics.median(values) for key, values in times.items()}
    best = {key: min(values) for key, values in times.items()}
    row = {
        "step_s": middle["ours", "reference"] + middle["ours", "dpo"],
        "trl_step_s": middle["trl", "reference"] + middle["trl", "dpo"],
        "update_s": middle["ours", "dpo"],
        "trl_update_s": middle["trl", "dpo"],
        "best": (best["trl", "reference"] + best["trl", "dpo"])
        / (best["ours", "reference"] + best["ours", "dpo"]),
    }
    row["ratio"] = row["trl_step_s"] / row["step_s"]
    row["update_ratio"] = row["trl_update_s"] / row["update_s"]
    print(
        "  {size}, DPO, {leaves} leaves against TRL: {ratio:.2f}× with reference (best times"
        " {best:.2f}×), {update_ratio:.2f}× the update alone; {step_s:.2f} s instead of"
        " {trl_step_s:.2f} s".format(size=size, leaves=leaves, **row),
        flush=True,
    )
    return row


def packed_contender(policy: Path, reference: Path, pairs: peers.Pairs) -> peers.Contender:
    """This library's DPO as the trainer does it: packed, the reference scored once per pair."""
    changes = dict(compute_dtype="float32", unroll=models.read_config(policy).num_layers)
    config, params = models.load_hf(policy, **changes)
    _, reference_params = models.load_hf(reference, **changes)
    items, score_fn, tx = pairs.sequences(), models.make_score_fn(config), peers.optimizer()
    sequences, parts = batches.pair_parts(items)
    loss = functools.partial(losses.preference_loss, beta=peers.BETA)
    step = train.make_train_step(score_fn, loss, tx)
    row_length = batches.round_length(batches.find_prefixes(sequences).num_tokens)
    scorer = train.make_sequence_scorer(score_fn, rows_per_batch=1, row_length=row_length)
    held = [train.init_state(params, tx)]
    loaders: list[batches.BatchLoader] = []

    def score() -> None:
        logps = scorer(reference_params, sequences, parts).reshape(3, -1).T
        loaders[:] = [
            batches.preference_batches(
                items,
                pairs_per_batch=len(items),
                total_steps=1,
                seed=0,
                extras={"ref_logps": logps},
            )
        ]

    def update() -> float:
        loaded = loaders[0].batch(0)
        state, metrics = step(held.pop(), loaded.batch, loaded.extras)
        held.append(jax.block_until_ready(state))
        return float(metrics["loss"])

    return peers.Contender(lambda: 0.0, score, update)


def host_rate(workloads: Sequence[Workload]) -> float:
    """Tokens per second that are laid out, choosing of shapes apart; the slowest workload's."""
    rates = []
    for workload in workloads:
        loader = workload.loader("tree")
        took = []
        for _ in range(5):
            start = time.perf_counter()
            loader.batch(0)
            took.append(time.perf_counter() - start)
        rates.append(sum(map(len, workload.sequences)) / statistics.median(took))
    return min(rates)


def shape_config(size: str) -> models.ModelConfig:
    shape = peers.SHAPES[size]
    return models.ModelConfig(
        vocab_size=shape["vocab_size"],
        width=shape["hidden_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        mlp_width=shape["intermediate_size"],
        compute_dtype="float32",
        unroll=shape["num_hidden_layers"],
    )


def gpu_kernel(rounds: int) -> dict[str, float]:
    """Tree attention against a dense causal flash call of equal visible area, on a GPU, bfloat16.

    8k tokens: a trunk of 1024 and 64 leaves of 112; the dense call has rows whose causal area adds
    up to the same number of visible pairs.
    """
    from w2sjax.models.tree_kernels import tree_attention

    heads, groups, width, trunk, leaves, leaf = 32, 8, 128, 1024, 64, 112
    length = trunk + leaves * leaf
    ends = np.full((1, length), length, np.int32)
    positions = np.arange(length, dtype=np.int32)[None].copy()
    for start in range(trunk, length, leaf):
        ends[0, start : start + leaf] = start + leaf
        positions[0, start : start + leaf] = trunk + np.arange(leaf)
    visible = int((positions + 1).sum())
    dense_length = 4096
    dense_rows = max(1, round(visible / (dense_length * (dense_length + 1) / 2)))
    key = jax.random.key(0)

    def operands(rows: int, length: int):
        shapes = [(rows, length, number, width) for number in (heads, groups, groups)]
        return [jax.random.normal(key, shape, jnp.bfloat16) for shape in shapes]

    def tree(q, k, v):
        return tree_attention(q, k, v, positions, ends, kind="gpu", scale=width**-0.5)

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def with_gradient(attend) -> Callable:
        return jax.jit(jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)))

    area = {"tree": visible, "dense": dense_rows * dense_length * (dense_length + 1) // 2}
    functions, arguments = {}, {"tree": operands(1, length), "dense": operands(dense_rows, 4096)}
    for name, attend in (("tree", tree), ("dense", dense)):
        update = with_gradient(attend)
        functions[name] = functools.partial(
            lambda f, x: jax.block_until_ready(f(*x)), update, arguments[name]
        )
        functions[name]()
    times = peers.alternating(functions, rounds)
    each = {name: statistics.median(times[name]) / area[name] for name in times}
    found = {"tree_over_dense": each["tree"] / each["dense"]}
    print("  kernel: {tree_over_dense:.2f} of cuDNN's time per visible pair".format(**found))
    return found


def main() -> None:
    """Prints the tables, and writes all figures where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: real trees and TRL, 5 M"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--episodes", metavar="FILE", help="episodes.jsonl of a run: real trees")
    parser.add_argument(
        "--trajectories", type=int, default=64, help="in a batch of real trees (64); memory follows"
    )
    parser.add_argument("--sizes", help="models, of s (5 M) and m (30 M), with commas between")
    parser.add_argument("--leaves", help="leaves of the made-up trees, with commas between")
    parser.add_argument("--parts", help="of leaves, deep, real and trl, with commas between")
    parser.add_argument("--only", metavar="TEXT", help="workloads whose title holds this text")
    parser.add_argument("--rounds", type=int, help="how often each contender is timed")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds = arguments.rounds or (3 if quick else 5)
    parts = (arguments.parts or ("real,trl" if quick else ",".join(PARTS))).split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {min(unknown)!r} is none of {', '.join(PARTS)}")
    if arguments.trajectories < 8:
        parser.error("--trajectories: expected 8 or more, rollouts of one task at least")
    print(f"load {os.getloadavg()[0]:.1f} before the start", flush=True)
    data: dict[str, Any] = {"load_before": os.getloadavg()[0], "sizes": {}, "trl": {}}
    real = (
        real_workloads(quick, arguments.episodes, arguments.trajectories) if "real" in parts else []
    )
    on_gpu = jax.default_backend() == "gpu"
    sizes = arguments.sizes or ("s" if quick else "s,m")
    configs = {size: shape_config(size) for size in sizes.split(",")}
    if on_gpu:
        configs = {"1b": dataclasses.replace(peers.GPU_SHAPES["1b"], remat="full")}
        data["kernel"] = gpu_kernel(rounds)
    for size, config in configs.items():
        print(f"{size}: {config.num_params / 1e6:.1f} M parameters", flush=True)
        leaves = map(int, (arguments.leaves or ("4" if quick else "2,4,8,16,32,64")).split(","))
        trees = []
        if "leaves" in parts:
            trees += [[(1, 512), (count, 128)] for count in leaves]
        if "deep" in parts:
            trees += [[(1, 1024), (3, 128), (3, 128), (3, 128)], [(1, 2048), (16, 64)]]
        workloads = [
            made_up_tree(levels, config.vocab_size, kind)
            for levels in trees
            for kind in ("sft", "dpo")
        ] + real
        data["sizes"][size] = [
            measure(config, workload, rounds, math.inf if arguments.rounds else _MEASURE_S)
            for workload in workloads
            if (arguments.only or "") in workload.title
        ]
        if arguments.only and not data["sizes"][size]:
            titles = "; ".join(workload.title for workload in workloads)
            parser.error(f"--only: no title holds {arguments.only!r}; there are: {titles}")
        if "trl" in parts and not on_gpu:
            trl_rounds = 1 if quick else rounds
            data["trl"][size] = against_trl(size, leaves=16, rounds=trl_rounds)
    if real:
        data["host_tokens_per_s"] = host_rate(real)
        print(f"laying out: {data['host_tokens_per_s'] / 1e6:.1f} M tokens/s", flush=True)
    rows = [row for table in data["sizes"].values() for row in table]
    titles = {workload.title for workload in real}
    data["ratios"] = {
        "packed_over_ideal_min": min((row["over_ideal"] for row in rows), default=None),
        "packed_over_possible_min": min((row["over_possible"] for row in rows), default=None),
        **{
            "packed_vs_trl_16" + (f"_{size}" if size != "s" else ""): row and row["ratio"]
            for size, row in data["trl"].items()
        },
        "packed_vs_unpacked_real": min(
            (row["measured"] for row in rows if row["title"] in titles), default=None
        ),
    }
    print(json.dumps(data["ratios"]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
