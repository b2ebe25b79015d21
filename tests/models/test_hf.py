"""Checkpoints of every family come in and go out, and transformers agrees on what they compute."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_cases import CASES, write_checkpoint
from safetensors.numpy import load_file, save_file

from w2sjax.models import init_params, load_hf, make_apply_fn, make_policy, preset, save_hf

TOLERANCE = 2e-5  # relative to the scale of the logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name → (directory, torch model), written once."""
    made = {}

    def get(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name) / "model"
            made[name] = path, write_checkpoint(path, name)
        return made[name]

    return get


def _tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 97, shape)


def _torch_logits(model, tokens, **inputs):
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **inputs).logits.numpy()


def _assert_agree(ours, theirs):
    scale = np.abs(theirs).max()
    assert scale > 0.5  # or the tolerance would mean nothing
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, checkpoint):
    path, model = checkpoint(name)
    config, params = load_hf(path)
    tokens = _tokens((2, 24))
    _assert_agree(jax.jit(make_apply_fn(config))(params, tokens), _torch_logits(model, tokens))
    assert config.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "gemma2", "gemma3"])
def test_padding_and_long_positions_agree(name, checkpoint):
    path, model = checkpoint(name)
    config, params = load_hf(path)
    tokens, length = _tokens((2, 16), 1), 11
    apply_fn = jax.jit(make_apply_fn(config))
    positions = np.broadcast_to(np.arange(16) + 300, (2, 16))
    ends = np.where(np.arange(16) < length, length, 0)
    ours = apply_fn(params, tokens, positions=positions, subtree_end=np.broadcast_to(ends, (2, 16)))
    attention_mask = np.broadcast_to(np.arange(16) < length, (2, 16)).astype(np.int64)
    theirs = _torch_logits(model, tokens, attention_mask=attention_mask, position_ids=positions)
    _assert_agree(ours[:, :length], theirs[:, :length])


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_window_longer_than_the_row_is_none(name, tmp_path):
    model = write_checkpoint(tmp_path / "model", name, sliding_window=300)
    config, params = load_hf(tmp_path / "model")
    tokens = _tokens((1, 16))
    _assert_agree(make_apply_fn(config)(params, tokens), _torch_logits(model, tokens))


@pytest.mark.parametrize("name", CASES)
def test_cached_pass_equals_the_full_one(name, checkpoint):
    path, model = checkpoint(name)
    config, params = load_hf(path)
    policy = make_policy(config)
    tokens = _tokens((2, 14), 2).astype(np.int32)
    full = _torch_logits(model, tokens)  # where ours agrees, and is there without compiling
    decode = jax.jit(policy.decode_fn)
    cache, at = policy.init_cache(2, 16), 0
    for chunk in (6, 1, 1, 6):  # rows alike, so that `last` is the chunk's end
        start, last = np.full(2, at, np.int32), np.full(2, chunk - 1, np.int32)
        logits, cache = decode(params, cache, tokens[:, at : at + chunk], start, last)
        at += chunk
        scale = np.abs(full).max()
        np.testing.assert_allclose(logits, full[:, at - 1], rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", CASES)
def test_what_was_loaded_and_saved_is_what_transformers_loads(name, checkpoint, tmp_path):
    import transformers

    path, model = checkpoint(name)
    config, params = load_hf(path)
    save_hf(tmp_path / "again", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    ).eval()
    assert type(again) is type(model)
    tokens = _tokens((2, 24), 3)
    np.testing.assert_array_equal(_torch_logits(again, tokens), _torch_logits(model, tokens))
    assert load_hf(tmp_path / "again")[0] == config


def test_a_preset_goes_out_as_llama_with_its_tokenizer(tmp_path):
    import transformers

    from w2sjax.chat import train_bpe

    tokenizer = train_bpe(["Action: look", "You see a mug 1."], vocab_size=300)
    config = preset("tiny", vocab_size=len(tokenizer))
    params = init_params(config, jax.random.key(0))
    save_hf(tmp_path / "out", config, params, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = np.arange(20)[None]
    _assert_agree(make_apply_fn(config)(params, tokens), _torch_logits(model, tokens))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_several_files_in_and_out(tmp_path):
    import transformers

    model = write_checkpoint(tmp_path / "whole", "qwen3")
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    config, params = load_hf(tmp_path / "split")
    expected = load_hf(tmp_path / "whole")[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    save_hf(tmp_path / "out", config, params, max_file_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_bfloat16_files_and_parameters(tmp_path):
    model = write_checkpoint(tmp_path / "model", "llama3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    config, params = load_hf(tmp_path / "half", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    wide = load_hf(tmp_path / "half")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), params, wide)
    save_hf(tmp_path / "out", config, params)
    back = load_file(tmp_path / "half" / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert value.dtype == back[name].dtype
        np.testing.assert_array_equal(value, back[name])


def _edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_wrong_tensors_are_named(tmp_path):
    write_checkpoint(tmp_path, "llama2")

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)

    _edit(tmp_path, change)
    with pytest.raises(ValueError) as error:
        load_hf(tmp_path)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "left over: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.norm.weight: shape (31,), but config.json makes it (32,)" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": "no_such_model"}, "model_type is 'no_such_model'"),
        ({"hidden_act": "relu"}, "hidden activation is 'relu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused(fields, message, tmp_path):
    write_checkpoint(tmp_path, "llama2")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_hf(tmp_path / "nowhere")
    write_checkpoint(tmp_path, "llama2")
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_hf(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_hf(tmp_path)


def test_saving_refuses_what_would_be_lost(tmp_path):
    config = preset("tiny", vocab_size=40)
    params = init_params(config, jax.random.key(0))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists"):
        save_hf(tmp_path / "there", config, params)
    odd = preset("tiny", vocab_size=40, qk_norm=True)
    with pytest.raises(ValueError, match=r"ModelConfig\.qk_norm is True"):
        save_hf(tmp_path / "odd", odd, init_params(odd, jax.random.key(0)))
    assert not list(tmp_path.glob("odd*"))


MEASURE = """
    import sys, threading, time
    import jax, jax.numpy as jnp
    from pathlib import Path
    from w2sjax.models import ModelConfig, PARTITION_RULES, init_params, load_hf, save_hf
    from w2sjax.parallel import make_mesh, param_shardings

    def anonymous():
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) * 1024

    def measured(work):
        start, peak, done = anonymous(), 0, False

        def watch():
            nonlocal peak
            while not done:
                peak = max(peak, anonymous())
                time.sleep(0.001)

        thread = threading.Thread(target=watch)
        thread.start()
        result = work()
        done = True
        thread.join()
        return peak - start, result
"""
READ = """
    load_hf(sys.argv[1])  # compiles, imports
    jax.clear_caches()
    needed, (config, params) = measured(lambda: load_hf(sys.argv[2]))
    print(needed, sum(x.nbytes for x in jax.tree.leaves(params)))
"""
WRITE = """
    mesh = make_mesh(1, 2, 1)

    def made(*sizes):
        config = ModelConfig(*sizes, tie_embeddings=False)
        abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        shardings = param_shardings(abstract, PARTITION_RULES, mesh)
        ones = lambda: jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract)
        return config, jax.block_until_ready(jax.jit(ones, out_shardings=shardings)())

    folder = Path(sys.argv[1])
    save_hf(folder / "small", *made(64, 16, 2, 2, 2, 32))
    config, params = made(40_000, 512, 6, 8, 8, 4096)
    needed, _ = measured(lambda: save_hf(folder / "large", config, params))
    print(needed, (folder / "large" / "model.safetensors").stat().st_size)
"""


def _measure(code, *arguments):
    program = textwrap.dedent(MEASURE) + textwrap.dedent(code)
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # what is freed is given back
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return map(int, done.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_needs_the_shards_and_little_more(tmp_path):
    write_checkpoint(tmp_path / "small", "llama2")
    write_checkpoint(
        tmp_path / "large",
        "llama2",
        vocab_size=60_000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
    )
    needed, held = _measure(READ, tmp_path / "small", tmp_path / "large")
    largest = 60_000 * 512 * 4
    assert held > 2.5 * largest
    assert needed <= held + 1.2 * largest, (needed / 2**20, held / 2**20, largest / 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_needs_less_than_a_tensor(tmp_path):
    needed, written = _measure(WRITE, tmp_path)
    largest = 40_000 * 512 * 4
    assert written > 4 * largest
    assert needed <= largest, (needed / 2**20, written / 2**20, largest / 2**20)


WRITE_TOGETHER = """
    import sys
    import jax
    from w2sjax.models import PARTITION_RULES, init_params, preset, save_hf
    from w2sjax.parallel import make_mesh, param_shardings, start_processes

    folder, address, process = sys.argv[1:]
    start_processes(address, 2, int(process))
    config = preset("tiny", vocab_size=40)
    key = jax.random.key(0)
    mesh = make_mesh(1, 4, 1)
    shardings = param_shardings(
        jax.eval_shape(lambda: init_params(config, key)), PARTITION_RULES, mesh
    )
    params = jax.jit(lambda: init_params(config, key), out_shardings=shardings)()
    save_hf(folder, config, params)
"""


def test_two_processes_write_what_one_writes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = [sys.executable, "-c", textwrap.dedent(WRITE_TOGETHER)]
    programs = [
        subprocess.Popen(
            [*program, str(tmp_path / "together"), address, str(process)],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [one.communicate(timeout=80)[1][-3000:] for one in programs]
    assert [one.returncode for one in programs] == [0, 0], errors
    config = preset("tiny", vocab_size=40)
    save_hf(tmp_path / "alone", config, init_params(config, jax.random.key(0)))
    there, here = (
        load_file(tmp_path / name / "model.safetensors") for name in ("together", "alone")
    )
    assert there.keys() == here.keys()
    for name in here:  # drawn on two devices or one: the last bit may differ
        np.testing.assert_allclose(there[name], here[name], rtol=1e-6, atol=1e-8)
