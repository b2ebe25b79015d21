"""How fast are SFT and DPO steps? Against TRL and tunix on CPU; on a GPU, against its own ceiling.

    python benchmarks/train_step.py [--quick] [--json FILE] [--sizes s,m] [--rounds 5]

**On CPU**: one random Llama-shaped checkpoint, written by transformers, is loaded by all; the same
8 pairs of random tokens (512 of shared prompt, 128 of answer each; --quick: 1 pair of 128 and 64),
float32, forward, backward, clip, AdamW. SFT learns the answers of the same rows. Laying out a batch
counts. Peers are left out where they are not installed. TRL is driven as its `Trainer` does:
collator, `training_step`, clipping, optimizer. tunix's Llama rotates with base 10⁶ whatever its
config says, so the checkpoint has that.
Before anything is timed, the losses of the first two updates must agree to 10⁻³: the second one
has seen gradients, clipping and AdamW. In DPO the reference is another checkpoint than the policy,
or every first loss would be log 2.

A DPO step has two parts, timed apart: the reference's log-probabilities and the update. TRL and
tunix compute the former again in each step (TRL can do it once, by `precompute_ref_log_probs`),
w2sjax once for each pair, however many epochs follow. The ratio `dpo_vs_…` has both parts on both
sides; `dpo_update_vs_…` has the update alone. Contenders alternate; times are medians, warm; ratios
above 1 say that this library is faster. On a shared machine compare the best times as well, which
are printed beside: torch's threads wait for each other and suffer most from company.

**On a GPU** there are no peers: tokens/s and utilisation of a 1B and an 8B shape, random weights,
bfloat16, rows of 4096, full fine-tuning and LoRA. What does not fit is said.

**Model FLOPs** of a step: 6·N per token, N the parameters that are multiplied (all but an untied
input embedding), and 12·layers·width·L for attention, width being that of all heads, which
causality halves. A forward pass is a third of it. LoRA: 4·N for the base, which has no weight
gradients, 6·N for the adapters. What is computed again in the backward pass does not count, and the
output layer counts for each token, also for those whose loss has weight 0: leaving those out is a
gain. Utilisation (MFU) is that over the ceiling, a large matrix product in the same precision,
measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import (
    BETA,
    GPU_SHAPES,
    SHAPES,
    Pairs,
    alternating,
    check_losses,
    installed_peers,
    make_pairs,
    optimizer,
    ours,
    preference_loader,
    sft_loader,
    write_checkpoints,
)

from w2sjax import batches, losses, models, train

METHODS = {"full": None, "lora": models.Lora()}
_CPU_PRODUCT, _GPU_PRODUCT = 2048, 16_384

# ----------------------------------------------------------------------------------- measurements


def model_flops(config: models.ModelConfig, tokens: int, length: int, *, forward: bool = False):
    """Model FLOPs of a step, or of a forward pass, on rows of one length: see the module.

    Args:
      config: the model's shape; with `lora` the step is one that trains adapters alone.
      tokens: of the batch.
      length: of a row.
      forward: no backward pass.

    Returns:
      A number.
    """
    multiplied = config.num_params
    if not config.tie_embeddings:
        multiplied -= config.vocab_size * config.width
    attention = 6 * config.num_layers * config.num_heads * config.head_size * length
    if config.lora is None:
        per_token = 6 * multiplied + attention
        return tokens * (per_token / 3 if forward else per_token)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(config)["lora"]))
    if forward:
        return tokens * (2 * (multiplied + adapters) + attention / 3)
    return tokens * (4 * multiplied + 6 * adapters + attention)


def matrix_products(size: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Large square products, 2·size³ FLOPs each: by XLA and, on CPU, by torch; both warm."""
    left, right = jnp.ones((2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    functions = {"xla": lambda: jax.block_until_ready(product(left, right))}
    if jax.default_backend() == "cpu":
        with contextlib.suppress(ImportError):
            import torch

            torch_left, torch_right = torch.ones((2, size, size), dtype=getattr(torch, dtype))
            functions["torch"] = lambda: torch_left @ torch_right
    alternating(functions, 1)
    return functions


def ceiling(size: int, times: dict[str, list[float]]) -> float:
    """FLOP/s of the fastest of all products that were timed; prints each contender's."""
    rates = {name: 2 * size**3 / min(took) for name, took in times.items()}
    shown = ", ".join(f"{name} {rate / 1e12:.3f}" for name, rate in rates.items())
    print(f"  matrix product of {size}: at best {shown} TFLOP/s", flush=True)
    return max(rates.values())


def compare(
    shape: dict[str, Any], *, num_pairs: int, prompt: int, answer: int, rounds: int
) -> dict[str, Any]:
    """Times and ratios of one model on CPU; the ceiling is measured in the same rounds."""
    products = matrix_products(_CPU_PRODUCT, "float32")
    with tempfile.TemporaryDirectory() as directory:
        paths = write_checkpoints(Path(directory), shape)
        config = models.read_config(paths[0])
        pairs = make_pairs(num_pairs, config.vocab_size, prompt=prompt, answer=answer)
        contenders = {"ours": ours(*paths, pairs)}
        contenders |= {name: make(*paths, pairs) for name, make in installed_peers()}
        found_losses = check_losses(contenders)
        functions = {
            (name, kind): getattr(contender, kind)
            for kind in ("sft", "reference", "dpo")
            for name, contender in contenders.items()
        }
        functions |= {(name, "product"): function for name, function in products.items()}
        times = alternating(functions, rounds)
    peak = ceiling(_CPU_PRODUCT, {name: times.pop((name, "product")) for name in products})
    tokens, length = pairs.rows.size, pairs.rows.shape[1]
    step = model_flops(config, tokens, length)
    scoring = model_flops(config, tokens, length, forward=True)
    result: dict[str, Any] = {"losses": found_losses, "ceiling_tflops": peak / 1e12}
    middle, best = _seconds(times, statistics.median), _seconds(times, min)
    for name, seconds in middle.items():
        result[name] = {
            **{f"{part}_s": value for part, value in seconds.items()},
            "sft_tokens_per_s": tokens / seconds["sft"],
            "sft_mfu": step / seconds["sft"] / peak,
            "dpo_tokens_per_s": tokens / seconds["dpo"],
            "dpo_mfu": (step + scoring) / seconds["dpo"] / peak,
            "all_s": {kind: times[name, kind] for kind in ("sft", "reference", "dpo")},
        }
        print(
            "  {name:5s} SFT {sft_s:7.3f} s, {sft_tokens_per_s:6.0f} tokens/s, MFU {sft_mfu:.2f};"
            " DPO {dpo_s:7.3f} s = reference {reference_s:.3f} + update {dpo_update_s:.3f},"
            " {dpo_tokens_per_s:6.0f} tokens/s, MFU {dpo_mfu:.2f}".format(
                name=name, **result[name]
            ),
            flush=True,
        )
    result["ratios"], result["ratios_of_best"] = _ratios(middle), _ratios(best)
    for title, ratios in (("medians", result["ratios"]), ("best times", result["ratios_of_best"])):
        if ratios:
            shown = ", ".join(f"{name} {value:.2f}×" for name, value in ratios.items())
            print(f"  {title}: {shown}", flush=True)
    return result


def _seconds(
    times: dict[tuple[str, str], list[float]], pick: Callable[[list[float]], float]
) -> dict[str, dict[str, float]]:
    """Contender → seconds of SFT, of the reference, of the DPO update, of both together."""
    table: dict[str, dict[str, float]] = {}
    for (name, kind), values in times.items():
        table.setdefault(name, {})["dpo_update" if kind == "dpo" else kind] = pick(values)
    for row in table.values():
        row["dpo"] = row["reference"] + row["dpo_update"]
    return table


def _ratios(seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Theirs over ours."""
    return {
        f"{part}_vs_{name}": row[part] / seconds["ours"][part]
        for name, row in seconds.items()
        if name != "ours"
        for part in ("sft", "dpo", "dpo_update")
    }


# -------------------------------------------------------------------------------------------- GPU


def make_update(
    config: models.ModelConfig, params: Any, loss_fn: losses.LossFn
) -> Callable[[batches.LoadedBatch], float]:
    """The trainer's update, of all parameters or of adapters where there are some; what trains is
    copied, `params["base"]` is kept.
    """
    tx = optimizer()
    step = train.make_train_step(models.make_score_fn(config), loss_fn, tx)
    trained, frozen = params, None
    if config.lora is not None:
        trained, frozen = {"lora": params["lora"]}, {"base": params["base"]}
    held = [train.init_state(trained, tx)]

    def update(loaded: batches.LoadedBatch) -> float:
        state, metrics = step(held.pop(), loaded.batch, loaded.extras, frozen)
        held.append(jax.block_until_ready(state))
        return float(metrics["loss"])

    return update


def measure_alone(
    config: models.ModelConfig, pairs: Pairs, *, rounds: int, peak: float
) -> dict[str, float]:
    """SFT and DPO of one model without peers; all parameters, or adapters where it has them.

    The reference is the start, for adapters the base, scored once before the updates.
    """
    draw = jax.jit(functools.partial(models.init_params, config))
    start = functools.partial(draw, jax.random.key(0))
    result, logps = _time_reference(config, start(), pairs, rounds)
    preference_loss = functools.partial(losses.preference_loss, beta=BETA)
    flops = model_flops(config, pairs.rows.size, pairs.rows.shape[1])
    for kind, loss_fn, loader in (
        ("sft", losses.sft_loss, sft_loader(pairs)),
        ("dpo", preference_loss, preference_loader(pairs, logps)),
    ):
        # No name for the parameters here: a state is a copy, and at 8B every copy counts.
        update = functools.partial(make_update(config, start(), loss_fn), loader.batch(0))
        result[f"{kind}_first_loss"] = update()  # compiles
        took = statistics.median(alternating({kind: update}, rounds)[kind])
        del update
        result[f"{kind}_s"] = took
        result[f"{kind}_tokens_per_s"] = pairs.rows.size / took
        result[f"{kind}_tflops"] = flops / took / 1e12
        result[f"{kind}_mfu"] = flops / took / peak
    return result


def _time_reference(
    config: models.ModelConfig, params: Any, pairs: Pairs, rounds: int
) -> tuple[dict[str, float], np.ndarray]:
    """Median time of scoring the pairs, and float32 [3P] log-probabilities."""
    if config.lora is not None:
        config, params = models.without_adapters(config), params["base"]
    scorer = train.make_sequence_scorer(
        models.make_score_fn(config), rows_per_batch=1, row_length=pairs.rows.shape[1], share=False
    )
    score = functools.partial(scorer, params, *batches.pair_parts(pairs.sequences()))
    logps = score()  # compiles
    return {"reference_s": statistics.median(alternating({"": score}, rounds)[""])}, logps


def gpu_table(
    shapes: dict[str, models.ModelConfig],
    *,
    num_pairs: dict[str, int],
    length: int,
    rounds: int,
    peak: float,
    methods: dict[str, models.Lora | None] = METHODS,
) -> dict[str, dict[str, Any]]:
    """Full fine-tuning and LoRA of each shape.

    Args:
      shapes: name → model.
      num_pairs: name → pairs in a batch, two rows each.
      length: tokens of a row, half of them prompt.
      rounds: how often each step is timed.
      peak: FLOP/s of the ceiling.
      methods: name → adapters, or None to train all parameters.

    Returns:
      "name full" or "name lora" → figures, or {"error": why there are none}.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        pairs = make_pairs(
            num_pairs[name], shape.vocab_size, prompt=length // 2, answer=length - length // 2
        )
        for method, lora in methods.items():
            config = dataclasses.replace(shape, lora=lora)
            title = f"{name} {method}"
            try:
                table[title] = measure_alone(config, pairs, rounds=rounds, peak=peak)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                table[title] = {"error": "does not fit into this device's memory"}
                print(f"  {title:8s} {table[title]['error']}", flush=True)
                continue
            print(
                f"  {title:8s}"
                + " SFT {sft_tokens_per_s:8.0f} tokens/s, MFU {sft_mfu:.3f};"
                " DPO update {dpo_tokens_per_s:8.0f} tokens/s, MFU {dpo_mfu:.3f};"
                " reference, once, {reference_s:.3f} s".format(**table[title]),
                flush=True,
            )
    return table


def main() -> None:
    """Prints the comparison or the table, and writes it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: s alone, one short pair"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--sizes", help="on CPU: models, of s (5 M) and m (30 M), with commas")
    parser.add_argument("--rounds", type=int, help="on CPU: how often each contender is timed")
    arguments = parser.parse_args()
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    print(f"load {load:.1f} on {cores} cores before the start", flush=True)
    if jax.default_backend() == "cpu":
        sizes, setting = ["s", "m"], dict(num_pairs=8, prompt=512, answer=128, rounds=5)
        if arguments.quick:
            sizes, setting = ["s"], dict(num_pairs=1, prompt=128, answer=64, rounds=9)
        sizes = arguments.sizes.split(",") if arguments.sizes else sizes
        setting["rounds"] = arguments.rounds or setting["rounds"]
        settings = {}
        for size in sizes:
            print(
                size + ": {num_pairs} pairs of {prompt} + {answer} tokens".format(**setting),
                flush=True,
            )
            settings[size] = compare(SHAPES[size], **setting)
        data = {"ratios": settings[sizes[-1]]["ratios"], "settings": settings, **setting}
    else:
        times = alternating(matrix_products(_GPU_PRODUCT, "bfloat16"), 10)
        peak = ceiling(_GPU_PRODUCT, times)
        shapes = {"1b": GPU_SHAPES["1b"]} if arguments.quick else GPU_SHAPES
        pairs = {"1b": 2, "8b": 1}
        table = gpu_table(shapes, num_pairs=pairs, length=4096, rounds=5, peak=peak)
        data = {"ratios": {}, "table": table, "ceiling_tflops": peak / 1e12}
    data |= {
        "device": jax.devices()[0].device_kind,
        "cores": cores,
        "load_before": load,
    }
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)


if __name__ == "__main__":
    main()
