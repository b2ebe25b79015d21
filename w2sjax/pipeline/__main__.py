"""Trajectories in from other people's files, and out to other trainers.

    python -m w2sjax.pipeline import --format=sharegpt outputs/ episodes.jsonl
    python -m w2sjax.pipeline export --format=messages episodes.jsonl chats.jsonl
    python -m w2sjax.pipeline export --format=messages --target=mcts runs/household sft.jsonl
    python -m w2sjax.pipeline export --format=preferences --target=tree_dpo runs/household dpo.jsonl

What is exported is JSON Lines in TRL's conversational layouts. A run's targets are those that its
methods were trained on; of a file of episodes, the trees, the search and the targets are made now,
with the defaults of w2sjax/config.py or what --set says (--set=targets.min_value_gap=0.2). Trainers
differ in what they learn of a continuation of several turns: the training here learns the answers,
TRL's DPO all of it, observations included (--set=targets.continuation=one_step has none).
"""

from __future__ import annotations

import argparse
import collections
import json
import sys

import ml_collections

from w2sjax.checkpoints import absolute_path
from w2sjax.config import SFT_METHODS, default_config, validate
from w2sjax.pipeline import exchange
from w2sjax.sampling.exchange import ImportOptions, ImportReport
from w2sjax.sampling.exchange.exports import CONTEXTS, SYSTEM
from w2sjax.sampling.exchange.imports import EXAMPLES, FORMATS
from w2sjax.sampling.exchange.outcome import SUCCESS_FROM

_SET = ("seed", "trees.", "search.", "targets.")  # fields that --set may name
_SHOWN = 10  # refused records that are printed

_EXAMPLE_MESSAGES = (
    "how many messages of worked examples stand before the task: 10 (ALFWorld), 14 (ScienceWorld) "
    "or 8 (WebShop) in ETO's prompts; default: found at the first record of each source, up to the "
    "last user message that is no observation"
)
_TARGET = (
    f"what a method is trained on: {', '.join(SFT_METHODS)} as messages, "
    f"{', '.join(exchange.PAIRS)} as preferences; default: whole episodes, as messages"
)
_STAGE = (
    "of a run, whose whole episodes are exported: rollouts (the default), demonstrations, "
    "evaluate/mcts.sampled, …"
)
_SYSTEM = "the instruction as a system message, or at the start of the first user message"
_CONTEXT = (
    "pairs whose sides' texts differ before they part are left out (same), or get the chosen "
    "side's (chosen)"
)
_SETTING = (
    "a field of w2sjax/config.py, of seed, trees, search or targets, where targets are made of a "
    "file of episodes"
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m w2sjax.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_import(commands.add_parser("import", help="records → episodes"))
    _add_export(commands.add_parser("export", help="episodes or a run → records"))
    arguments = parser.parse_args(argv)
    try:
        out = absolute_path(arguments.out)
        if out.exists() and not arguments.overwrite:
            raise ValueError(f"{out} is there already; choose another name, or pass --overwrite")
        arguments.run(arguments, out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_import)
    add = parser.add_argument
    add("sources", nargs="+", help="files (a JSON array, JSON Lines, one object) or folders")
    add("out", help="JSON Lines file of episodes; OUT.report.json says what became of the records")
    add("--format", required=True, choices=FORMATS)
    add("--env", default="", help="name of the environment; default: the record's, or 'imported'")
    add("--policy", default="", help="who acted; default: the record's, or 'imported'")
    add(
        "--id_field",
        default="",
        help="names the task, such as id, game_file, meta.error",
    )
    add("--examples", choices=EXAMPLES, default="drop", help="what happens to worked examples")
    add("--example_messages", type=int, help=_EXAMPLE_MESSAGES)
    add("--observation_prefix", help="taken off observations; default: 'Observation:' for sharegpt")
    add("--task_prefix", default="", help="taken off the task's text")
    add("--score_scale", type=float, default=1.0, help="scores are divided by it")
    add("--clip_scores", action="store_true", help="cut scores to [0, 1]; else they are refused")
    add("--default_score", type=float, help="of records without one; else they are refused")
    add("--success_from", choices=SUCCESS_FROM, default="auto", help="whether the success field or "
        "the score decides; auto: the score, but where the record itself has a field")  # fmt: skip
    add("--success_score", type=float, default=1.0, help="least score that is a success")
    add("--strict", action="store_true", help="write nothing where a record is refused")
    add("--overwrite", action="store_true")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("source", help="a file of episodes, or the workdir of a run")
    add("out", help="JSON Lines file")
    add("--format", required=True, choices=("messages", "preferences"))
    add("--target", help=_TARGET)
    add("--stage", help=_STAGE)
    add("--system", choices=SYSTEM, default="message", help=_SYSTEM)
    add("--context", choices=CONTEXTS, default="same", help=_CONTEXT)
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help=_SETTING)
    add("--overwrite", action="store_true")


def _import(arguments: argparse.Namespace, out) -> None:
    names = ImportOptions.__dataclass_fields__
    options = ImportOptions(**{name: getattr(arguments, name) for name in names})
    report = exchange.import_files(arguments.sources, out, options, strict=arguments.strict)
    for line in _told(report):
        print(line)
    print(f"Written: {out}, and {out}.report.json, which lists all that was refused.")


def _told(report: ImportReport) -> list[str]:
    """What became of the records, in lines."""
    lines = [
        f"{report.imported} of {report.records} records imported: {report.tasks} tasks, "
        + ", ".join(f"{count} {status}" for status, count in report.statuses.most_common())
    ]
    for number, count in report.example_messages.items():
        if number:
            lines.append(f"  {number} messages of worked examples before the task: {count}")
    lines += [f"  {note}: {count}" for note, count in report.notes.most_common() if count]
    for field, count in report.unused_fields.most_common():
        lines.append(f"  field not used: {field} (of {count} records)")
    if report.refused:
        lines.append(f"{len(report.refused)} refused:")
        fields = collections.Counter(r.field.split("[")[0] for r in report.refused)
        lines += [f"  {f or 'the record itself'}: {n}" for f, n in fields.most_common()]
        lines += [f"  {refusal}" for refusal in report.refused[:_SHOWN]]
        if len(report.refused) > _SHOWN:
            lines.append(f"  … and {len(report.refused) - _SHOWN} more")
    return lines


def _export(arguments: argparse.Namespace, out) -> None:
    target = arguments.target
    if (target in exchange.PAIRS) != (arguments.format == "preferences"):
        wanted = exchange.PAIRS if arguments.format == "preferences" else SFT_METHODS
        raise ValueError(
            f"--format={arguments.format} goes with --target={' or '.join(wanted)}; got {target!r}"
        )
    if arguments.stage and (target or not exchange.is_run(arguments.source)):
        raise ValueError("--stage goes with the whole episodes of a run")
    if arguments.set and (target is None or exchange.is_run(arguments.source)):
        raise ValueError("--set goes with a target that is made of a file of episodes")
    if arguments.context != "same" and arguments.format != "preferences":
        raise ValueError("--context goes with --format=preferences")
    counts: collections.Counter[str] = collections.Counter()
    if target is None:
        episodes = exchange.read_source(arguments.source, arguments.stage or "rollouts")
        records = exchange.episode_records(episodes, counts, system=arguments.system)
    else:
        config = _configured(arguments.set)
        episodes, arrays = exchange.find_target(arguments.source, target, config)
        records = exchange.target_records(
            episodes, arrays, counts, system=arguments.system, context=arguments.context
        )
    written = exchange.write_records(out, records)
    print(f"{written} records of {len(episodes)} episodes: {out}")
    for what, count in counts.most_common():
        print(f"  {what}: {count}")


def _configured(changes: list[str]) -> ml_collections.ConfigDict:
    """The default settings with the changes asked for."""
    config = default_config()
    config.lock()
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals or not field.startswith(_SET):
            raise ValueError(f"--set={change}: wanted FIELD=VALUE, of {', '.join(_SET)}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        try:
            config.update_from_flattened_dict({field: value})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--set={change}: {error}") from error
    validate(config)
    return config


if __name__ == "__main__":
    main()
