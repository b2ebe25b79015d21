"""How fast are SFT and DPO steps? Against TRL and tunix on CPU; on a GPU, against its own ceiling.

    python benchmarks/train_step.py [--quick] [--json FILE]

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
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from w2sjax import batches, losses, models, train

BETA, RATE, CLIP = 0.1, 1e-4, 1.0
TOLERANCE = 1e-3
_CPU_PRODUCT, _GPU_PRODUCT = 2048, 16_384

# Fields of transformers' LlamaConfig.
SHAPES: dict[str, dict[str, Any]] = {
    "s": dict(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "m": dict(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
}
_BFLOAT16 = dict(param_dtype="bfloat16", compute_dtype="bfloat16")
GPU_SHAPES = {
    "1b": models.preset("1b", vocab_size=128_256, **_BFLOAT16),
    "8b": models.ModelConfig(
        vocab_size=128_256,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14_336,
        max_length=4096,
        rope_theta=500_000.0,
        tie_embeddings=False,
        remat="full",
        **_BFLOAT16,
    ),
}
METHODS = {"full": None, "lora": models.Lora()}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Random pairs: tokens of P prompts and of their answers."""

    prompt: np.ndarray  # int32 [P, L]
    chosen: np.ndarray  # int32 [P, A]
    rejected: np.ndarray  # int32 [P, A]

    @property
    def rows(self) -> np.ndarray:
        """int32 [2P, L + A], the chosen sides first."""
        answers = np.concatenate([self.chosen, self.rejected])
        return np.concatenate([np.concatenate([self.prompt] * 2), answers], axis=1)

    def sides(self) -> list[batches.Sequence]:
        """The rows as sequences, of which the answer counts."""
        weights = np.arange(self.rows.shape[1]) >= self.prompt.shape[1]
        return [batches.Sequence(row, weights) for row in self.rows]

    def sequences(self) -> list[batches.PairSequences]:
        """The same, chosen beside rejected."""
        sides, half = self.sides(), len(self.prompt)
        return [batches.PairSequences(*pair) for pair in zip(sides[:half], sides[half:])]  # noqa: B905


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is timed, as functions that return when the work is done."""

    sft: Callable[[], float]  # one SFT update; its loss
    reference: Callable[[], None]  # log-probabilities of all pairs under the reference
    dpo: Callable[[], float]  # one DPO update after `reference`; its loss


def make_pairs(num_pairs: int, vocab_size: int, *, prompt: int, answer: int) -> Pairs:
    """Draws tokens; 0 to 2 are left to padding and the like."""
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.integers, 3, vocab_size, dtype=np.int32)
    return Pairs(*(draw((num_pairs, length)) for length in (prompt, answer, answer)))


def write_checkpoints(directory: Path, shape: dict[str, Any]) -> tuple[Path, Path]:
    """Writes random policy and reference checkpoints; returns where."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        **shape,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    paths = directory / "policy", directory / "reference"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).float().save_pretrained(path)
    return paths


def preference_loader(pairs: Pairs, logps: np.ndarray) -> batches.BatchLoader:
    """All pairs as one batch, with the reference's log-probabilities, float32 [3P], of the paths
    that `batches.pair_parts` lists.
    """
    return batches.preference_batches(
        pairs.sequences(),
        pairs_per_batch=len(pairs.prompt),
        seed=0,
        total_steps=1,
        extras={"ref_logps": logps.reshape(3, -1).T},
        packing="none",
    )


def sft_loader(pairs: Pairs) -> batches.BatchLoader:
    """Both sides of all pairs as one batch."""
    sides = pairs.sides()
    return batches.sft_batches(
        sides, sequences_per_batch=len(sides), total_steps=1, seed=0, packing="none"
    )


# ------------------------------------------------------------------------------------ contenders


def optimizer() -> optax.GradientTransformation:
    """What every contender's optimizer is."""
    return train.make_optimizer(
        "adamw", learning_rate=RATE, total_steps=1000, schedule="constant", clip_norm=CLIP
    )


def ours(policy: Path, reference: Path, pairs: Pairs) -> Contender:
    """As the trainer does it with `batches.packing = none`, a row for each sequence, so that all do
    the same work; the reference is scored once. What packing saves is in benchmarks/packing.py.
    """
    layers = models.read_config(policy).num_layers
    changes = dict(compute_dtype="float32", unroll=layers)
    config, params = models.load_hf(policy, **changes)
    _, reference_params = models.load_hf(reference, **changes)
    score_fn, tx = models.make_score_fn(config), optimizer()
    preference_loss = functools.partial(losses.preference_loss, beta=BETA)
    sft_step = train.make_train_step(score_fn, losses.sft_loss, tx)
    dpo_step = train.make_train_step(score_fn, preference_loss, tx)
    scorer = train.make_sequence_scorer(
        score_fn, rows_per_batch=len(pairs.rows), row_length=pairs.rows.shape[1], share=False
    )
    start = train.init_state(params, tx)
    states = {"sft": start, "dpo": jax.tree.map(jnp.copy, start)}
    loaders = {"sft": sft_loader(pairs)}

    def update(name: str, step: train.TrainStep) -> float:
        loaded = loaders[name].batch(0)
        states[name], metrics = step(states[name], loaded.batch, loaded.extras)
        jax.block_until_ready(states[name])
        return float(metrics["loss"])

    def score() -> None:
        loaders["dpo"] = preference_loader(
            pairs, scorer(reference_params, *batches.pair_parts(pairs.sequences()))
        )

    return Contender(lambda: update("sft", sft_step), score, lambda: update("dpo", dpo_step))


def trl(policy: Path, reference: Path, pairs: Pairs) -> Contender:
    """TRL's trainers, stepped as `transformers.Trainer` steps them."""
    import datasets
    import tokenizers
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    options = dict(
        output_dir=str(policy.parent / "trl"),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        weight_decay=0.0,
        gradient_checkpointing=False,  # TRL's default saves memory and costs time
        bf16=False,
        use_cpu=True,
        report_to="none",
        max_length=None,
    )
    prompt, chosen, rejected = (array.tolist() for array in dataclasses.astuple(pairs))
    rows, half = pairs.rows.tolist(), len(prompt)
    ignored = [-100] * len(prompt[0])
    sft_examples = [{"input_ids": row, "labels": ignored + row[len(ignored) :]} for row in rows]
    dpo_examples = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
        for p, c, r in zip(prompt, chosen, rejected, strict=True)
    ]
    sft_trainer = SFTTrainer(
        load(policy),
        args=SFTConfig(**options),
        train_dataset=datasets.Dataset.from_list(sft_examples[:1]),
        processing_class=tokenizer,
    )
    # Tokens are given to the collator; the trainer only wants to see some data.
    text = {"prompt": "<bos>", "chosen": "<eos>", "rejected": "<eos>"}
    dpo_trainer = DPOTrainer(
        load(policy),
        load(reference),
        args=DPOConfig(**options, beta=BETA),
        train_dataset=datasets.Dataset.from_list([text]),
        processing_class=tokenizer,
    )
    # The reference is timed apart: the same forward pass as in the step without this switch.
    dpo_trainer.precompute_ref_logps = True

    def prepare(trainer: Any) -> None:
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(
            trainer.model, trainer.optimizer
        )
        trainer.current_gradient_accumulation_steps = 1

    def update(trainer: Any, examples: list[dict[str, Any]]) -> float:
        loss = trainer.training_step(trainer.model, trainer.data_collator(examples))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        return float(loss.detach())

    def score() -> None:
        inputs = dpo_trainer.data_collator(
            [{key: example[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
             for example in dpo_examples]
        )  # fmt: skip
        logps = dpo_trainer.compute_ref_log_probs(dpo_trainer.ref_model, inputs)
        for index in range(half):
            dpo_examples[index]["ref_chosen_logps"] = float(logps[0][index])
            dpo_examples[index]["ref_rejected_logps"] = float(logps[1][index])

    prepare(sft_trainer)
    prepare(dpo_trainer)
    return Contender(
        lambda: update(sft_trainer, sft_examples),
        score,
        lambda: update(dpo_trainer, dpo_examples),
    )


def tunix(policy: Path, reference: Path, pairs: Pairs) -> Contender:
    """tunix's trainers: what their `train` does with a batch, without its logging."""
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params
    from tunix.rl import common
    from tunix.sft import peft_trainer
    from tunix.sft.dpo import dpo_trainer

    shape = models.read_config(policy)
    config = llama.ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.width,
        hidden_dim=shape.mlp_width,
        num_heads=shape.num_heads,
        head_dim=shape.head_size,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=int(shape.rope_theta),
        norm_eps=shape.norm_eps,
        weight_tying=shape.tie_embeddings,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def load(path: Path) -> Any:
        return llama_params.create_model_from_safe_tensors(
            str(path), config, mesh=mesh, dtype=jnp.float32
        )

    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE, weight_decay=0.0))
    sft_trainer = peft_trainer.PeftTrainer(
        load(policy), tx, peft_trainer.TrainingConfig(eval_every_n_steps=1000)
    )

    def sft_input(example: peft_trainer.TrainingInput) -> dict[str, Any]:
        everything = jnp.ones(example.input_tokens.shape, bool)
        return {
            "input_tokens": example.input_tokens,
            "input_mask": example.input_mask,
            "positions": common.build_positions_from_mask(everything),
            "attention_mask": common.make_causal_attn_mask(everything),
        }

    sft_trainer = sft_trainer.with_gen_model_input_fn(sft_input)
    preference_trainer = dpo_trainer.DPOTrainer(
        load(policy),
        load(reference),
        tx,
        dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1000, beta=BETA),
    )
    steps = {
        trainer: trainer.jit_train_and_eval_step(cache_nnx_graph=True)[0]
        for trainer in (sft_trainer, preference_trainer)
    }
    learned = np.arange(pairs.rows.shape[1]) >= pairs.prompt.shape[1]
    prepared: dict[str, Any] = {}

    def update(trainer: Any, example: Any) -> float:
        loss, _, norm = steps[trainer](example)
        jax.block_until_ready(norm)
        return float(loss)

    def sft() -> float:
        rows = pairs.rows
        mask = np.broadcast_to(learned, rows.shape)
        return update(sft_trainer, peft_trainer.TrainingInput(input_tokens=rows, input_mask=mask))

    def score() -> None:
        ones = functools.partial(np.ones_like, dtype=np.int32)
        example = preference_trainer._prepare_inputs(
            dpo_trainer.TrainingInput(
                prompt_ids=pairs.prompt,
                prompt_mask=ones(pairs.prompt),
                chosen_ids=pairs.chosen,
                chosen_mask=ones(pairs.chosen),
                rejected_ids=pairs.rejected,
                rejected_mask=ones(pairs.rejected),
            )
        )
        prepared["example"] = jax.block_until_ready(example)

    return Contender(sft, score, lambda: update(preference_trainer, prepared["example"]))


PEERS = {"trl": ("trl", trl), "tunix": ("tunix.sft.dpo.dpo_trainer", tunix)}


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


def alternating(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each function took; in each round all have their turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def installed_peers() -> Iterator[tuple[str, Callable[..., Contender]]]:
    """Those that can be imported; says which cannot."""
    for name, (module, make) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
        else:
            yield name, make


def check_losses(contenders: dict[str, Contender]) -> dict[str, list[float]]:
    """Two updates of each kind; raises unless all contenders have the same losses.

    Returns:
      "sft" and "dpo" → this library's losses before the first and the second update.

    Raises:
      AssertionError: they differ by more than `TOLERANCE`, relative.
    """
    for contender in contenders.values():
        contender.reference()
    found = {}
    for kind in ("sft", "dpo"):
        of = {
            name: [getattr(contender, kind)() for _ in range(2)]
            for name, contender in contenders.items()
        }
        for name, values in of.items():
            np.testing.assert_allclose(
                values, of["ours"], rtol=TOLERANCE, err_msg=f"{kind} losses: {name} against ours"
            )
        shown = ", ".join(f"{name} {a:.6f} {b:.6f}" for name, (a, b) in of.items())
        verdict = "agree" if len(of) > 1 else "(no peer to compare with)"
        print(f"  {kind} losses of the first two updates {verdict}: {shown}", flush=True)
        found[kind] = of["ours"]
    return found


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
    arguments = parser.parse_args()
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    print(f"load {load:.1f} on {cores} cores before the start", flush=True)
    if jax.default_backend() == "cpu":
        sizes, setting = ["s", "m"], dict(num_pairs=8, prompt=512, answer=128, rounds=5)
        if arguments.quick:
            sizes, setting = ["s"], dict(num_pairs=1, prompt=128, answer=64, rounds=9)
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
