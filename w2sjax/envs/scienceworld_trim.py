"""Ways to make a plan for ScienceWorld shorter. Each proposal still has to be played to see it win.

The package's gold player tries doors that are open, looks into rooms for nothing, measures
temperatures while it waits, and waits one step at a time, or looks at a sliding block 700 times,
where `wait` waits for ten steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

SLIPS = ("No known action", "Unknown action", "It's not clear", "That request")
_QUESTION = "Ambiguous request"
WAIT, WAIT_ONE, LOOK, TELEPORT = "wait", "wait1", "look around", "teleport to "
_LOOK_AT = "look at "
# Tasks that are won by a change of state, whatever was measured on the way.
_CHANGES_OF_STATE = ("boil", "change-the-state-of-matter-of", "freeze", "melt")
_NOTHING = re.compile(
    r"already (?:open|closed|activated|deactivated)|\A(?:" + "|".join(SLIPS) + ")"
)
_MEASURING = re.compile(r"examine .*|use thermometer .*|look around|wait1?")
_MAX_RUNS = 4
_LONG = 3  # actions that are worth one `wait`
# Of the simulator's clock; looks around and examinations are free, `look at` takes one.
_TICKS = {WAIT: 10, WAIT_ONE: 1}


class Played(NamedTuple):
    """One action of a plan, where the agent stood, and what was answered."""

    action: str
    location: str
    reply: str


def proposals(task: str, plan: Sequence[Played]) -> Iterator[list[str]]:
    """Shorter action sequences that may win as well, most hopeful first; none for short plans."""
    if len(plan) <= 12:
        return
    actions = [step.action for step in plan]
    measuring = task in _CHANGES_OF_STATE
    rules = [lambda: _without_wandering(_without_slips(plan)), lambda: _without_slips(plan)]
    if measuring:
        rules = [
            lambda: _without_measuring(_without_wandering(_without_slips(plan)), False),
            lambda: _without_measuring(_without_wandering(_without_slips(plan)), True),
            *rules,
        ]
    rules += [lambda: _with_long_waits(actions, None)]
    runs = sum(map(_is_long_wait, _runs(actions)))
    if runs <= _MAX_RUNS:  # each proposal is played, and one of the long tasks takes seconds
        rules += [lambda run=run: _with_long_waits(actions, run) for run in range(runs)]
    seen = [actions]
    for rule in rules:
        shorter = rule()
        if len(shorter) < len(actions) and shorter not in seen:
            seen.append(shorter)
            yield shorter


def unmeasured(task: str, actions: Sequence[str]) -> Iterator[list[str]]:
    """For a task won by a change of state: the actions without measuring, and less time spent."""
    if task in _CHANGES_OF_STATE:
        yield _without_measuring(_without_wandering(actions), False)


def _without_slips(plan: Sequence[Played]) -> list[str]:
    """Without the actions that did nothing, and the questions that they failed to answer.

    After a question ("Ambiguous request: …") whatever comes next is taken for its answer: the
    question without the answer would swallow the action that follows it.
    """
    kept: list[str] = []
    asked = False
    for step in plan:
        if asked and step.reply.startswith(SLIPS):
            kept.pop()
        elif not _NOTHING.search(step.reply):
            kept.append(step.action)
        asked = step.reply.startswith(_QUESTION)
    return kept


def _without_wandering(actions: Sequence[str]) -> list[str]:
    """Without places that were gone to, at most looked at, and left."""
    kept: list[str] = []
    for action in actions:
        if action.startswith(TELEPORT):
            if kept and kept[-1] == LOOK and len(kept) > 1 and kept[-2].startswith(TELEPORT):
                del kept[-2:]
            elif kept and kept[-1].startswith(TELEPORT):
                del kept[-1:]
        kept.append(action)
    return kept


def _without_measuring(actions: Sequence[str], keep_time: bool) -> list[str]:
    """Runs of measuring and waiting become waiting alone, or, but for the last, a look or nothing.

    Args:
      actions: of a plan.
      keep_time: whether there is waiting in place of all runs, not of the last alone.
    """
    runs = [(busy, list(run)) for busy, run in groupby(actions, key=_is_measuring)]
    last = max((index for index, (busy, _) in enumerate(runs) if busy), default=-1)
    kept: list[str] = []
    for index, (busy, run) in enumerate(runs):
        if not busy:
            kept += run
            continue
        kept += [LOOK] * (LOOK in run)
        if keep_time or index == last:
            ticks = sum(_TICKS.get(action, action.startswith("use ")) for action in run)
            kept += [WAIT] * -(-ticks // _TICKS[WAIT])
    return kept


def _is_measuring(action: str) -> bool:
    return _MEASURING.fullmatch(action) is not None


def _runs(actions: Sequence[str]) -> list[list[str]]:
    """Equal actions in a row."""
    return [list(run) for _, run in groupby(actions)]


def _is_long_wait(run: Sequence[str]) -> bool:
    return len(run) >= _LONG and (run[0] == WAIT_ONE or run[0].startswith(_LOOK_AT))


def _with_long_waits(actions: Sequence[str], only: int | None) -> list[str]:
    """Long runs of `wait1` or of looks at one thing, or one such run, as the `wait` that covers
    them, with one look at the end.
    """
    kept: list[str] = []
    index = 0
    for run in _runs(actions):
        if _is_long_wait(run):
            if only in (None, index):
                look = run[-1:] if run[0] != WAIT_ONE else []
                run = [WAIT] * -(-(len(run) - len(look)) // _TICKS[WAIT]) + look
            index += 1
        kept += run
    return kept
