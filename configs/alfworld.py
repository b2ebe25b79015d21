"""The main job on procedural ALFWorld: small rooms on the real engine, small models from scratch.

    pip install -e '.[alfworld]' && python launch.py --config=configs/alfworld.py
    python launch.py --config=configs/alfworld.py:smoke   # every stage, tiny
    python launch.py --config=configs/alfworld.py:dev     # on the dev split, to choose settings

The games are drawn from ALFWorld's floor plans; they are not the official ones, and results on them
are not results on ALFWorld. `--config.tasks.held_out_split=unseen` evaluates in scenes that
training does not have. The expert searches like a person (option `expert`).
Hardware: 2 CPU cores, 4 GB. Time: about 15 min of pretraining and 20 min a seed. Result:
docs/results.md.
"""

from w2sjax.config import default_config


def get_config(arg: str = ""):
    c = default_config()
    c.name = "alfworld"
    c.env.name = "alfworld"
    c.env.workers = 2
    c.env.options.instruction = "Act in the room to reach the goal."  # small models need no more
    c.env.options.families = ("put", "look", "clean", "heat", "cool", "two")
    c.env.options.receptacles = 5
    c.env.options.clutter = 2
    c.env.options.expert = "searcher"
    c.env.options.max_steps = 16
    c.env.options.cache_dir = ""  # so many small games are not worth their files
    c.tasks.demonstrations = 80
    c.models.max_length = 512  # the longest of 240 transcripts had 514 tokens
    c.tokenizer.vocab_size = 768
    c.pretrain.tasks = 3000
    c.pretrain.per_task = 2
    c.pretrain.random_low = 0.05
    c.pretrain.random_high = 0.7
    c.pretrain.weak_steps = 900
    c.pretrain.strong_steps = 4000
    c.weak.steps = 200
    c.rollouts.per_task = 12
    c.targets.best_path_min_return = 0.9  # mcts: best paths that succeed
    c.train.steps = 800
    c.train.pairs = 4
    if arg == "smoke":
        _smoke(c)
    elif arg == "dev":
        c.name = "alfworld_dev"
        c.tasks.held_out_split = "dev"
    elif arg:
        raise ValueError(f"configs/alfworld.py has no variant {arg!r}; known: smoke, dev")
    return c.lock()


def _smoke(c) -> None:
    c.name = "alfworld_smoke"
    c.methods = ("weak", "strong", "sft_all", "ceiling")
    c.env.workers = 0  # starting two processes takes longer than what they would play
    c.env.options.families = ("put", "look")
    c.env.options.max_steps = 12
    c.tasks.demonstrations = 6
    c.tasks.train = 6
    c.tasks.held_out = 6
    c.models.weak = "tiny"
    c.models.strong = "xs"
    c.models.max_length = 384
    c.pretrain.tasks = 12
    c.pretrain.per_task = 1
    c.pretrain.weak_steps = 5
    c.pretrain.strong_steps = 5
    c.weak.steps = 5
    c.rollouts.per_task = 2
    c.search.num_simulations = 50
    c.sampler.slots = 4
    c.sampler.block = 4
    c.train.steps = 6
    c.train.preference_steps = 2
    c.train.warmup_steps = 1
    c.train.checkpoint_every = 6
    c.evaluate.modes = ("sampled",)
    c.evaluate.bootstrap = 200
