"""The main job from checkpoints in Hugging Face's format, with adapters, and out again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from w2sjax.models import Lora, load_hf, load_peft, make_apply_fn, merge_lora, save_hf

ROOT = Path(__file__).parents[2]
SMOKE = "--config=configs/household.py:smoke"
SHORT = (
    "--config.pretrain.tasks=100",
    "--config.pretrain.weak_steps=120",
    "--config.pretrain.strong_steps=20",
    "--config.train.steps=12",
    "--config.tasks.held_out=4",
)


def launch(cache, workdir, *flags):
    return subprocess.run(
        [sys.executable, "launch.py", SMOKE, *SHORT, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=os.environ | {"W2SJAX_CACHE": str(cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(cache, workdir of a run from scratch that exports, workdir and flags of one from there)."""
    top = tmp_path_factory.mktemp("runs")
    first = launch(
        top / "cache",
        top / "first",
        "--config.methods=('weak',)",
        "--config.evaluate.modes=('sampled',)",
        "--config.models.export=True",
    )
    assert first.returncode == 0, first.stdout + first.stderr
    weak = top / "first" / "weak" / "hf"
    flags = [
        "--config.methods=('sft_success', 'dpo')",
        "--config.evaluate.modes=('sampled',)",
        f"--config.models.weak={weak}",
        f"--config.models.strong={weak}",
        "--config.models.lora_rank=4",
        "--config.models.lora_dropout=0.1",
        "--config.models.lora_targets=.",
        "--config.models.export=True",
        "--config.train.accumulate=2",
    ]
    second = launch(top / "cache", top / "second", *flags)
    assert second.returncode == 0, second.stdout + second.stderr
    return top / "cache", top / "first", top / "second", flags


def test_what_a_run_exports_is_a_checkpoint_that_transformers_loads(runs):
    path = runs[1] / "weak" / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "You are in a room."}]
    tokens = tokenizer.apply_chat_template(messages, return_dict=False)
    config, params = load_hf(path)
    with torch.no_grad():
        theirs = model(torch.as_tensor([tokens])).logits.numpy()
    ours = make_apply_fn(config)(params, np.asarray([tokens]))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_from_checkpoints_nothing_is_pretrained_and_adapters_alone_are_kept(runs):
    stages = json.loads((runs[2] / "report.json").read_text())["stages"]
    assert {"checkpoint_weak", "checkpoint_strong"} <= stages.keys()
    assert not {"transcripts", "pretrained_weak", "pretrained_strong"} & stages.keys()
    facts = json.loads((runs[2] / "checkpoint_weak" / "checkpoint.json").read_text())
    assert facts["checkpoint"] == str(runs[1] / "weak" / "hf")
    size = sum(f.stat().st_size for f in (runs[2] / "train/dpo/hf").iterdir())
    base = (runs[1] / "weak" / "hf" / "model.safetensors").stat().st_size
    assert size < base / 2


def test_the_exported_adapters_are_the_trained_ones(runs, tmp_path):
    base = runs[1] / "weak" / "hf"
    lora = Lora(4, alpha=16.0, dropout=0.1, targets=".")
    config, params = load_hf(base, lora=lora)
    trained = load_peft(runs[2] / "train" / "sft_success" / "hf", config)
    moved = [np.abs(leaf).max() for leaf in jax.tree.leaves(trained)]
    assert min(moved) > 0  # B starts at zero
    plain, merged = merge_lora(config, {"base": params["base"], "lora": trained})
    save_hf(tmp_path / "merged", plain, merged)
    again = load_hf(tmp_path / "merged")[1]
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(merged))


def test_a_checkpoint_that_changed_is_noticed(runs):
    """The stages that were made from the old one are not taken for those of the new one."""
    weights = runs[1] / "weak" / "hf" / "model.safetensors"
    config, params = load_hf(weights.parent)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 1.01
    save_hf(weights.parent.parent / "hf2", config, params)
    os.replace(weights.parent.parent / "hf2" / "model.safetensors", weights)
    again = launch(runs[0], runs[2], *runs[3])
    assert again.returncode != 0
    assert "checkpoint_weak was made with other settings or inputs" in again.stderr


def test_a_directory_that_is_no_checkpoint_is_refused(runs, tmp_path):
    result = launch(runs[0], tmp_path / "run", f"--config.models.weak={tmp_path}")
    assert result.returncode != 0
    assert f"config.models.weak is '{tmp_path}'" in result.stderr
    assert "with its config.json" in result.stderr and "Traceback" not in result.stderr
