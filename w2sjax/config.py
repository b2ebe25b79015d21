"""Every field a run can set, its default, and what values make sense.

A config file in `configs/` calls `default_config()`, changes what it needs and returns it locked.
Only `pipeline` reads a config; the rooms get plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_collections

from w2sjax.batches import PACKINGS
from w2sjax.chat.tokenizer import SMALLEST_VOCAB
from w2sjax.losses import LOSS_TYPES
from w2sjax.models import PRESETS, Lora
from w2sjax.models.config import ATTENTION_IMPLEMENTATIONS, REMAT_POLICIES
from w2sjax.train.optim import OPTIMIZERS, SCHEDULES

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
SFT_METHODS = ("sft_all", "sft_success", "mcts", "tree_awr", "ceiling")
PREFERENCE_METHODS = {  # method → the SFT targets that its frozen reference was trained on
    "dpo": "sft_success",
    "tree_dpo": "sft_success",
    "mcts_tree_dpo": "mcts",
}
METHODS = ("weak", "strong", *SFT_METHODS[:2], "dpo", "tree_dpo", "mcts", "mcts_tree_dpo")
METHODS += ("tree_awr", "ceiling")
MODES = ("greedy", "sampled")


def default_config() -> ml_collections.ConfigDict:
    """The whole schema with defaults, unlocked; the config files lock it."""
    c = ml_collections.ConfigDict()
    c.name = "unnamed"  # names the default workdir, runs/<name>
    c.seed = 0  # of everything after pretraining; runs of several seeds share the pretrained models
    c.cache_dir = ""  # of pretrained models and programs; "": the user's folder, or the bucket
    c.methods = METHODS  # which rows of the table run

    c.env = ml_collections.ConfigDict()
    c.env.name = "household"  # a registered name, or "module:Class" of your own environment
    c.env.options = ml_collections.ConfigDict()  # keyword arguments of the environment's class
    c.env.workers = 0  # worker processes; 0 runs the environment in this process
    c.env.timeout_s = 60.0  # seconds before a silent worker is restarted
    c.env.max_restarts = 20  # worker restarts before the run gives up

    c.tasks = ml_collections.ConfigDict()  # how many tasks of each split
    c.tasks.demonstrations = 100  # expert episodes that teach the weak policy
    c.tasks.train = 400  # tasks of the weak rollouts, and of the ceiling's expert episodes
    c.tasks.held_out = 300  # tasks of the evaluation
    c.tasks.held_out_split = "test"  # "dev" while choosing settings, "test" once

    c.tokenizer = ml_collections.ConfigDict()
    c.tokenizer.vocab_size = 512  # of the BPE trained on the pretraining transcripts

    c.models = ml_collections.ConfigDict()
    # presets of w2sjax.models, or directories of checkpoints in Hugging Face's format
    c.models.weak = "xs"
    c.models.strong = "s"
    c.models.max_length = 512  # context in tokens
    c.models.param_dtype = "float32"  # or "bfloat16"; adapters are float32 either way
    c.models.compute_dtype = "auto"  # "float32", "bfloat16"; auto: float32 on CPU, else bfloat16
    c.models.remat = "none"  # what backward passes compute again; see w2sjax.models.ModelConfig
    c.models.attention = "auto"  # or "xla", "tree", "pallas", "cudnn", "splash"; see ModelConfig
    c.models.lora_rank = 0  # trains adapters of this rank beside a frozen model; 0 trains all of it
    c.models.lora_alpha = 16.0  # adapters are multiplied by alpha / rank
    c.models.lora_dropout = 0.0
    c.models.lora_targets = "attention/(query|key|value|output)"  # regex over projections
    c.models.export = False  # every trained model also as a Hugging Face directory, in its stage

    c.pretrain = ml_collections.ConfigDict()  # on unlabelled transcripts of players of mixed skill
    c.pretrain.seed = 0  # apart from `seed`, so that seeds share the pretrained models
    c.pretrain.tasks = 2000  # tasks of the split "pretrain"
    c.pretrain.per_task = 1  # transcripts of each
    c.pretrain.random_low = 0.1  # each player's share of random actions is drawn per episode
    c.pretrain.random_high = 1.0  # uniformly between these two
    c.pretrain.weak_steps = 600  # optimizer steps of the weak model
    c.pretrain.strong_steps = 1200  # of the strong model
    c.pretrain.learning_rate = 2e-3
    c.pretrain.trajectories = 6  # transcripts per batch
    c.pretrain.loss_on = "all"  # "all" tokens, or the "agent"'s only

    c.weak = ml_collections.ConfigDict()  # the weak policy: SFT of the weak model on demonstrations
    c.weak.steps = 200
    c.weak.learning_rate = 1e-3
    c.weak.trajectories = 4  # demonstrations per batch

    c.rollouts = ml_collections.ConfigDict()
    c.rollouts.per_task = 8  # R
    c.rollouts.temperature = 1.0
    c.rollouts.top_k = 0  # 0: all tokens
    c.rollouts.top_p = 1.0
    c.rollouts.min_p = 0.0
    c.rollouts.stop = ()  # texts that end an answer as its end of turn does; in evaluation too
    c.rollouts.max_new_tokens = 24  # per answer
    # a file of episodes that stand for the weak policy's own rollouts in trees and targets, such as
    # `python -m w2sjax.pipeline import` writes; "": the weak policy plays
    c.rollouts.path = ""
    # "uct": after some rollouts of each task from its root, further ones go on from nodes of its
    # tree that are chosen by UCT; for environments that replay their past exactly. "none": all
    # rollouts are from the root
    c.rollouts.branching = "none"
    # successes after which a task gets no more rollouts; what they would have cost goes to the
    # others. 0: every task gets its rollouts
    c.rollouts.stop_after = 0
    # with either of these, what all rollouts may cost: the "tokens" that per_task rollouts from the
    # root would, going by the first ones; or per_task "rollouts", some of them short
    c.rollouts.budget = "tokens"
    c.rollouts.root_rollouts = 4  # of each task, before its first tree
    c.rollouts.per_round = 2  # of each task, between two choices
    c.rollouts.exploration_weight = 0.5  # of UCT, in units of return
    c.rollouts.max_start_depth = 0  # steps, the deepest node that rollouts begin at; 0: no limit

    c.sampler = ml_collections.ConfigDict()
    c.sampler.slots = 128  # episodes in flight
    # "free": the model writes what it likes; "admissible": it chooses among the actions that the
    # environment admits, by their log-probability. In evaluation too.
    c.sampler.actions = "free"
    # episodes per file while a stage is made, and the share that a process takes at a time
    c.sampler.block = 1024

    c.trees = ml_collections.ConfigDict()
    c.trees.merge_on = "action_observation"  # or "action", "observation_history"

    c.search = ml_collections.ConfigDict()
    c.search.num_simulations = 1000  # k
    c.search.exploration_weight = 1.41  # c of UCT
    c.search.discount = 1.0  # per step

    c.targets = ml_collections.ConfigDict()
    c.targets.pair_values = "max"  # values that tree_dpo compares: "mean", "max" or "mcts"
    c.targets.min_value_gap = 0.1  # least difference of value between the sides of a pair
    c.targets.max_pairs_per_tree = 16  # tree_dpo; those of the largest gap stay
    c.targets.max_pairs_per_node = 3  # and of a single parting
    c.targets.pairing = "best_vs_each"  # which children are paired: or "best_vs_worst", "adjacent"
    c.targets.continuation = "to_end"  # what is compared below a parting: or "one_step"
    c.targets.max_pairs_per_task = 8  # dpo, randomly matched
    # a rejected side is cut to this many steps more than the chosen
    c.targets.rejected_extra_steps = 5
    c.targets.best_path_min_return = 0.0  # mcts leaves out trees whose best path returned no more
    c.targets.awr_beta = 0.2  # temperature of tree_awr's weights
    c.targets.awr_max_weight = 10.0  # they are clipped here

    c.batches = ml_collections.ConfigDict()
    # "tree": what trajectories of a batch have in common is computed once; "none": every trajectory
    # in a row of its own, with the same losses, for comparison and debugging
    c.batches.packing = "tree"
    c.batches.shapes = 3  # row lengths that a training may use, a program to compile for each
    # they are multiples of this: trainings share programs more often where it is large, and pad
    # more
    c.batches.round_to = 64

    # one budget for every method: optimizer steps at equal batch
    c.train = ml_collections.ConfigDict()
    c.train.steps = 600  # in all; a preference method's two phases add up to it
    c.train.preference_steps = 120  # of them, for dpo, tree_dpo and mcts_tree_dpo
    c.train.learning_rate = 1e-3
    c.train.preference_learning_rate = 5e-5
    c.train.trajectories = 8  # per batch
    c.train.accumulate = 1  # micro-batches that a batch is cut into
    c.train.pairs = 8  # pairs per preference batch
    c.train.preference_loss = "sigmoid"  # DPO's; or "ipo", "simpo" (which has no reference)
    c.train.beta = 0.1  # of the preference loss
    c.train.label_smoothing = 0.0  # share of pairs taken to be the wrong way round; "sigmoid" alone
    c.train.simpo_margin = 0.0  # by how much the chosen side has to win; "simpo" alone
    # log-probabilities per token instead of sums in the preference loss; "simpo" always does
    c.train.length_normalized = False
    c.train.chosen_sft_weight = 1.0  # weight of the chosen side's likelihood beside it
    c.train.optimizer = "adamw"
    c.train.schedule = "cosine"
    c.train.warmup_steps = 20
    c.train.weight_decay = 0.01
    c.train.clip_norm = 1.0
    c.train.ema_decay = 0.0  # keeps parameters averaged over updates, with this decay; 0: the last
    c.train.checkpoint_every = 200  # steps between checkpoints that a resumed run starts from

    c.mesh = ml_collections.ConfigDict()  # device counts; −1 takes what is left
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.evaluate = ml_collections.ConfigDict()
    c.evaluate.modes = MODES  # how actions are chosen
    c.evaluate.headline = "sampled"  # the mode that report.json's methods.<name> shows first
    c.evaluate.temperature = 1.0  # of the mode "sampled"
    c.evaluate.bootstrap = 2000  # resamples behind every interval

    c.gate = ml_collections.ConfigDict()  # warnings when a set-up has no room to show anything
    c.gate.min_sampled_success = 0.05  # of the weak rollouts
    c.gate.max_sampled_success = 0.8
    c.gate.min_tasks_with_success = 0.2  # share of tasks with at least one success
    c.gate.min_shared_steps = 0.1  # share of steps that merging rollouts into trees saves
    return c


def paper_recipe(c: ml_collections.ConfigDict) -> None:
    """Sets what the paper's runs with real models share (arXiv 2507.18858, and its code): adapters
    on the attention projections, rates, batch, context. For 8 devices.
    """
    c.models.max_length = 4096
    c.models.param_dtype = "bfloat16"
    c.models.compute_dtype = "bfloat16"
    c.models.remat = "full"
    c.models.lora_rank = 128
    c.models.lora_alpha = 128.0
    c.models.lora_targets = "attention/(query|key|value|output)"
    c.mesh.data = 1
    c.mesh.fsdp = 8  # parameters are split over all devices, and so are rows
    c.mesh.tensor = 1
    c.weak.learning_rate = 2e-5
    c.weak.trajectories = 32
    c.weak.steps = 60
    c.train.learning_rate = 2e-5
    c.train.preference_learning_rate = 1e-6
    c.train.trajectories = 32
    c.train.pairs = 32
    c.train.accumulate = 2
    c.train.steps = 300
    c.train.preference_steps = 100
    c.train.clip_norm = 0.5
    c.train.weight_decay = 0.0
    c.train.chosen_sft_weight = 0.0
    c.rollouts.temperature = 0.7
    c.sampler.slots = 64
    c.sampler.block = 1024
    c.evaluate.headline = "greedy"


_POSITIVE = (
    "env.timeout_s",
    "tasks.demonstrations",
    "tasks.train",
    "tasks.held_out",
    "tokenizer.vocab_size",
    "models.max_length",
    "pretrain.tasks",
    "pretrain.per_task",
    "pretrain.weak_steps",
    "pretrain.strong_steps",
    "pretrain.learning_rate",
    "pretrain.trajectories",
    "weak.steps",
    "weak.learning_rate",
    "weak.trajectories",
    "rollouts.per_task",
    "rollouts.temperature",
    "rollouts.max_new_tokens",
    "rollouts.root_rollouts",
    "rollouts.per_round",
    "sampler.slots",
    "sampler.block",
    "search.num_simulations",
    "targets.max_pairs_per_tree",
    "targets.max_pairs_per_node",
    "targets.max_pairs_per_task",
    "targets.awr_beta",
    "targets.awr_max_weight",
    "train.steps",
    "train.learning_rate",
    "train.preference_learning_rate",
    "train.trajectories",
    "train.accumulate",
    "train.pairs",
    "batches.shapes",
    "batches.round_to",
    "train.beta",
    "train.clip_norm",
    "train.checkpoint_every",
    "evaluate.temperature",
    "evaluate.bootstrap",
)
_NOT_NEGATIVE = (
    "seed",
    "env.workers",
    "env.max_restarts",
    "models.lora_rank",
    "rollouts.top_k",
    "pretrain.seed",
    "rollouts.exploration_weight",
    "rollouts.stop_after",
    "rollouts.max_start_depth",
    "search.exploration_weight",
    "targets.min_value_gap",
    "targets.rejected_extra_steps",
    "targets.best_path_min_return",
    "train.preference_steps",
    "train.chosen_sft_weight",
    "train.simpo_margin",
    "train.warmup_steps",
    "train.weight_decay",
)
_SHARES = (
    "pretrain.random_low",
    "pretrain.random_high",
    "rollouts.top_p",
    "rollouts.min_p",
    "search.discount",
    "gate.min_sampled_success",
    "gate.max_sampled_success",
    "gate.min_tasks_with_success",
    "gate.min_shared_steps",
)
_CHOICES = {
    "models.param_dtype": ("float32", "bfloat16"),
    "models.compute_dtype": ("auto", "float32", "bfloat16"),
    "models.remat": REMAT_POLICIES,
    "models.attention": ATTENTION_IMPLEMENTATIONS,
    "pretrain.loss_on": ("all", "agent"),
    "sampler.actions": ("free", "admissible"),
    "rollouts.branching": ("none", "uct"),
    "rollouts.budget": ("tokens", "rollouts"),
    "trees.merge_on": ("action_observation", "action", "observation_history"),
    "targets.pair_values": ("mean", "max", "mcts"),
    "targets.pairing": ("best_vs_each", "best_vs_worst", "adjacent"),
    "targets.continuation": ("to_end", "one_step"),
    "batches.packing": PACKINGS,
    "train.preference_loss": LOSS_TYPES,
    "evaluate.headline": MODES,
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every value that a type cannot rule out.

    Raises:
      ValueError: one sentence per impossible value, each naming the field, what it is and what it
      may be.
    """
    problems: list[str] = []

    def get(path: str):
        value = config
        for part in path.split("."):
            value = value[part]
        return value

    def require(path: str, holds: Callable, wanted: str) -> None:
        if not holds(get(path)):
            problems.append(f"config.{path} is {get(path)!r}; it must be {wanted}")

    for path in _POSITIVE:
        require(path, lambda v: v > 0, "greater than 0")
    for path in _NOT_NEGATIVE:
        require(path, lambda v: v >= 0, "0 or more")
    for path in _SHARES:
        require(path, lambda v: 0 <= v <= 1, "between 0 and 1")
    for path, choices in _CHOICES.items():
        require(path, lambda v, choices=choices: v in choices, f"one of {', '.join(choices)}")
    for path, known in (("methods", METHODS), ("evaluate.modes", MODES)):
        require(path, len, "not empty")
        require(
            path,
            lambda v, known=known: set(v) <= set(known),
            f"a tuple of some of {', '.join(known)}",
        )
        require(path, lambda v: len(set(v)) == len(v), "free of repetitions")
    for path in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        require(path, lambda v: v == -1 or v > 0, "a number of devices, or -1 for what is left")
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if axes.count(-1) > 1:
        problems.append(f"config.mesh has -1 on {axes.count(-1)} axes; at most one can be filled")
    if config.pretrain.random_low > config.pretrain.random_high:
        problems.append("config.pretrain.random_low is above config.pretrain.random_high")
    if config.train.preference_steps >= config.train.steps:
        problems.append(
            f"config.train.preference_steps is {config.train.preference_steps}; it must be less "
            f"than config.train.steps ({config.train.steps}), which it is a part of"
        )
    if config.evaluate.headline not in config.evaluate.modes:
        problems.append(
            f"config.evaluate.headline is {config.evaluate.headline!r}, which is not in "
            f"config.evaluate.modes {tuple(config.evaluate.modes)}"
        )
    for which in ("weak", "strong"):
        require(
            f"models.{which}",
            lambda v: v in PRESETS or Path(v, "config.json").is_file(),
            f"one of {', '.join(PRESETS)}, or the directory of a checkpoint, with its config.json",
        )
    if config.models.lora_rank:
        c = config.models
        try:
            Lora(c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_targets)
        except ValueError as error:
            problems.append(f"config.models.lora_…: {error}")
    require("train.optimizer", OPTIMIZERS.__contains__, f"one of {', '.join(OPTIMIZERS)}")
    require("train.schedule", SCHEDULES.__contains__, f"one of {', '.join(SCHEDULES)}")
    require("tokenizer.vocab_size", lambda v: v >= SMALLEST_VOCAB, f"{SMALLEST_VOCAB} or more")
    require("train.label_smoothing", lambda v: 0 <= v < 0.5, "at least 0 and less than 0.5")
    if config.train.label_smoothing and config.train.preference_loss != "sigmoid":
        problems.append("config.train.label_smoothing goes with preference_loss 'sigmoid' alone")
    if config.train.simpo_margin and config.train.preference_loss != "simpo":
        problems.append("config.train.simpo_margin goes with preference_loss 'simpo' alone")
    require("train.ema_decay", lambda v: 0 <= v < 1, "at least 0 and less than 1")
    require("name", lambda v: v and set(v) <= _NAME, "letters, digits, _ and - only")
    if set(PREFERENCE_METHODS) & set(config.methods):
        require("train.preference_steps", lambda v: v > 0, "greater than 0 for preference methods")
    shortest = min(config.train.steps, config.weak.steps, config.pretrain.weak_steps)
    if set(PREFERENCE_METHODS) & set(config.methods):
        shortest = min(shortest, config.train.preference_steps)
    require(
        "train.warmup_steps",
        lambda v: v < shortest,
        f"less than the steps of the shortest training ({shortest})",
    )
    if config.gate.min_sampled_success > config.gate.max_sampled_success:
        problems.append("config.gate.min_sampled_success is above config.gate.max_sampled_success")
    if config.env.workers > 0 and config.sampler.slots % config.env.workers:
        problems.append(
            f"config.sampler.slots ({config.sampler.slots}) must be a multiple of "
            f"config.env.workers ({config.env.workers})"
        )
    if any(not isinstance(text, str) or not text for text in config.rollouts.stop):
        problems.append(f"config.rollouts.stop is {config.rollouts.stop!r}; texts, none empty")
    c = config.rollouts
    if (c.branching != "none" or c.stop_after) and c.root_rollouts > c.per_task:
        problems.append(
            f"config.rollouts.root_rollouts ({c.root_rollouts}) must be at most "
            f"config.rollouts.per_task ({c.per_task}), whose cost they are a part of"
        )
    if config.rollouts.top_p == 0:
        problems.append("config.rollouts.top_p is 0; it must be greater than 0")
    if config.rollouts.max_new_tokens >= config.models.max_length:
        problems.append(
            f"config.rollouts.max_new_tokens ({config.rollouts.max_new_tokens}) must be less than "
            f"config.models.max_length ({config.models.max_length})"
        )
    if problems:
        raise ValueError("; ".join(problems))
