"""The paper's recipe on ALFWorld with real checkpoints: Qwen2.5 1.5B teaches 7B.

    python launch.py --config=configs/qwen_alfworld.py --plan --plan_devices=8
    python launch.py --config=configs/qwen_alfworld.py \
        --config.models.weak=DIR --config.models.strong=DIR

DIR is a checkpoint directory with safetensors and a tokenizer with a chat template. Without them
the plan is that of the shapes alone. The games are the official ones (json_2.1.1, which
`alfworld-download` of the extra `alfworld` fetches); evaluation is on the 134 of valid_unseen.
--config.env.options.games=procedural needs no download, and its results are not ALFWorld's.
Hardware: 8 GPUs of 80 GB, the default; `:tpu` is laid out for a slice of 16 TPU v4 or v5p chips.
Time and result: not run yet, for want of weights and accelerators.
Recipe: as in configs/llama_scienceworld.py, with episodes of at most 40 steps.
"""

from w2sjax.config import default_config, paper_recipe


def get_config(arg: str = ""):
    c = default_config()
    c.name = "qwen_alfworld"
    c.env.name = "alfworld"
    c.env.workers = 16
    c.env.options.games = "official"
    c.env.options.expert = "searcher"  # knows no more than who plays
    c.env.options.max_steps = 40
    paper_recipe(c)
    c.models.weak = "qwen2.5-1.5b"
    c.models.strong = "qwen2.5-7b"
    c.models.max_length = 8192  # forty steps with their observations
    c.tasks.demonstrations = 200
    c.tasks.train = 800
    c.tasks.held_out = 134
    c.tasks.held_out_split = "unseen"
    c.pretrain.tasks = 1  # checkpoints are trained already
    c.rollouts.max_new_tokens = 128  # a thought and an action
    if arg == "tpu":
        c.mesh.fsdp = 16
    elif arg:
        raise ValueError(f"configs/qwen_alfworld.py has no variant {arg!r}; known: tpu")
    return c.lock()
