"""Rollouts: a policy plays an environment pool, many episodes side by side.

Each slot of the sampler is tied to the environment slot of the same number, and goes its own way:
while the environments of some slots think, the model speaks in the others; a slot whose answer is
done hands its action over at once, and one whose episode ends takes the next request. An episode is
a function of (seed, task, rollout) alone: neither slots, nor neighbours, nor the order of requests,
nor how fast an environment is matter, beyond float rounding of the logits.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from w2sjax.chat import MALFORMED_OBSERVATION, ChatTemplate, parse_answer
from w2sjax.envs import EnvFailure, EnvPool, Outcome, Reset
from w2sjax.sampling.sampler import Sampler, SlotState, TurnResult
from w2sjax.types import Status, Step, Trajectory

NOT_DETERMINISTIC = "the environment is not deterministic, so a prefix cannot be replayed:"
_MOST_STEPS = 4  # tokens of each answer after which the environments are looked at again


@dataclasses.dataclass(frozen=True)
class EpisodeRequest:
    """One episode to sample, from the start or from a later point of an earlier episode.

    The prefix is restored by replay: its actions are performed again, and what the environment says
    must be what it said then. The model gets all of it as one prompt and goes on from there.
    """

    task_id: str
    rollout: int  # index among the rollouts of this task, >= 0
    prefix: tuple[Step, ...] = ()  # first steps of an earlier episode of the task
    first_observation: str | None = None  # of that episode; not compared where None


@dataclasses.dataclass
class CollectStats:
    """What a collection did so far.

    Attributes:
      statuses: finished episodes by status.
      repeated: finished episodes whose answers are those of an earlier one of the same task.
      turns: answers sampled.
      malformed: answers without an action; those that were cut off count too.
      sampled_tokens: tokens sampled, ends of turn included.
      prompt_tokens: tokens given to the model: instructions, observations, prefixes of requests.
      steps: passes of the model that sampled a token in the slots that were speaking.
      slot_steps: steps × slots; `speaking / slot_steps` is the share of slots that were.
      speaking: slots that were speaking, summed over steps.
      seconds: wall time so far.
      model_seconds: of them, in the model; environments in worker processes work meanwhile.
      env_seconds: of them, waiting for environments while no slot had anything to say.
    """

    statuses: collections.Counter[Status] = dataclasses.field(default_factory=collections.Counter)
    repeated: int = 0
    turns: int = 0
    malformed: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    slot_steps: int = 0
    speaking: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    env_seconds: float = 0.0

    @property
    def episodes(self) -> int:
        """Finished episodes."""
        return sum(self.statuses.values())

    @property
    def scored(self) -> int:
        """Finished episodes that say something about the policy."""
        return sum(count for status, count in self.statuses.items() if status.scored)


@dataclasses.dataclass
class _Episode:
    """An episode under way."""

    request: EpisodeRequest
    task_hash: tuple[int, int]  # two words of 32 bits
    instruction: str = ""
    first_observation: str = ""
    max_steps: int = 0
    chunk: list[int] = dataclasses.field(default_factory=list)  # tokens that the model gets next
    context: int = 0  # tokens in the slot's context
    score: float = 0.0
    steps: list[Step] = dataclasses.field(default_factory=list)
    expects: str = "reset"  # what the environment was asked for last: an operation of `EnvPool`
    said: Step | None = None  # the answer whose action the environment is performing

    @property
    def replays(self) -> bool:
        """Whether the next step is one of the request's prefix."""
        return len(self.steps) < len(self.request.prefix)


def collect(
    sampler: Sampler,
    params: Any,
    template: ChatTemplate,
    pool: EnvPool,
    requests: Sequence[EpisodeRequest],
    *,
    env_name: str,
    policy_name: str,
    seed: int,
    on_done: Callable[[Trajectory], None],
    progress: Callable[[int, int, CollectStats], None] | None = None,
    patience: int | None = None,
) -> CollectStats:
    """Samples one episode per request.

    Every episode reaches `on_done` as soon as it ends, in no fixed order; one that is stopped from
    outside (an interrupt) leaves those behind that have ended. How an episode ends:

    - the environment ends it: success or failed, its own verdict;
    - its step limit is reached: step_limit. An answer that is malformed or was cut off costs a
    step;
      the environment does not see it;
    - the next observation does not fit into the context, or an answer fills it: token_limit;
    - the environment or its worker breaks: env_error, with what it said in `error`, score 0. The
      answer that it broke at is not among the steps. Likewise where a request's prefix is replayed
      and the environment says something else than before;
    - the policy's numbers are not finite: policy_error, likewise.

    Args:
      sampler: the policy's sampler; one slot per slot of the pool.
      params: the policy's parameters.
      template: how texts become ids; its `stop_ids` must be among the sampler's.
      pool: environments, `sampler.num_slots` of them.
      requests: what to sample.
      env_name: recorded in the trajectories.
      policy_name: recorded in the trajectories.
      seed: sampling keys are a function of (seed, task, rollout, turn, token).
      on_done: takes each finished episode; what it raises stops the collection.
      progress: called with (finished, requested, statistics) now and then, after episodes ended.
      patience: answers that end, and observations that come, before the other slots are held up
        for them; an eighth of the slots by default. Where environments answer at once, as many as
        there are slots wastes least on a CPU.

    Returns:
      Statistics of the whole collection.

    Raises:
      ValueError: sampler, pool and template do not fit together.
      RuntimeError: the pool has restarted its workers too often.
    """
    check_fit(sampler, template, pool, requests)
    run = Run(sampler, params, template, pool, env_name, policy_name, seed, on_done, patience)
    return go_through(run, requests, progress)


def go_through(
    run: Run,
    requests: Sequence[EpisodeRequest],
    progress: Callable[[int, int, CollectStats], None] | None,
) -> CollectStats:
    """Plays all requests of a collection."""
    started = time.perf_counter()
    queue = collections.deque(requests)
    reported = 0
    while run.go_on(queue):
        run.stats.seconds = time.perf_counter() - started
        if progress is not None and run.stats.episodes > reported:
            reported = run.stats.episodes
            progress(reported, len(requests), run.stats)
    run.stats.seconds = time.perf_counter() - started
    if progress is not None and run.stats.episodes > reported:
        progress(run.stats.episodes, len(requests), run.stats)
    return run.stats


def check_fit(
    sampler: Sampler, template: ChatTemplate, pool: EnvPool, requests: Sequence[EpisodeRequest]
) -> None:
    if sampler.num_slots != pool.num_slots:
        raise ValueError(
            f"the sampler has {sampler.num_slots} slots and the pool {pool.num_slots}; make both "
            "with the same num_slots"
        )
    if missing := set(template.stop_ids) - set(sampler.settings.stop_ids):
        raise ValueError(
            f"the sampler's stop_ids {sampler.settings.stop_ids} lack {sorted(missing)}, which end "
            "an answer in this chat template; make the sampler with stop_ids=template.stop_ids"
        )
    for request in requests:
        if request.rollout < 0:
            raise ValueError(f"request of task {request.task_id!r}: rollout {request.rollout} < 0")


@jax.jit
def turn_keys(
    key: jax.Array, high: jax.Array, low: jax.Array, rollout: jax.Array, turn: jax.Array
) -> jax.Array:
    """PRNG keys [S] of one turn; all arguments but `key` are uint32 [S]."""

    def one(*words: jax.Array) -> jax.Array:
        folded = key
        for word in words:
            folded = jax.random.fold_in(folded, word)
        return folded

    return jax.vmap(one)(high, low, rollout, turn)


def _task_hash(task_id: str) -> tuple[int, int]:
    digest = hashlib.blake2b(task_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def _difference(recorded: Step, now: Step, ends_early: bool) -> str:
    """How a replayed step went otherwise than before; "" where it did not."""
    if ends_early:
        return "it ended the episode, which went on before"
    if now.observation != recorded.observation:
        return f"it said {now.observation!r} instead of {recorded.observation!r}"
    if not math.isclose(now.reward, recorded.reward, abs_tol=1e-6):
        return f"the score rose by {now.reward:g} instead of {recorded.reward:g}"
    return ""


class Run:
    """The state of one collection: episodes by slot, and what happens to them."""

    def __init__(
        self,
        sampler: Sampler,
        params: Any,
        template: ChatTemplate,
        pool: EnvPool,
        env_name: str,
        policy_name: str,
        seed: int,
        on_done: Callable[[Trajectory], None],
        patience: int | None,
    ) -> None:
        self.stats = CollectStats()
        self._sampler, self._params, self._template, self._pool = sampler, params, template, pool
        self._env_name, self._policy_name, self._seed = env_name, policy_name, seed
        self._on_done = on_done
        self._key = jax.random.key(seed)
        self._state: SlotState | None = None  # made when the model is first needed
        self._episodes: dict[int, _Episode] = {}  # slot → the episode under way
        self._ready: set[int] = set()  # slots whose chunk the model has not got yet
        self._speaking = 0  # slots whose answer is under way
        self._replaying: dict[int, str] = {}  # slot → action of a prefix, to be sent next
        self._patience = patience or max(1, sampler.num_slots // 8)
        self._seen: set[bytes] = set()  # digests of (task, answers) of finished episodes

    def go_on(self, queue: collections.deque[EpisodeRequest]) -> bool:
        """Takes in what has come from environments, and lets the model speak for a while; returns
        whether any episode is under way.
        """
        self._start(queue)
        idle = not self._speaking and not self._ready
        self._take_answers(wait=idle)
        self._start(queue)
        if self._ready and (len(self._ready) >= self._patience or not self._speaking):
            self._feed()
        if self._speaking:
            self._speak()
        return bool(queue or self._episodes)

    def _start(self, queue: collections.deque[EpisodeRequest]) -> None:
        """Starts episodes in free slots."""
        free = (slot for slot in range(self._sampler.num_slots) if slot not in self._episodes)
        starting = dict(zip(free, self._next(queue), strict=False))
        if not starting:
            return
        for slot, request in starting.items():
            self._episodes[slot] = _Episode(request, _task_hash(request.task_id))
        self._ask("reset", {slot: request.task_id for slot, request in starting.items()})

    def _next(self, queue: collections.deque[EpisodeRequest]) -> Iterator[EpisodeRequest]:
        while queue:
            yield queue.popleft()

    def _ask(self, operation: str, requests: Mapping[int, str]) -> None:
        began = time.perf_counter()
        for slot in requests:
            self._episodes[slot].expects = operation
        self._pool.submit(operation, requests)  # environments of this process work here and now
        self.stats.env_seconds += time.perf_counter() - began

    def _take_answers(self, *, wait: bool) -> None:
        """Goes on where environments have answered."""
        if not self._pool.outstanding:
            return
        answers = self._poll(None if wait else 0.0)
        while answers:
            for slot, answer in answers.items():
                episode = self._episodes[slot]
                if episode.expects == "reset":
                    self._begin(slot, episode, answer)
                elif episode.expects == "actions":
                    self._offer(slot, episode, answer)
                else:
                    self._advance(slot, episode, episode.said, answer)
            actions, self._replaying = self._replaying, {}
            if not actions:
                break
            self._ask("step", actions)
            answers = self._poll(0.0)

    def _poll(self, wait_s: float | None) -> dict[int, Any]:
        began = time.perf_counter()
        answers = self._pool.poll(wait_s=wait_s)
        self.stats.env_seconds += time.perf_counter() - began
        return answers

    def _offer(self, slot: int, episode: _Episode, actions: Sequence[str] | EnvFailure) -> None:
        """What may be done. Speaking freely asks for no actions; `choose` does, and says what to do
        with them."""
        raise NotImplementedError

    def _begin(self, slot: int, episode: _Episode, reset: Reset | EnvFailure) -> None:
        if isinstance(reset, EnvFailure):
            self._finish(slot, Status.ENV_ERROR, error=reset.message)
            return
        episode.instruction = reset.instruction
        episode.first_observation = reset.first_observation
        episode.max_steps = reset.max_steps
        expected = episode.request.first_observation
        if expected not in (None, reset.first_observation):
            said = f"at the start {reset.first_observation!r} instead of {expected!r}"
            self._finish(slot, Status.ENV_ERROR, error=f"{NOT_DETERMINISTIC} {said}")
            return
        episode.chunk = self._template.encode_start(reset.instruction, reset.first_observation)
        if len(episode.chunk) >= self._sampler.settings.max_length:
            self._finish(slot, Status.TOKEN_LIMIT)
        else:
            self._go_on(slot, episode)

    def _go_on(self, slot: int, episode: _Episode) -> None:
        """The next turn is the model's, or a step of the prefix that is to be restored."""
        if not episode.replays:
            self._ready.add(slot)
            return
        step = episode.request.prefix[len(episode.steps)]
        episode.chunk += self._ids_of(step)
        if step.action is None:
            self._advance(slot, episode, step, None)
        else:
            episode.said = step
            self._replaying[slot] = step.action

    def _ids_of(self, step: Step) -> Sequence[int]:
        if step.answer_ids is None:
            return self._template.encode_answer(step.answer)
        return step.answer_ids

    def _feed(self) -> None:
        """Gives the model the chunks that are ready."""
        began = time.perf_counter()
        if self._state is None:
            self._state = self._sampler.init()
        num_slots = self._sampler.num_slots
        chunk = np.zeros(
            (num_slots, max(len(self._episodes[slot].chunk) for slot in self._ready)), np.int32
        )
        length = np.zeros(num_slots, np.int32)
        reset = np.zeros(num_slots, bool)
        for slot in self._ready:
            episode = self._episodes[slot]
            length[slot] = len(episode.chunk)
            chunk[slot, : length[slot]] = episode.chunk
            reset[slot] = not episode.context
            episode.context += len(episode.chunk)
            episode.chunk = []
        self._state = self._sampler.feed(
            self._params, self._state, chunk, length, reset, self._keys(self._ready)
        )
        self._speaking += len(self._ready)
        self._ready.clear()
        self.stats.turns += int((length > 0).sum())
        self.stats.prompt_tokens += int(length.sum())
        self.stats.model_seconds += time.perf_counter() - began

    def _keys(self, slots: Iterable[int]) -> jax.Array:
        """PRNG keys [S] for the next turns of some slots."""
        words = np.zeros((4, self._sampler.num_slots), np.uint32)
        for slot in slots:
            episode = self._episodes[slot]
            words[:, slot] = (*episode.task_hash, episode.request.rollout, len(episode.steps))
        return turn_keys(self._key, *words)

    def _speak(self) -> None:
        """Samples until a few answers have ended, or the environments have had time enough."""
        began = time.perf_counter()
        waits = self._pool.outstanding or self._ready
        self._state, result, work = self._sampler.decode(
            self._params,
            self._state,
            until=self._patience,
            max_steps=_MOST_STEPS if waits else None,
        )
        stats = self.stats
        stats.model_seconds += time.perf_counter() - began
        stats.steps += work.steps
        stats.slot_steps += work.steps * self._sampler.num_slots
        stats.speaking += work.busy
        stats.sampled_tokens += int(result.length.sum())
        actions: dict[int, str] = {}
        for slot in map(int, np.flatnonzero(result.ended)):
            self._speaking -= 1
            episode = self._episodes[slot]
            step = self._read(slot, episode, result)
            if step is None:
                continue
            if step.action is None:
                self._advance(slot, episode, step, None)
            else:
                episode.said = step
                actions[slot] = step.action
        if actions:
            self._ask("step", actions)

    def _read(self, slot: int, episode: _Episode, result: TurnResult) -> Step | None:
        """What the agent said in a slot; None where the episode has ended with it."""
        ids = tuple(result.tokens[slot, : result.length[slot]].tolist())
        logp = float(result.logp[slot])
        episode.context += len(ids)
        if not math.isfinite(logp):
            self._finish(
                slot,
                Status.POLICY_ERROR,
                error=f"log-probability of answer {len(episode.steps)} is {logp}",
            )
            return None
        answer = self._template.decode_answer(ids)
        action = None if result.truncated[slot] else parse_answer(answer).action
        self.stats.malformed += action is None
        step = Step(answer, action, "", answer_ids=ids, answer_logp=logp)
        if result.full[slot]:
            if ids:
                episode.steps.append(step)
            self._finish(slot, Status.TOKEN_LIMIT)
            return None
        return step

    def _advance(
        self, slot: int, episode: _Episode, step: Step, outcome: Outcome | EnvFailure | None
    ) -> None:
        """Records a step and what followed it; ends the episode or prepares its next turn."""
        episode.said = None
        status = None
        if step.action is None:
            said = step.observation if episode.replays else MALFORMED_OBSERVATION
            step = dataclasses.replace(step, observation=said)
        elif isinstance(outcome, EnvFailure):
            self._finish(
                slot, Status.ENV_ERROR, error=f"at action {step.action!r}: {outcome.message}"
            )
            return
        else:
            recorded = step
            step = dataclasses.replace(
                step, observation=outcome.observation, reward=outcome.score - episode.score
            )
            ends_early = outcome.done and len(episode.steps) + 1 < len(episode.request.prefix)
            if episode.replays and (what := _difference(recorded, step, ends_early)):
                said = f"at step {len(episode.steps)}, action {step.action!r}, {what}"
                self._finish(slot, Status.ENV_ERROR, error=f"{NOT_DETERMINISTIC} {said}")
                return
            episode.score = outcome.score
            if outcome.done:
                status = Status.SUCCESS if outcome.success else Status.FAILED
        episode.steps.append(step)
        if status is None and len(episode.steps) >= episode.max_steps:
            status = Status.STEP_LIMIT
        if status is None:
            episode.chunk += self._template.close_answer(self._ids_of(step))
            episode.chunk += self._template.encode_observation(step.observation)
            if episode.context + len(episode.chunk) >= self._sampler.settings.max_length:
                status = Status.TOKEN_LIMIT
        if status is None:
            self._go_on(slot, episode)
        else:
            self._finish(slot, status)

    def _finish(self, slot: int, status: Status, error: str = "") -> None:
        episode = self._episodes.pop(slot)
        self.stats.statuses[status] += 1
        if status.scored:
            said = repr((episode.request.task_id, [step.answer for step in episode.steps]))
            digest = hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=16).digest()
            self.stats.repeated += digest in self._seen
            self._seen.add(digest)
        self._on_done(
            Trajectory(
                task_id=episode.request.task_id,
                rollout=episode.request.rollout,
                env=self._env_name,
                policy=self._policy_name,
                seed=self._seed,
                instruction=episode.instruction,
                first_observation=episode.first_observation,
                steps=tuple(episode.steps),
                status=status,
                score=episode.score if status.scored else 0.0,
                error=error,
                start=min(len(episode.request.prefix), len(episode.steps)),
            )
        )
