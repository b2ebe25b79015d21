"""Adapters: PEFT agrees, merging changes nothing, and the base stays as it was."""

import dataclasses

import chex
import jax
import numpy as np
import optax
import peft
import pytest
import torch
from hf_cases import write_checkpoint

from w2sjax.batches import Sequence, sft_batches
from w2sjax.losses import sft_loss
from w2sjax.models import (
    Lora,
    ModelConfig,
    init_params,
    load_hf,
    load_peft,
    make_apply_fn,
    make_policy,
    make_score_fn,
    merge_lora,
    save_hf,
    save_peft,
    without_adapters,
)
from w2sjax.train import init_state, make_train_step

CONFIG = ModelConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24,
    lora=Lora(3, alpha=6.0, dropout=0.25, targets="query|output|down"),
)  # fmt: skip


def _awake(params, seed=1):
    """Adapters whose B is no longer zero."""
    rng = np.random.default_rng(seed)
    lora = jax.tree.map(
        lambda x: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32), params["lora"]
    )
    return {"base": params["base"], "lora": lora}


@pytest.fixture(scope="module")
def params():
    return _awake(init_params(CONFIG, jax.random.key(0)))


def _tokens(shape, seed=0, vocab=23):
    return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


def test_a_fresh_adapter_changes_nothing():
    fresh = init_params(CONFIG, jax.random.key(0))
    plain = make_apply_fn(without_adapters(CONFIG))(fresh["base"], _tokens((1, 9)))
    np.testing.assert_array_equal(make_apply_fn(CONFIG)(fresh, _tokens((1, 9))), plain)


def test_merged_equals_apart(params):
    config, merged = merge_lora(CONFIG, params)
    assert config == without_adapters(CONFIG)
    tokens = _tokens((2, 9))
    apart = make_apply_fn(CONFIG)(params, tokens)
    np.testing.assert_allclose(make_apply_fn(config)(merged, tokens), apart, atol=2e-5)
    base = make_apply_fn(config)(params["base"], tokens)
    assert np.abs(base - apart).max() > 0.1
    with pytest.raises(ValueError, match="no adapters"):
        merge_lora(config, merged)


def test_cached_pass_has_the_adapters(params):
    policy, tokens = make_policy(CONFIG), _tokens((1, 5))
    cache = policy.init_cache(1, 8)
    logits, _ = policy.decode_fn(params, cache, tokens, np.array([0]), np.array([4]))
    np.testing.assert_allclose(logits, policy.apply_fn(params, tokens)[:, -1], atol=2e-5)


def test_dropout_is_a_function_of_its_key_and_keeps_the_mean(params):
    apply_fn, tokens = jax.jit(make_apply_fn(CONFIG)), _tokens((1, 6))
    once = apply_fn(params, tokens, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(once, apply_fn(params, tokens, dropout_key=jax.random.key(1)))
    assert np.abs(once - apply_fn(params, tokens, dropout_key=jax.random.key(2))).max() > 1e-3
    sure = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=0.0))
    np.testing.assert_array_equal(
        make_apply_fn(sure)(params, tokens, dropout_key=jax.random.key(1)),
        make_apply_fn(CONFIG)(params, tokens),
    )


def test_only_adapters_are_trained():
    params = init_params(CONFIG, jax.random.key(0))
    frozen = {"base": params["base"]}
    before = jax.device_get(frozen)
    tx = optax.adamw(1e-2)
    state = init_state({"lora": params["lora"]}, tx)
    sizes = {leaf.shape for leaf in jax.tree.leaves(params["lora"])} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} <= sizes
    step = make_train_step(make_score_fn(CONFIG), sft_loss, tx, dropout_seed=3)
    sequences = [
        Sequence(_tokens((10,), seed), np.r_[0, np.ones(9)].astype(np.float32)) for seed in range(4)
    ]
    loader = sft_batches(sequences, sequences_per_batch=4, total_steps=40, seed=0)
    losses = []
    for number in range(40):
        loaded = loader.batch(number)
        state, metrics = step(state, loaded.batch, loaded.extras, frozen)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    chex.assert_trees_all_equal(jax.device_get(frozen), before)
    for path, leaf in jax.tree.leaves_with_path(state.params):
        start = params
        for entry in path:
            start = start[entry.key]
        assert np.abs(leaf - start).max() > 0, path


@pytest.mark.parametrize("changes", [{}, {"param_dtype": "bfloat16"}], ids=str)
def test_base_and_adapters_have_their_own_dtypes(changes, tmp_path):
    write_checkpoint(tmp_path / "model", "llama2")
    _, params = load_hf(tmp_path / "model", lora=Lora(2), **changes)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params["base"])}
    assert dtypes == {changes.get("param_dtype", "float32")}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["lora"])} == {"float32"}


@pytest.mark.parametrize("targets", ["attention/(query|value)", "."])
@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_peft_loads_what_was_saved_and_agrees(name, targets, tmp_path):
    model = write_checkpoint(tmp_path / "model", name)
    lora = Lora(3, alpha=5.0, targets=targets)
    config, params = load_hf(tmp_path / "model", lora=lora)
    params = _awake(params)
    save_peft(tmp_path / "adapter", config, params, base=tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    tokens = _tokens((2, 12), vocab=97)
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(tokens.astype(np.int64))).logits.numpy()
    ours = make_apply_fn(config)(params, tokens)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5 * scale)
    back = load_peft(tmp_path / "adapter", config)
    chex.assert_trees_all_equal(back, jax.device_get(params["lora"]))
    merged = theirs.merge_and_unload()
    save_hf(tmp_path / "merged", *merge_lora(config, params))
    again = type(model).from_pretrained(tmp_path / "merged")
    for key, value in merged.state_dict().items():
        np.testing.assert_allclose(again.state_dict()[key], value, atol=2e-6, err_msg=key)


def test_adapters_of_another_shape_are_refused(params, tmp_path):
    save_peft(tmp_path / "adapter", CONFIG, params, base="somewhere")
    other = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, rank=4))
    with pytest.raises(ValueError, match="r is 3, not 4"):
        load_peft(tmp_path / "adapter", other)
    deeper = dataclasses.replace(CONFIG, num_layers=3)
    with pytest.raises(
        ValueError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight is missing"
    ):
        load_peft(tmp_path / "adapter", deeper)
    with pytest.raises(FileExistsError):
        save_peft(tmp_path / "adapter", CONFIG, params, base="somewhere")
    with pytest.raises(ValueError, match="merge them first"):
        save_hf(tmp_path / "whole", CONFIG, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), "rank"),
        (dict(dropout=1.0), "dropout"),
        (dict(targets="("), "no regex"),
        (dict(targets="q_proj"), "names no projection"),
    ],
)
def test_impossible_adapters_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Lora(**fields)
