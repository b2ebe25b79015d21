"""Stages that train: from episodes to sequences or pairs, and from those to parameters. Each
reports what it left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Examples(NamedTuple):
    """What a training learns from."""

    items: list  # `batches.Sequence` or `batches.PairSequences`
    groups: list[int]  # the task of each, as a number
    too_long: int  # how many were left out because they are longer than config.models.max_length


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
        examples: Examples,
        *,
        steps: int,
        learning_rate: float,
        per_batch: int,
        seed: int,
        source: str,
        packing: str | None = None,
    ) -> dict[str, Any]:
        """Maximum likelihood on weighted sequences; writes `params` and `metrics.jsonl`. `packing`
        stands in for the config's."""
        _require(examples, title, source)
        loading = self._loading(examples, steps, seed)
        loader = batches.sft_batches(
            examples.items,
            sequences_per_batch=self._rounded(per_batch),
            **loading | {"packing": packing or loading["packing"]},
        )
        self._fit(
            directory, title, agent, policy, params, losses.sft_loss, loader, steps, learning_rate
        )
        return {"sequences": len(examples.items)} | self._facts(examples, loader)

    def fit_preference(
        self,
        directory: epath.Path,
        title: str,
        agent: Agent,
        policy: Policy,
        params: Any,
        examples: Examples,
        *,
        steps: int,
        seed: int,
        source: str,
    ) -> dict[str, Any]:
        """A preference loss against the frozen start `params`, whose log-probabilities are computed
        once and kept in the directory.
        """
        _require(examples, title, source)
        c = self.config.train
        extras = {}
        if c.preference_loss != "simpo":
            extras["ref_logps"] = self._reference_logps(directory, policy, params, examples.items)
        loader = batches.preference_batches(
            examples.items,
            pairs_per_batch=self._rounded(c.pairs, shards=1),
            extras=extras,
            **self._loading(examples, steps, seed),
        )
        loss = self._preference_loss()
        rate = c.preference_learning_rate
        self._fit(directory, title, agent, policy, params, loss, loader, steps, rate)
        return {"pairs": len(examples.items)} | self._facts(examples, loader)

    def _reference_logps(
        self, directory: epath.Path, policy: Policy, params: Any, pairs: Sequence
    ) -> np.ndarray:
        """float32 [P, 3], of the three paths of each pair (see `batches.pair_parts`)."""
        length = batches.round_length(self.config.models.max_length)
        scorer = train.make_sequence_scorer(
            policy.score_fn,
            rows_per_batch=self._shards,
            row_length=max(length, 1024),
            mesh=self.mesh,
            share=self.config.batches.packing == "tree",
        )
        sequences, parts = batches.pair_parts(pairs)
        scores = train.cached_scores(
            directory / "reference_logps.npz",
            lambda: scorer(params, sequences, parts),
            sequences,
            parts,
        )
        return scores.reshape(3, -1).T

    @functools.cache  # noqa: B019 (one Training per run; the cache should live as long as it does)
    def _preference_loss(self) -> losses.LossFn:
        c = self.config.train
        return functools.partial(
            losses.preference_loss,
            beta=c.beta,
            loss_type=c.preference_loss,
            label_smoothing=c.label_smoothing,
            margin=c.simpo_margin,
            sft_weight=c.chosen_sft_weight,
            length_normalized=c.length_normalized,
        )

    @property
    def _shards(self) -> int:
        """Parts that the mesh splits rows into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _rounded(self, per_batch: int, *, shards: int | None = None) -> int:
        """Examples of a batch, rounded up to what micro-batches and the mesh can split."""
        parts = (self._shards if shards is None else shards) * self.config.train.accumulate
        return -(-per_batch // parts) * parts

    def _loading(self, examples: Examples, steps: int, seed: int) -> dict[str, Any]:
        """What both loaders are told."""
        c = self.config
        return dict(
            total_steps=steps,
            seed=seed,
            max_length=c.models.max_length,
            groups=examples.groups,
            micro_batches=c.train.accumulate,
            num_rows=self._shards,
            packing=c.batches.packing,
            num_shapes=c.batches.shapes,
            round_to=c.batches.round_to,
        )

    @staticmethod
    def _facts(examples: Examples, loader: batches.BatchLoader) -> dict[str, Any]:
        return {
            "left_out_too_long": examples.too_long,
            "steps_per_epoch": round(loader.steps_per_epoch(), 2),
            "fill_rate": round(loader.fill_rate(), 3),
            "sharing": round(loader.sharing(), 2),
            "row_lengths": list(loader.shapes),
        }

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
                policy.score_fn,
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
) -> Examples:
    """Episodes as weighted token sequences.

    Args:
      template: turns text into tokens.
      episodes: E of them; those that broke (env_error, policy_error) are no sequences.
      max_length: longer sequences are left out.
      step_weights: float32 [E, T], what each answer's tokens count; all 1 where None. What follows
        the last answer that counts is cut off; an episode without any is not a sequence.
      all_tokens: what the environment said counts as well (pretraining).

    Returns:
      `Examples` of sequences.
    """
    sequences, groups, too_long = [], [], 0
    tasks = _numbered(episodes)
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
        groups.append(tasks[index])
    return Examples(sequences, groups, too_long)


def to_pairs(
    template: ChatTemplate,
    episodes: Sequence[Trajectory],
    max_length: int,
    arrays: dict[str, np.ndarray],
) -> Examples:
    """Pairs of continuations as pairs of sequences; a side's tokens before its first step are
    context.

    Args:
      template: turns text into tokens.
      episodes: what the indices point into.
      max_length: pairs with a longer side are left out.
      arrays: int [P] each: `chosen`, `rejected` (episodes), `start` and, of either, `…_end`
      (steps).

    Returns:
      `Examples` of pairs.
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

    pairs, groups, too_long = [], [], 0
    tasks = _numbered(episodes)
    for row in range(len(arrays["chosen"])):
        sides = {
            name: side(*(int(arrays[key][row]) for key in (name, "start", f"{name}_end")))
            for name in ("chosen", "rejected")
        }
        if max(map(len, sides.values())) > max_length:
            too_long += 1
        else:
            pairs.append(batches.PairSequences(**sides))
            groups.append(tasks[int(arrays["chosen"][row])])
    return Examples(pairs, groups, too_long)


def _numbered(episodes: Sequence[Trajectory]) -> list[int]:
    """The task of each episode, numbered in the order of appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(episode.task_id, len(numbers)) for episode in episodes]


def _require(examples: Examples, stage: str, source: str) -> None:
    if not examples.items:
        why = (
            f"all {examples.too_long} examples are longer than config.models.max_length"
            if examples.too_long
            else "it has no example (its counts are in its manifest.json, under facts)"
        )
        raise ValueError(
            f"stage {stage}: nothing to train on. It takes its examples from {source}, and {why}. "
            "More or better weak rollouts (config.rollouts.per_task, config.tasks.train, "
            "config.weak.steps) give more; or drop the method from config.methods."
        )
