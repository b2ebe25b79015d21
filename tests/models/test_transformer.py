"""Laws of the built-in transformer: masks, the cached pass, initial values, configs."""

import dataclasses
import doctest
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2sjax.models import (
    PRESETS,
    PUBLISHED,
    Lora,
    ModelConfig,
    Transformer,
    attention,
    families,
    init_params,
    kernels,
    make_apply_fn,
    make_policy,
    preset,
    presets,
)

CONFIG = ModelConfig(
    vocab_size=23, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48, max_length=64
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def apply_fn():
    return jax.jit(make_apply_fn(CONFIG))


@pytest.fixture(scope="module")
def decode_fn():
    return jax.jit(make_policy(CONFIG).decode_fn)


def _tokens(shape, seed=1):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape, np.int32)


def _random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), tree)


def _plain(length, row_length):
    """positions and subtree_end of one sequence at the start of a row, padding after it."""
    index = np.arange(row_length)
    return np.where(index < length, index, 0), np.where(index < length, length, 0)


# --- the full pass ------------------------------------------------------------------------------


def test_defaults_are_one_causal_sequence_per_row(params, apply_fn):
    tokens = _tokens((1, 16))
    positions, subtree_end = np.arange(16)[None], np.full((1, 16), 16)
    explicit = apply_fn(params, tokens, positions=positions, subtree_end=subtree_end)
    np.testing.assert_array_equal(apply_fn(params, tokens), explicit)
    assert explicit.dtype == jnp.float32 and explicit.shape == (1, 16, CONFIG.vocab_size)


def test_logits_do_not_depend_on_later_tokens(params, apply_fn):
    tokens = _tokens((1, 16))
    changed = tokens.copy()
    changed[0, 9] = (changed[0, 9] + 1) % CONFIG.vocab_size
    before, after = apply_fn(params, tokens), apply_fn(params, changed)
    np.testing.assert_array_equal(before[0, :9], after[0, :9])
    assert (np.abs(before[0, 9:] - after[0, 9:]).max(axis=-1) > 1e-4).all()


def test_packed_row_equals_separate_rows_and_padding_is_inert(params, apply_fn):
    tokens = _tokens((1, 16))
    positions = np.array([[*range(6), *range(7), 0, 0, 0]])
    subtree_end = np.array([[6] * 6 + [13] * 7 + [0] * 3])
    packed = apply_fn(params, tokens, positions=positions, subtree_end=subtree_end)
    for begin, end in ((0, 6), (6, 13)):
        row = np.full((1, 16), 5)
        row[0, : end - begin] = tokens[0, begin:end]
        where, ends = _plain(end - begin, 16)
        alone = apply_fn(params, row, positions=where[None], subtree_end=ends[None])
        np.testing.assert_allclose(packed[0, begin:end], alone[0, : end - begin], atol=2e-5)
    assert np.isfinite(packed).all()
    repadded = tokens.copy()
    repadded[0, 13:] = 2
    again = apply_fn(params, repadded, positions=positions, subtree_end=subtree_end)
    np.testing.assert_array_equal(again[0, :13], packed[0, :13])


def test_tree_row_equals_its_paths(params, apply_fn):
    # trunk 0–3, branch 4–6 with a twig 7–8 below it, branch 9–11; 12–15 padding
    tokens = _tokens((1, 16))
    subtree_end = np.array([[12] * 4 + [9] * 3 + [9] * 2 + [12] * 3 + [0] * 4])
    positions = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 0, 0, 0, 0]])
    tree = apply_fn(params, tokens, positions=positions, subtree_end=subtree_end)
    for path in ([*range(9)], [*range(4), 9, 10, 11]):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(path)] = tokens[0, path]
        where, ends = _plain(len(path), 16)
        alone = apply_fn(params, row, positions=where[None], subtree_end=ends[None])
        np.testing.assert_allclose(tree[0, path], alone[0, : len(path)], atol=2e-5)


def test_gradients_are_finite_and_blind_to_padding(params):
    fn = make_apply_fn(CONFIG)
    positions, subtree_end = _plain(5, 16)

    def loss(params, tokens):
        logits = fn(params, tokens, positions=positions[None], subtree_end=subtree_end[None])
        return (jax.nn.log_softmax(logits)[0, :5] ** 2).sum()

    grad = jax.jit(jax.grad(loss))
    tokens = _tokens((1, 16))
    gradients = grad(params, tokens)
    chex.assert_tree_all_finite(gradients)
    tokens[0, 5:] = 3
    chex.assert_trees_all_close(grad(params, tokens), gradients, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [dict(remat="full"), dict(remat="dots"), dict(remat="attention"), dict(unroll=2)],
    ids=str,
)
def test_what_is_kept_and_how_layers_loop_change_nothing(params, changes):
    tokens = _tokens((1, 8))

    def gradient(config):
        fn = make_apply_fn(config)
        return jax.jit(jax.grad(lambda p: (fn(p, tokens) ** 2).mean()))(params)

    expected = gradient(CONFIG)
    actual = gradient(dataclasses.replace(CONFIG, **changes))
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


def test_gradients_through_mixed_windows_equal_those_of_a_plain_loop():
    config = dataclasses.replace(
        CONFIG, window=3, local_layers=(True, False), local_rope_theta=500.0, remat="full"
    )
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(1))
    tokens = _tokens((2, 6))

    def looped(params, tokens):
        """Layer by layer through the cached pass, which needs no choice by layer at run time."""
        policy = make_policy(config)
        rows, length = tokens.shape
        logits, cache = [], policy.init_cache(rows, length)
        for i in range(length):
            start = jnp.full(rows, i, jnp.int32)
            out, cache = policy.decode_fn(
                params, cache, tokens[:, i : i + 1], start, jnp.zeros(rows, jnp.int32)
            )
            logits.append(out)
        return jnp.stack(logits, axis=1)

    def gradient(function):
        return jax.jit(jax.grad(lambda p: (function(p, tokens) ** 2).mean()))(params)

    chex.assert_trees_all_close(
        gradient(make_apply_fn(config)), gradient(looped), atol=1e-5, rtol=1e-3
    )


def test_bfloat16_compute_keeps_float32_logits(params, apply_fn):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    tokens = _tokens((1, 16))
    logits = jax.jit(make_apply_fn(config))(params, tokens)
    exact = apply_fn(params, tokens)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.2


# --- attention ----------------------------------------------------------------------------------


def test_attend_equals_repeated_heads_in_numpy():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, 6, 4))
    key, value = rng.normal(size=(2, 2, 7, 4)), rng.normal(size=(2, 2, 7, 4))
    mask = rng.random((2, 5, 7)) < 0.5
    mask[1, 3] = False
    actual = attention.attend(*(jnp.float32(x) for x in (query, key.swapaxes(2, 3), value)), mask)
    for row, position, head in np.ndindex(2, 5, 6):
        visible = mask[row, position]
        expected = np.zeros(4)
        if visible.any():
            scores = key[row, head // 3][visible] @ query[row, position, head] / 2.0
            weights = np.exp(scores) / np.exp(scores).sum()
            expected = weights @ value[row, head // 3][visible]
        np.testing.assert_allclose(actual[row, position, head], expected, atol=1e-5)


@pytest.mark.parametrize("length", (5, 191, 400, 600))
def test_blocks_of_long_rows_change_nothing(length):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    key = rng.normal(size=(2, 2, 8, length)).astype(np.float32)
    value = rng.normal(size=(2, 2, length, 8)).astype(np.float32)
    ends = np.sort(rng.integers(0, length + 1, (2, length)), axis=1).astype(np.int32)
    mask = attention.subtree_mask(ends)

    def value_and_gradients(function):
        loss = jax.value_and_grad(lambda *x: (function(*x) ** 2).sum(), (0, 1, 2))
        return jax.jit(loss)(query, key, value, mask)

    chex.assert_trees_all_close(
        value_and_gradients(attention.attend_backwards),
        value_and_gradients(attention.attend),
        rtol=1e-4,
        atol=1e-4,
    )


def test_rotary_scores_depend_on_distance_only():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 8))

    def score(i, j):
        turned = [
            attention.rotate(
                jnp.float32(x)[None, None],
                attention.row_view(
                    jnp.array([[at]]),
                    None,
                    frequencies=[1.0, 0.3, 0.1, 0.03],
                    window=None,
                    implementation="xla",
                ),
            )
            for x, at in ((query, i), (key, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(45, 43), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


# --- the cached pass ----------------------------------------------------------------------------


def test_chunks_of_any_size_equal_the_full_pass(params, apply_fn, decode_fn):
    tokens = _tokens((3, 16))
    full = apply_fn(params, tokens)
    cache = make_policy(CONFIG).init_cache(3, 16)
    fed = np.zeros(3, np.int32)
    rng = np.random.default_rng(0)
    for _ in range(20):
        # every slot takes a chunk of its own size, sometimes none; the rest of the chunk is garbage
        size = np.minimum(rng.integers(0, 5, 3), 16 - fed)
        chunk = rng.integers(0, CONFIG.vocab_size, (3, 4))
        for slot in range(3):
            chunk[slot, : size[slot]] = tokens[slot, fed[slot] : fed[slot] + size[slot]]
        logits, cache = decode_fn(params, cache, chunk, fed, size - 1)
        fed = fed + size
        assert np.isfinite(logits).all()
        for slot in np.flatnonzero(size):
            np.testing.assert_allclose(logits[slot], full[slot, fed[slot] - 1], atol=1e-5)
    assert (fed == 16).all()


def test_writes_past_the_end_are_dropped_not_clamped(params, decode_fn):
    policy = make_policy(CONFIG)
    cache = _random_like(policy.init_cache(3, 16))
    start, last = np.array([14, 16, 0]), np.array([3, 3, 3])
    _, after = decode_fn(params, cache, _tokens((3, 4)), start, last)
    for (keys, values), (new_keys, new_values) in zip(cache, after, strict=True):
        np.testing.assert_array_equal(keys[0, ..., :14], new_keys[0, ..., :14])
        np.testing.assert_array_equal(values[0, :, :14], new_values[0, :, :14])
        assert (np.abs(values[0, :, 14:] - new_values[0, :, 14:]).max(axis=-1) > 1e-3).all()
        np.testing.assert_array_equal(keys[1], new_keys[1])
        np.testing.assert_array_equal(values[1], new_values[1])


def test_tokens_after_last_are_not_written(params, decode_fn):
    cache = make_policy(CONFIG).init_cache(3, 16)
    start, last = np.array([2, 0, 5]), np.array([1, -1, 3])
    _, after = decode_fn(params, cache, _tokens((3, 4)), start, last)
    for keys, values in after:
        for written in (np.abs(keys).max(axis=(1, 2)) > 0, np.abs(values).max(axis=(1, 3)) > 0):
            where = [np.flatnonzero(slot).tolist() for slot in written]
            assert where == [[2, 3], [], [5, 6, 7, 8]]


def test_resize_keeps_positions():
    policy = make_policy(CONFIG)
    cache = _random_like(policy.init_cache(2, 8))
    longer = policy.resize_cache(cache, 12)
    chex.assert_trees_all_equal_shapes(longer, policy.init_cache(2, 12))
    chex.assert_trees_all_equal(policy.resize_cache(longer, 8), cache)


# --- configs and initial values -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_embeddings=False),
        dict(norm_plus_one=True, post_norms=True, qk_norm=True),
        dict(qkv_bias=True, output_bias=True, mlp_bias=True, lora=Lora(8, targets=".")),
    ],
    ids=("plain", "gemma", "biases_and_adapters"),
)
def test_init_has_the_modules_own_shapes_and_deviations(changes):
    config = dataclasses.replace(CONFIG, width=64, num_layers=1, **changes)
    rows = jnp.ones((1, 1), jnp.int32)
    params, own = jax.jit(
        lambda key: (init_params(config, key), Transformer(config).init(key, rows, rows, rows))
    )(jax.random.key(0))
    own = own["params"] if config.lora is None else {"base": own["params"], "lora": own["lora"]}
    chex.assert_trees_all_equal_shapes_and_dtypes(params, own)
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(own), strict=True
    ):
        if float(theirs.std()) == 0:
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert float(mine.std() / theirs.std()) == pytest.approx(1, abs=0.12), path
    base = params if config.lora is None else params["base"]
    assert sum(x.size for x in jax.tree.leaves(base)) == config.num_params


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_they_claim(name):
    config = preset(name, vocab_size=400)
    abstract = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == config.num_params
    assert config.vocab_size == 400


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.0),
        ("llama-3.1-8b", 8.03),
        ("qwen2.5-1.5b", 1.54),
        ("qwen2.5-7b", 7.62),
        ("qwen3-8b", 8.19),
    ],
)
def test_published_models_have_their_published_size_and_vocabulary(name, billions):
    config = preset(name)
    digits = len(str(billions).partition(".")[2])
    assert round(config.num_params / 1e9, digits) == billions
    assert preset(name, vocab_size=400).vocab_size == 400 != config.vocab_size


def test_published_models_can_be_said_in_their_familys_config():
    for config in PUBLISHED.values():
        fields = families.to_hf(config)  # fails where it could not be read back
        assert fields["model_type"] == config.family


def test_a_preset_without_a_vocabulary_asks_for_it():
    with pytest.raises(ValueError, match=r"'s' has no vocabulary.*vocab_size"):
        preset("s")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_layers", 1.5),
        ("num_kv_heads", 3),
        ("num_heads", 6),
        ("head_width", 7),
        ("rope_theta", 0.0),
        ("norm_eps", -1.0),
        ("param_dtype", "auto"),
        ("compute_dtype", "float64"),
        ("activation", "relu"),
        ("remat", "some"),
        ("attention", "flash"),
        ("window", 0),
        ("local_layers", (True,)),
        ("local_rope_theta", 500.0),
    ],
)
def test_impossible_configs_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


def test_examples_in_docstrings_hold():
    result = doctest.testmod(presets)
    assert result.attempted and not result.failed


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*tiny"):
        preset("huge", vocab_size=10)


# --- fused kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["causal", "window", "mask", "softcap"])
def test_splash_attention_equals_plain(case):
    rng = np.random.default_rng(0)
    length, window = 256, 70 if case == "window" else None
    query = jnp.float32(rng.normal(size=(2, length, 4, 128)))
    key, value = (jnp.float32(rng.normal(size=(2, length, 2, 128))) for _ in range(2))
    softcap = 2.0 if case == "softcap" else None
    ends = np.full((2, length), length)
    if case == "mask":
        ends = np.where(np.arange(length) < 100, 100, 220) * np.ones((2, 1), int)
    mask = attention.subtree_mask(jnp.asarray(ends, jnp.int32))
    index = np.arange(length)
    if window is not None:
        mask &= index[:, None] - index[None, :] < window
    seen = np.asarray(mask).any(-1)[..., None, None]

    def plain(query, key, value):
        keys, values = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)
        return attention.attend(query, keys, values, mask, scale=0.1, softcap=softcap) * seen

    def fused(query, key, value):
        given = mask if case == "mask" else None
        options = dict(window=window, scale=0.1, softcap=softcap, interpret=True)
        return kernels.splash(query, key, value, mask=given, **options) * seen

    def value_and_gradients(function):
        return jax.value_and_grad(lambda *x: (function(*x) ** 2).mean(), (0, 1, 2))(
            query, key, value
        )

    chex.assert_trees_all_close(
        value_and_gradients(fused), value_and_gradients(plain), atol=2e-6, rtol=1e-3
    )


def test_attention_is_chosen_by_backend_and_never_silently():
    resolve = functools.partial(attention.resolve, dtype=jnp.dtype("bfloat16"), softcap=None)
    assert resolve("auto") == "tree"
    whole = {"cpu": "tree", "gpu": "cudnn", "tpu": "splash"}[jax.default_backend()]
    assert resolve("auto", packed=False) == whole
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="'cudnn' needs a GPU"):
            resolve("cudnn")
        config = dataclasses.replace(CONFIG, attention="splash")
        with pytest.raises(ValueError, match="'splash' needs a TPU"):
            make_apply_fn(config)(init_params(config, jax.random.key(0)), _tokens((1, 8)))
    with pytest.raises(ValueError, match="cannot cap scores"):
        attention.resolve("cudnn", dtype=jnp.dtype("bfloat16"), softcap=3.0)
