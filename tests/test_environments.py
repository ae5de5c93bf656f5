"""Tests of the environments: the rules of each family, and what is worked around in the packages underneath."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pygame
import pytest
from gymnasium import spaces
from minigrid.core.actions import Actions
from pydantic import TypeAdapter

from environments import MEMORY_GYM_TYPES, memory_gym_env, minigrid_env
from environments.section import Environment

pytestmark = pytest.mark.filterwarnings("error")

ROOT = Path(__file__).resolve().parent.parent

MEMORY_S9 = {"type": "Minigrid", "name": "MiniGrid-MemoryS9-v0"}
CASES = {
    **{name: {"type": name} for name in ("PocMemoryEnv", "CartPole", "CartPoleMasked", *MEMORY_GYM_TYPES)},
    "Minigrid-Memory": MEMORY_S9,
    "Minigrid-DoorKey": {"type": "Minigrid", "name": "MiniGrid-DoorKey-5x5-v0"},
    "Gymnasium": {"type": "Gymnasium", "name": "MountainCar-v0", "max_episode_steps": 60},
    "SearingSpotlights-bright": {"type": "SearingSpotlights", "reset_params": {"light_dim_off_duration": 0}},
}
every_environment = pytest.mark.parametrize("environment", CASES.values(), ids=CASES.keys())
every_memory_gym_task = pytest.mark.parametrize("task", MEMORY_GYM_TYPES)


def create(section, render_mode=None):
    """Return the environment of a config's section."""
    return TypeAdapter(Environment).validate_python(section).create(render_mode)


def digest(array):
    return hashlib.md5(np.ascontiguousarray(array).tobytes()).hexdigest()


def random_actions(env, count, seed=0):
    """Return actions as the trainer passes them: arrays of shape (branches,)."""
    choices = getattr(env.action_space, "nvec", None)
    choices = [env.action_space.n] if choices is None else choices
    return np.random.default_rng(seed).integers(0, choices, (count, len(choices)))


def rollout(env, seed, actions, look=lambda env: None):
    """Play one episode, or as far as the actions go, and return all that happens."""
    observation, _ = env.reset(seed=seed)
    look(env)
    history = [digest(observation)]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        look(env)
        history.append((digest(observation), reward, terminated, truncated, tuple(sorted(info.items()))))
        if terminated or truncated:
            break
    return history


# All environments


@every_environment
def test_episode_is_determined_by_its_seed_and_actions(environment):
    used, fresh = create(environment), create(environment)
    for seed in range(3):
        rollout(used, seed, random_actions(used, 90, seed))
    actions = random_actions(fresh, 150, seed=9)
    history = rollout(fresh, 7, actions)
    assert rollout(used, 7, actions) == history
    assert len({str(rollout(used, seed, actions)) for seed in range(5)}) > 1  # the seed matters


@every_environment
def test_rendering_changes_nothing(environment):
    pictures = []

    def look(env):
        picture = env.render()
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= 96
        pictures.append(picture.copy())
        picture[:] = 0  # it is the caller's own
        assert np.array_equal(env.render(), pictures[-1])
        env.agent_view()

    watched, looked_at_once = (create(environment, render_mode="rgb_array") for _ in range(2))
    unwatched = create(environment)
    actions = random_actions(unwatched, 150, seed=1)
    for seed in (3, 4):
        history = rollout(unwatched, seed, actions)
        assert rollout(watched, seed, actions, look) == history
        assert rollout(looked_at_once, seed, actions[:5]) == history[:6]
        assert np.array_equal(looked_at_once.render(), pictures[5 - len(history)])
    with pytest.raises(RuntimeError, match="render_mode='rgb_array'"):
        unwatched.render()
    watched.close()
    watched.close()


@every_environment
def test_infos_and_types(environment):
    env = create(environment)
    observation, info = env.reset(seed=1)
    assert info == {}
    rewards = []
    for action in random_actions(env, 600, seed=2):
        assert env.observation_space.contains(observation)
        before = observation.copy()
        earlier = observation
        observation, reward, terminated, truncated, info = env.step(action)
        assert np.array_equal(earlier, before)  # no observation is overwritten by the next one
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
        rewards.append(reward)
        if terminated or truncated:
            break
        assert info == {}
    assert terminated or truncated
    scale = 100 if environment["type"].startswith("CartPole") else 1
    assert info["reward"] == pytest.approx(scale * sum(rewards))
    assert info["length"] == len(rewards)
    assert {type(value) for key, value in info.items() if key != "length"} == {float}


@pytest.mark.parametrize(
    "name", [name for name, each in CASES.items() if each["type"] in ("Minigrid", *MEMORY_GYM_TYPES)]
)
def test_pictures_are_channels_first_views_of_channels_last_memory(name):
    env = create(CASES[name], render_mode="rgb_array")
    env.reset(seed=0)
    for action in random_actions(env, 3):
        observation = env.step(action)[0]
        assert observation.shape == env.observation_space.shape
        assert observation.transpose(1, 2, 0).flags.c_contiguous
        assert np.array_equal(env.agent_view(), observation.transpose(1, 2, 0))


LIMITS = [
    ("PocMemoryEnv", {}, 32),
    ("CartPole", {}, 200),
    ("CartPoleMasked", {}, 200),
    ("Minigrid-Memory", {}, 96),
    ("Minigrid-Memory", {"max_episode_steps": 20}, 20),
    ("Minigrid-DoorKey", {}, 64),
    ("Gymnasium", {}, 60),
    ("CartPole", {"max_episode_steps": 500}, 500),
    ("CartPoleMasked", {"max_episode_steps": 7}, 7),
    ("MortarMayhem", {}, 275),
    ("MortarMayhem-Grid", {}, 119),
    ("MortarMayhem-Grid", {"reset_params": {"start-seed": 0, "num-seeds": 9, "command_count": [5]}}, 59),
    ("MysteryPath", {}, 512),
    ("MysteryPath-Grid", {"reset_params": {"max_steps": 77}}, 77),
    ("SearingSpotlights", {}, 256),
    ("Endless-MortarMayhem", {}, None),
    ("Endless-MysteryPath", {}, None),
    ("Endless-SearingSpotlights", {"reset_params": {"max_steps": 50}}, 50),
]


@pytest.mark.parametrize(("name", "changes", "expected"), LIMITS)
def test_max_episode_steps(name, changes, expected):
    env = create(CASES[name] | changes)
    assert env.max_episode_steps == expected
    assert type(env.max_episode_steps) is (int if expected else type(None))


MEMORY_S9_IDS = {"name": "MiniGrid-MemoryS9-v0"}
REFUSED = [
    ("Minigrid", {"name": "MiniGrid-MemoryS8-v0"}, ["MiniGrid-MemoryS8-v0", "MiniGrid-MemoryS9-v0"]),
    ("Minigrid", {"name": "CartPole-v1"}, ["CartPole-v1"]),
    ("Minigrid", MEMORY_S9_IDS | {"tile_size": 8}, ["tile_size: 8", "24×24", "36×36"]),
    ("Gymnasium", {"name": "Acrobat-v1"}, ["Acrobat-v1", "Acrobot-v1"]),
    ("Gymnasium", MEMORY_S9_IDS, ["observation space Dict", "mission is text", "observe"]),
]
REFUSED_OPTIONS = [
    ("MortarMayhem", {"comand_count": [5]}, ["comand_count: [5]", "nearest: command_count"]),
    ("MortarMayhem", {"command_count": 5}, ["command_count: 5", "a list", "of at least 1"]),
    ("MortarMayhem", {"command_count": []}, ["command_count: []", "at least one element"]),
    ("MortarMayhem", {"command_count": [True]}, ["command_count: [True]"]),
    ("MortarMayhem", {"explosion_delay": [0]}, ["explosion_delay: [0]"]),
    ("MortarMayhem", {"arena_size": 7}, ["arena_size: 7", "from 2 to 6"]),
    ("MortarMayhem", {"reward_command_success": "0.1"}, ["reward_command_success: '0.1'", "finite number"]),
    ("MortarMayhem", {"reward_command_success": float("nan")}, ["reward_command_success: nan"]),
    ("MysteryPath", {"max_steps": 0}, ["max_steps: 0", "-1 for no limit"]),
    ("MysteryPath", {"max_steps": 9.0}, ["max_steps: 9.0"]),
    ("MysteryPath", {"show_goal": 1}, ["show_goal: 1", "true or false"]),
    ("MysteryPath-Grid", {"agent_scale": True}, ["agent_scale: True"]),
    ("SearingSpotlights", {"use_exit": False}, ["use_exit: False", "its default is True"]),
    ("SearingSpotlights", {"num_coins": [2], "use_exit": False}, ["use_exit: False", "its default is True"]),
    ("SearingSpotlights", {"num_coins": []}, ["num_coins: []"]),
    ("SearingSpotlights", {"num_coins": [1, 0]}, ["num_coins: [1, 0]", "from 1 to 8"]),
    ("SearingSpotlights", {"spot_min_radius": 20, "initial_spawns": 0}, ["spot_min_radius: 20", "13.75"]),
    ("Endless-SearingSpotlights", {"show_last_action": False}, ["show_last_action: False"]),
    ("Endless-MysteryPath", {"stamina_level": -3}, ["stamina_level: -3"]),
]


@pytest.mark.parametrize(
    ("kind", "entries", "parts"),
    REFUSED + [(kind, {"reset_params": options}, parts) for kind, options, parts in REFUSED_OPTIONS],
)
def test_bad_configuration_is_refused_in_one_line(kind, entries, parts):
    with pytest.raises(ValueError) as error:
        create({"type": kind, **entries})
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_unknown_render_mode_is_refused():
    with pytest.raises(ValueError, match="'human'"):
        create({"type": "PocMemoryEnv"}, render_mode="human")


def test_nothing_is_printed_and_nothing_warns():
    """In a process of its own, where every warning is an error."""
    lines = ["import numpy as np", "from pydantic import TypeAdapter", "from environments.section import Environment"]
    for environment in CASES.values():
        lines += [
            f"env = TypeAdapter(Environment).validate_python({environment!r}).create('rgb_array')",
            "env.reset(seed=0)",
            "env.step(np.zeros(env.action_space.shape or (1,), dtype=int))",
            "env.render()",
            "env.close()",
        ]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("SDL_", "PYGAME_"))}
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines)]
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


# PocMemoryEnv


@pytest.mark.parametrize("chosen_end", ["good", "bad"])
def test_poc_memory_episode(chosen_end):
    env = create({"type": "PocMemoryEnv"})
    starts, good_sides = set(), set()
    for seed in range(40):
        shown, _ = env.reset(seed=seed)
        starts.add(shown[1])
        good_sides.add(shown[0])
        assert shown.dtype == np.float32
        assert {shown[0], shown[2]} == {-1, 1}
        good_action = 0 if shown[0] == 1 else 1
        action = good_action if chosen_end == "good" else 1 - good_action
        for _ in range(2):
            observation, reward, terminated, truncated, info = env.step(np.array([action]))
            assert np.array_equal(observation, shown)  # frozen
            assert (reward, terminated, truncated, info) == (0.0, False, False, {})
        direction = 1 if action == 1 else -1
        start = round(5 * float(shown[1]))
        moves = 5 - direction * start
        for move in range(1, moves + 1):
            observation, reward, terminated, truncated, info = env.step(np.array([action]))
            expected = np.array([0, (start + direction * move) / 5, 0], dtype=np.float32)
            assert np.array_equal(observation, expected)
            assert terminated == (move == moves)
            assert not truncated
            assert reward == (-0.1 if not terminated else 1.6 if chosen_end == "good" else -1.6)
        assert info["success"] == (1.0 if chosen_end == "good" else 0.0)
        assert info["reward"] == pytest.approx(reward - 0.1 * (moves - 1))
        assert info["length"] == moves + 2
    assert starts == {np.float32(start / 5) for start in (-2, -1, 0, 1, 2)}
    assert good_sides == {-1, 1}


def test_poc_memory_time_limit_truncates():
    env = create({"type": "PocMemoryEnv"})
    env.reset(seed=0)
    ends = [env.step(step % 2)[2:4] for step in range(32)]
    assert ends == [(False, False)] * 31 + [(False, True)]


def test_poc_memory_end_reached_with_the_last_step_terminates():
    env = create({"type": "PocMemoryEnv"})
    seed = next(seed for seed in range(100) if env.reset(seed=seed)[0][1] == np.float32(0.2))
    env.reset(seed=seed)
    ends = [env.step(action)[2:4] for action in [0, 0, *[0, 1] * 13, *[1] * 4]]
    assert ends == [(False, False)] * 31 + [(True, False)]


def test_poc_memory_picture_shows_goals_only_while_visible():
    env = create({"type": "PocMemoryEnv"}, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    shown = env.render()
    height, width, _ = shown.shape
    left, right = shown[height // 2 - 40, 50], shown[height // 2 - 40, width - 50]
    greener = left if observation[0] == 1 else right
    assert greener[1] > greener[0]
    assert not np.array_equal(left, right)
    for action in (0, 0, 0):
        env.step(action)
    hidden = env.render()
    assert np.array_equal(hidden[height // 2 - 40, 50], hidden[height // 2 - 40, width - 50])
    assert env.agent_view() is None


# CartPole


def test_cartpole_masks_velocities_and_scales_rewards():
    masked, full = create({"type": "CartPoleMasked"}), create({"type": "CartPole"})
    hidden, seen = masked.reset(seed=5)[0], full.reset(seed=5)[0]
    for step in range(1, 201):
        assert seen.all()
        assert np.array_equal(hidden, seen * np.array([1, 0, 1, 0], dtype=np.float32))
        # Keeps the pole upright and the cart in the middle
        action = int(seen @ np.array([0.1, 0.3, 1.0, 0.5]) > 0)
        hidden, reward, terminated, truncated, info = masked.step(np.array([action]))
        seen = full.step(action)[0]
        assert (reward, terminated, truncated) == (0.01, False, step == 200)
    assert info == {"reward": 200.0, "length": 200}


# MiniGrid


@pytest.mark.parametrize("kept", [minigrid_env.MAX_KEPT_PICTURES, 3])
@pytest.mark.parametrize(
    ("name", "entries", "needed"),
    [
        ("MiniGrid-MemoryS7-v0", {}, "success"),
        ("MiniGrid-KeyCorridorS3R1-v0", {"max_episode_steps": 200}, "carrying"),
        ("MiniGrid-MultiRoom-N2-S4-v0", {"view_size": 5, "tile_size": 10}, "open door"),
    ],
)
def test_minigrid_pictures_equal_plain_rendering(monkeypatch, name, entries, needed, kept):
    monkeypatch.setattr(minigrid_env, "MAX_KEPT_PICTURES", kept)
    monkeypatch.setattr(minigrid_env, "_kept_pictures", {})
    env = create({"type": "Minigrid", "name": name, **entries})
    view_size, tile_size = (3, 28) if "Memory" in name else (entries.get("view_size", 7), entries.get("tile_size", 8))
    plain = gymnasium.make(name, agent_view_size=view_size).unwrapped
    create({"type": "Minigrid", "name": name, "tile_size": 16, "view_size": view_size}).reset(seed=0)
    happened = set()
    for seed in range(8):
        observation, _ = env.reset(seed=seed)
        plain.reset(seed=seed)
        for action in random_actions(env, 120, seed):
            # What MiniGrid's RGBImgPartialObsWrapper observes
            expected = plain.get_frame(tile_size=tile_size, agent_pov=True)
            assert np.array_equal(observation, expected.transpose(2, 0, 1))
            observation, reward, terminated, truncated, _ = env.step(action)
            assert (reward, terminated) == plain.step(action.item())[1:3]
            happened.add("success" if reward > 0 else "")
            happened.add("carrying" if plain.carrying else "")
            happened.add("open door" if any(getattr(cell, "is_open", False) for cell in plain.grid.grid) else "")
            if terminated or truncated:
                break
    assert needed in happened
    assert len(minigrid_env._kept_pictures) <= kept


def test_minigrid_pictures_cannot_be_written_to():
    env = create(MEMORY_S9)
    observation, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match="read-only"):
        observation[:] = 0


def test_minigrid_time_limit_truncates_and_leaves_the_reward():
    env = create(MEMORY_S9)
    assert env.action_space == spaces.Discrete(3)
    env.reset(seed=0)
    ends = [env.step(Actions.left)[2:] for _ in range(96)]
    assert ends[:95] == [(False, False, {})] * 95
    assert ends[95] == (False, True, {"reward": 0.0, "length": 96, "success": 0.0})

    env = create({"type": "Minigrid", "name": "MiniGrid-Empty-5x5-v0"})
    env.reset(seed=0)
    for action in (Actions.forward, Actions.forward, Actions.right, Actions.forward, Actions.forward):
        _, reward, terminated, truncated, info = env.step(action)
    assert reward == pytest.approx(1 - 0.9 * 5 / 100)  # of its own limit, 4·5²
    assert (terminated, truncated) == (True, False)
    assert info == {"reward": reward, "length": 5, "success": 1.0}


# Memory Gym

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
        for action in actions[task]:
            observation, reward, terminated, _, _ = env.step(action)
            history.append([digest(observation.transpose(2, 1, 0)), reward, terminated])
            if terminated:
                break
        assert history == json.loads(line), task


def test_endless_mortar_mayhem_is_that_of_the_pygame_it_was_made_with():
    """The digest was made with plain Memory Gym's own versions, gymnasium 0.29.0 and pygame 2.4.0."""
    env = create({"type": "Endless-MortarMayhem"})
    histories = [rollout(env, seed, random_actions(env, 100, seed)) for seed in range(12)]
    assert hashlib.md5(str(histories).encode()).hexdigest() == "7d85c4d2e983f3562a7214ecf2469905"


def test_pixels_are_copied_as_surfarray_does():
    surface = pygame.Surface((5, 3))
    for x in range(5):
        for y in range(3):
            surface.set_at((x, y), (10 * x, 20 * y, 30 + x + y))
    pixels = memory_gym_env.copy_pixels(surface)
    assert np.array_equal(pixels, pygame.surfarray.array3d(surface))


def test_memory_gym_picture_is_upright():
    env = create({"type": "SearingSpotlights"}, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    health_bar = np.array([0, 255, 0])
    assert (observation[:, :4, :40] == health_bar[:, None, None]).all()  # left half of the top rows
    assert not (observation[:, 4:, :4] == health_bar[:, None, None]).all(axis=0).any()
    assert env.render().shape == (336, 336, 3)
    assert (env.render()[:16, :160] == health_bar).all()


@every_memory_gym_task
def test_memory_gym_environments_do_not_disturb_each_other(task):
    def play(envs, count):
        histories = [[] for _ in envs]
        for seed, env in enumerate(envs):
            env.reset(seed=seed)
        for step in range(count):
            for seed, (env, history) in enumerate(zip(envs, histories, strict=True)):
                history.append(digest(env.step(random_actions(env, count, seed)[step])[0]))
                if env.render_mode:
                    history.append(digest(env.render()))
        return histories

    def make():
        return create({"type": task}, render_mode="rgb_array")

    first, second = make(), make()
    together = play([first, second], 30)
    assert play([make()], 30)[0] == together[0]
    first.close()
    first.close()
    pygame.quit()  # as closing a window elsewhere in the process would
    assert play([make(), second], 30) == together
    assert not pygame.display.get_init()


@pytest.mark.parametrize("driver", [None, "offscreen"])
def test_memory_gym_leaves_the_video_driver_alone(driver, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", driver or "")
    if driver is None:
        monkeypatch.delenv("SDL_VIDEODRIVER")
    create({"type": "MortarMayhem"})
    assert os.environ.get("SDL_VIDEODRIVER") == driver


def test_memory_gym_keeps_no_reference_to_the_action():
    actions = random_actions(create({"type": "SearingSpotlights"}), 20)
    reused = np.zeros(2, dtype=np.int64)
    env, other = (create({"type": "SearingSpotlights"}) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    for action in actions:
        reused[:] = action
        observation = env.step(reused)[0]
        reused[:] = 0
        assert np.array_equal(observation, other.step(action.copy())[0])


def test_memory_gym_understands_an_array_of_one_action():
    env = create({"type": "MysteryPath-Grid"})
    start = env.reset(seed=0)[0]
    turned = env.step(np.array([1]))[0]
    env.reset(seed=0)
    assert np.array_equal(env.step(1)[0], turned)
    assert not np.array_equal(start, turned)


def test_memory_gym_time_limit_is_part_of_the_task():
    env = create({"type": "MysteryPath-Grid", "reset_params": {"max_steps": 12}})
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(12)]
    assert ends == [(False, False)] * 11 + [(True, False)]


def test_memory_gym_uses_the_options_at_every_reset():
    env = create({"type": "MysteryPath-Grid", "reset_params": {"num-seeds": 5, "show_goal": True}})
    green = np.array([0, 255, 0])[:, None, None]
    for seed in range(3):
        assert (env.reset(seed=seed)[0] == green).all(axis=0).any()


def mortar_mayhem_action(env, wrong):
    """Return an action that moves the agent to the target of the current command, or away from it."""
    task = env._task
    x, y = task.normalized_agent_position
    goal_x, goal_y = task._target_pos
    if wrong:
        goal_x, goal_y = (goal_x + 1 if goal_x < 2 else goal_x - 1), goal_y
    if env.action_space == spaces.Discrete(4):
        directions = {(0, -1): 0, (-1, 0): 1, (0, 1): 2, (1, 0): 3}
        step = (np.sign(goal_x - x), 0) if goal_x != x else (0, np.sign(goal_y - y))
        if step == (0, 0):
            return 0
        return 3 if task.agent.face_direction.value == directions[step] else 1
    return np.array([(0, 2, 1)[int(np.sign(goal_x - x))], (0, 2, 1)[int(np.sign(goal_y - y))]])


@pytest.mark.parametrize("reward_command_success", [0.1, 0.0])
@pytest.mark.parametrize("task", ["MortarMayhem", "MortarMayhem-Grid"])
@pytest.mark.parametrize(
    ("failing_command", "fails_while_tiles_are_deadly", "completed"),
    [(None, False, 3), (2, False, 2), (1, False, 1), (0, False, 0), (1, True, 2)],
)
def test_mortar_mayhem_success(task, reward_command_success, failing_command, fails_while_tiles_are_deadly, completed):
    options = {
        "command_count": [3],
        "reward_command_success": reward_command_success,
        "explosion_delay": [18],
        "explosion_duration": [8],
    }
    env = create({"type": task, "reset_params": options})
    for seed in range(3):
        env.reset(seed=seed)
        ended, total = False, 0.0
        while not ended:
            command = env._task._current_command - int(env._task.arena.tiles_on)
            wrong = command == failing_command and env._task.arena.tiles_on == fails_while_tiles_are_deadly
            _, reward, ended, _, info = env.step(mortar_mayhem_action(env, wrong))
            total += reward
        assert total == pytest.approx(completed * reward_command_success)
        assert info["success"] == (1.0 if completed == 3 else 0.0)
        assert info["commands_completed"] == pytest.approx(completed / 3)


# Gymnasium


class Dummy(gymnasium.Env):
    """Counts its steps in every entry of one reused array, and rewards and ends as NumPy would."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, shape, dtype, action_space, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, shape, dtype)
        self.action_space = action_space
        self._array = np.zeros(shape, dtype)
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._array[:] = 0
        self._array[..., -1] = 7
        return self._array, {"unused": 1}

    def step(self, action):
        self.actions.append(action)
        self._array += 1
        return self._array, np.float32(0.5), np.bool_(len(self.actions) == 3), False, {"is_success": True, "map": [1]}

    def render(self):
        return np.zeros((120, 100, 3), np.uint8)


def make_dummy(monkeypatch, shape, dtype=np.uint8, action_space=None, **entries):
    spec = gymnasium.envs.registration.EnvSpec(
        "Dummy-v0",
        entry_point=Dummy,
        max_episode_steps=50,
        kwargs={"shape": shape, "dtype": dtype, "action_space": action_space or spaces.Discrete(3)},
    )
    monkeypatch.setitem(gymnasium.registry, "Dummy-v0", spec)
    return create({"type": "Gymnasium", "name": "Dummy-v0", **entries}, render_mode="rgb_array")


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gymnasium_pictures(monkeypatch, channels, channels_first):
    shape = (channels, 40, 60) if channels_first else (40, 60, channels)
    env = make_dummy(monkeypatch, shape)
    assert env.observation_space == spaces.Box(0, 255, (channels, 40, 60), np.uint8)
    assert env.max_episode_steps == 50
    first, _ = env.reset(seed=0)
    expected = np.zeros(shape, np.uint8)
    expected[..., -1] = 7
    expected = expected if channels_first else expected.transpose(2, 0, 1)
    assert first.transpose(1, 2, 0).flags.c_contiguous
    second = env.step(np.array([1]))[0]
    assert np.array_equal(first, expected)  # not overwritten
    assert np.array_equal(second, expected + 1)
    assert env.agent_view().shape == (40, 60, 3)
    assert env.render().shape == (120, 100, 3)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_gymnasium_vectors_infos_and_limit(monkeypatch, dtype):
    env = make_dummy(monkeypatch, (5,), dtype, max_episode_steps=20)
    assert env.max_episode_steps == 20
    first, info = env.reset(seed=0)
    assert info == {}
    for _ in range(3):
        observation, reward, terminated, truncated, info = env.step(np.array([1]))
    assert observation.dtype == first.dtype == np.float32
    assert first.tolist() == [0, 0, 0, 0, 7]  # not overwritten
    assert observation.tolist() == [3, 3, 3, 3, 10]
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    assert info == {"reward": 1.5, "length": 3, "success": 1.0}


def test_gymnasium_does_not_warn_of_old_versions():
    assert create({"type": "Gymnasium", "name": "CartPole-v0"}).max_episode_steps == 200


def test_gymnasium_time_limit_truncates(monkeypatch):
    env = make_dummy(monkeypatch, (5,), np.float64, max_episode_steps=2)
    env.reset(seed=0)
    env.step(0)
    assert env.step(0)[2:4] == (False, True)


def test_gymnasium_actions_count_from_zero(monkeypatch):
    env = make_dummy(monkeypatch, (5,), np.float32, spaces.Discrete(3, start=2))
    assert env.action_space == spaces.Discrete(3)
    env.reset(seed=0)
    env.step(np.array([1]))
    assert env._env.unwrapped.actions == [3]
    env = make_dummy(monkeypatch, (5,), np.float32, spaces.MultiDiscrete([2, 4]))
    assert env.action_space == spaces.MultiDiscrete([2, 4])
    env.reset(seed=0)
    env.step(np.array([1, 3]))
    assert env._env.unwrapped.actions[0].tolist() == [1, 3]
