"""From other people's records to trees and pairs, and from a run's targets to TRL's records."""

import collections
import dataclasses
import json

import datasets
import jax
import numpy as np
import pytest
from etils import epath

from w2sjax.chat import ChatTemplate, train_bpe
from w2sjax.chat.tokenizer import CHAT_TEMPLATE
from w2sjax.config import default_config
from w2sjax.envs import EnvPool, PlayRequest
from w2sjax.pipeline import exchange, order
from w2sjax.pipeline.__main__ import main
from w2sjax.pipeline.blocks import EPISODES, given_episodes
from w2sjax.pipeline.forest import build_forest, make_targets, search_forest
from w2sjax.pipeline.manifests import stage_facts
from w2sjax.pipeline.processes import Processes
from w2sjax.pipeline.stages import Stages
from w2sjax.pipeline.storage import save_arrays, write_json
from w2sjax.pipeline.training import to_pairs, to_sequences
from w2sjax.sampling import dump_trajectories, play_episodes, read_trajectories
from w2sjax.types import Status

HOUSEHOLD = {"families": ("look", "put"), "num_object_types": 4, "max_steps": 8}
NO_LIMIT = 10_000
NO_SYSTEM = "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('none') -}}{%- endif -%}"
FIXED = ("sft_all", "sft_success", "mcts", "tree_awr")


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These tests run each program once, so nearly all of their time is compiling."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def episodes():
    """Rollouts of mixed skill, one of which broke."""
    with EnvPool("household", HOUSEHOLD, num_slots=1) as pool:
        tasks = pool.task_ids("train", 5)
        requests = [PlayRequest(t, rate, seed=3) for t in tasks for rate in (0.0, 0.3, 0.6, 0.9)]
        played = play_episodes(pool, requests, env_name="household", policy_name="weak")
    broken = dataclasses.replace(
        played[5], rollout=9, status=Status.ENV_ERROR, score=0.0, error="its worker died"
    )
    return [*played[:3], broken, *played[3:]]


@pytest.fixture(scope="module")
def config():
    c = default_config()
    c.search.num_simulations = 50
    c.targets.min_value_gap = 0.05
    return c


@pytest.fixture(scope="module")
def targets(episodes, config):
    forest = build_forest(episodes, merge_on=config.trees.merge_on)
    values = search_forest(forest, **config.search)
    return {n: a for n, (a, _) in make_targets(forest, values, config.targets, seed=0).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, episodes, targets):
    """As much of a run's directory as is read."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    for stage in ("rollouts", "targets", "expert_episodes"):
        (workdir / stage).mkdir(parents=True)
        write_json(workdir / stage / "manifest.json", {"facts": {}})
    (workdir / "rollouts" / EPISODES).write_bytes(dump_trajectories(episodes))
    (workdir / "expert_episodes" / EPISODES).write_bytes(dump_trajectories(episodes[:1]))
    for name, arrays in targets.items():
        save_arrays(workdir / "targets" / f"{name}.npz", arrays)
    write_json(workdir / "config.json", {"w2sjax": 1, "config": {}})
    return workdir


@pytest.fixture(scope="module", params=["message", "user"])
def template(request, episodes):
    """A tokenizer whose template has a system role, and one whose has not."""
    tokenizer = train_bpe([t.first_observation for t in episodes], vocab_size=300)
    if request.param == "user":
        tokenizer.chat_template = NO_SYSTEM + CHAT_TEMPLATE
    made = ChatTemplate(tokenizer)
    assert made.system_role == (request.param == "message")
    return made, request.param


def command(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def rendered(template, messages):
    """Token ids as transformers makes them, and so TRL."""
    return template.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def learned(template, messages):
    ids = [template.encode_answer(m["content"]) for m in messages if m["role"] == "assistant"]
    return [i for answer in ids for i in answer]


# ------------------------------------------------------------------------------- records of a run


@pytest.mark.parametrize("method", ["dpo", "tree_dpo", "mcts_tree_dpo"])
def test_exported_pairs_are_what_the_trainer_learns(
    capsys, tmp_path, run, episodes, targets, template, method
):
    chat, system = template
    out = tmp_path / "pairs.jsonl"
    told = command(capsys, "export", "--format=preferences", f"--target={method}",
                   f"--system={system}", run, out)  # fmt: skip
    arrays = targets[exchange.PAIRS[method]]
    pairs = to_pairs(chat, episodes, NO_LIMIT, arrays).items
    records = lines(out)
    assert len(records) == len(pairs) > 3 and f"{len(pairs)} records" in told
    if method != "dpo":
        assert any(record["start"] for record in records)
    for record, pair, gap in zip(records, pairs, arrays["value_gap"], strict=True):
        assert record["value_gap"] == pytest.approx(gap)
        assert [m["role"] for m in record["prompt"]][-1] == "user"
        for name, sequence in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            side = record[name]
            assert side[0]["role"] == side[-1]["role"] == "assistant"
            tokens = rendered(chat, record["prompt"] + side)
            assert tokens == sequence.tokens.tolist()
            assert learned(chat, side) == sequence.tokens[sequence.weights > 0].tolist()


@pytest.mark.parametrize("method", [*FIXED, "ceiling"])
def test_exported_episodes_are_what_the_trainer_learns(
    capsys, tmp_path, run, episodes, targets, template, method
):
    chat, system = template
    out = tmp_path / "sft.jsonl"
    told = command(capsys, "export", "--format=messages", f"--target={method}",
                   f"--system={system}", run, out)  # fmt: skip
    source, weights = episodes, None
    if method == "ceiling":
        source = episodes[:1]
    else:
        weights = targets[method]["step_weights"]
    sequences = to_sequences(chat, source, NO_LIMIT, step_weights=weights).items
    records = lines(out)
    assert len(records) == len(sequences) > 0
    left_out = len(source) - len(records)
    assert not left_out or f"does not learn: {left_out}" in told
    for record, sequence in zip(records, sequences, strict=True):
        assert rendered(chat, record["messages"]) == sequence.tokens.tolist()
        answers = [m for m in record["messages"] if m["role"] == "assistant"]
        assert len(record["step_weights"]) == len(answers)
        by_token = [w for w, m in zip(record["step_weights"], answers, strict=True)
                    for _ in chat.encode_answer(m["content"])]  # fmt: skip
        nonzero = sequence.weights[sequence.weights > 0]
        np.testing.assert_allclose(nonzero, [w for w in by_token if w], rtol=1e-6)


def test_whole_episodes_go_out_and_come_back(capsys, tmp_path, run, episodes):
    out, back = tmp_path / "chats.jsonl", tmp_path / "back.jsonl"
    told = command(capsys, "export", "--format=messages", run, out)
    assert "left out: env_error: 1" in told
    told = command(capsys, "import", "--format=messages", out, back)
    assert "not used" not in told and "refused" not in told.split("Written")[0]
    assert read_trajectories(back) == [e for e in episodes if e.status.scored]


def test_targets_of_a_file_are_those_of_a_run_with_the_same_settings(
    capsys, tmp_path, run, episodes
):
    out = [tmp_path / name for name in ("run.jsonl", "file.jsonl")]
    settings = ("--set=search.num_simulations=50", "--set=targets.min_value_gap=0.05")
    asked = ("export", "--format=preferences", "--target=tree_dpo")
    command(capsys, *asked, run, out[0])
    command(capsys, *asked, *settings, run / "rollouts" / EPISODES, out[1])
    assert out[0].read_text() == out[1].read_text() != ""


def test_datasets_loads_what_is_exported(capsys, tmp_path, run):
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    for kind, target in (("preferences", "tree_dpo"), ("messages", "tree_awr"), ("messages", None)):
        out = tmp_path / f"{kind}.{target}.jsonl"
        chosen = [f"--target={target}"] if target else []
        command(capsys, "export", f"--format={kind}", *chosen, run, out)
        loaded = datasets.load_dataset(
            "json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert loaded.to_list() == lines(out)
        for column in ("prompt", "chosen", "rejected") if kind == "preferences" else ("messages",):
            feature = loaded.features[column]
            feature = feature[0] if isinstance(feature, list) else feature.feature
            assert dict(feature) == message


# ------------------------------------------------------------------------- other people's records


def eto(task, actions, reward, reason):
    turns = ["Do science.", "OK", "Make paint.", "Thought: e\nAction: mix", f"Task {task}."]
    for t, action in enumerate(actions):
        thought = f"Thought: I need {action}.\nAction: {action}"
        turns += [thought, f"Observation: {t} {action}"]
    meta = {"steps": len(actions), "reward": reward, "success": reason == "success",
            "terminate_reason": reason, "finished": True, "error": None}  # fmt: skip
    messages = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]
    return {"id": task, "conversations": messages, "meta": meta}


FOREIGN = [
    eto("x", "abc", 1.0, "success"),
    eto("x", "abde", 0.2, "success"),
    eto("x", "aff", 0.0, "max_steps"),
    eto("y", "aab", 0.5, "max_steps"),
    eto("y", "aac", 0.9, "max_steps"),
]


@pytest.fixture
def foreign(tmp_path, capsys):
    """(file of episodes, what was printed)"""
    source, out = tmp_path / "eto.json", tmp_path / "episodes.jsonl"
    source.write_text(json.dumps([*FOREIGN, {"id": "z"}], indent=4))
    asked = ("import", "--format=sharegpt", "--env=scienceworld", source, out)
    return out, command(capsys, *asked)


def test_imported_records_grow_trees_and_pairs(capsys, tmp_path, foreign):
    path, told = foreign
    assert "5 of 6 records imported: 2 tasks, 3 step_limit, 1 success, 1 failed" in told
    assert "1 refused" in told and "record 5, field 'conversations': is missing" in told
    facts = json.loads((tmp_path / "episodes.jsonl.report.json").read_text())
    assert facts["refused"][0]["record"] == 5 and facts["options"]["env"] == "scienceworld"
    episodes = read_trajectories(path)
    forest = build_forest(episodes, merge_on="action_observation")
    # x: a, b, c, d, e, f, f beside the root; y: a, a, b, c
    assert forest.tree.num_nodes.tolist() == [8, 5]
    out = tmp_path / "pairs.jsonl"
    command(capsys, "export", "--format=preferences", "--target=tree_dpo", path, out)
    pairs = [
        (r["task_id"], r["start"], r["chosen"][0]["content"][-1], r["rejected"][0]["content"][-1])
        for r in lines(out)
    ]
    assert sorted(pairs) == [("x", 1, "b", "f"), ("x", 2, "c", "d"), ("y", 2, "c", "b")]
    prompt = lines(out)[0]["prompt"]
    assert [m["role"] for m in prompt[:3]] == ["system", "user", "assistant"]


def test_differing_thoughts_are_counted_or_overlooked(foreign, config):
    episodes = read_trajectories(foreign[0])
    first = dataclasses.replace(episodes[4].steps[0], answer="Thought: hm.\nAction: a")
    episodes[4] = dataclasses.replace(episodes[4], steps=(first, *episodes[4].steps[1:]))
    foreign[0].write_bytes(dump_trajectories(episodes))
    found, arrays = exchange.find_target(foreign[0], "tree_dpo", config)
    for context, number in (("same", 2), ("chosen", 3)):
        counts = collections.Counter()
        records = exchange.target_records(found, arrays, counts, system="message", context=context)
        assert len(list(records)) == number and counts.total() == 3 - number
        assert all("--context=chosen" in what for what in counts)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("export", "--format=preferences", "{run}", "{out}"), "--target=dpo or tree_dpo"),
        (("export", "--format=messages", "--target=dpo", "{run}", "{out}"), "sft_all"),
        (("export", "--format=messages", "--target=luck", "{run}", "{out}"), "got 'luck'"),
        (("export", "--format=messages", "--stage=weak", "{run}", "{out}"), "no finished stage"),
        (("export", "--format=messages", "--stage=weak", "{run}/rollouts", "{out}"), "of a run"),
        (("export", "--format=messages", "--set=seed=1", "{run}", "{out}"), "--set goes with"),
        (("export", "--format=messages", "--context=chosen", "{run}", "{out}"), "--context"),
        (("export", "--format=messages", "{run}/none.jsonl", "{out}"), "none.jsonl"),
        (("export", "--format=messages", "{run}", "{run}/config.json"), "there already"),
        (("export", "--format=preferences", "--target=dpo", "--set=targets.luck=1",
          "{run}/rollouts", "{out}"), "targets.luck"),
        (("export", "--format=preferences", "--target=dpo", "--set=models.weak=s",
          "{run}/rollouts", "{out}"), "wanted FIELD=VALUE"),
        (("export", "--format=preferences", "--target=dpo", "--set=targets.pairing=luck",
          "{run}/rollouts", "{out}"), "targets.pairing"),
        (("import", "--format=sharegpt", "{run}/config.json", "{out}"), "1 of 1 records"),
        (("import", "--format=sharegpt", "--strict", "{foreign}", "{out}"), "1 of 6 records"),
        (("import", "--format=sharegpt", "--default_score=3", "{foreign}", "{out}"),
         "default_score"),
        (("import", "--format=sharegpt", "{run}/none.json", "{out}"), "none.json"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_no_file(tmp_path, run, arguments, says):
    source, out = tmp_path / "foreign.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps([*FOREIGN, {"id": "z"}]))
    names = {"run": run, "out": out, "foreign": source}
    with pytest.raises(SystemExit) as exit:
        main([argument.format(**names) for argument in arguments])
    assert str(exit.value).startswith("error: ") and says in str(exit.value)
    assert not out.exists() and not list(tmp_path.glob("*.tmp"))


# --------------------------------------------------------------- a run on other people's episodes


def test_a_run_takes_its_rollouts_from_a_file(tmp_path, episodes):
    sampled = [
        dataclasses.replace(s, answer_ids=(1, 2), answer_logp=-1.0) for s in episodes[0].steps
    ]
    given = [dataclasses.replace(episodes[0], steps=tuple(sampled)), *episodes[1:]]
    path = tmp_path / "given.jsonl"
    path.write_bytes(dump_trajectories(given))
    config = default_config()
    config.rollouts.path = str(path)
    run = object.__new__(order._Run)
    run.config = config
    workdir = epath.Path(tmp_path / "run")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run.stages = Stages(order._settings(config), workdir, workdir, mesh, Processes(workdir))
    stage = run._rollouts(None)
    assert read_trajectories(stage.directory / EPISODES) == episodes
    assert stage_facts(stage)["unscored"] == 1

    again = Stages(order._settings(config), workdir, workdir, mesh, Processes(workdir))
    run.stages = again
    assert run._rollouts(None).skipped
    path.write_bytes(dump_trajectories(episodes[:-1]))
    run.stages = Stages(order._settings(config), workdir, workdir, mesh, Processes(workdir))
    with pytest.raises(ValueError, match="other settings or inputs"):
        run._rollouts(None)


def test_held_out_tasks_and_missing_files_are_refused_before_anything_runs(tmp_path, episodes):
    path = tmp_path / "given.jsonl"
    path.write_bytes(dump_trajectories(episodes))
    with pytest.raises(ValueError, match=r"config\.rollouts\.path.*1 of the 2 tasks"):
        given_episodes(path, [episodes[0].task_id, "other"])
    config = default_config()
    config.env.options.update(HOUSEHOLD)
    for field in ("pretrain.tasks", "tasks.demonstrations", "tasks.train", "tasks.held_out"):
        config.update_from_flattened_dict({field: 3})
    config.rollouts.path = str(path)
    order._check_environment(config)
    config.tasks.held_out_split = "train"  # where the episodes are from
    with pytest.raises(ValueError, match=r"3 of the 3 tasks"):
        order._check_environment(config)
    config.rollouts.path = str(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError):
        order._check_environment(config)
