"""The main job on WebShop with its generated catalogue, from pretraining to the table.

    pip install -e '.[webshop]' && python launch.py --config=configs/webshop.py
    python launch.py --config=configs/webshop.py:smoke   # every stage, tiny
    python launch.py --config=configs/webshop.py:dev     # on the dev split, to choose settings

Official data instead: --config.env.options.data_dir=DIR, with --config.env.options.observation=full
and a --config.models.max_length to match; from-scratch models are too small for it.

Hardware: 2 CPU cores, 4 GB. Result: docs/results.md, three seeds. Time: about half an hour from
nothing, half of it pretraining (estimated: the runs shared their cores).
"""

from w2sjax.config import default_config


def get_config(arg: str = ""):
    c = default_config()
    c.name = "webshop"
    c.env.name = "webshop"
    c.env.options.instruction = "Buy what is asked for."  # small models need no more
    c.env.options.observation = "short"
    c.env.options.page_size = 5
    c.env.options.num_products = 240
    c.env.options.max_steps = 10
    c.env.options.data_dir = ""
    c.tokenizer.vocab_size = 1536
    c.models.max_length = 512
    c.pretrain.tasks = 8000
    c.tasks.demonstrations = 80
    c.pretrain.random_low = 0.05
    c.pretrain.random_high = 0.5
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
        c.name = "webshop_dev"
        c.tasks.held_out_split = "dev"
    elif arg:
        raise ValueError(f"configs/webshop.py has no variant {arg!r}; known: smoke, dev")
    return c.lock()


def _smoke(c) -> None:
    c.name = "webshop_smoke"
    c.methods = ("weak", "strong", "sft_all", "ceiling")
    c.env.options.num_products = 120
    c.env.options.page_size = 3
    c.env.options.max_steps = 8
    c.tasks.demonstrations = 16
    c.tasks.train = 6
    c.tasks.held_out = 6
    c.models.weak = "xs"
    c.models.strong = "xs"  # one shape for both, so that half as much is compiled
    c.models.max_length = 384
    c.pretrain.tasks = 200
    c.pretrain.random_low = 0.0
    c.pretrain.random_high = 0.3
    c.batches.shapes = 1
    c.pretrain.weak_steps = 20
    c.pretrain.strong_steps = 20
    c.weak.steps = 20
    c.rollouts.per_task = 4
    c.search.num_simulations = 50
    c.sampler.slots = 8
    c.train.steps = 20
    c.train.preference_steps = 2
    c.train.warmup_steps = 1
    c.train.checkpoint_every = 20
    c.evaluate.modes = ("sampled",)
    c.evaluate.bootstrap = 200
