"""Training steps of this library, of TRL and of tunix, on the same checkpoint and the same pairs.

What `train_step.py` and `packing.py` compare; how each is driven is told in the former.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
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


def alternating(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each function took; in each round all have their turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(0.3)  # threads of the one before spin for a while
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
