"""The built-in environment is fast enough to never be what a run waits for."""

import time

from w2sjax.envs import make_env


def steps_per_second(seconds=1.0):
    """Expert episodes, resets included, in this process."""
    env = make_env("household")
    tasks = env.task_ids("train", 200)
    plans = []
    for task in tasks:
        env.reset(task)
        actions = []
        while True:
            action = env.expert_action()
            actions.append(action)
            if env.step(action).done:
                break
        plans.append((task, actions))
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for task, actions in plans:
            env.reset(task)
            for action in actions:
                env.step(action)
            steps += len(actions)
    return steps / (time.perf_counter() - start)


def test_twenty_thousand_steps_a_second_and_more():
    """20,000 on a free core is the aim; the bound allows for a busy machine."""
    assert max(steps_per_second() for _ in range(3)) > 8_000


if __name__ == "__main__":
    print(f"{steps_per_second(5):,.0f} steps/s")
