"""Stages that train: from episodes to sequences or pairs, and from those to parameters. Each
reports what it left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from w2sjax import batches, losses, models, parallel, train
from w2sjax.chat import ChatTemplate
from w2sjax.pipeline.agents import Agent
from w2sjax.report import progress_bar
from w2sjax.types import Policy, Trajectory

_STATES = "states"  # training states of a run that goes on; removed when it is done


class Training:
    """The mesh and the compiled updates that stages share."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config
        self.mesh = parallel.make_mesh(**self.config.mesh)
        self._train_steps: dict[tuple, train.TrainStep] = {}

    # ------------------------------------------------------------------------------ training

    def fit_sft(
        self,
        directory: epath.Path,
        title: str,
        agent: Agent,
        policy: Policy,
        params: Any,
        sequences: Sequence[batches.Sequence],
        *,
        steps: int,
        learning_rate: float,
        rows: int,
        seed: int,
        source: str,
        too_long: int,
    ) -> dict[str, Any]:
        """Maximum likelihood on weighted sequences; writes `params` and `metrics.jsonl`."""
        _require(sequences, title, source, too_long)
        loader = batches.sft_batches(
            sequences,
            rows_per_batch=self._rows(rows),
            row_length=self.config.models.max_length,
            seed=seed,
            micro_batches=self.config.train.accumulate,
        )
        self._fit(
            directory, title, agent, policy, params, losses.sft_loss, loader, steps, learning_rate
        )
        return {
            "sequences": len(sequences),
            "left_out_too_long": too_long,
            "steps_per_epoch": round(loader.steps_per_epoch(), 2),
            "fill_rate": round(loader.fill_rate(), 3),
        }

    def fit_preference(
        self,
        directory: epath.Path,
        title: str,
        agent: Agent,
        policy: Policy,
        params: Any,
        pairs: Sequence[batches.PairSequences],
        *,
        steps: int,
        seed: int,
        source: str,
        too_long: int,
    ) -> dict[str, Any]:
        """DPO against the frozen start `params`, whose log-probabilities are computed once."""
        _require(pairs, title, source, too_long)
        c = self.config.train
        length = self.config.models.max_length
        scorer = train.make_sequence_scorer(
            policy.apply_fn, rows_per_batch=self._rows(8), row_length=length, mesh=self.mesh
        )
        extras = {
            f"ref_{side}_logps": scorer(params, [getattr(pair, side) for pair in pairs])
            for side in ("chosen", "rejected")
        }
        loader = batches.preference_batches(
            pairs,
            pairs_per_batch=c.pairs,
            row_length=length,
            seed=seed,
            total_steps=steps,
            extras=extras,
            rows_multiple=self._rows(1),
            micro_batches=c.accumulate,
        )
        loss = self._preference_loss()
        rate = c.preference_learning_rate
        self._fit(directory, title, agent, policy, params, loss, loader, steps, rate)
        return {
            "pairs": len(pairs),
            "left_out_too_long": too_long,
            "steps_per_epoch": round(loader.steps_per_epoch(), 2),
        }

    @functools.cache  # noqa: B019 (one Training per run; the cache should live as long as it does)
    def _preference_loss(self) -> losses.LossFn:
        c = self.config.train
        return functools.partial(
            losses.preference_loss, beta=c.beta, sft_weight=c.chosen_sft_weight
        )

    def _rows(self, rows: int) -> int:
        """Rows rounded up to what the mesh and micro-batches can split."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config.train.accumulate
        return -(-rows // shards) * shards

    def _fit(
        self, directory, title, agent, policy, params, loss, loader, steps: int, learning_rate
    ) -> None:
        c = self.config.train
        tx = train.make_optimizer(
            c.optimizer,
            learning_rate=learning_rate,
            total_steps=steps,
            warmup_steps=min(c.warmup_steps, steps - 1),
            schedule=c.schedule,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
            ema_decay=c.ema_decay,
        )
        # Lengths and rates of trainings are data of their states, so one program serves them all.
        key = (policy, loss)
        if key not in self._train_steps:
            step = train.make_train_step(
                policy.apply_fn,
                loss,
                tx,
                mesh=self.mesh,
                accumulate=c.accumulate,
                dropout_seed=self.config.seed if "lora" in params else None,
            )
            self._train_steps[key] = step
        frozen = None
        if "lora" in params:
            frozen, params = {"base": params["base"]}, {"lora": params["lora"]}
        shardings = parallel.param_shardings(params, models.PARTITION_RULES, self.mesh)
        state = train.init_state(params, tx, mesh=self.mesh, param_shardings=shardings)
        with progress_bar(title, steps, "steps") as update:
            result = train.fit(
                state,
                self._train_steps[key],
                loader,
                total_steps=steps,
                frozen=frozen,
                checkpoint_dir=directory / _STATES,
                checkpoint_every=c.checkpoint_every,
                keep=1,
                metrics_path=directory / "metrics.jsonl",
                on_step=lambda step, _total, metrics: update(step, f"loss {metrics['loss']:.3f}"),
            )
        agent.save(directory, train.averaged_params(result.state))
        if jax.process_index() == 0:
            epath.Path(directory / _STATES).rmtree()


def to_sequences(
    template: ChatTemplate,
    episodes: Sequence[Trajectory],
    max_length: int,
    *,
    step_weights: np.ndarray | None = None,
    all_tokens: bool = False,
) -> tuple[list[batches.Sequence], int]:
    """Episodes as weighted token sequences.

    Args:
      template: turns text into tokens.
      episodes: E of them; those that broke (env_error, policy_error) are no sequences.
      max_length: longer sequences are left out.
      step_weights: float32 [E, T], what each answer's tokens count; all 1 where None. What follows
        the last answer that counts is cut off; an episode without any is not a sequence.
      all_tokens: what the environment said counts as well (pretraining).

    Returns:
      The sequences, and how many were left out because they are too long.
    """
    sequences, too_long = [], 0
    for index, episode in enumerate(episodes):
        if not episode.status.scored:
            continue  # it broke; it may be empty, or have more steps than T
        if step_weights is not None and not step_weights[index].any():
            continue  # not chosen
        encoded = template.encode_trajectory(episode)
        if all_tokens:
            weights = np.ones(len(encoded.tokens), np.float32)
            weights[0] = 0.0
        else:
            weights = np.zeros(len(encoded.tokens), np.float32)
            for t, (start, end) in enumerate(
                zip(encoded.turn_start, encoded.turn_end, strict=True)
            ):
                weights[start:end] = 1.0 if step_weights is None else step_weights[index, t]
        learned = np.flatnonzero(weights)
        if not len(learned):
            continue
        end = learned[-1] + 1
        if end > max_length:
            too_long += 1
            continue
        sequences.append(batches.Sequence(encoded.tokens[:end], weights[:end]))
    return sequences, too_long


def to_pairs(
    template: ChatTemplate,
    episodes: Sequence[Trajectory],
    max_length: int,
    arrays: dict[str, np.ndarray],
) -> tuple[list[batches.PairSequences], int]:
    """Pairs of continuations as pairs of sequences; a side's tokens before its first step are
    context.

    Args:
      template: turns text into tokens.
      episodes: what the indices point into.
      max_length: pairs with a longer side are left out.
      arrays: int [P] each: `chosen`, `rejected` (episodes), `start` and, of either, `…_end`
      (steps).

    Returns:
      The pairs, and how many were left out because a side is too long.
    """

    @functools.cache
    def encode(index: int):
        return template.encode_trajectory(episodes[index])

    def side(index: int, start: int, end: int) -> batches.Sequence:
        encoded = encode(index)
        last = encoded.turn_end[end - 1]
        weights = np.zeros(last, np.float32)
        for t in range(start, end):
            weights[encoded.turn_start[t] : encoded.turn_end[t]] = 1.0
        return batches.Sequence(encoded.tokens[:last], weights)

    pairs, too_long = [], 0
    for row in range(len(arrays["chosen"])):
        sides = {
            name: side(*(int(arrays[key][row]) for key in (name, "start", f"{name}_end")))
            for name in ("chosen", "rejected")
        }
        if max(map(len, sides.values())) > max_length:
            too_long += 1
        else:
            pairs.append(batches.PairSequences(**sides))
    return pairs, too_long


def _require(items: Sequence, stage: str, source: str, too_long: int) -> None:
    if not items:
        why = (
            f"all {too_long} examples are longer than config.models.max_length"
            if too_long
            else "it has no example (its counts are in its manifest.json, under facts)"
        )
        raise ValueError(
            f"stage {stage}: nothing to train on. It takes its examples from {source}, and {why}. "
            "More or better weak rollouts (config.rollouts.per_task, config.tasks.train, "
            "config.weak.steps) give more; or drop the method from config.methods."
        )
