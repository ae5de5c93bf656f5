"""An agent in a loop of one's own does what evaluation does, whatever it sees and however it acts."""

import itertools
import re
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from environments.contract import Task
from evaluation import Agent
from evaluation.agent import play_episodes
from evaluation.watch import Player
from model import ActorCriticModel
from run.checkpoint import encode
from run.config import Config, check_config
from tests.toy_environments import toy
from tests.walk import CORES, task_of, tiny
from utils import UserError, create_env

BOTH = {"previous_action": True, "previous_reward": True, "reward_scale": 0.5}
GYMNASIUM = {"type": "Gymnasium", "max_episode_steps": 9}
# Each with a core
TASKS: dict = {
    "numbers": (GYMNASIUM | BOTH | {"name": "CartPole-v1", "hide": [1, 3]}, "gru"),
    "masked": (toy("Masked", max_episode_steps=9), "learned"),
    "continuous": (toy("Acted", max_episode_steps=9, **BOTH), "relative"),
    "dict": (GYMNASIUM | {"name": "minigrid:MiniGrid-MemoryS7-v0", "observe": ["image", "direction"]}, "relative"),
}
every_task = pytest.mark.parametrize("name", TASKS)


def make_model(
    environment: dict, core: str = "relative", normalize: bool = False, **more: Any
) -> tuple[ActorCriticModel, Config, Task]:
    """Return a small model with random weights, its config and its task; `more` is of the core's section."""
    ((kind, entries),) = CORES[core].items()
    shape = ({"memory_length": 4} if kind == "transformer" else {}) | entries | more
    config = check_config(tiny(environment, normalize_observations=normalize, **{kind: shape}), "test")
    task = task_of(config.environment)
    torch.manual_seed(1)
    model = ActorCriticModel(config, task).eval()
    with torch.no_grad():
        for branch in model.policy:  # so that actions depend on what is seen
            branch.weight *= 20
        for block in model.core.blocks if kind == "transformer" else ():
            block.attention.query.weight *= 8
    return model, config, task


def write(path: Path, model: ActorCriticModel, config: Config, task: Task, **run: Any) -> Path:
    """Write a model's file."""
    content = {"config": config.model_dump(), "task": vars(task), "weights": model.state_dict()}
    path.write_bytes(encode("model", content | {"run": {"run_id": "run", "seed": 1, "steps": 1} | run}))
    return path


@pytest.fixture
def seen(monkeypatch) -> list:
    """Collects, of all that any agent looks at, the values and the actions."""
    found: list = []
    observe = Agent.observe

    def observing(agent, arrays, rows):
        output, actions = observe(agent, arrays, rows)
        found.append((output.value.numpy().copy(), actions))
        return output, actions

    monkeypatch.setattr(Agent, "observe", observing)
    return found


def same(one: list, other: list, steps: int) -> bool:
    """Return whether values and actions of so many looks are equal to the last bit."""
    pairs = list(zip(one[:steps], other[:steps], strict=True))
    return len(pairs) == steps and all(np.array_equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def make_registered(section) -> gymnasium.Env:
    """Return what somebody makes who does not use our wrappers."""
    return gymnasium.make(section.name, max_episode_steps=section.max_episode_steps)


def play(agent: Agent, env: gymnasium.Env, seed: int) -> tuple[float, int]:
    """Play an episode in Gymnasium's loop; return its reward and its length."""
    observation, info = env.reset(seed=seed)
    agent.reset()
    reward, total, length, ended = None, 0.0, 0, False
    while not ended:
        action = agent.act(observation, mask=info.get("action_mask"), reward=reward)
        assert env.action_space.contains(action) or isinstance(env.action_space, gymnasium.spaces.Discrete)
        observation, reward, terminated, truncated, info = env.step(action)
        total, length, ended = total + float(reward), length + 1, terminated or truncated
    return total, length


@every_task
def test_a_loop_does_what_evaluation_does(tmp_path, seen, name):
    """Gymnasium's own loop, with the registered environment or with our wrapper: the same values and actions."""
    model, config, task = make_model(*TASKS[name])
    (episode,) = play_episodes(model, config, task, [100_000], action_seed=7)
    evaluated, path = seen[:], write(tmp_path / "model.nn", model, config, task)
    for seed, wrapped in ((7, False), (7, True), (8, True)):
        seen.clear()
        agent = Agent.load(path, seed=seed, wrapped=wrapped)
        env = create_env(agent.section) if wrapped else make_registered(agent.section)
        total, length = play(agent, env, 100_000)
        assert same(seen, evaluated, length) == (seed == 7)
        if seed == 7:
            assert length == episode["length"] > 4
            assert total == pytest.approx(episode["reward"] * (agent.section.reward_scale if wrapped else 1))


def planned(section, seeds: list[int]) -> gymnasium.Env:
    """Return an environment whose episodes have seeds that are given."""
    env, following = make_registered(section), itertools.cycle(seeds)
    reset = env.reset
    env.reset = lambda **_: reset(seed=next(following))
    return env


@every_task
def test_a_vector_environment_does_what_evaluation_does(tmp_path, monkeypatch, seen, name):
    """Three environments, two episodes each, as anybody writes it: values and actions are the same to the last bit."""
    monkeypatch.setattr("evaluation.agent.ENVIRONMENTS", 3)
    model, config, task = make_model(*TASKS[name])
    seeds = list(range(100_000, 100_006))
    episodes = play_episodes(model, config, task, seeds, action_seed=7)
    evaluated = seen[:]
    seen.clear()
    agent = Agent.load(write(tmp_path / "model.nn", model, config, task), environments=3, seed=7)
    envs = [partial(planned, agent.section, seeds[index::3]) for index in range(3)]
    env = SyncVectorEnv(envs, autoreset_mode=AutoresetMode.SAME_STEP)
    (observation, info), reward, ended = env.reset(), None, None
    lengths: list[list[int]] = [[0] for _ in range(3)]
    while min(map(len, lengths)) <= 2:
        actions = agent.act(observation, info.get("action_mask"), reward, ended)
        observation, reward, terminated, truncated, info = env.step(actions)
        agent.reset(ended := terminated | truncated)
        for own, is_over in zip(lengths, ended, strict=True):
            own[-1] += 1
            if is_over:
                own.append(0)
    steps = max(sum(own[:2]) for own in lengths)
    assert [own[:2] for own in lengths] == [[e["length"] for e in episodes[index::3]] for index in range(3)]
    assert len(seen) == 2 * steps and same(seen, evaluated, 2 * steps)


@pytest.mark.parametrize("core", ("relative", "gru", "lstm", "none"))
def test_what_the_last_step_was_like(core):
    """Value and attention, of one environment and of each of several; for who watches, the change of the state, too."""
    made = make_model(toy("Toy"), core)
    one, three = Agent(*made), Agent(*made, environments=3, deterministic=True)
    for step in range(7):
        frame = np.full(3, step, np.float32)
        one.act(frame)
        assert three.act(np.stack([frame] * 3)).tolist() == [one.outputs[0].policy.parameters().argmax()] * 3
        np.testing.assert_allclose(three.value, [one.value] * 3, atol=1e-6)
        if "transformer" in CORES[core]:
            assert one.attention.shape == (2, 2, min(step, 4))
            np.testing.assert_allclose(one.attention.sum(axis=2), float(step > 0), atol=1e-6)
            np.testing.assert_allclose(three.attention, [one.attention] * 3, atol=1e-6)
        else:
            assert one.attention is None
    three.reset([])
    three.reset([1])
    assert three.arrays.steps.tolist() == [7, 0, 7]
    player = Player(*made, render=False)
    for moment in list(player.play(0))[:-1]:
        assert moment.probabilities[0].shape == (3,) and moment.probabilities[0].sum() == pytest.approx(1)
        assert (moment.change > 0) == ("recurrence" in CORES[core])
    if "recurrence" in CORES[core]:
        before, after = player.agent.memory.states[0, player.agent.t :][:2]
        assert moment.change == pytest.approx((after - before).abs().mean().item())


def test_what_is_wrong_is_one_line_and_changes_nothing(tmp_path):
    """An observation or a mask that is none, a step after the end; the right one may follow."""
    path = write(tmp_path / "model.nn", *make_model(*TASKS["masked"]))
    agent, twin, many = (Agent.load(path, environments=n) for n in (None, None, 2))
    right, mask = np.zeros(3, np.float32), np.ones(7)
    agent.act(right, mask), twin.act(right, mask)
    for call, message in (
        (lambda: agent.act(right[:2], mask), r"environment 0: .*has the shape \(2,\)"),
        (lambda: agent.act("left", mask), r"has the shape \(\)"),
        (lambda: agent.act(right), "needs mask"),
        (lambda: agent.act(right, np.zeros(7)), "allows no action"),
        (lambda: many.act(np.stack([right] * 3), [mask] * 2), "for each of the 2 environments"),
        (lambda: agent.act(right, mask, ended=True), "has ended, after 1 steps: agent.reset is due"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
    for _ in range(8):
        assert (agent.act(right, mask) == twin.act(right, mask)).all()
    with pytest.raises(UserError, match="has ended, after 9 steps: agent.reset is due"):
        agent.act(right, mask)


def test_the_example_of_the_readme_runs(monkeypatch, capsys):
    """As it stands, in the repository's folder."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    (example,) = re.findall(r"```python\n(from evaluation import Agent.*?)```", Path("README.md").read_text(), re.S)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert "success" in capsys.readouterr().out
