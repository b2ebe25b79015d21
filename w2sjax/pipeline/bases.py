"""What the two models of a run start from: checkpoints, or pretraining on transcripts of play."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from w2sjax.chat import ChatTemplate, load_tokenizer, save_tokenizer, train_bpe
from w2sjax.envs import PlayRequest
from w2sjax.pipeline.agents import Agent, fingerprint, is_checkpoint
from w2sjax.pipeline.blocks import EPISODES, join_episodes, read_episodes
from w2sjax.pipeline.episodes import Episodes
from w2sjax.pipeline.manifests import Stage
from w2sjax.pipeline.stages import Stages
from w2sjax.pipeline.storage import filled_locally, read_locally, write_json
from w2sjax.pipeline.training import Training, to_sequences
from w2sjax.sampling import read_trajectories


def make_agents(stages: Stages, episodes: Episodes, training: Training) -> dict[str, Agent]:
    """The weak and the strong model, each with the stage that its trainings start from.

    Presets are pretrained first, on unlabelled play of mixed skill, whose text their tokenizer
    comes from too; checkpoints are taken as they are, and known by their files.

    Raises:
      ValueError, OSError: a checkpoint that cannot be read.
    """
    config = training.config
    sources = {which: config.models[which] for which in ("weak", "strong")}
    transcripts = None
    if not all(map(is_checkpoint, sources.values())):
        transcripts = _transcripts(stages, episodes)
    agents = {}
    for which, source in sources.items():
        kept = source if is_checkpoint(source) else transcripts.directory / "tokenizer"
        with read_locally(epath.Path(kept)) as directory:
            template = ChatTemplate(load_tokenizer(directory))
        agent = agents[which] = Agent(which, config, training.mesh, template)
        if is_checkpoint(source):
            facts = {"checkpoint": str(Path(source).absolute()), "files": fingerprint(source)}
            make = functools.partial(_write_facts, facts)
            agent.base = stages.run(f"checkpoint_{which}", (), {}, make, facts=facts)
        else:
            agent.base = _pretrained(which, agent, transcripts, stages, training)
    sampler, reader = (agents[which].template.tokenizer for which in ("weak", "strong"))
    agents["strong"].reads_sampled_ids = sampler.get_vocab() == reader.get_vocab()
    return agents


def _write_facts(facts: Mapping[str, Any], directory: epath.Path) -> Mapping[str, Any]:
    write_json(directory / "checkpoint.json", facts)
    return {"checkpoint": facts["checkpoint"]}


def _transcripts(stages: Stages, episodes: Episodes) -> Stage:
    """Unlabelled play of mixed skill, and the tokenizer trained on its text."""
    config = episodes.config

    def make(directory: epath.Path) -> dict[str, Any]:
        c = config.pretrain
        with episodes.pool(slots=max(1, config.env.workers)) as pool:
            rng = random.Random(c.seed)
            requests = [
                PlayRequest(task, rng.uniform(c.random_low, c.random_high), c.seed + copy)
                for task in pool.task_ids("pretrain", c.tasks)
                for copy in range(c.per_task)
            ]
            return episodes.play(directory, pool, requests, policy_name="player")

    def finish(directory: epath.Path, shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        facts = join_episodes(directory, shares)
        texts = []
        for episode in read_trajectories(directory / EPISODES):
            texts += [episode.instruction, episode.first_observation]
            texts += [text for step in episode.steps for text in (step.answer, step.observation)]
        tokenizer = train_bpe(texts, vocab_size=config.tokenizer.vocab_size)
        with filled_locally(directory / "tokenizer") as local:
            save_tokenizer(tokenizer, local)
        return facts | {"vocab_size": len(tokenizer)}

    fields = ("env.name", "env.options", "tokenizer", "pretrain.seed", "pretrain.tasks",
              "pretrain.per_task", "pretrain.random_low", "pretrain.random_high")  # fmt: skip
    return stages.run("transcripts", fields, {}, make, finish=finish, shared=True)


def _pretrained(
    which: str, agent: Agent, transcripts: Stage, stages: Stages, training: Training
) -> Stage:
    """A preset's model after pretraining."""
    config = training.config

    def make(directory: epath.Path) -> dict[str, Any]:
        c = config.pretrain
        examples = to_sequences(
            agent.template,
            read_episodes(transcripts),
            config.models.max_length,
            all_tokens=c.loss_on == "all",
        )
        return training.fit_sft(
            directory,
            f"pretraining, {which}",
            agent,
            *agent.init(c.seed),
            examples,
            steps=c[f"{which}_steps"],
            learning_rate=c.learning_rate,
            per_batch=c.trajectories,
            seed=c.seed,
            source="the stage transcripts",
            packing="tree",  # whatever the config says: both ways start from the same models
        )

    fields = ("pretrain", f"models.{which}", "models.max_length", "models.param_dtype",
              "models.compute_dtype", "models.remat", "models.attention", "train.optimizer",
              "train.schedule", "train.warmup_steps", "train.weight_decay", "train.clip_norm",
              "train.accumulate", "train.ema_decay", "mesh", "batches.shapes",
              "batches.round_to")  # fmt: skip
    inputs = {"transcripts": transcripts}
    name = f"pretrained_{which}"
    return stages.run(name, fields, inputs, make, shared=True, together=True)
