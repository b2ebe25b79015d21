"""Every impossible value fails at once with a sentence that names it."""

import importlib.util
from pathlib import Path

import pytest

from w2sjax.config import default_config, validate

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name, argument=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_every_config_is_valid_locked_and_has_no_unknown_variant(name):
    config = load(name)
    validate(config)
    assert config.is_locked
    with pytest.raises(ValueError, match="no variant 'nonsense'"):
        load(name, "nonsense")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("train.steps", 0, "greater than 0"),
        ("train.learning_rate", -1.0, "greater than 0"),
        ("rollouts.top_p", 1.5, "between 0 and 1"),
        ("rollouts.top_p", 0.0, "greater than 0"),
        ("search.discount", 2.0, "between 0 and 1"),
        ("targets.pairing", "all", "best_vs_each"),
        ("trees.merge_on", "thought", "action_observation"),
        ("methods", ("weak", "sft"), "sft_all"),
        ("methods", (), "not empty"),
        ("evaluate.modes", ("greedy", "greedy"), "repetitions"),
        ("mesh.fsdp", 0, "-1"),
        ("train.preference_steps", 600, "less than"),
        ("env.workers", -1, "0 or more"),
        ("pretrain.random_low", 1.1, "between 0 and 1"),
        ("models.max_length", 10, "max_length"),
        ("batches.packing", "dense", "one of tree, none"),
        ("batches.shapes", 0, "greater than 0"),
        ("train.preference_loss", "hinge", "one of sigmoid, ipo, simpo"),
        ("train.label_smoothing", 0.5, "less than 0.5"),
        ("train.simpo_margin", 0.1, "'simpo' alone"),
    ],
)
def test_impossible_values_name_the_field(field, value, says):
    config = default_config()
    *path, last = field.split(".")
    section = config
    for part in path:
        section = section[part]
    section[last] = value
    with pytest.raises(ValueError) as caught:
        validate(config)
    assert f"config.{field}" in str(caught.value) and says in str(caught.value)


def test_two_mesh_axes_cannot_both_be_filled():
    config = default_config()
    config.mesh.fsdp = -1
    with pytest.raises(ValueError, match=r"config\.mesh"):
        validate(config)


def test_all_problems_are_reported_at_once():
    config = default_config()
    config.train.steps = -5
    config.rollouts.per_task = 0
    with pytest.raises(ValueError, match=r"(?s)rollouts\.per_task.*train\.steps"):
        validate(config)
