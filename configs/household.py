"""The main job on the built-in environment, from pretraining to the table.

    python launch.py --config=configs/household.py         # everything
    python launch.py --config=configs/household.py:smoke   # every stage, tiny
    python launch.py --config=configs/household.py:dev     # on the dev split, to choose settings

Hardware: 2 CPU cores, 4 GB. Time: 9 min the first time, 4 of them pretraining.
Result (3 seeds, test split, actions sampled): success .199 for the weak policy, .636 for
sft_success, .730 for mcts, .943 for the ceiling; README.md has the whole table.
"""

from w2sjax.config import default_config


def get_config(arg: str = ""):
    c = default_config()
    c.name = "household"
    c.env.options.instruction = "Act in the room to reach the goal."  # small models need no more
    c.env.options.families = ("put", "look", "clean", "heat", "cool", "two")
    c.env.options.num_object_types = 6
    c.env.options.max_receptacles = 3
    c.env.options.num_distractors = 2
    c.env.options.max_steps = 14
    c.models.max_length = 288
    c.pretrain.tasks = 8000
    c.tasks.demonstrations = 80
    c.pretrain.random_low = 0.05
    c.pretrain.random_high = 0.7
    c.pretrain.weak_steps = 900
    c.pretrain.strong_steps = 5000
    c.weak.steps = 200
    c.train.steps = 800
    c.rollouts.per_task = 12
    c.targets.best_path_min_return = 0.9  # mcts: best paths that succeed
    c.train.pairs = 4
    if arg == "smoke":
        _smoke(c)
    elif arg == "dev":
        c.name = "household_dev"
        c.tasks.held_out_split = "dev"
    elif arg:
        raise ValueError(f"configs/household.py has no variant {arg!r}; known: smoke, dev")
    return c.lock()


def _smoke(c) -> None:
    c.name = "household_smoke"
    c.env.options.families = ("look", "put")
    c.env.options.num_object_types = 4
    c.env.options.max_receptacles = 3
    c.env.options.num_distractors = 1
    c.env.options.max_steps = 10
    c.tasks.demonstrations = 32
    c.tasks.train = 12
    c.tasks.held_out = 12
    c.models.weak = "xs"
    c.models.strong = "xs"  # one shape for both, so that half as much is compiled
    c.models.max_length = 192
    c.pretrain.tasks = 400
    c.pretrain.random_low = 0.0
    c.pretrain.random_high = 0.3
    c.pretrain.trajectories = 3
    c.batches.shapes = 1
    c.batches.round_to = 256
    c.pretrain.weak_steps = 250
    c.pretrain.strong_steps = 40  # equal steps, rates and batches where possible: compiled once
    c.weak.steps = 40
    c.weak.learning_rate = 2e-3
    c.rollouts.temperature = 0.7
    c.rollouts.per_task = 8
    c.search.num_simulations = 100
    c.sampler.slots = 16
    c.train.steps = 40
    c.train.trajectories = 4
    c.train.preference_steps = 4
    c.train.learning_rate = 2e-3
    c.train.warmup_steps = 2
    c.train.checkpoint_every = 20
    c.train.pairs = 4
    c.evaluate.bootstrap = 200
