"""`launch.py --plan` as its users start it: it tells, and touches nothing."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from w2sjax import models, pipeline
from w2sjax.config import default_config

ROOT = Path(__file__).parents[2]
REAL = dict(weak="llama-2-7b", strong="llama-2-13b", max_length=4096, compute_dtype="bfloat16")


def launch(folder, *flags):
    return subprocess.run(
        [sys.executable, ROOT / "launch.py", *flags],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "W2SJAX_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def real_config(**mesh):
    config = default_config()
    config.models.update(REAL)
    config.mesh.update(mesh)
    return config


def test_the_flag_prints_both_models_and_writes_nothing(tmp_path):
    flags = [f"--config.models.{field}={value}" for field, value in REAL.items()]
    done = launch(
        tmp_path,
        f"--config={ROOT}/configs/household.py",
        "--config.env.name=scienceworld",  # never made
        *flags,
        "--config.mesh.fsdp=8",
        "--plan",
        "--plan_devices=8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("llama-2-7b", "llama-2-13b", "6,738,415,616", "fsdp 8", "sum, sampling", "GiB"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--plan", "--plan_devices=6", "--config.mesh.fsdp=4"), "6 devices cannot be divided"),
        (("--plan", "--plan_devices=0"), "1 device or more; got 0"),
        (("--plan_devices=8",), "give --plan too"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(tmp_path, flags, words):
    done = launch(tmp_path, f"--config={ROOT}/configs/household.py", *flags)
    assert done.returncode != 0 and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama_scienceworld", "qwen_alfworld"])
@pytest.mark.parametrize(
    ("variant", "devices", "memory"),
    [("", 8, 80 * 10**9), ("tpu", 16, 32 * 2**30)],  # a v4 chip's, the smaller of the two
)
def test_the_configs_for_real_checkpoints_fit_their_devices(name, variant, devices, memory):
    config = runpy.run_path(ROOT / "configs" / f"{name}.py")["get_config"](variant)
    for planned in pipeline.plan(config, num_devices=devices).values():
        assert planned.parameters > 10**8
        assert 0 < planned.cache < planned.sampling < memory
        assert planned.training < memory


def test_rows_are_rounded_up_to_what_the_mesh_splits():
    by_device = {
        devices: pipeline.plan(real_config(data=-1), num_devices=devices)["weak"].activations
        for devices in (8, 16, 32)  # 6 transcripts of pretraining
    }
    assert by_device[8] == by_device[16] == by_device[32]


def test_preference_pairs_count_with_both_sides():
    config = real_config()
    config.train.pairs = 64
    with_pairs = pipeline.plan(config, num_devices=1)["strong"]
    config.methods = ("weak", "strong", "sft_all")
    without = pipeline.plan(config, num_devices=1)["strong"]
    assert with_pairs.activations > 10 * without.activations
    assert with_pairs.parameters == without.parameters


def test_a_model_from_scratch_has_the_tokenizers_vocabulary():
    config = default_config()
    planned = pipeline.plan(config, num_devices=1)["weak"].parameters
    shape = models.preset(config.models.weak, vocab_size=config.tokenizer.vocab_size)
    assert planned == 4 * shape.num_params
