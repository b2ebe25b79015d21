"""The weak and the strong model of a run: shape, tokenizer, base, and parameters by stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from w2sjax import models, parallel
from w2sjax.chat import ChatTemplate
from w2sjax.checkpoints import load_params, save_params
from w2sjax.pipeline.blocks import without_ids
from w2sjax.pipeline.manifests import Stage
from w2sjax.pipeline.storage import filled_locally
from w2sjax.types import Policy, Trajectory

PARAMS = "params"  # of what a stage trained: all parameters, or the adapters alone
EXPORT = "hf"  # the same as a Hugging Face directory
_HOW = ("param_dtype", "compute_dtype", "remat", "attention")  # set beside any shape
_SAMPLE = 2**20  # bytes of each file that a checkpoint is recognised by


def is_checkpoint(model: str) -> bool:
    """Whether config.models.weak or strong is a directory rather than a preset."""
    return model not in models.PRESETS


def shapes(
    c: ml_collections.ConfigDict, which: str, vocab_size: int | None
) -> tuple[models.ModelConfig, models.ModelConfig]:
    """What the section `models` of a config makes of a model.

    Args:
      c: the section.
      which: "weak" or "strong".
      vocab_size: tokens of a preset's tokenizer; None for a published shape's own vocabulary.
        Checkpoints bring theirs.

    Returns:
      The plain shape, and the one that is trained: with adapters, where they are asked for.

    Raises:
      ValueError: the checkpoint's config cannot be read, or its context is shorter than
        `max_length`.
    """
    changes = {field: c[field] for field in _HOW}
    if is_checkpoint(c[which]):
        plain = models.read_config(c[which], **changes)
        if c.max_length > plain.max_length:
            raise ValueError(
                f"config.models.max_length is {c.max_length}, but {c[which]} was made for "
                f"{plain.max_length} tokens"
            )
    else:
        plain = models.preset(c[which], vocab_size=vocab_size, max_length=c.max_length, **changes)
    lora = None
    if c.lora_rank:
        lora = models.Lora(c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_targets)
    return plain, dataclasses.replace(plain, lora=lora)


def fingerprint(path: str) -> dict[str, Any]:
    """What a checkpoint directory is recognised by: per file its size and the hash of its start."""
    found = {}
    for file in sorted(Path(path).iterdir()):
        if file.suffix in (".json", ".safetensors", ".jinja", ".model"):
            with file.open("rb") as data:
                start = hashlib.sha256(data.read(_SAMPLE)).hexdigest()
            found[file.name] = [file.stat().st_size, start]
    return found


class Agent:
    """One of the two models of a run.

    Attributes:
      template: its tokenizer and chat template.
      base: the stage that its trainings start from; set once it is known.
      plain: its shape.
      tuned: its shape while it is trained and after: with adapters, where config.models asks for
        them.
      reads_sampled_ids: whether its tokenizer is that of the model that sampled the rollouts.
    """

    def __init__(
        self, which: str, config: ml_collections.ConfigDict, mesh: Mesh, template: ChatTemplate
    ):
        c = config.models
        self.template, self.base, self.reads_sampled_ids = template, None, True
        self._mesh, self._which = mesh, which
        self._export = c.export
        self._several = jax.process_count() > 1
        self._own_mesh = parallel.local_mesh(mesh)  # where each of several processes acts alone
        self.source = c[which] if is_checkpoint(c[which]) else None
        self.plain, self.tuned = shapes(c, which, template.vocab_size)
        if template.vocab_size > self.plain.vocab_size:
            raise ValueError(
                f"{self.source}: its tokenizer has {template.vocab_size} tokens, its model only "
                f"{self.plain.vocab_size}"
            )

    def as_read(self, episodes: Sequence[Trajectory]) -> list[Trajectory]:
        """Episodes as this model reads them: without the sampled token ids, where those are another
        tokenizer's; the text says the same.
        """
        if self.reads_sampled_ids:
            return list(episodes)

        return list(map(without_ids, episodes))

    def policy(self, stage: Stage) -> Policy:
        """The model's functions for what a stage holds."""
        return models.make_policy(self.plain if stage is self.base else self.tuned)

    def load(self, stage: Stage, *, alone: bool = False) -> chex.ArrayTree:
        """A finished stage's parameters, born where they will live: on the mesh, or of several
        processes on this one's devices alone.
        """
        if stage is self.base:
            return self._base(alone)
        if self.tuned.lora is None:
            return self._read(stage, self.plain, None, alone)
        return {"base": self._base(alone), "lora": self._read(stage, self.tuned, "lora", alone)}

    def start(self, stage: Stage, *, seed: int) -> tuple[Policy, chex.ArrayTree]:
        """The model's functions and parameters where a training starts; adapters are drawn from the
        seed.
        """
        if stage is not self.base or self.tuned.lora is None:
            return self.policy(stage), self.load(stage)
        init = functools.partial(models.init_params, self.tuned)
        abstract = models.abstract_params(self.tuned)
        shardings = parallel.param_shardings(abstract, self._rules, self._mesh)
        draw = jax.jit(lambda key: init(key)["lora"], out_shardings=shardings["lora"])
        params = {"base": self._base(False), "lora": draw(jax.random.key(seed))}
        return models.make_policy(self.tuned), params

    def init(self, seed: int) -> tuple[Policy, chex.ArrayTree]:
        """The plain model with fresh parameters, sharded from the start."""
        init = functools.partial(models.init_params, self.plain)
        params = parallel.init_sharded(init, self._rules, self._mesh, jax.random.key(seed))
        return models.make_policy(self.plain), params

    def save(self, directory: epath.Path, trained: chex.ArrayTree) -> None:
        """Writes what a training changed, and the Hugging Face directory where it is asked for."""
        save_params(directory / PARAMS, trained, overwrite=True)
        if not self._export or self.base is None:  # pretraining, which other runs share
            return
        with filled_locally(directory / EXPORT, upload=jax.process_index() == 0) as local:
            if "lora" in trained:
                base = self.source or f"the stage of the pretrained {self._which} model"
                models.save_peft(local, self.tuned, trained, base=base, overwrite=True)
            else:
                tokenizer = self.template.tokenizer
                models.save_hf(local, self.plain, trained, tokenizer, overwrite=True)

    _rules = models.PARTITION_RULES

    @functools.cache  # noqa: B019 (an Agent lives as long as its run; so shall its frozen base)
    def _kept_base(self, alone: bool) -> chex.ArrayTree:
        return self._read_base(alone)

    def _base(self, alone: bool) -> chex.ArrayTree:
        """The base's parameters; kept where adapters leave them as they are."""
        alone = alone and self._several
        return self._read_base(alone) if self.tuned.lora is None else self._kept_base(alone)

    def _read_base(self, alone: bool) -> chex.ArrayTree:
        if self.source is None:
            return self._read(self.base, self.plain, None, alone)
        changes = {field: getattr(self.plain, field) for field in _HOW}
        mesh = self._own_mesh if alone else self._mesh
        return models.load_hf(self.source, mesh=mesh, **changes)[1]

    def _read(
        self, stage: Stage, config: models.ModelConfig, part: str | None, alone: bool
    ) -> chex.ArrayTree:
        abstract = models.abstract_params(config)
        mesh = self._own_mesh if alone else self._mesh
        shardings = parallel.param_shardings(abstract, self._rules, mesh)
        like = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        )
        like = like if part is None else {part: like[part]}
        params = load_params(stage.directory / PARAMS, like, alone=alone and self._several)
        return params if part is None else params[part]
