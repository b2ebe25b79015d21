"""The main job on the built-in environment, from pretraining to the table.

    python launch.py --config=configs/household.py         # everything
    python launch.py --config=configs/household.py:smoke   # every stage, tiny, under a minute
    python launch.py --config=configs/household.py:dev     # on the dev split, to choose settings

Hardware: 2 CPU cores, 4 GB.
"""

from w2sjax.config import default_config


def get_config(arg: str = ""):
    c = default_config()
    c.name = "household"
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
    c.tasks.demonstrations = 16
    c.tasks.train = 12
    c.tasks.held_out = 12
    c.models.weak = "tiny"
    c.models.strong = "xs"
    c.pretrain.episodes = 100
    c.pretrain.weak_steps = 20
    c.pretrain.strong_steps = 30
    c.weak.steps = 10
    c.rollouts.per_task = 4
    c.search.num_simulations = 100
    c.sampler.slots = 16
    c.train.steps = 12
    c.train.preference_steps = 4
    c.train.warmup_steps = 2
    c.train.checkpoint_every = 6
    c.train.pairs = 4
    c.evaluate.bootstrap = 200
