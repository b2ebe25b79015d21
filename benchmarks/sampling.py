"""How fast are rollouts? Against transformers' `generate`, and against a loop without overlap.

    python benchmarks/sampling.py [--quick] [--json FILE] [--sizes s,m] [--batches 16,64]
        [--parts generate,slow,household,scienceworld]

**Against `generate`** (torch, the same weights, exported by this library; left out where torch or
transformers' torch side is not installed), random Llama-shaped weights, float32, greedy, answers of
fixed length so that both sides do equal work:

- multi-turn: episodes of 10 turns from a prompt of 256 tokens, 24 tokens of answer and 24 of
  observation a turn, 16 and 64 episodes side by side. `generate` is used as its users do: it gets
  the whole conversation at each turn. The tokens of all answers must be equal.
- one prompt of 256 tokens, 16 samples of 64 tokens (`num_return_sequences=16`).

**Against a loop without overlap** (all slots take their turns together, and the environments theirs
after them), the same sampler: episodes per second on household, on ScienceWorld where it is
installed, and on an environment that answers after 50 ms. A bigram table learned from experts'
transcripts on top of random weights speaks, so that actions are real ones and the work is the
model's.

**Occupancy**, on that slow environment: the share of time in which the model is at work; and
`slot_occupancy`, of the time that slots do not spend waiting for their environment, the share in
which the model is working on their turn, until the last episode has started. What is missing from 1
there is slots that are idle while work waits.

**On a GPU**: decoding at 1B and 8B shapes, bfloat16, against the time that reading weights and
caches takes at the bandwidth of a large copy, measured in the same run.

Contenders alternate; times are medians, warm. Ratios above 1 say that this library is faster.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import GPU_SHAPES, SHAPES
from slow_env import LATENCY_S

from w2sjax import models
from w2sjax.chat import MALFORMED_OBSERVATION, ChatTemplate, parse_answer, train_bpe
from w2sjax.envs import EnvPool, PlayRequest, Reset
from w2sjax.sampling import (
    EpisodeRequest,
    SamplerSettings,
    collect,
    make_sampler,
    play_episodes,
)
from w2sjax.types import Policy

PARTS = ("generate", "slow", "household", "scienceworld")
PROMPT, TURNS, ANSWER, OBSERVATION = 256, 10, 24, 24
SAMPLES, SAMPLE_LENGTH = 16, 64


def model_config(size: str) -> models.ModelConfig:
    shape = SHAPES[size]
    return models.ModelConfig(
        vocab_size=shape["vocab_size"],
        width=shape["hidden_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        mlp_width=shape["intermediate_size"],
        max_length=2048,
        compute_dtype="float32",
    )


def timed(
    functions: dict[str, Callable[[], Any]], rounds: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each function, which take turns; the first turn is not counted, unless all are
    warm."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + (not warm)):
        for name, function in functions.items():
            time.sleep(0.3)  # threads of the one before spin for a while
            start = time.perf_counter()
            function()
            if round_ or warm:
                times[name].append(time.perf_counter() - start)
    return times


# ------------------------------------------------------------------------------ against `generate`


def against_generate(size: str, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Both comparisons at one size of model; {} without torch."""
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"generate is left out: {error}", flush=True)
        return {}
    config = model_config(size)
    params = jax.jit(functools.partial(models.init_params, config))(jax.random.key(0))
    with tempfile.TemporaryDirectory() as directory:
        models.save_hf(Path(directory) / "model", config, params, None)
        peer = transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "model").eval()
    torch.set_num_threads(os.cpu_count() or 1)
    peer.generation_config.eos_token_id = None  # answers have a fixed length
    peer.generation_config.pad_token_id = 0
    policy = models.make_policy(config)
    nothing = (config.vocab_size,)  # no token ends an answer
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(1, config.vocab_size, shape, dtype=np.int32)

    @torch.no_grad()
    def generated(context: np.ndarray, length: int, **options: Any) -> np.ndarray:
        ids = torch.as_tensor(context, dtype=torch.long)
        mask = torch.ones_like(ids)
        output = peer.generate(
            ids, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, **options
        )
        return output[:, context.shape[1] :].numpy()

    found: dict[str, Any] = {}
    for batch in batches:
        prompt, observations = draw(batch, PROMPT), draw(TURNS, batch, OBSERVATION)
        length = PROMPT + TURNS * (ANSWER + OBSERVATION)
        settings = SamplerSettings(length, ANSWER, nothing, temperature=0.0)
        sampler = make_sampler(policy, settings, num_slots=batch)
        keys = jax.random.split(jax.random.key(0), batch)

        def ours(batch=batch, prompt=prompt, observations=observations, sampler=sampler, keys=keys):
            state, answers = sampler.init(), []
            for turn in range(TURNS):
                chunk = prompt if turn == 0 else observations[turn]
                full, reset = np.full(batch, chunk.shape[1]), np.full(batch, turn == 0)
                state, result = sampler.turn(params, state, chunk, full, reset, keys)
                answers.append(result.tokens)
            return np.stack(answers)

        def theirs(prompt=prompt, observations=observations):
            context, answers = prompt, []
            for turn in range(TURNS):
                if turn:
                    context = np.concatenate([context, observations[turn]], axis=1)
                answers.append(generated(context, ANSWER, do_sample=False))
                context = np.concatenate([context, answers[-1]], axis=1)
            return np.stack(answers)

        said: dict[str, np.ndarray] = {}  # [turns, episodes, tokens of an answer]
        contenders = {
            "ours": lambda ours=ours, said=said: said.setdefault("ours", ours()),
            "generate": lambda theirs=theirs, said=said: said.setdefault("theirs", theirs()),
        }
        ours()  # compiles; generate has nothing to compile
        times = timed(contenders, rounds, warm=True)
        np.testing.assert_array_equal(said["ours"], said["theirs"])
        tokens = batch * TURNS * ANSWER
        found[f"multi_turn_{batch}"] = row = _compared(times)
        print(
            f"  {size}, {batch} episodes of {TURNS} turns: {row['ratio']:.2f}× generate;"
            f" {tokens / row['ours_s']:.0f} instead of {tokens / row['generate_s']:.0f} answer"
            " tokens/s",
            flush=True,
        )
    prompt = draw(1, PROMPT)
    settings = SamplerSettings(PROMPT + SAMPLE_LENGTH + 1, SAMPLE_LENGTH, nothing)
    sampler = make_sampler(policy, settings, num_slots=SAMPLES)
    keys = jax.random.split(jax.random.key(1), SAMPLES)

    def samples() -> None:
        chunk = np.repeat(prompt, SAMPLES, axis=0)
        every = np.ones(SAMPLES, bool)
        sampler.turn(params, sampler.init(), chunk, PROMPT * every, every, keys)

    def peer_samples() -> None:
        options = dict(do_sample=True, num_return_sequences=SAMPLES, top_k=0)
        generated(prompt, SAMPLE_LENGTH, **options)

    samples()
    found["shared_prompt"] = row = _compared(
        timed({"ours": samples, "generate": peer_samples}, 4 if rounds == 1 else 10, warm=True)
    )
    print(f"  {size}, {SAMPLES} samples of one prompt: {row['ratio']:.2f}× generate", flush=True)
    return found


def _compared(times: dict[str, list[float]]) -> dict[str, float]:
    middle = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    best = min(times["generate"]) / min(times["ours"])
    return middle | {"ratio": middle["generate_s"] / middle["ours_s"], "ratio_of_best": best}


# ---------------------------------------------------------------------------------- whole episodes


def speaking_policy(size: str, template: ChatTemplate, transcripts) -> tuple[Policy, Any]:
    """A model of random weights with a bigram table of experts' transcripts on top."""
    shape = dict(vocab_size=template.vocab_size, max_length=1024, compute_dtype="float32")
    config = models.preset(size, **shape)
    inner = models.make_policy(config)
    counts = np.full((config.vocab_size, config.vocab_size), 1e-3, np.float32)
    for transcript in transcripts:
        tokens = template.encode_trajectory(transcript).tokens
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1.0)
    table = jnp.asarray(np.log(counts / counts.sum(axis=1, keepdims=True)))

    def decode_fn(params, cache, tokens, start, last, *, slots=None):
        logits, cache = inner.decode_fn(params, cache, tokens, start, last, slots=slots)
        token = jnp.take_along_axis(tokens, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
        return 0.1 * jnp.tanh(logits) + table[token], cache

    policy = inner._replace(decode_fn=decode_fn)
    return policy, jax.jit(functools.partial(models.init_params, config))(jax.random.key(0))


def lockstep(sampler, params, template: ChatTemplate, pool: EnvPool, requests, seed: int) -> int:
    """Plays all requests without overlap: model and environments take turns; returns the steps."""
    queue, count = list(requests)[::-1], sampler.num_slots
    state, chunks, left, fresh = sampler.init(), {}, {}, set()
    steps = 0

    def start() -> None:
        while queue and (free := [slot for slot in range(count) if slot not in chunks]):
            wanted = {slot: queue.pop().task_id for slot in free[: len(queue)]}
            for slot, reset in pool.reset(wanted).items():
                assert isinstance(reset, Reset), reset
                chunks[slot] = template.encode_start(reset.instruction, reset.first_observation)
                left[slot] = reset.max_steps
                fresh.add(slot)

    start()
    while chunks:
        width = max(map(len, chunks.values()))
        chunk, length = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
        for slot, ids in chunks.items():
            chunk[slot, : len(ids)], length[slot] = ids, len(ids)
        reset = np.isin(np.arange(count), list(fresh))
        fresh.clear()
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), steps), count)
        state, result = sampler.turn(params, state, chunk, length, reset, keys)
        answers = {}
        for slot in list(chunks):
            ids = result.tokens[slot, : result.length[slot]].tolist()
            action = parse_answer(template.decode_answer(ids)).action
            action = None if result.truncated[slot] else action
            chunks[slot] = [*template.close_answer(ids)]
            left[slot] -= 1
            if result.full[slot]:
                del chunks[slot]
            elif action is not None:
                answers[slot] = action
        outcomes = pool.step(answers)
        steps += len(outcomes)
        for slot in list(chunks):
            outcome = outcomes.get(slot)
            if left[slot] <= 0 or (outcome is not None and outcome.done):
                del chunks[slot]
                continue
            said = MALFORMED_OBSERVATION if outcome is None else outcome.observation
            chunks[slot] += template.encode_observation(said)
            if state.length[slot] + len(chunks[slot]) >= sampler.settings.max_length:
                del chunks[slot]
        start()
    return steps


class Watched:
    """A sampler and a pool that note what slots spend their time on."""

    def __init__(self, sampler, pool):
        self._sampler, self._pool = sampler, pool
        self.settings, self.num_slots = sampler.settings, sampler.num_slots
        self.init, self.poll = sampler.init, pool.poll
        self.worked: list[tuple[float, float]] = []  # (end, slot-seconds in the model)
        self.asked: list[float] = []  # when an environment was asked for a step or an episode
        self.last_start = 0.0

    def feed(self, params, state, chunk, chunk_length, *rest):
        busy = int(state.going.sum() + (np.asarray(chunk_length) > 0).sum())
        start = time.perf_counter()
        state = self._sampler.feed(params, state, chunk, chunk_length, *rest)
        end = time.perf_counter()
        self.worked.append((end, busy * (end - start)))
        return state

    def decode(self, params, state, **limits):
        start = time.perf_counter()
        state, result, work = self._sampler.decode(params, state, **limits)
        end = time.perf_counter()
        self.worked.append((end, (end - start) * work.busy / max(work.steps, 1)))
        return state, result, work

    def submit(self, operation, requests):
        self.asked += [time.perf_counter()] * len(requests)
        if operation == "reset":
            self.last_start = time.perf_counter()
        self._pool.submit(operation, requests)

    @property
    def outstanding(self) -> int:
        return self._pool.outstanding

    def occupancy(self, start: float) -> float:
        """Until the last episode started."""
        worked = sum(seconds for end, seconds in self.worked if end <= self.last_start)
        thinking = LATENCY_S * sum(at <= self.last_start for at in self.asked)
        return worked / (self.num_slots * (self.last_start - start) - thinking)


def episodes_per_second(
    name: str,
    options: dict[str, Any],
    *,
    slots: int,
    workers: int,
    episodes: int,
    rounds: int,
    size: str = "s",
    patience: int | None = None,
    compared: bool = True,
) -> dict[str, float]:
    """With overlap and, to compare, without; and for the slow environment the occupancy."""
    with EnvPool(name, options, num_slots=slots, num_workers=workers) as pool:
        tasks = pool.task_ids("train", max(8, episodes // 8))
        played = play_episodes(
            pool, [PlayRequest(task, 0.2, 0) for task in tasks[:24]], env_name=name, policy_name="p"
        )
        texts = [text for t in played for text in (t.instruction, t.first_observation)]
        texts += [text for t in played for s in t.steps for text in (s.answer, s.observation)]
        template = ChatTemplate(train_bpe(texts, vocab_size=512))
        policy, params = speaking_policy(size, template, played)
        settings = SamplerSettings(1024, 24, template.stop_ids)
        sampler = make_sampler(policy, settings, num_slots=slots)
        requests = [EpisodeRequest(tasks[i % len(tasks)], i) for i in range(episodes)]
        stats, watched = [], []

        def overlapped() -> None:
            watch = Watched(sampler, pool)
            start = time.perf_counter()
            stats.append(
                collect(
                    watch, params, template, _AsPool(watch), requests, env_name=name,
                    policy_name="p", seed=0, on_done=lambda trajectory: None, patience=patience,
                )
            )  # fmt: skip
            watched.append(watch.occupancy(start))

        def plain() -> None:
            lockstep(sampler, params, template, pool, requests, 0)

        contenders = {"overlapped": overlapped} | ({"plain": plain} if compared else {})
        times = timed(contenders, rounds)
    last = stats[-1]
    row = {
        "episodes_per_s": episodes / statistics.median(times["overlapped"]),
        "tokens_per_s": last.sampled_tokens / last.seconds,
        "model_share": last.model_seconds / last.seconds,
        "speaking": last.speaking / max(1, last.slot_steps),
        "malformed": last.malformed / max(1, last.turns),
    }
    slow = name.endswith(":SlowEnv")
    if slow:
        row["slot_occupancy"] = statistics.median(watched[1:])
    more = f", {row['slot_occupancy']:.0%} of slots' own time used" if slow else ""
    if compared:
        row["plain_episodes_per_s"] = episodes / statistics.median(times["plain"])
        row["ratio"] = row["episodes_per_s"] / row["plain_episodes_per_s"]
        more += f"; without overlap {row['plain_episodes_per_s']:.1f} ({row['ratio']:.2f}×)"
    print(
        "  {name}, {slots} slots: {episodes_per_s:.1f} episodes/s; model at work {model_share:.0%}"
        " of the time, {speaking:.0%} of slots speaking{more}".format(
            name=name.rpartition(":")[2], slots=slots, more=more, **row
        ),
        flush=True,
    )
    return row


class _AsPool:
    """The pool's side of a `Watched`, which has as many slots as the sampler."""

    def __init__(self, watched: Watched):
        self.num_slots, self._watched = watched.num_slots, watched
        self.submit, self.poll = watched.submit, watched.poll

    @property
    def outstanding(self) -> int:
        return self._watched.outstanding


# ------------------------------------------------------------------------------------------ on GPU


def gpu_decoding(rounds: int) -> dict[str, dict[str, float]]:
    """Decoding steps of 64 slots at 2,048 tokens, against the memory's bandwidth."""
    block = jnp.ones(2**29, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(block))
    seconds = timed({"copy": lambda: jax.block_until_ready(copy(block))}, rounds)["copy"]
    bandwidth = 2 * block.nbytes / statistics.median(seconds)
    found = {"bandwidth_tb_per_s": bandwidth / 1e12}
    for size, config in GPU_SHAPES.items():
        slots, length, steps = 64, 2048, 64
        try:
            policy = models.make_policy(config)
            params = jax.jit(functools.partial(models.init_params, config))(jax.random.key(0))
            settings = SamplerSettings(length, steps, (config.vocab_size,), temperature=0.0)
            sampler = make_sampler(policy, settings, num_slots=slots)
            start = length - steps - 1
            chunk = np.ones((slots, start), np.int32)
            every = np.ones(slots, bool)
            keys = jax.random.split(jax.random.key(0), slots)
            times = []
            for _ in range(rounds + 1):
                state = sampler.feed(
                    params, sampler.init(), chunk, np.full(slots, start), every, keys
                )
                jax.block_until_ready(state.cache)
                began = time.perf_counter()
                state, _, work = sampler.decode(params, state)
                times.append((time.perf_counter() - began) / work.steps)
            cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
            weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        except jax.errors.JaxRuntimeError as error:
            print(f"  {size}: {str(error).splitlines()[0]}", flush=True)
            continue
        middle = statistics.median(times[1:])
        found[size] = {
            "step_ms": 1e3 * middle,
            "tokens_per_s": slots / middle,
            "of_bandwidth": (cache + weights) / middle / bandwidth,
        }
        print(
            "  {size}: {step_ms:.1f} ms a step, {tokens_per_s:.0f} tokens/s, {of_bandwidth:.0%} of"
            " the memory's bandwidth".format(size=size, **found[size]),
            flush=True,
        )
        del params, state
    return found


def main() -> None:
    """Prints the comparisons, and writes all figures where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under a minute: one model, 16 episodes, the slow environment without its comparison",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--sizes", help="models against generate, s (5 M) and m (30 M), with commas"
    )
    parser.add_argument("--batches", help="episodes side by side there, with commas")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}, with commas")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds = 1 if quick else 3
    sizes = (arguments.sizes or ("s" if quick else "s,m")).split(",")
    batches = [int(b) for b in (arguments.batches or ("16" if quick else "16,64")).split(",")]
    parts = (arguments.parts or ("generate,slow" if quick else ",".join(PARTS))).split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {min(unknown)!r} is none of {', '.join(PARTS)}")
    print(f"load {os.getloadavg()[0]:.1f} before the start", flush=True)
    data: dict[str, Any] = {"load_before": os.getloadavg()[0], "generate": {}, "episodes": {}}
    if jax.default_backend() == "gpu":
        data["gpu"] = gpu_decoding(rounds)
    for size in sizes if "generate" in parts else ():
        data["generate"][size] = against_generate(size, batches, rounds)
    household = dict(num_object_types=6, max_receptacles=3, num_distractors=2, max_steps=14)
    cases: dict[str, Any] = {
        "slow": dict(
            name="slow_env:SlowEnv",
            options={},
            slots=8 if quick else 16,
            workers=8 if quick else 16,
            episodes=16 if quick else 96,
            size="m",
            compared=not quick,
        ),
    }
    cases["household"] = dict(
        name="household", options=household, slots=64, workers=0, episodes=256, patience=64
    )
    tasks = ("find-plant", "lifespan-longest-lived", "find-non-living-thing")
    options = dict(tasks=tasks, simplification="easy", heap_mb=512)
    cases["scienceworld"] = dict(
        name="scienceworld", options=options, slots=16, workers=2, episodes=48
    )
    if "scienceworld" in parts and importlib.util.find_spec("scienceworld") is None:
        print("ScienceWorld is left out: pip install -e '.[scienceworld]'", flush=True)
        parts.remove("scienceworld")
    for title, case in cases.items():
        if title in parts:
            data["episodes"][title] = episodes_per_second(rounds=rounds, **case)
    small = data["generate"].get("s", {})
    slow = data["episodes"].get("slow", {})
    multi = [row["ratio"] for name, row in small.items() if name.startswith("multi")]
    data["ratios"] = {
        "multi_turn_vs_generate": min(multi, default=None),
        "shared_prompt_vs_generate": small["shared_prompt"]["ratio"] if small else None,
        "occupancy": slow.get("model_share"),
        "slot_occupancy": slow.get("slot_occupancy"),
        **{
            f"overlap_{title}": row["ratio"]
            for title, row in data["episodes"].items()
            if "ratio" in row
        },
    }
    print(json.dumps(data["ratios"]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
