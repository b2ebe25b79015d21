"""The order of the stages.

    transcripts → pretrained weak and strong model   (cached, shared by seeds and methods)
    demonstrations → weak policy → rollouts → trees → search → targets
    targets → one trained model per method → episodes on held-out tasks → report

Every stage reads directories and writes one, atomically, with a manifest: a matching manifest means
skip. Inside a stage, episodes go on by block and training by step. Several processes train together
and share the episodes' blocks; everything else is done by the first of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import traceback
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from w2sjax import evaluate, report
from w2sjax.checkpoints import absolute_path
from w2sjax.config import PREFERENCE_METHODS, SFT_METHODS, validate
from w2sjax.envs import PlayRequest, make_env
from w2sjax.pipeline import forest as forests
from w2sjax.pipeline.agents import Agent
from w2sjax.pipeline.bases import make_agents
from w2sjax.pipeline.blocks import given_episodes, join_episodes, read_episodes, write_episodes
from w2sjax.pipeline.branching import in_rounds, join_rounds, sample_rounds
from w2sjax.pipeline.episodes import Episodes
from w2sjax.pipeline.manifests import CACHE, Stage, claim_workdir, stage_facts
from w2sjax.pipeline.processes import Processes, agree
from w2sjax.pipeline.stages import Stages
from w2sjax.pipeline.storage import in_bucket, load_arrays, read_json, save_arrays, write_json
from w2sjax.pipeline.training import Training, to_pairs, to_sequences
from w2sjax.sampling import EpisodeRequest, dump_trajectories
from w2sjax.train.termination import remembered_interrupts
from w2sjax.types import Trajectory

# What a run reports as one sentence; the whole story goes to error.log in the workdir.
USER_ERRORS = (ValueError, OSError, FloatingPointError, RuntimeError, ImportError)

_DRAWS = ("temperature", "top_k", "top_p", "min_p")  # of the section `rollouts`

# Fields that decide how a run goes on, not what comes out: they may change between two runs.
_HOW = ("cache_dir", "env.workers", "env.timeout_s", "env.max_restarts", "train.checkpoint_every")


def run(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], *, start_over: bool = False
) -> dict[str, Any]:
    """Runs every stage that is not done yet.

    Args:
      config: from a file of `configs/`; see `config.default_config` for its fields.
      workdir: where everything goes; belongs to one config. May be in a bucket (`gs://…`). All
        processes see it and the cache, where there are several.
      start_over: delete what another config left there.

    Returns:
      The report, as written to `workdir/report.json`.

    Raises:
      ValueError: an impossible setting, a workdir of another config, a stage with nothing to work
      on.
      OSError: the workdir cannot be written.
      FloatingPointError: a loss became NaN or infinite; the last good checkpoint is kept.
      TrainingInterrupted: SIGTERM or Ctrl-C came during training; the same call goes on from there.
    """
    workdir = absolute_path(workdir)
    problem = settings = None
    try:
        validate(config)
        _check_environment(config)
        settings = _settings(config)
        if jax.process_index() == 0:
            claim_workdir(workdir, settings, start_over=start_over)
    except USER_ERRORS as error:
        problem = error
    agree(problem)
    if jax.process_index() > 0:
        report.CONSOLE.quiet = True
    processes = Processes(workdir)
    cache = cache_directory(config, workdir)
    jax.config.update("jax_compilation_cache_dir", os.fspath(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        with (
            remembered_interrupts(),
            contextlib.closing(Episodes(config, processes)) as episodes,
        ):
            return _Run(config, settings, workdir, cache, processes, episodes).all_stages()
    except USER_ERRORS as error:
        told = processes.told(error)
        number = processes.index
        log = workdir / (f"error.{number}.log" if number else "error.log")
        log.write_text(traceback.format_exc())
        told.add_note(f"The whole story is in {log}")
        if told is not error:
            raise told from error
        raise
    except BaseException as error:
        processes.report_failure(error)
        raise


def _settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All that decides results, as JSON values."""
    settings = json.loads(config.to_json())
    for field in _HOW:
        *path, last = field.split(".")
        del functools.reduce(dict.__getitem__, path, settings)[last]
    return settings


def _check_environment(config: ml_collections.ConfigDict) -> None:
    """Asks for all tasks of a run, and for episodes from elsewhere, before anything is made.

    Raises:
      ValueError: unknown environment or split, an impossible option, or more tasks than there are;
      episodes that cannot be read, or are of held-out tasks.
      FileNotFoundError: no file of episodes.
    """
    c = config
    env = make_env(c.env.name, **c.env.options.to_dict())
    try:
        for split, count in (
            ("pretrain", c.pretrain.tasks),
            ("demos", c.tasks.demonstrations),
            ("train", c.tasks.train),
            (c.tasks.held_out_split, c.tasks.held_out),
        ):
            tasks = env.task_ids(split, count)
    finally:
        env.close()
    if c.rollouts.path:
        given_episodes(c.rollouts.path, tasks)


def cache_directory(config: ml_collections.ConfigDict, workdir: epath.Path) -> epath.Path:
    """Where pretrained models and compiled programs are kept: config, $W2SJAX_CACHE, or the
    user's; beside the results where those are in a bucket.
    """
    chosen = config.cache_dir or os.environ.get("W2SJAX_CACHE")
    if not chosen and in_bucket(workdir):
        return workdir / CACHE
    if not chosen:
        chosen = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/w2sjax"
    return absolute_path(os.path.expanduser(chosen))


class _Run:
    """One run of the main job: settings, places, and the stages done so far."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        settings: dict[str, Any],
        workdir: epath.Path,
        cache: epath.Path,
        processes: Processes,
        episodes: Episodes,
    ):
        self.config = config
        self.workdir = workdir
        self.episodes = episodes
        self.processes = processes
        self.training = Training(config)
        self.stages = Stages(settings, workdir, cache, self.training.mesh, processes)
        self.room: dict[str, Any] = {}

    # ------------------------------------------------------------------------------ the order

    def all_stages(self) -> dict[str, Any]:
        """Runs or skips every stage, in order."""
        c = self.config
        self.agents = make_agents(self.stages, self.episodes, self.training)
        weak = self._weak_policy()
        strong = self.agents["strong"].base
        policies = {"weak": weak, "strong": strong} | self._trained(strong, weak)
        scores: dict[str, dict[str, evaluate.Scores]] = {mode: {} for mode in c.evaluate.modes}
        for name in c.methods:
            for mode in c.evaluate.modes:
                stage = self._evaluated(name, mode, policies[name])
                tasks = read_json(stage.directory / "tasks.json")
                scores[mode][name] = evaluate.task_scores(read_episodes(stage), tasks)
        return self._reported(scores)

    def _weak_policy(self) -> Stage:
        c, agent = self.config, self.agents["weak"]
        demonstrations = self.stages.run(
            "demonstrations",
            ("env.name", "env.options", "seed", "tasks.demonstrations"),
            {},
            functools.partial(self._make_expert_episodes, "demos", c.tasks.demonstrations),
            finish=join_episodes,
        )

        def make(directory: epath.Path) -> dict[str, Any]:
            examples = self._sequences(agent, read_episodes(demonstrations))
            return self.training.fit_sft(
                directory,
                "weak policy",
                agent,
                *agent.start(agent.base, seed=c.seed),
                examples,
                steps=c.weak.steps,
                learning_rate=c.weak.learning_rate,
                per_batch=c.weak.trajectories,
                seed=c.seed,
                source="the stage demonstrations",
            )

        inputs = {"base": agent.base, "demonstrations": demonstrations}
        fields = ("seed", "weak", "train", "mesh", "models", "batches")
        return self.stages.run("weak", fields, inputs, make, together=True)

    def _trained(self, strong: Stage, weak: Stage) -> dict[str, Stage]:
        """The strong model, trained once per method."""
        c = self.config
        trained: dict[str, Stage] = {}
        if "ceiling" in c.methods:
            experts = self.stages.run(
                "expert_episodes",
                ("env.name", "env.options", "seed", "tasks.train"),
                {},
                functools.partial(self._make_expert_episodes, "train", c.tasks.train),
                finish=join_episodes,
            )
            trained["ceiling"] = self._sft_method("ceiling", strong, experts, None, c.train.steps)
        sft = [name for name in SFT_METHODS if name in c.methods and name != "ceiling"]
        preference = [name for name in PREFERENCE_METHODS if name in c.methods]
        if not sft + preference:
            return trained
        rollouts = self._rollouts(weak)
        trees = self.stages.run(
            "trees", ("trees", "gate"), {"rollouts": rollouts},
            functools.partial(self._make_trees, rollouts),
        )  # fmt: skip
        self.room = stage_facts(trees)
        for warning in self.room["warnings"]:
            report.CONSOLE.print(f"  warning: {warning}", markup=False)
        search = self.stages.run(
            "search", ("search",), {"trees": trees}, functools.partial(self._make_search, trees)
        )
        targets = self.stages.run(
            "targets", ("seed", "targets"), {"trees": trees, "search": search},
            functools.partial(self._make_targets, trees, search),
        )  # fmt: skip
        for name in sft:
            trained[name] = self._sft_method(name, strong, rollouts, targets, c.train.steps)
        for name in preference:
            source = PREFERENCE_METHODS[name]
            steps = c.train.steps - c.train.preference_steps
            reference = self._sft_method(
                source, strong, rollouts, targets, steps, stage_name=f"reference_{source}"
            )
            trained[name] = self._preference_method(name, reference, rollouts, targets)
        return trained

    def _rollouts(self, weak: Stage) -> Stage:
        """The episodes that trees are made of: the weak policy's, or those of a file."""
        if path := self.config.rollouts.path:
            episodes = given_episodes(path, ())
            digest = hashlib.blake2b(dump_trajectories(episodes), digest_size=12).hexdigest()
            make = functools.partial(write_episodes, episodes=episodes)
            return self.stages.run("rollouts", (), {}, make, facts={"episodes": digest})
        fields = ("env", "seed", "rollouts", "models.max_length", "tasks.train", "sampler")
        finish = join_episodes
        if in_rounds(self.config.rollouts):
            fields += ("trees",)
            finish = functools.partial(join_rounds, settings=self.config.rollouts)
        make = functools.partial(self._make_rollouts, weak)
        return self.stages.run("rollouts", fields, {"weak": weak}, make, finish=finish)

    # ----------------------------------------------------------------------------- the stages

    def _make_expert_episodes(
        self, split: str, count: int, directory: epath.Path
    ) -> dict[str, Any]:
        c = self.config
        with self.episodes.pool(slots=max(1, c.env.workers)) as pool:
            requests = [PlayRequest(task, 0.0, c.seed) for task in pool.task_ids(split, count)]
            return self.episodes.play(directory, pool, requests, policy_name="expert")

    def _make_rollouts(self, weak: Stage, directory: epath.Path) -> dict[str, Any]:
        c, agent = self.config, self.agents["weak"]
        with self.episodes.pool(slots=c.sampler.slots) as pool:
            tasks = pool.task_ids("train", c.tasks.train)
            policy, params = agent.policy(weak), agent.load(weak, alone=True)

            def sample(requests, title, first_block=0):
                return self.episodes.sample(
                    directory,
                    title,
                    agent.template,
                    policy,
                    params,
                    pool,
                    requests,
                    draws={name: c.rollouts[name] for name in _DRAWS},
                    policy_name="weak",
                    seed=c.seed,
                    first_block=first_block,
                )

            if in_rounds(c.rollouts):
                return sample_rounds(directory, tasks, sample, c, self.processes)
            requests = [EpisodeRequest(t, r) for t in tasks for r in range(c.rollouts.per_task)]
            return sample(requests, "weak rollouts")

    def _make_trees(self, rollouts: Stage, directory: epath.Path) -> dict[str, Any]:
        forest = forests.build_forest(read_episodes(rollouts), merge_on=self.config.trees.merge_on)
        forests.save_forest(directory / "trees.npz", forest)
        c = self.config
        first = c.rollouts.root_rollouts if in_rounds(c.rollouts) else None
        return forests.room(forest, c.gate, root_rollouts=first)

    def _make_search(self, trees: Stage, directory: epath.Path) -> dict[str, Any]:
        forest = forests.load_forest(trees.directory / "trees.npz")
        save_arrays(directory / "values.npz", forests.search_forest(forest, **self.config.search))
        return {"trees": len(forest.episode)}

    def _make_targets(self, trees: Stage, search: Stage, directory: epath.Path) -> dict[str, Any]:
        c = self.config
        forest = forests.load_forest(trees.directory / "trees.npz")
        values = load_arrays(search.directory / "values.npz")
        made = forests.make_targets(forest, values, c.targets, seed=c.seed)
        for name, (arrays, _) in made.items():
            save_arrays(directory / f"{name}.npz", arrays)
        return {name: counts for name, (_, counts) in made.items()}

    def _sft_method(
        self,
        target: str,
        strong: Stage,
        episodes: Stage,
        targets: Stage | None,
        steps: int,
        *,
        stage_name: str | None = None,
    ) -> Stage:
        c, agent = self.config, self.agents["strong"]
        stage_name = stage_name or target

        def make(directory: epath.Path) -> dict[str, Any]:
            weights = None
            if targets is not None:
                weights = load_arrays(targets.directory / f"{target}.npz")["step_weights"]
            examples = self._sequences(agent, read_episodes(episodes), step_weights=weights)
            return self.training.fit_sft(
                directory,
                f"training, {stage_name}",
                agent,
                *agent.start(strong, seed=c.seed),
                examples,
                steps=steps,
                learning_rate=c.train.learning_rate,
                per_batch=c.train.trajectories,
                seed=c.seed,
                source=f"the target {target} of stage targets" if targets else "expert_episodes",
            )

        inputs = {"start": strong, "episodes": episodes}
        inputs |= {"targets": targets} if targets is not None else {}
        fields = ("seed", "train", "mesh", "models", "batches")
        return self.stages.run(f"train/{stage_name}", fields, inputs, make, together=True)

    def _preference_method(
        self, name: str, reference: Stage, rollouts: Stage, targets: Stage
    ) -> Stage:
        c, agent = self.config, self.agents["strong"]
        target = "dpo" if name == "dpo" else "tree_dpo"

        def make(directory: epath.Path) -> dict[str, Any]:
            examples = to_pairs(
                agent.template,
                agent.as_read(read_episodes(rollouts)),
                c.models.max_length,
                load_arrays(targets.directory / f"{target}.npz"),
            )
            return self.training.fit_preference(
                directory,
                f"training, {name}",
                agent,
                *agent.start(reference, seed=c.seed),
                examples,
                steps=c.train.preference_steps,
                seed=c.seed,
                source=f"the target {target} of stage targets",
            )

        inputs = {"reference": reference, "rollouts": rollouts, "targets": targets}
        fields = ("seed", "train", "mesh", "models", "batches")
        return self.stages.run(f"train/{name}", fields, inputs, make, together=True)

    def _evaluated(self, name: str, mode: str, policy: Stage) -> Stage:
        c, agent = self.config, self.agents["weak" if name == "weak" else "strong"]

        def make(directory: epath.Path) -> dict[str, Any]:
            with self.episodes.pool(slots=c.sampler.slots) as pool:
                tasks = list(pool.task_ids(c.tasks.held_out_split, c.tasks.held_out))
                if jax.process_index() == 0:
                    write_json(directory / "tasks.json", tasks)
                return self.episodes.sample(
                    directory,
                    f"evaluating, {name} ({mode})",
                    agent.template,
                    agent.policy(policy),
                    agent.load(policy, alone=True),
                    pool,
                    [EpisodeRequest(task, 0) for task in tasks],
                    draws={"temperature": c.evaluate.temperature if mode == "sampled" else 0.0},
                    policy_name=name,
                    seed=c.seed,
                )

        fields = ("env", "seed", "tasks.held_out", "tasks.held_out_split", "sampler",
                  "rollouts.max_new_tokens", "rollouts.stop", "models.max_length")  # fmt: skip
        fields += ("evaluate.temperature",) if mode == "sampled" else ()
        return self.stages.run(
            f"evaluate/{name}.{mode}", fields, {"policy": policy}, make, finish=join_episodes
        )

    def _reported(self, scores: Mapping[str, Mapping[str, evaluate.Scores]]) -> dict[str, Any]:
        c = self.config
        comparisons = {
            mode: evaluate.compare(by_method, num_resamples=c.evaluate.bootstrap)
            for mode, by_method in scores.items()
        }
        record = report.build_report(
            comparisons,
            headline=c.evaluate.headline,
            stages=self.stages.done,
            room=self.room,
            settings={
                "name": c.name,
                "seed": c.seed,
                "held_out": c.tasks.held_out,
                "split": c.tasks.held_out_split,
                "train_steps": c.train.steps,
                "left_out": report.left_out(
                    {stage.name: stage_facts(stage) for stage in self.stages.done}
                ),
            },
        )
        if jax.process_index() > 0:
            return record
        write_json(self.workdir / "report.json", record)
        (self.workdir / "report.md").write_text(report.render_markdown(record))
        for table in report.terminal_tables(record):
            report.CONSOLE.print(table)
        report.CONSOLE.print(
            f"Results: {self.workdir}/report.md and report.json, beside a directory per stage.",
            markup=False,
        )
        return record

    def _sequences(self, agent: Agent, episodes: list[Trajectory], **options: Any):
        return to_sequences(
            agent.template,
            agent.as_read(episodes),
            self.config.models.max_length,
            **options,
        )
