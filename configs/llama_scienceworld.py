"""The paper's recipe on ScienceWorld with real checkpoints: Llama 2 7B teaches Llama 2 13B.

    pip install -e '.[scienceworld]'
    python launch.py --config=configs/llama_scienceworld.py --plan --plan_devices=8
    python launch.py --config=configs/llama_scienceworld.py \
        --config.models.weak=DIR --config.models.strong=DIR

DIR is a checkpoint directory with safetensors and a tokenizer with a chat template (the chat
versions have one). Without them the plan is that of the shapes alone.
Hardware: 8 GPUs of 80 GB, the default; `:tpu` is laid out for a slice of 16 TPU v4 or v5p chips.
Time and result: not run yet, for want of weights and accelerators.
Recipe (arXiv 2507.18858): adapters of rank 128 on the attention projections, learning rate 2e-5
and 1e-6 for preferences, batch 32, gradient clip 0.5, context 4096, exploration at temperature 0.7,
greedy evaluation.
"""

from w2sjax.config import default_config, paper_recipe


def get_config(arg: str = ""):
    c = default_config()
    c.name = "llama_scienceworld"
    c.env.name = "scienceworld"
    c.env.workers = 8
    c.env.options.simplification = "easy"
    c.env.options.heap_mb = 512
    c.env.options.tasks = (
        "lifespan-longest-lived",
        "lifespan-shortest-lived",
        "lifespan-longest-lived-then-shortest-lived",
        "find-non-living-thing",
        "find-plant",
    )
    c.tasks.demonstrations = 48
    c.tasks.train = 150
    c.tasks.held_out = 80
    paper_recipe(c)
    c.models.weak = "llama-2-7b"
    c.models.strong = "llama-2-13b"
    c.rollouts.max_new_tokens = 128  # a thought and an action
    c.sampler.slots = 8  # one a device, 3 GiB of cache each for the 13B model
    if arg == "tpu":
        c.mesh.fsdp = 16
        # Fewer slots than chips are not split: each holds the cache of all four.
        c.sampler.slots = c.env.workers = 4
    elif arg:
        raise ValueError(f"configs/llama_scienceworld.py has no variant {arg!r}; known: tpu")
    return c.lock()
