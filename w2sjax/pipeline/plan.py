"""What a config needs on each device, told before anything is started."""

from __future__ import annotations

from typing import Any

import jax
import ml_collections

from w2sjax import models, parallel, report, train
from w2sjax.config import PREFERENCE_METHODS, validate
from w2sjax.pipeline.agents import is_checkpoint, shapes


def plan(
    config: ml_collections.ConfigDict, *, num_devices: int | None = None
) -> dict[str, models.MemoryPlan]:
    """Prints the memory plan of the weak and the strong model; starts and writes nothing.

    The batch is the largest that any training of the model may have; a preference batch counts with
    a row for each side of a pair, the most that it may take. The vocabulary of a model that is
    trained from scratch is `config.tokenizer.vocab_size`, the most that its tokenizer may have;
    published shapes are planned with their own.

    Args:
      config: as for `run`.
      num_devices: how many to assume, which need not be there; those that are there where None.

    Returns:
      "weak" and "strong" → `models.MemoryPlan`, bytes on each device.

    Raises:
      ValueError: an impossible setting, or a mesh that does not go with the devices or the model.
    """
    validate(config)
    if num_devices is None:
        num_devices = jax.device_count()
    elif num_devices < 1:
        raise ValueError(f"a plan needs 1 device or more; got {num_devices}")
    mesh = parallel.mesh_sizes(**config.mesh, num_devices=num_devices)
    parts = mesh["data"] * mesh["fsdp"]
    plans, columns = {}, {}
    for which, wanted in _sequences(config).items():
        model = config.models[which]
        own = model in models.PUBLISHED or is_checkpoint(model)
        _, shape = shapes(config.models, which, None if own else config.tokenizer.vocab_size)
        # A micro-batch is on the devices at a time.
        rows = -(-wanted // (parts * config.train.accumulate)) * parts
        plans[which] = models.plan_memory(
            shape,
            _optimizer(config.train),
            mesh=mesh,
            rows=rows,
            row_length=config.models.max_length,
            slots=config.sampler.slots,
            cache_length=config.models.max_length,
        )
        columns[f"{which}: {config.models[which]}"] = _column(config, shape, rows, plans[which])
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.items())
    title = f"memory per device, on {num_devices} ({sizes})"
    report.CONSOLE.print(report.plan_table(title, columns))
    return plans


def _sequences(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Sequences of the largest batch that each model is trained on."""
    strong = max(config.pretrain.trajectories, config.train.trajectories)
    if set(PREFERENCE_METHODS) & set(config.methods):
        strong = max(strong, 2 * config.train.pairs)
    return {"weak": max(config.pretrain.trajectories, config.weak.trajectories), "strong": strong}


def _optimizer(c: ml_collections.ConfigDict) -> Any:
    return train.make_optimizer(
        c.optimizer,
        learning_rate=c.learning_rate,
        total_steps=c.steps,
        schedule=c.schedule,
        weight_decay=c.weight_decay,
        clip_norm=c.clip_norm,
        ema_decay=c.ema_decay,
    )


def _column(
    config: ml_collections.ConfigDict,
    shape: models.ModelConfig,
    rows: int,
    plan: models.MemoryPlan,
) -> dict[str, dict[str, str | int]]:
    """Section → label → text, or a number of bytes."""
    heads = f"{shape.num_heads} heads ({shape.num_kv_heads})"
    moments = {f"  {name}": size for name, size in plan.moments.items()}
    trained = "all" if shape.lora is None else f"adapters of rank {shape.lora.rank}"
    return {
        "model": {
            "layers × width": f"{shape.num_layers} × {shape.width}, {heads}",
            "parameters": f"{shape.num_params:,}",
            "trained": trained,
            "stored, computed in": f"{shape.param_dtype}, {shape.dtype.name}",
            "remat, attention": f"{shape.remat}, {shape.attention}",
            "sequences × tokens": f"{rows} × {config.models.max_length}",
            "slots × tokens": f"{config.sampler.slots} × {config.models.max_length}",
        },
        "training": {
            "parameters": plan.parameters,
            f"optimizer ({config.train.optimizer})": plan.optimizer,
            "gradients": plan.gradients,
            "activations kept": plan.activations,
            "one block": plan.block,
            "logits": plan.logits,
            "beside parameters and optimizer": "",
            **moments,
            "sum, training": plan.training,
        },
        "sampling": {
            "parameters": plan.parameters,
            "cache": plan.cache,
            "while the cache grows": plan.growth,
            "one step": plan.step,
            "sum, sampling": plan.sampling,
        },
    }
