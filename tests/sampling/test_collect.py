"""Every episode is accounted for, and is a function of (seed, task, rollout) alone."""

import dataclasses
import functools
import random
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2sjax.chat import MALFORMED_OBSERVATION, ChatTemplate, train_bpe
from w2sjax.envs import EnvFailure, EnvPool, Outcome, PlayRequest, Reset
from w2sjax.losses import score_from_logits
from w2sjax.models import ModelConfig, init_params, make_policy
from w2sjax.sampling import (
    DecodeWork,
    EpisodeRequest,
    SamplerSettings,
    TrajectoryWriter,
    TurnResult,
    collect,
    collect_choosing,
    make_sampler,
    play_episodes,
    read_trajectories,
)
from w2sjax.sampling.collect import _task_hash, turn_keys
from w2sjax.types import Policy, Status

WORDS = ("left", "right", "look")


@functools.cache
def _template():
    texts = [f"You are at {i}. Task: task {j}." for i in range(9) for j in range(9)]
    texts += ["Walk.", MALFORMED_OBSERVATION, *(f"Action: {word}" for word in WORDS)] * 9
    return ChatTemplate(train_bpe(texts, vocab_size=420))


class Corridor:
    """Stand-in for a pool: walk from 0 to 3; "left" from 0 loses; looking changes nothing."""

    def __init__(self, num_slots, max_steps=8):
        self.num_slots = num_slots
        self.max_steps = max_steps
        self.places = {}
        self.stepped = []
        self.answers = {}
        self.offers = ["left", "look", "right"]  # in place 2
        self.rng = random.Random(0)

    def submit(self, operation, requests):
        """Answers come in no particular order, and some only when they are waited for."""
        perform = {"reset": self._reset, "step": self._step, "actions": self._offers}[operation]
        for slot, argument in requests.items():
            assert slot not in self.answers
            self.answers[slot] = perform(slot, argument)

    def poll(self, *, wait_s=None):
        slots = [slot for slot in self.answers if wait_s is None or not self.rng.randrange(2)]
        return {slot: self.answers.pop(slot) for slot in slots}

    @property
    def outstanding(self):
        return len(self.answers)

    def _reset(self, slot, task):
        if task == "reset breaks":
            return EnvFailure("no such world")
        self.places[slot] = 0
        first = "echo " * 400 if task == "long start" else f"You are at 0. Task: {task}."
        return Reset(first_observation=first, instruction="Walk.", max_steps=self.max_steps)

    def _offers(self, slot, _):
        place = self.places[slot]
        return {1: ["left", "right", "two\nlines"], 2: self.offers}.get(place, ["look", "right"])

    def _step(self, slot, action):
        self.stepped.append(action)
        if action == "break":
            return EnvFailure("worker 0 died")
        if action == "shout":
            return Outcome("echo " * 400, 0.25, False, False)
        self.places[slot] += {"left": -1, "right": 1}.get(action, 0)
        place = self.places[slot]
        score = max(place, 0) / 3
        return Outcome(f"You are at {place}.", score, place in (-1, 3), place == 3)


@dataclasses.dataclass
class Scripted:
    """Stand-in for a sampler: `say(context text)` → an answer, or (ids, truncated, full, logp)."""

    num_slots: int
    say: object
    max_length: int = 256

    def __post_init__(self):
        stop_ids = _template().stop_ids
        self.settings = SamplerSettings(self.max_length, 40, stop_ids)
        self.contexts = None
        self.speaking = []
        self.rng = random.Random(1)

    def init(self):
        return [[] for _ in range(self.num_slots)]

    def feed(self, params, state, chunk, chunk_length, reset, keys):
        contexts = [[] if new else old for new, old in zip(reset, state, strict=True)]
        for slot in np.flatnonzero(chunk_length):
            contexts[slot] = contexts[slot] + chunk[slot, : chunk_length[slot]].tolist()
            assert len(contexts[slot]) < self.max_length
            self.speaking.append(slot)
        return contexts

    def decode(self, params, contexts, *, until=None, max_steps=None):
        """Answers end in no particular order."""
        num_slots = self.num_slots
        out = dict(
            ended=np.zeros(num_slots, bool),
            tokens=np.zeros((num_slots, 40), np.int32),
            length=np.zeros(num_slots, np.int32),
            logps=np.zeros((num_slots, 40), np.float32),
            truncated=np.zeros(num_slots, bool),
            full=np.zeros(num_slots, bool),
        )
        self.rng.shuffle(self.speaking)
        ending, self.speaking = self.speaking[:until], self.speaking[until or num_slots :]
        for slot in ending:
            said = self.say(_template().tokenizer.decode(contexts[slot]))
            if isinstance(said, str):
                said = (_template().encode_answer(said), False, False, -1.0)
            ids, out["truncated"][slot], out["full"][slot], out["logps"][slot, 0] = said
            out["tokens"][slot, : len(ids)] = ids
            out["length"][slot] = len(ids)
            out["ended"][slot] = True
            contexts[slot] = contexts[slot] + list(ids)
        self.contexts = contexts
        return contexts, TurnResult(**out), DecodeWork(1, len(ending))


def _play(sampler, pool, requests, params=None, seed=0, **more):
    done = []
    stats = collect(
        sampler, params, _template(), pool, requests, env_name="corridor", policy_name="weak",
        seed=seed, on_done=done.append, **more,
    )  # fmt: skip
    return done, stats


def _one(say, task="t", **more):
    """One scripted episode."""
    (episode,), stats = _play(
        Scripted(2, say, **more), pool := Corridor(2), [EpisodeRequest(task, 4)]
    )
    assert stats.statuses == Counter([episode.status])
    assert (episode.task_id, episode.rollout, episode.seed) == (task, 4, 0)
    assert (episode.env, episode.policy) == ("corridor", "weak")
    return episode, stats, pool


def test_the_environments_verdict_ends_an_episode():
    episode, stats, _ = _one(lambda context: "Action: right")
    assert episode.status is Status.SUCCESS
    assert [s.action for s in episode.steps] == ["right"] * 3
    assert [s.observation for s in episode.steps] == [f"You are at {i}." for i in (1, 2, 3)]
    assert [s.reward for s in episode.steps] == pytest.approx([1 / 3] * 3)
    assert (episode.score, episode.instruction) == (1.0, "Walk.")
    assert all(s.answer == "Action: right" and s.answer_logp == -1.0 for s in episode.steps)
    assert all(list(s.answer_ids) == _template().encode_answer(s.answer) for s in episode.steps)
    assert (stats.episodes, stats.turns, stats.malformed, stats.steps) == (1, 3, 0, 3)
    assert stats.sampled_tokens == sum(len(s.answer_ids) for s in episode.steps)

    episode, *_ = _one(lambda context: "Thought: hm.\nAction: left")
    assert (episode.status, episode.score, len(episode.steps)) == (Status.FAILED, 0.0, 1)


def test_what_the_model_sees_is_what_is_trained_on():
    sampler = Scripted(1, lambda context: "Action: right")
    (episode,), stats = _play(sampler, Corridor(1), [EpisodeRequest("t", 0)])
    tokens = _template().encode_trajectory(episode).tokens.tolist()
    assert sampler.contexts[0] == tokens
    assert stats.prompt_tokens + stats.sampled_tokens == len(tokens)


def test_steps_are_limited():
    episode, *_ = _one(lambda context: "Action: look")
    assert (episode.status, len(episode.steps), episode.score) == (Status.STEP_LIMIT, 8, 0.0)


def test_a_malformed_answer_costs_a_step_and_never_reaches_the_environment():
    def say(context):
        return "I go right" if context.endswith("at 1.<|assistant|>") else "Action: right"

    episode, stats, pool = _one(say)
    assert episode.status is Status.SUCCESS
    assert [s.action for s in episode.steps] == ["right", None, "right", "right"]
    assert episode.steps[1].observation == MALFORMED_OBSERVATION
    assert episode.steps[1].reward == 0.0
    assert pool.stepped == ["right"] * 3
    assert stats.malformed == 1

    episode, stats, pool = _one(lambda context: "no")
    assert (episode.status, len(episode.steps)) == (Status.STEP_LIMIT, 8)
    assert pool.stepped == []


def test_an_answer_that_was_cut_off_is_malformed_and_its_turn_is_closed():
    cut = tuple(_template().encode_answer("Action: right")[:-1])
    sampler = Scripted(1, lambda context: (cut, True, False, -1.0))
    (episode,), _ = _play(sampler, Corridor(1), [EpisodeRequest("t", 0)])
    assert {s.action for s in episode.steps} == {None}
    assert episode.steps[0].answer == "Action: right"
    tokens = _template().encode_trajectory(episode)
    assert sampler.contexts[0] == tokens.tokens.tolist()
    text = _template().tokenizer.decode(tokens.tokens)
    assert text.count("Action: right<|end|><|user|>") == 7


@pytest.mark.parametrize("task", ["long start", "shout"])
def test_what_does_not_fit_ends_with_token_limit(task):
    episode, *_ = _one(lambda context: "Action: shout", task=task)
    assert episode.status is Status.TOKEN_LIMIT
    assert len(episode.steps) == (task == "shout")
    assert episode.score == (0.25 if task == "shout" else 0.0)


def test_an_answer_that_fills_the_context_ends_with_token_limit():
    cut = tuple(_template().encode_answer("Action: right")[:-1])
    episode, _, pool = _one(lambda context: (cut, True, True, -1.0))
    assert episode.status is Status.TOKEN_LIMIT
    assert [(s.action, s.answer_ids) for s in episode.steps] == [(None, cut)]
    assert pool.stepped == []


def test_context_lengths_are_counted_exactly():
    """Episodes are cut where the sampler would refuse, neither earlier nor later."""
    whole, *_ = _one(lambda context: "Action: look")
    length = len(_template().encode_trajectory(whole).tokens)
    answer = len(whole.steps[-1].answer_ids)
    # The last chunk has to leave room for one token at least.
    enough, *_ = _one(lambda context: "Action: look", max_length=length - answer + 1)
    assert enough.status is Status.STEP_LIMIT
    short, *_ = _one(lambda context: "Action: look", max_length=length - answer)
    assert (short.status, len(short.steps)) == (Status.TOKEN_LIMIT, 7)


def test_what_breaks_is_counted_and_never_scored():
    def say(context):
        return "Action: break" if "at 1" in context else "Action: right"

    episode, *_ = _one(say)
    assert (episode.status, episode.score, len(episode.steps)) == (Status.ENV_ERROR, 0.0, 1)
    assert episode.error == "at action 'break': worker 0 died"
    episode, *_ = _one(say, task="reset breaks")
    assert (episode.status, episode.error) == (Status.ENV_ERROR, "no such world")
    episode, *_ = _one(lambda context: ((5,), True, False, float("nan")))
    assert episode.status is Status.POLICY_ERROR
    assert "nan" in episode.error
    assert not episode.status.scored


def test_every_request_ends_once_however_many_break():
    tasks = ["a", "reset breaks", "long start", "b"] * 5
    requests = [EpisodeRequest(task, i) for i, task in enumerate(tasks)]
    reports = []
    done, stats = _play(
        Scripted(3, lambda context: "Action: right"), Corridor(3), requests,
        progress=lambda *report: reports.append(report[:2]),
    )  # fmt: skip
    assert Counter((t.task_id, t.rollout) for t in done) == Counter(
        (r.task_id, r.rollout) for r in requests
    )
    assert stats.statuses == Counter(t.status for t in done)
    assert (stats.episodes, stats.scored) == (20, 15)
    assert reports == sorted(set(reports))
    assert reports[-1] == (20, 20)


def test_no_requests_no_work():
    done, stats = _play(Scripted(2, lambda context: "x"), Corridor(2), [])
    assert (done, stats.episodes, stats.steps) == ([], 0, 0)


def test_slots_are_refilled_and_repetitions_are_counted():
    requests = [EpisodeRequest(f"task {i % 10}", i // 10) for i in range(40)]
    _, stats = _play(Scripted(4, lambda context: "Action: right"), Corridor(4), requests)
    assert stats.turns == stats.speaking == 40 * 3
    assert stats.slot_steps == stats.steps * 4
    assert stats.repeated == 30


# ------------------------------------------------------------------------------------------------
# The real sampler with a tiny model that has learned to speak: a bigram bias on top of its logits.
# ------------------------------------------------------------------------------------------------


@functools.cache
def _speaker():
    template = _template()
    config = ModelConfig(
        vocab_size=template.vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1,
        mlp_width=16, compute_dtype="float32",
    )  # fmt: skip
    inner = make_policy(config)
    assistant = template.encode_observation("x")[-1]
    mark = template.encode_answer("Action: x")[0]
    end = template.stop_ids[0]
    bias = np.zeros((config.vocab_size, config.vocab_size), np.float32)
    bias[:, end] = 8.0
    bias[assistant, mark] = 11.0
    for word in WORDS:
        bias[mark, template.encode_answer(f"Action: {word}")[1]] = 9.0
    bias = jnp.asarray(bias)

    def apply_fn(params, tokens, **where):
        return 2 * jnp.tanh(inner.apply_fn(params, tokens, **where)) + bias[tokens]

    def decode_fn(params, cache, tokens, start, last, *, slots=None):
        logits, cache = inner.decode_fn(params, cache, tokens, start, last, slots=slots)
        at = jnp.maximum(last, 0)[:, None]
        token = jnp.take_along_axis(tokens, at, axis=1)[:, 0]
        return 2 * jnp.tanh(logits) + bias[token], cache

    score_fn = score_from_logits(apply_fn)
    policy = Policy(apply_fn, score_fn, inner.init_cache, decode_fn, inner.resize_cache)
    return policy, init_params(config, jax.random.key(1))


def _sample(num_slots, requests, seed=0, **more):
    policy, params = _speaker()
    settings = SamplerSettings(200, 8, _template().stop_ids)
    sampler = make_sampler(policy, settings, num_slots=num_slots)
    done, stats = _play(sampler, Corridor(num_slots), requests, params=params, seed=seed, **more)
    return {(t.task_id, t.rollout): t for t in done}, stats


REQUESTS = [EpisodeRequest(f"task {i % 6}", i // 6) for i in range(24)]


@functools.cache
def _reference():
    return _sample(8, REQUESTS)[0]


def _tokens(episodes):
    return {key: [step.answer_ids for step in t.steps] for key, t in episodes.items()}


def test_the_speaker_is_worth_testing_with():
    statuses = Counter(t.status for t in _reference().values())
    assert {Status.SUCCESS, Status.FAILED} <= set(statuses)
    assert any(s.action is None for t in _reference().values() for s in t.steps)
    assert len({tuple(ids) for ids in _tokens(_reference()).values()}) > 12


def test_episodes_do_not_depend_on_slots_neighbours_or_order():
    shuffled = random.Random(0).sample(REQUESTS, len(REQUESTS))
    assert _tokens(_sample(3, shuffled)[0]) == _tokens(_reference())
    alone = _sample(3, [EpisodeRequest("task 4", 2)])[0]
    assert _tokens(alone) == {("task 4", 2): _tokens(_reference())["task 4", 2]}


def test_episodes_depend_on_the_seed():
    assert _tokens(_sample(8, REQUESTS, seed=1)[0]) != _tokens(_reference())


def test_log_probabilities_are_those_of_the_forward_pass():
    """What was recorded while sampling is what training would compute for the same tokens."""
    policy, params = _speaker()
    episodes = [_template().encode_trajectory(t) for t in _reference().values()]
    longest = max(len(episode.tokens) for episode in episodes)
    tokens, ends = np.zeros((2, len(episodes), longest), np.int32)
    for row, episode in enumerate(episodes):
        tokens[row, : len(episode.tokens)] = episode.tokens
        ends[row, : len(episode.tokens)] = len(episode.tokens)
    positions = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens.shape)
    forward = jax.jit(policy.apply_fn)
    logits = np.array(forward(params, tokens, positions=positions, subtree_end=ends), np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    logps = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    for row, (episode, out) in enumerate(zip(_reference().values(), episodes, strict=True)):
        for step, start, end in zip(episode.steps, out.turn_start, out.turn_end, strict=True):
            whole = logps[row, start - 1 : end - 1].sum()
            assert whole == pytest.approx(step.answer_logp, abs=1e-3)


def test_an_interrupted_collection_is_resumed_with_equal_results(tmp_path):
    path = tmp_path / "rollouts.jsonl"

    class Interrupted(TrajectoryWriter):
        def write(self, trajectory):
            super().write(trajectory)
            if self.path.read_bytes().count(b"\n") == 7:
                raise KeyboardInterrupt

    policy, params = _speaker()
    settings = SamplerSettings(200, 8, _template().stop_ids)
    sampler = make_sampler(policy, settings, num_slots=8)
    run = functools.partial(
        collect, sampler, params, _template(), env_name="corridor", policy_name="weak", seed=0
    )
    with Interrupted(path) as writer, pytest.raises(KeyboardInterrupt):
        run(Corridor(8), REQUESTS, on_done=writer.write)
    there = {(t.task_id, t.rollout) for t in read_trajectories(path)}
    assert len(there) == 7
    rest = [r for r in REQUESTS if (r.task_id, r.rollout) not in there]
    with TrajectoryWriter(path) as writer:
        run(Corridor(8), rest, on_done=writer.write)
    episodes = read_trajectories(path)
    assert len(episodes) == len(REQUESTS)
    assert _tokens({(t.task_id, t.rollout): t for t in episodes}) == _tokens(_reference())


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="2 slots and the pool 3"):
        _play(Scripted(2, None), Corridor(3), [])
    sampler = Scripted(2, None)
    sampler.settings = SamplerSettings(64, 8, (7,))
    with pytest.raises(ValueError, match="stop_ids"):
        _play(sampler, Corridor(2), [])
    with pytest.raises(ValueError, match="'t': rollout -1"):
        _play(Scripted(2, None), Corridor(2), [EpisodeRequest("t", -1)])


# ------------------------------------------------------------------------------------------------
# Choosing among admissible actions.
# ------------------------------------------------------------------------------------------------


def _taste(params, contexts, answers):
    """Log-probabilities by the action's length and the context's end."""
    scores = []
    for context, offered in zip(contexts, answers, strict=True):
        text = _template().tokenizer.decode(context)
        scores.append(
            np.array([-len(a) - 0.5 * ("at 1" in text) * i for i, a in enumerate(offered)])
        )
    return scores


def _choose(requests, slots=3, pool=None, score=_taste, **settings):
    sampler = make_sampler(
        Policy(None, None, None, None),
        SamplerSettings(settings.pop("max_length", 256), 8, _template().stop_ids, **settings),
        num_slots=slots,
    )
    done = []
    stats = collect_choosing(
        sampler, None, _template(), pool or Corridor(slots), requests, score=score,
        env_name="corridor", policy_name="weak", seed=0, on_done=done.append,
    )  # fmt: skip
    return {(t.task_id, t.rollout): t for t in done}, stats


def test_only_what_is_offered_is_chosen_and_by_its_probability():
    requests = [EpisodeRequest(f"task {i}", 0) for i in range(300)]
    episodes, stats = _choose(requests, slots=8, temperature=2.0)
    assert len(episodes) == 300 and stats.malformed == 0
    firsts = Counter(t.steps[0].action for t in episodes.values())
    assert set(firsts) == {"look", "right"}
    lengths = [len(_template().encode_answer(f"Action: {a}")) for a in ("look", "right")]
    expected = 1 / (1 + np.exp((lengths[1] - lengths[0]) / 2.0))
    assert firsts["right"] / 300 == pytest.approx(expected, abs=0.1)
    assert {s.action for t in episodes.values() for s in t.steps} == {"left", "look", "right"}
    for episode in episodes.values():
        offered = [-lengths[0], -lengths[1]]
        chosen = ("look", "right").index(episode.steps[0].action)
        expected = offered[chosen] - np.log(np.exp(offered).sum())
        assert episode.steps[0].answer_logp == pytest.approx(expected, abs=1e-5)
        tokens = _template().encode_trajectory(episode).tokens
        assert sum(len(s.answer_ids) for s in episode.steps) < len(tokens)
    assert stats.sampled_tokens == sum(
        len(s.answer_ids) for t in episodes.values() for s in t.steps
    )


def test_choices_do_not_depend_on_slots_or_order_and_greedy_takes_the_best():
    requests = [EpisodeRequest(f"task {i % 5}", i // 5) for i in range(20)]
    some, _ = _choose(requests, slots=8)
    others, _ = _choose(requests[::-1], slots=3)
    assert _tokens(some) == _tokens(others)
    best, _ = _choose(requests, temperature=0.0)
    (actions,) = {tuple(s.action for s in t.steps) for t in best.values()}
    lengths = {a: len(_template().encode_answer(f"Action: {a}")) for a in ("look", "right")}
    assert actions[0] == min(lengths, key=lengths.get)


def test_nothing_to_choose_from_ends_an_episode_and_says_why():
    request = [EpisodeRequest("t", 0)]
    towards = {"temperature": 0.0, "score": lambda p, c, a: [-np.arange(len(x))[::-1] for x in a]}
    pool = Corridor(1)
    pool.offers = ["two\nlines", ""]
    (episode,) = _choose(request, 1, pool, **towards)[0].values()
    assert episode.status is Status.ENV_ERROR
    assert "none of 2 actions can be said" in episode.error
    pool = Corridor(1)
    pool.offers = []
    (episode,) = _choose(request, 1, pool, **towards)[0].values()
    assert (episode.status, episode.error) == (
        Status.ENV_ERROR, "nothing to choose from: no actions"
    )  # fmt: skip
    whole = _template().encode_start("Walk.", "You are at 0. Task: t.")
    (episode,) = _choose(request, 1, max_length=len(whole) + 1, **towards)[0].values()
    assert (episode.status, len(episode.steps)) == (Status.TOKEN_LIMIT, 0)
    nan = dict(score=lambda p, c, a: [np.full(len(x), np.nan) for x in a])
    (episode,) = _choose(request, 1, **nan)[0].values()
    assert episode.status is Status.POLICY_ERROR


# ------------------------------------------------------------------------------------------------
# Episodes that go on from a later point of an earlier one.
# ------------------------------------------------------------------------------------------------


def _sampled_alone(context, keys, max_length=200):
    """What the real sampler says in one slot after a context."""
    policy, params = _speaker()
    settings = SamplerSettings(max_length, 8, _template().stop_ids)
    sampler = make_sampler(policy, settings, num_slots=1)
    chunk, length = np.asarray([context], np.int32), np.asarray([len(context)])
    state = sampler.feed(params, sampler.init(), chunk, length, np.asarray([True]), keys)
    _, result, _ = sampler.decode(params, state)
    return tuple(result.tokens[0, : result.length[0]].tolist())


def _branches():
    """Requests that go on from every inner point of some of the episodes."""
    return [
        EpisodeRequest(t.task_id, 100 + 20 * t.rollout + cut, t.steps[:cut], t.first_observation)
        for t in list(_reference().values())[:6]
        for cut in range(1, len(t.steps))
    ]


def test_a_branched_episode_is_its_prefix_and_what_is_sampled_after_it():
    requests = _branches()
    assert any(step.action is None for r in requests for step in r.prefix)
    done, stats = _sample(4, requests)
    own_tokens = 0
    for request in requests:
        episode = done[request.task_id, request.rollout]
        cut = len(request.prefix)
        assert episode.start == cut and episode.steps[:cut] == request.prefix
        assert episode.status.scored and len(episode.steps) > cut
        own_tokens += sum(len(step.answer_ids) for step in episode.steps[cut:])
        # The first new answer, by hand: a prompt that ends where it asks for an answer, and the
        # key of (seed, task, rollout, turn).
        whole = _template().encode_trajectory(episode)
        context = whole.tokens[: whole.turn_start[cut]].tolist()
        words = (*_task_hash(request.task_id), request.rollout, cut)
        keys = turn_keys(jax.random.key(0), *(np.asarray([w], np.uint32) for w in words))
        assert _sampled_alone(context, keys) == episode.steps[cut].answer_ids
        # What the environment paid along the way is in the score, as in any episode.
        total = sum(step.reward for step in episode.steps)
        assert episode.score == pytest.approx(total)
    assert stats.sampled_tokens == own_tokens
    assert len({t.steps[t.start].answer_ids for t in done.values()}) > 3
    alone, _ = _sample(2, requests[5:6])
    key = (requests[5].task_id, requests[5].rollout)
    assert alone[key] == dataclasses.replace(
        done[key],
        steps=tuple(
            dataclasses.replace(new, answer_logp=old.answer_logp)  # equal but for rounding
            for new, old in zip(done[key].steps, alone[key].steps, strict=True)
        ),
    )


def test_malformed_steps_of_a_prefix_stay_away_from_the_environment():
    said = iter(["no", "Action: right", "nothing"])
    first, *_ = _one(lambda context: next(said, "Action: right"))
    prefix = tuple(dataclasses.replace(s, answer_ids=None, answer_logp=None) for s in first.steps)
    pool, sampler = Corridor(2), Scripted(2, lambda context: "Action: right")
    request = EpisodeRequest("t", 1, prefix[:3], first.first_observation)
    (episode,), stats = _play(sampler, pool, [request])
    assert [s.action for s in episode.steps] == [None, "right", None, "right", "right"]
    assert episode.steps[:3] == prefix[:3] and episode.status is Status.SUCCESS
    assert pool.stepped == ["right"] * 3
    assert (stats.malformed, stats.turns, episode.start) == (0, 2, 3)
    assert stats.prompt_tokens + stats.sampled_tokens == len(
        _template().encode_trajectory(episode).tokens
    )  # a step without ids is read as the template writes it


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(observation="You are at 7."), "step 1, action 'look', it said 'You are at 1.'"),
        (dict(reward=0.5), "step 1, action 'look', the score rose by 0 instead of 0.5"),
        (dict(action="right right"), "step 2, action 'right', it said 'You are at 2.' instead"),
    ],
)
def test_an_environment_that_is_not_deterministic_is_told(change, says):
    actions = iter(["right", "look", "right"])
    whole, *_ = _one(lambda context: f"Action: {next(actions, 'right')}")
    steps = list(whole.steps)
    if "action" in change:
        steps[2] = dataclasses.replace(steps[2], observation="You are at 3.")
    else:
        steps[1] = dataclasses.replace(steps[1], **change)
    request = EpisodeRequest("t", 1, tuple(steps), whole.first_observation)
    (episode,), stats = _play(Scripted(2, None), Corridor(2), [request])
    assert (episode.status, episode.score) == (Status.ENV_ERROR, 0.0)
    assert "not deterministic" in episode.error and says in episode.error
    assert stats.turns == 0 and episode.start == len(episode.steps) < 3


def test_what_else_ends_a_replay():
    looks, *_ = _one(lambda context: "Action: look")
    first = looks.first_observation

    def replay(prefix, first=first, task="t", say=lambda context: "Action: look", **more):
        request = EpisodeRequest(task, 1, tuple(prefix), first)
        (episode,), _ = _play(Scripted(2, say, **more), Corridor(2), [request])
        return episode

    assert "at the start" in replay(looks.steps[:2], first="Elsewhere.").error
    whole = replay(looks.steps)  # nothing is left to be said
    assert (whole.status, whole.steps) == (Status.STEP_LIMIT, looks.steps)
    small = replay(looks.steps[:5], max_length=42)
    assert small.status is Status.TOKEN_LIMIT and 0 < len(small.steps) < 5
    assert small.steps == looks.steps[: len(small.steps)]
    right, *_ = _one(lambda context: "Action: right")
    more = (*right.steps, dataclasses.replace(right.steps[0]))
    assert "it ended the episode, which went on before" in replay(more).error
    broken = dataclasses.replace(looks.steps[0], action="break")
    assert replay([broken]).error == "at action 'break': worker 0 died"


# ------------------------------------------------------------------------------------------------
# Real environments in real processes.
# ------------------------------------------------------------------------------------------------


BREAKS = {  # the second action → what the error says
    "die": "at action 'die': ",
    "exit": "at action 'exit': ",
    "hang": "at action 'hang': ",
    "raise": "at action 'raise': ",
    "at reset: die": "died",
    "at reset: raise": "as told",
}


@pytest.mark.parametrize("num_slots", [2, 6])
def test_every_request_ends_once_when_processes_die_and_hang(num_slots, monkeypatch):
    """With two slots each has a process of its own, with six three slots share one."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "envs")
    tasks = ["fine", "die", "fine", "long", "raise", "fine", "at reset: die", "exit", "hang"]
    tasks += ["fine", "long", "at reset: raise", "fine", "fine"]
    requests = [EpisodeRequest(task, i) for i, task in enumerate(tasks)]

    def say(context):
        task = re.search(r"task ([a-z]+)", context)[1]
        return f"Action: {task if 'hello' in context else 'hello'}"

    options = dict(num_slots=num_slots, num_workers=2, timeout_s=3.0, max_restarts=100)
    with EnvPool("faulty_envs:Faulty", {}, **options) as pool:
        done, stats = _play(Scripted(num_slots, say), pool, requests)
        assert 0 < pool.restarts <= 4 and not pool.outstanding
        assert pool.restarts == 4 or num_slots > 2
    assert Counter((t.task_id, t.rollout) for t in done) == Counter(
        (r.task_id, r.rollout) for r in requests
    )
    assert stats.statuses == Counter(t.status for t in done)
    lost = 0  # beside one that took their process along
    for episode in done:
        task, steps = episode.task_id, [s.action for s in episode.steps]
        if num_slots > 2 and episode.status is Status.ENV_ERROR:
            taken = task not in BREAKS
            lost += taken
            told = "died|no answer for 3 s" + "|as told" * (not taken)
            assert re.search(told, episode.error), episode
        elif task in BREAKS:
            assert episode.status is Status.ENV_ERROR and BREAKS[task] in episode.error
            assert steps == ([] if task.startswith("at") else ["hello"])
        elif task == "long":
            assert (episode.status, steps) == (Status.TOKEN_LIMIT, ["hello", "long"])
            assert len(episode.steps[-1].observation) == 200_000
        else:
            assert (episode.status, steps) == (Status.STEP_LIMIT, ["hello"] + ["fine"] * 4)
        assert episode.status.scored == (episode.status is not Status.ENV_ERROR)
        assert (episode.score > 0) == episode.status.scored
    assert stats.statuses[Status.ENV_ERROR] == 6 + lost and stats.scored == 8 - lost


def _bigrams(template, episodes):
    """A policy of whole numbers that speaks as in some episodes: a table of which token follows
    which, and a hash of the whole context. So nothing in it depends on who is beside it."""
    size = template.vocab_size
    table = np.full((size, size), 1e-3)
    for episode in episodes:
        tokens = template.encode_trajectory(episode).tokens
        np.add.at(table, (tokens[:-1], tokens[1:]), 1.0)
    table = jnp.asarray(np.round(64 * np.log(table)) / 64, jnp.float32)

    def decode(params, cache, tokens, start, last, *, slots=None):
        length = cache.shape[1]
        slots = jnp.arange(len(cache)) if slots is None else slots
        index = jnp.arange(tokens.shape[1])[None]
        where = jnp.where(index <= last[:, None], start[:, None] + index, length)
        cache = cache.at[slots[:, None], where].set(tokens + 1, mode="drop")
        seen = jnp.arange(length)[None] <= (start + last)[:, None]
        rows = jnp.take(cache, slots, axis=0, mode="clip")
        digest = jnp.where(seen, rows * (jnp.arange(length) * 7919 + 13), 0).sum(axis=1)
        token = jnp.take_along_axis(tokens, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
        mixed = (digest[:, None] * 31 + jnp.arange(size) * 977) % 64
        return table[token] + mixed.astype(jnp.float32) / 64, cache

    def init(slots, length):
        return jnp.zeros((slots, length), jnp.int32)

    return Policy(None, None, init, decode)


def test_processes_of_an_environment_change_no_token():
    """Household in this process and in two others."""
    options = dict(families=("look", "put"), num_object_types=4, max_steps=4, instruction="Act.")
    found, template = [], None
    for num_workers in (0, 2):
        with EnvPool("household", options, num_slots=2, num_workers=num_workers) as pool:
            tasks = list(pool.task_ids("train", 5))
            if template is None:
                played = play_episodes(
                    pool,
                    [PlayRequest(task, 0.3, 0) for task in tasks],
                    env_name="household",
                    policy_name="player",
                )
                texts = [text for t in played for text in (t.instruction, t.first_observation)]
                texts += [x for t in played for s in t.steps for x in (s.answer, s.observation)]
                template = ChatTemplate(train_bpe(texts, vocab_size=400))
                settings = SamplerSettings(512, 12, template.stop_ids)
                sampler = make_sampler(_bigrams(template, played), settings, num_slots=2)
            done = []
            collect(
                sampler, None, template, pool,
                [EpisodeRequest(task, rollout) for task in tasks for rollout in range(2)],
                env_name="household", policy_name="weak", seed=0, on_done=done.append,
            )  # fmt: skip
        found.append({(t.task_id, t.rollout): t for t in done})
        assert len(done) == len(found[-1]) == 10
    assert _tokens(found[0]) == _tokens(found[1])
    texts = [{key: [s.observation for s in t.steps] for key, t in one.items()} for one in found]
    assert texts[0] == texts[1]
    steps = [step for t in found[0].values() for step in t.steps]
    assert len({step.answer_ids for step in steps}) > 8
    assert {True, False} == {step.action is None for step in steps}
