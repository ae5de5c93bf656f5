"""The rules of each family of environments, and what is worked around in the packages underneath."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pygame
import pytest
import yaml
from minigrid.core.actions import Actions
from pydantic import TypeAdapter

from environments import MEMORY_GYM_TYPES, Environment, minigrid_env
from environments.contract import try_out
from environments.tmaze_env import DOWN, LEFT, RIGHT, UP

pytestmark = pytest.mark.filterwarnings("error")

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    **{name: {"type": name} for name in ("PocMemoryEnv", "CartPole", "CartPoleMasked", *MEMORY_GYM_TYPES)},
    "TMaze": {"type": "TMaze", "corridor_length": 20},
    "TMaze-active": {"type": "TMaze", "corridor_length": 3, "passive": False, "guided": False},
    "KeyToDoor": {"type": "KeyToDoor"},
    "Minigrid-Memory": {"type": "Minigrid", "name": "MiniGrid-MemoryS9-v0"},
    "Minigrid-DoorKey": {"type": "Minigrid", "name": "MiniGrid-DoorKey-5x5-v0"},
    "Gymnasium": {"type": "Gymnasium", "name": "MountainCar-v0", "max_episode_steps": 60},
    "SearingSpotlights-bright": {"type": "SearingSpotlights", "reset_params": {"light_dim_off_duration": 0}},
}
every_environment = pytest.mark.parametrize("environment", CASES.values(), ids=CASES)


def create(section, render_mode=None):
    """Return the environment of a config's section."""
    return TypeAdapter(Environment).validate_python(section).create(render_mode)


def digest(array):
    return hashlib.md5(np.ascontiguousarray(array).tobytes()).hexdigest()


def random_actions(env, count, seed=0):
    """Return actions as the trainer passes them: arrays of shape (branches,)."""
    choices = np.ravel(getattr(env.action_space, "nvec", getattr(env.action_space, "n", None)))
    return np.random.default_rng(seed).integers(0, choices, (count, len(choices)))


def without_mask(info):
    return {key: value for key, value in info.items() if key != "action_mask"}


def rollout(env, seed, actions, look=lambda env: None):
    """Play one episode, or as far as the actions go, and return all that happens."""
    observation, _ = env.reset(seed=seed)
    look(env)
    history = [digest(observation)]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        look(env)
        numbers = tuple(sorted(without_mask(info).items()))
        history.append((digest(observation), reward, terminated, truncated, numbers))
        if terminated or truncated:
            break
    return history


# -------------------------------------------------------------------------------------------------------- environments


@every_environment
def test_episodes_are_determined_by_seed_and_actions_whoever_looks(environment):
    pictures = []

    def look(env):
        pictures.append(env.render().copy())
        assert pictures[-1].dtype == np.uint8 and pictures[-1].shape[2] == 3 and min(pictures[-1].shape[:2]) >= 36
        env.render()[:] = 0  # it is the caller's own
        assert np.array_equal(env.render(), pictures[-1])
        env.agent_view()

    watched, looked_at_once = (create(environment, render_mode="rgb_array") for _ in range(2))
    unwatched = create(environment)
    actions = random_actions(unwatched, 64, seed=2)
    histories = [rollout(unwatched, seed, actions) for seed in (3, 4, 5, 6)]
    assert len({str(history) for history in histories}) > 1  # the seed matters
    assert rollout(watched, 4, actions[:30], look) == histories[1][:31]
    assert rollout(looked_at_once, 4, actions[:5]) == histories[1][:6]
    assert np.array_equal(looked_at_once.render(), pictures[min(5, len(pictures) - 1)])
    assert rollout(looked_at_once, 3, actions) == histories[0]
    watched.close()


@every_environment
def test_infos_and_types(environment):
    env = create(environment)
    observation, info = env.reset(seed=1)
    assert without_mask(info) == {}
    if observation.ndim == 3:
        assert observation.transpose(1, 2, 0).flags.c_contiguous  # channels first, a view of channels last
    rewards = []
    for action in random_actions(env, 600, seed=2):
        assert env.observation_space.contains(observation)
        before, earlier = observation.copy(), observation
        observation, reward, terminated, truncated, info = env.step(action)
        assert np.array_equal(earlier, before)  # no observation is overwritten by the next one
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
        rewards.append(reward)
        info = without_mask(info)
        if terminated or truncated:
            break
        assert info == {}
    assert terminated or truncated
    assert info["reward"] == pytest.approx(sum(rewards) / env.reward_scale)
    assert info["length"] == len(rewards) <= (env.task.max_episode_steps or len(rewards))
    assert {type(value) for key, value in info.items() if key != "length"} == {float}


PLAYED = """
import sys, run.config, numpy as np
from pydantic import TypeAdapter
from environments import Environment
sections = [TypeAdapter(Environment).validate_python(one) for one in {sections}]
assert not {{"pygame", "minigrid", "memory_gym", "popgym"}} & set(sys.modules)
for section in sections:
    env = section.create("rgb_array")
    env.reset(seed=0)
    env.step(np.ones(env.action_space.shape or (1,), dtype=int))
    env.render()
    env.close()
"""


def test_nothing_is_printed_and_nothing_warns():
    """In a process of its own, where every warning is an error; and checking a config imports no simulator."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("SDL_", "PYGAME_"))}
    command = [sys.executable, "-W", "error", "-c", PLAYED.format(sections=list(CASES.values()))]
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------------------- documentation

DOCUMENTED = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
SECTIONS = [yaml.safe_load(block)["environment"] for block in re.findall(r"```yaml\n(.*?)```", DOCUMENTED, re.S)]


@pytest.mark.parametrize("entries", SECTIONS, ids=lambda entries: entries.get("name", entries["type"]))
def test_documented_sections(entries):
    if entries["name"].startswith("recall"):
        pytest.skip("it is yet to be written")
    if entries["name"].startswith("ale_py"):
        pytest.importorskip("ale_py")
    env = create(entries)
    try_out(env)
    env.close()


def test_the_tutorial_s_environment_keeps_the_contract():
    exec(re.search(r"```python\n(\"\"\".*?)```", DOCUMENTED, re.S)[1], {})
    env = create({"type": "Gymnasium", "name": "Recall-v0", "arguments": {"delay": 3}}, "rgb_array")
    assert try_out(env).vector == 4
    symbol = env.reset(seed=1)[0].argmax()
    assert env.render().shape[2] == 3
    results = [env.step(symbol) for _ in range(4)]
    assert [result[2] for result in results] == [False] * 3 + [True]
    assert results[-1][4] == {"success": 1.0, "reward": 1.0, "length": 4}


# ----------------------------------------------------------------------------------------------------- tasks of our own


@pytest.mark.parametrize("good", [True, False])
def test_poc_memory_episode(good):
    env, seen = create({"type": "PocMemoryEnv"}), set()
    for seed in range(40):
        shown, _ = env.reset(seed=seed)
        start, good_side = round(5 * float(shown[1])), int(shown[2])
        seen.add((start, good_side))
        action = int((good_side == 1) == good)
        for _ in range(2):
            observation, *rest = env.step(np.array([action]))
            assert np.array_equal(observation, shown) and rest == [0.0, False, False, {}]  # frozen
        direction = 2 * action - 1
        moves = 5 - direction * start
        for move in range(1, moves + 1):
            observation, reward, terminated, truncated, info = env.step(np.array([action]))
            assert np.array_equal(observation, np.array([0, (start + direction * move) / 5, 0], dtype=np.float32))
            assert (terminated, truncated) == (move == moves, False)
            assert reward == (-0.1 if not terminated else 1.6 if good else -1.6)
        assert info["success"] == good and info["length"] == moves + 2
    assert seen == {(start, side) for start in range(-2, 3) for side in (-1, 1)}


def test_poc_memory_time_limit():
    """It truncates; but an end that is reached with the last step terminates."""
    env = create({"type": "PocMemoryEnv"})
    seed = next(seed for seed in range(100) if env.reset(seed=seed)[0][1] == np.float32(0.2))
    for actions, last in (([0, 1] * 16, (False, True)), ([0, 0, *[0, 1] * 13, *[1] * 4], (True, False))):
        env.reset(seed=seed)
        assert [env.step(action)[2:4] for action in actions] == [(False, False)] * 31 + [last]


def play(env, seed, policy):
    """Play an episode by a function of its observations so far; return rewards and the last info."""
    seen, rewards, ended = [env.reset(seed=seed)[0]], [], False
    while not ended:
        observation, reward, ended, truncated, info = env.step(policy(seen))
        seen.append(observation)
        rewards.append(reward)
        assert not truncated  # so that no value is expected beyond the last step
    return rewards, info


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("passive", "length"), [(True, 1), (False, 1), (False, 9)])
def test_tmaze_pays_1_who_remembers_and_half_who_does_not(length, passive, guided):
    env = create({"type": "TMaze", "corridor_length": length, "passive": passive, "guided": guided})

    def oracle(seen):
        cue = sum(observation[0] for observation in seen)
        if seen[-1][3]:
            return UP if cue > 0 else DOWN
        return RIGHT if cue else LEFT

    for seed in range(20):
        rewards, info = play(env, seed, oracle)
        assert rewards == [0.0] * (env.task.max_episode_steps - 1) + [1.0]
        assert without_mask(info) == {"success": 1.0, "reward": 1.0, "length": env.task.max_episode_steps}
    blind = [sum(play(env, seed, lambda seen: UP if seen[-1][3] else RIGHT)[0]) for seed in range(200)]
    assert set(blind) == {0.0, 1.0} and abs(np.mean(blind) - 0.5) < 0.1


def test_tmaze_shows_no_time_and_always_comes_to_its_decision():
    """Who stands still pays 1 in all; guided, it decides nevertheless, and only then between up and down alone."""
    env = create({"type": "TMaze", "corridor_length": 9})
    env.reset(seed=0)
    steps = [env.step(DOWN) for _ in range(9)]
    assert [step[1:4] for step in steps] == [(-1 / 9, False, False)] * 9
    assert [step[0].tolist() for step in steps] == [[0, 1, 0, 0]] * 8 + [[0, 0, 0, 1]]
    assert steps[-1][4]["action_mask"].tolist() == [False, True, False, True]
    rewards, info = play(create({"type": "TMaze", "corridor_length": 9, "guided": False}), 0, lambda seen: DOWN)
    assert (len(rewards), info["success"]) == (10, 0.0)


def test_key_to_door_pays_its_optimum_with_the_key_alone():
    env = create({"type": "KeyToDoor", "episode_length": 40})
    towards = {(-1, 0): 0, (0, 1): 1, (1, 0): 2, (0, -1): 3}

    def walk(seen, skip=None):
        """Go to the nearest object; to a wall where there is none, and in the room that is skipped."""
        view = seen[-1][3:].reshape(5, 5)
        offsets = np.argwhere(view == 1) - 2
        if not len(offsets) or skip is not None and seen[-1][skip]:
            return towards[min(towards, key=lambda step: view[2 + step[0], 2 + step[1]])]
        down, right = min(offsets.tolist(), key=lambda offset: abs(offset[0]) + abs(offset[1]))
        return towards[(np.sign(down), 0) if down else (0, np.sign(right))]

    optima = set()
    for seed in range(30):
        rewards, info = play(env, seed, walk)
        optima.add(round(info["optimum"], 1))
        assert sum(rewards) == pytest.approx(info["optimum"]) == info["reward"] and info["success"] == 1.0
        without, info = play(env, seed, lambda seen: walk(seen, skip=0))
        assert sum(without) == pytest.approx(info["optimum"] - 1)
    assert optima <= {round(1 + 0.1 * apples, 1) for apples in range(9)} and len(optima) > 4


# ------------------------------------------------------------------------------------------------ CartPole and MiniGrid


def test_cartpole_masks_velocities_and_scales_rewards():
    masked, full = create({"type": "CartPoleMasked"}), create({"type": "CartPole"})
    hidden, seen = masked.reset(seed=5)[0], full.reset(seed=5)[0]
    for step in range(1, 201):
        assert np.array_equal(hidden, seen * np.array([1, 0, 1, 0], dtype=np.float32))
        # Keeps the pole upright and the cart in the middle
        action = int(seen @ np.array([0.1, 0.3, 1.0, 0.5]) > 0)
        hidden, reward, terminated, truncated, info = masked.step(np.array([action]))
        seen = full.step(action)[0]
        assert (reward, terminated, truncated) == (0.01, False, step == 200)
    assert info == {"reward": 200.0, "length": 200}


@pytest.mark.parametrize(
    ("name", "entries", "needed", "kept"),
    [
        ("MiniGrid-KeyCorridorS3R1-v0", {"view_size": 7, "tile_size": 8, "max_episode_steps": 200}, "carrying", 1000),
        ("MiniGrid-MultiRoom-N2-S4-v0", {"view_size": 5, "tile_size": 10}, "open door", 3),
    ],
)
def test_minigrid_pictures_equal_plain_rendering(monkeypatch, name, entries, needed, kept):
    monkeypatch.setattr(minigrid_env, "MAX_KEPT_PICTURES", kept)
    monkeypatch.setattr(minigrid_env, "_kept_pictures", {})
    env, happened = create({"type": "Minigrid", "name": name, **entries}), set()
    plain = gymnasium.make(name, agent_view_size=entries["view_size"]).unwrapped
    create({"type": "Minigrid", "name": name, **entries, "tile_size": 16}).reset(seed=0)
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        plain.reset(seed=seed)
        for action in random_actions(env, 120, seed):
            # What MiniGrid's RGBImgPartialObsWrapper observes
            expected = plain.get_frame(tile_size=entries["tile_size"], agent_pov=True)
            assert np.array_equal(observation, expected.transpose(2, 0, 1))
            observation, reward, terminated, truncated, _ = env.step(action)
            assert (reward, terminated) == plain.step(action.item())[1:3]
            happened.add("carrying" if plain.carrying else "")
            happened.add("open door" if any(getattr(cell, "is_open", False) for cell in plain.grid.grid) else "")
            if terminated or truncated:
                break
    assert needed in happened and len(minigrid_env._kept_pictures) <= kept


def test_minigrid_time_limit_truncates_and_leaves_the_reward():
    env = create(CASES["Minigrid-Memory"])
    env.reset(seed=0)
    ends = [env.step(Actions.left)[2:] for _ in range(96)]
    assert ends == [(False, False, {})] * 95 + [(False, True, {"reward": 0.0, "length": 96, "success": 0.0})]

    env = create({"type": "Minigrid", "name": "MiniGrid-Empty-5x5-v0"})
    env.reset(seed=0)
    for action in (Actions.forward, Actions.forward, Actions.right, Actions.forward, Actions.forward):
        _, reward, terminated, truncated, info = env.step(action)
    assert reward == pytest.approx(1 - 0.9 * 5 / 100)  # of its own limit, 4·5²
    assert (terminated, truncated, info) == (True, False, {"reward": reward, "length": 5, "success": 1.0})


@pytest.mark.parametrize("name", ["MiniGrid-Fetch-5x5-N2-v0", "BabyAI-BossLevel-v0", "MiniGrid-LockedRoom-v0"])
def test_missions_are_seen_as_words_which_are_all_known(name):
    env = create({"type": "Minigrid", "name": name, "mission": True})
    assert not env.notices
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        seen = [word for word, count in zip(env.vector_names, observation["vector"], strict=True) if count]
        mission = re.findall(r"\w+", env.unwrapped.mission.lower())
        assert seen == sorted(f"mission[{word}]" for word in set(mission))
        assert observation["vector"].sum() == len(mission)


def test_goals_that_the_agent_is_not_told_are_noticed():
    for name, untold in (("BabyAI-GoToLocal-v0", 1), ("MiniGrid-Fetch-5x5-N2-v0", 1), ("MiniGrid-MemoryS9-v0", 0)):
        notices = create({"type": "Minigrid", "name": name}).notices
        assert ["mission: True" in notice for notice in notices] == [True] * untold


# ---------------------------------------------------------------------------------------------------------- Memory Gym

# Plain Memory Gym, in a process of its own: it draws to the window and reads its pixels with pygame.surfarray.
PLAIN_MEMORY_GYM = """
import hashlib, json, sys
import gymnasium, memory_gym, numpy as np
for task, actions in json.loads(sys.stdin.read()).items():
    env = gymnasium.make(task + "-v0", disable_env_checker=True)
    observation, _ = env.reset(seed=11)
    history = [hashlib.md5(observation.tobytes()).hexdigest()]
    for action in actions:
        observation, reward, terminated, _, _ = env.step(action[0] if len(action) == 1 else action)
        history.append([hashlib.md5(observation.tobytes()).hexdigest(), float(reward), terminated])
        if terminated:
            break
    print(json.dumps(history))
"""


def test_pixels_rewards_and_ends_are_those_of_memory_gym():
    tasks = [task for task in MEMORY_GYM_TYPES if task != "Endless-MortarMayhem"]  # see the next test
    envs = {task: create({"type": task}) for task in tasks}
    actions = {task: random_actions(env, 250, seed=4) for task, env in envs.items()}
    finished = subprocess.run(
        [sys.executable, "-c", PLAIN_MEMORY_GYM],
        input=json.dumps({task: rows.tolist() for task, rows in actions.items()}),
        env=os.environ | {"PYGAME_HIDE_SUPPORT_PROMPT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for (task, env), line in zip(envs.items(), finished.stdout.splitlines(), strict=True):
        history = [digest(env.reset(seed=11)[0].transpose(2, 1, 0))]
        given = np.zeros_like(actions[task][0])
        for given[:] in actions[task]:  # it keeps no reference to the array
            observation, reward, terminated, _, _ = env.step(given)
            history.append([digest(observation.transpose(2, 1, 0)), reward, terminated])
            if terminated:
                break
        assert history == json.loads(line), task


def test_endless_mortar_mayhem_is_that_of_the_pygame_it_was_made_with():
    """The digest was made with plain Memory Gym's own versions, gymnasium 0.29.0 and pygame 2.4.0."""
    env = create({"type": "Endless-MortarMayhem"})
    histories = [rollout(env, seed, random_actions(env, 100, seed)) for seed in range(12)]
    assert hashlib.md5(str(histories).encode()).hexdigest() == "7d85c4d2e983f3562a7214ecf2469905"


@pytest.mark.parametrize("task", MEMORY_GYM_TYPES)
def test_memory_gym_environments_do_not_disturb_each_other(task, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "offscreen")

    def play(envs, count):
        histories = [[digest(env.reset(seed=seed)[0])] for seed, env in enumerate(envs)]
        for step in range(count):
            for seed, (env, history) in enumerate(zip(envs, histories, strict=True)):
                history.append(digest(env.step(random_actions(env, count, seed)[step])[0]) + digest(env.render()))
        return histories

    first, second = (create({"type": task}, render_mode="rgb_array") for _ in range(2))
    together = play([first, second], 15)
    assert play([create({"type": task}, render_mode="rgb_array")], 15)[0] == together[0]
    first.close()
    pygame.quit()  # as closing a window elsewhere in the process would
    assert play([create({"type": task}, render_mode="rgb_array"), second], 15) == together
    assert not pygame.display.get_init() and os.environ["SDL_VIDEODRIVER"] == "offscreen"


def test_memory_gym_uses_the_options_at_every_reset():
    """Its time limit is part of the task and terminates."""
    env = create({"type": "MysteryPath-Grid", "reset_params": {"num-seeds": 5, "show_goal": True, "max_steps": 12}})
    green = np.array([0, 255, 0])[:, None, None]
    assert env.task.max_episode_steps == 12
    for seed in range(3):
        assert (env.reset(seed=seed)[0] == green).all(axis=0).any()
        assert [env.step(0)[2:4] for _ in range(12)] == [(False, False)] * 11 + [(True, False)]


def mortar_mayhem_action(task, wrong):
    """Return an action that moves the agent to the target of the current command, or away from it."""
    x, y = task.normalized_agent_position
    goal_x, goal_y = task._target_pos
    if wrong:
        goal_x += 1 if goal_x < 2 else -1
    directions = {(0, -1): 0, (-1, 0): 1, (0, 1): 2, (1, 0): 3}
    step = (np.sign(goal_x - x), 0) if goal_x != x else (0, np.sign(goal_y - y))
    if step == (0, 0):
        return 0
    return 3 if task.agent.face_direction.value == directions[step] else 1


@pytest.mark.parametrize(
    ("failing_command", "fails_while_tiles_are_deadly", "completed"),
    [(None, False, 3), (2, False, 2), (0, False, 0), (1, True, 2)],
)
def test_mortar_mayhem_success(failing_command, fails_while_tiles_are_deadly, completed):
    given = {"command_count": [3], "explosion_delay": [18], "explosion_duration": [8]}
    env = create({"type": "MortarMayhem-Grid", "reset_params": given})
    for seed in range(3):
        env.reset(seed=seed)
        task, ended, total = env.unwrapped, False, 0.0
        while not ended:
            command = task._current_command - int(task.arena.tiles_on)
            wrong = command == failing_command and task.arena.tiles_on == fails_while_tiles_are_deadly
            _, reward, ended, _, info = env.step(mortar_mayhem_action(task, wrong))
            total += reward
        assert total == pytest.approx(completed * 0.1)
        assert info["success"] == (1.0 if completed == 3 else 0.0)
        assert info["commands_completed"] == pytest.approx(completed / 3)
