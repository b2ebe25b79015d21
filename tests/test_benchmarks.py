"""Benchmarks import and say how they are run; train_step.py compares the same thing and traces at
full size.
"""

import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from w2sjax import losses, models, train
from w2sjax.parallel import make_mesh, replicated

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def bench():
    """Everything in the two files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        modules = [importlib.import_module(name) for name in ("contenders", "train_step")]
    return SimpleNamespace(**vars(modules[0]) | vars(modules[1]))


def torch_contender(bench, policy, reference, pairs):
    """SFT and DPO in plain torch: what each contender must compute."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    rows = torch.tensor(pairs.rows, dtype=torch.long)
    start, half = pairs.prompt.shape[1], len(pairs.prompt)
    frozen = load(reference, dtype=torch.float32)

    def logps(model):
        logits = model(rows).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, rows[:, 1:, None])[:, start - 1 :, 0]

    def sft_loss(model):
        return -logps(model).mean()

    def dpo_loss(model):
        with torch.no_grad():
            expected = logps(frozen).sum(1)
        gain = logps(model).sum(1) - expected
        return -torch.nn.functional.logsigmoid(bench.BETA * (gain[:half] - gain[half:])).mean()

    def make_update(loss_fn):
        model = load(policy, dtype=torch.float32)
        adamw = torch.optim.AdamW(model.parameters(), bench.RATE, weight_decay=0.0)

        def update():
            adamw.zero_grad()
            loss = loss_fn(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), bench.CLIP)
            adamw.step()
            return float(loss.detach())

        return update

    return bench.Contender(make_update(sft_loss), lambda: None, make_update(dpo_loss))


def test_losses_and_updates_are_those_of_plain_torch(bench, tmp_path):
    paths = bench.write_checkpoints(tmp_path, TINY)
    pairs = bench.make_pairs(2, TINY["vocab_size"], prompt=12, answer=6)
    contenders = {
        "ours": bench.ours(*paths, pairs),
        "torch": torch_contender(bench, *paths, pairs),
    }
    found = bench.check_losses(contenders)
    assert found["dpo"][0] != pytest.approx(np.log(2), rel=1e-3)  # the reference is another model
    assert found["sft"][1] < found["sft"][0]


def test_a_disagreement_is_an_error(bench):
    one = bench.Contender(lambda: 1.0, lambda: None, lambda: 1.0)
    other = bench.Contender(lambda: 1.0, lambda: None, lambda: 1.01)
    with pytest.raises(AssertionError, match="dpo losses: peer against ours"):
        bench.check_losses({"ours": one, "peer": other})


@pytest.mark.parametrize("name", ["1b", "8b"])
def test_gpu_lora_step_traces_at_full_size(bench, name):
    """Shapes alone: nothing is compiled or allocated."""
    config = dataclasses.replace(bench.GPU_SHAPES[name], lora=models.Lora())
    params, tx = models.abstract_params(config), bench.optimizer()
    pairs = bench.make_pairs(1, config.vocab_size, prompt=2048, answer=2048)
    loaded = bench.preference_loader(pairs, np.zeros(3, np.float32)).batch(0)
    loss_fn = functools.partial(losses.preference_loss, beta=bench.BETA)
    step = train.make_train_step(models.make_score_fn(config), loss_fn, tx)
    everywhere = replicated(make_mesh(devices=jax.devices()[:1]))
    adapters, base = {"lora": params["lora"]}, {"base": params["base"]}
    state = train.TrainState(
        params=adapters,
        opt_state=jax.eval_shape(tx.init, adapters),
        step=jax.ShapeDtypeStruct((), np.int32),
    )
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), state
    )
    after, metrics = step.lower(state, loaded.batch, loaded.extras, base).out_info
    same = functools.partial(jax.tree.map, lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype))
    assert all(jax.tree.leaves(same(after, state)))
    assert metrics["loss"].shape == ()


def test_gpu_shapes_are_1b_and_8b(bench):
    assert bench.GPU_SHAPES["1b"].num_params == pytest.approx(1.24e9, rel=0.01)
    assert bench.GPU_SHAPES["8b"].num_params == pytest.approx(8.03e9, rel=0.01)


def test_model_flops(bench):
    config = models.preset("s", vocab_size=400)
    step = bench.model_flops(config, 128, 64)
    head, attention = config.num_params, 2 * 128 * 64  # layers × width × L
    assert step == 128 * (6 * head + 6 * attention)
    assert bench.model_flops(config, 128, 64, forward=True) == step / 3
    untied = models.preset("s", vocab_size=400, tie_embeddings=False)
    assert bench.model_flops(untied, 128, 64) == step  # an input embedding is looked up
    lora = models.preset("s", vocab_size=400, lora=models.Lora(rank=1))
    assert 2 / 3 * step < bench.model_flops(lora, 128, 64) < 0.75 * step


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_file_imports_and_says_how_it_is_run(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # search.py sets it
    before = set(sys.modules)
    try:
        module = importlib.import_module(path.stem)
    except ModuleNotFoundError as error:
        if error.name not in ("mctx", "numba"):
            raise
        pytest.skip(f"{error.name} is not installed")
    finally:
        for other in {file.stem for file in FOLDER.glob("*.py")} - before:
            sys.modules.pop(other, None)  # names such as "trees" are others' as well
    assert Path(module.__file__) == path
    if path.stem in ("contenders", "slow_env"):  # parts of others
        assert not hasattr(module, "main")
        return
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--json" in said and f"python benchmarks/{path.name}" in module.__doc__
    # `agreement` reads two finished runs, in no time.
    assert ("--quick" in said) == ("[--quick]" in module.__doc__) == (path.stem != "agreement")
