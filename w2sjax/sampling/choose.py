"""Rollouts of an agent that chooses among the environment's admissible actions.

Each action is written as an answer and scored by its log-probability after the episode so far; the
softmax over the actions, with the sampler's temperature and filters, is what is drawn from. Nothing
malformed can be said, and a weak model explores what there is instead of what it can spell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from w2sjax.chat import ChatTemplate, format_answer
from w2sjax.envs import EnvFailure, EnvPool
from w2sjax.sampling.collect import (
    CollectStats,
    EpisodeRequest,
    Run,
    check_fit,
    go_through,
)
from w2sjax.sampling.draw import draw, uniforms
from w2sjax.sampling.sampler import Sampler
from w2sjax.types import Status, Step, Trajectory

# (params, contexts, answers of each context) → log-probability of each answer, float [answers]
# each, in nats; token ids all of them.
Score = Callable[[Any, Sequence[Sequence[int]], Sequence[Sequence[Sequence[int]]]], list]

_draw = jax.jit(draw)


def collect_choosing(
    sampler: Sampler,
    params: Any,
    template: ChatTemplate,
    pool: EnvPool,
    requests: Sequence[EpisodeRequest],
    *,
    score: Score,
    env_name: str,
    policy_name: str,
    seed: int,
    on_done: Callable[[Trajectory], None],
    progress: Callable[[int, int, CollectStats], None] | None = None,
    patience: int | None = None,
) -> CollectStats:
    """`collect`, but for how an answer comes about.

    A step's `answer_logp` is the log-probability of the choice among those offered, before
    temperature and filters. Actions that no answer can hold (several lines) and answers that the
    context has no room for are not offered; an episode in which nothing is left to choose from ends
    with token_limit where room was the reason, else with env_error.

    Args:
      sampler: says how many slots there are, how long contexts may be, and how to draw; it samples
        no token.
      score: log-probabilities of answers, such as a `train.SequenceScorer` computes them.
      params, template, pool, requests, env_name, policy_name, seed, on_done, progress, patience: as
        in `collect`.

    Returns:
      Statistics of the whole collection; `sampled_tokens` are those of the answers chosen.

    Raises:
      ValueError: sampler, pool and template do not fit together.
      RuntimeError: the pool has restarted its workers too often.
    """
    check_fit(sampler, template, pool, requests)
    run = _Choosing(sampler, params, template, pool, env_name, policy_name, seed, on_done, patience)
    run.score = score
    return go_through(run, requests, progress)


class _Choosing(Run):
    """A collection whose agent gets offers instead of speaking freely."""

    score: Score

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._contexts: dict[int, list[int]] = {}  # slot → tokens of its episode so far
        self._offers: dict[int, list[tuple[str, list[int]]]] = {}  # slot → actions and answers

    def go_on(self, queue) -> bool:
        self._start(queue)
        self._take_answers(wait=not self._ready and not self._offers)
        self._start(queue)
        if self._ready:
            self._read_chunks()
        if self._offers and (len(self._offers) >= self._patience or not self._pool.outstanding):
            self._choose()
        return bool(queue or self._episodes)

    def _read_chunks(self) -> None:
        """Appends what came to the contexts, and asks what may be done."""
        for slot in self._ready:
            episode = self._episodes[slot]
            before = self._contexts[slot] if episode.context else []
            self._contexts[slot] = [*before, *episode.chunk]
            episode.context += len(episode.chunk)
            self.stats.prompt_tokens += len(episode.chunk)
            episode.chunk = []
        asked, self._ready = dict.fromkeys(self._ready, ""), set()
        self._ask("actions", asked)

    def _offer(self, slot, episode, actions: Sequence[str] | EnvFailure) -> None:
        if isinstance(actions, EnvFailure):
            self._finish(slot, Status.ENV_ERROR, error=actions.message)
            return
        sayable = []
        for action in actions:
            try:
                sayable.append((action, self._template.encode_answer(format_answer(action))))
            except ValueError:  # no answer can hold it
                continue
        room = self._sampler.settings.max_length - len(self._contexts[slot])
        offers = [(action, answer) for action, answer in sayable if len(answer) <= room]
        if offers:
            self._offers[slot] = offers
        elif sayable:
            self._finish(slot, Status.TOKEN_LIMIT)
        else:
            reason = f"none of {len(actions)} actions can be said" if actions else "no actions"
            self._finish(slot, Status.ENV_ERROR, error=f"nothing to choose from: {reason}")

    def _choose(self) -> None:
        """Scores what is on offer in all slots, and performs what was drawn."""
        began = time.perf_counter()
        slots = sorted(self._offers)
        logps = self.score(
            self._params,
            [self._contexts[slot] for slot in slots],
            [[answer for _, answer in self._offers[slot]] for slot in slots],
        )
        width = 8
        while width < max(map(len, logps)):
            width *= 2
        logits = np.full((self._sampler.num_slots, width), -np.inf, np.float32)
        logits[:, 0] = 0.0  # of slots without an offer
        for slot, values in zip(slots, logps, strict=True):
            logits[slot, : len(values)] = values
        uniform = uniforms(self._keys(slots), count=1)[:, 0]
        drawn = jax.device_get(_draw(logits, uniform, self._sampler.settings.filters))
        actions = {}
        for slot, values in zip(slots, logps, strict=True):
            if not np.isfinite(values).all():
                self._finish(
                    slot,
                    Status.POLICY_ERROR,
                    error=f"log-probabilities of answer {len(self._episodes[slot].steps)} are not "
                    "finite",
                )
                continue
            action, answer = self._offers[slot][int(drawn[0][slot])]
            self._contexts[slot] = [*self._contexts[slot], *answer]
            episode = self._episodes[slot]
            episode.context += len(answer)
            episode.said = Step(
                format_answer(action),
                action,
                "",
                answer_ids=tuple(answer),
                answer_logp=float(drawn[1][slot]),
            )
            actions[slot] = action
            self.stats.sampled_tokens += len(answer)
        self.stats.turns += len(slots)
        self.stats.steps += 1
        self.stats.slot_steps += self._sampler.num_slots
        self.stats.speaking += len(slots)
        self.stats.model_seconds += time.perf_counter() - began
        self._offers.clear()
        if actions:
            self._ask("step", actions)
