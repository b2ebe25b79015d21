"""Plays an environment by hand, or checks it with its own expert.

    python -m w2sjax.envs play household
    python -m w2sjax.envs play scienceworld --split=test --option tasks=find-plant
    python -m w2sjax.envs check household --tasks 100 --at-least 0.99 --json household.json

ENV is a registered name, or "module:Class" of an environment of your own. `check` exits with
status 1 where the expert succeeds less often than `--at-least` says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2sjax.envs.base import ENVIRONMENTS, Env, make_env
from w2sjax.envs.check import check, summary

_COMMANDS = {
    ":actions": "what means something now",
    ":score": "score and steps so far",
    ":expert": "what the expert would do now",
    ":help": "this list",
    ":quit": "end",
}


def printable(text: str) -> str:
    r"""The text with everything but printable characters and line ends written as an escape.

    Text of an environment is untrusted: a terminal would obey control characters in it.

    Example:
      printable("\x1b[2J") == r"\x1b[2J"
    """
    return "".join(
        char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text
    )


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Environment options from texts "key=value".

    Args:
      texts: values are JSON, and plain text where they are not (quote a text that reads like a
        number: 'key="1"').

    Raises:
      ValueError: a text without a key, or a key given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--option: want key=value, got {text!r}")
        if key in options:
            raise ValueError(f"--option: {key} is given twice")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):
            options[key] = value
    return options


def play_by_hand(env: Env, task_id: str) -> None:
    """Lets a person play one task on standard input and output, to its end or step limit."""
    first_observation = env.reset(task_id)
    print(f"task {printable(task_id)}, at most {env.max_steps} steps; :help lists commands\n")
    print(printable(env.instruction), "\n", printable(first_observation), sep="\n")
    steps, score = 0, 0.0
    while steps < env.max_steps:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            line = ":quit"
        if not sys.stdin.isatty():
            print(printable(line))  # so that what a file says stands in the record
        match line.strip():
            case ":actions":
                print(*map(printable, env.admissible_actions()), sep="\n")
            case ":score":
                print(f"score {score:g} after {steps} of {env.max_steps} steps")
            case ":expert":
                print(printable(env.expert_action()))
            case ":quit":
                print(f"given up with score {score:g} after {steps} steps")
                return
            case command if command.startswith(":"):
                print(*(f"{name:9} {what}" for name, what in _COMMANDS.items()), sep="\n")
            case _:
                outcome = env.step(line)
                steps, score = steps + 1, outcome.score
                print(printable(outcome.observation))
                if outcome.done:
                    verdict = "success" if outcome.success else "failed"
                    print(f"\n{verdict}, score {score:g}, {steps} steps")
                    return
    print(f"\nthe step limit of {env.max_steps} is reached; score {score:g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m w2sjax.envs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    known = ", ".join(sorted(ENVIRONMENTS))
    common.add_argument("env", metavar="ENV", help=f"one of {known}; or module:Class")
    common.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the environment's class, in JSON or as plain text; may be repeated",
    )
    play = commands.add_parser("play", parents=[common], help="play one task in the terminal")
    play.add_argument("--task", help="the task's id; without it --split and --index say which")
    play.add_argument("--split", default="train", help="default: %(default)s")
    play.add_argument("--index", type=int, default=0, help="which task of the split, from 0 on")
    checks = commands.add_parser("check", parents=[common], help="let the expert play many tasks")
    checks.add_argument("--tasks", type=int, default=50, help="of each split; default: %(default)s")
    checks.add_argument(
        "--splits",
        default="train,dev,test",
        help="with commas between them; default: %(default)s",
    )
    checks.add_argument("--at-least", type=float, default=0.0, help="smallest share of successes")
    checks.add_argument("--json", type=Path, help="write the numbers to this file as well")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "play" and arguments.index < 0:
        parser.error("--index must be 0 or more")
    if arguments.command == "check" and arguments.tasks < 1:
        parser.error("--tasks must be 1 or more")
    if arguments.command == "check" and not 0 <= arguments.at_least <= 1:
        parser.error("--at-least must be between 0 and 1")
    if arguments.command == "check" and arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # what the terminal cannot say or show ends nothing
            stream.reconfigure(errors=errors)
    try:
        options = parse_options(arguments.option)
        if arguments.command == "play":
            _play(arguments, options)
        else:
            _check(arguments, options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {printable(str(error))}")


def _play(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    env = make_env(arguments.env, **options)
    try:
        task_id = arguments.task
        if task_id is None:
            task_id = env.task_ids(arguments.split, arguments.index + 1)[-1]
        play_by_hand(env, task_id)
    finally:
        env.close()


def _check(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    splits = list(dict.fromkeys(split.strip() for split in arguments.splits.split(",")))
    result = check(arguments.env, options, splits=splits, tasks=arguments.tasks)
    print(printable(summary(result)))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["success"] < arguments.at_least:
        sys.exit(f"error: success {result['success']:.3f} is below {arguments.at_least:g}")


if __name__ == "__main__":
    main()
