"""The tasks of Memory Gym, without the defects of version 1.0.2."""

import contextlib
import math
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import gymnasium
import memory_gym
import numpy as np
import pygame
from memory_gym import endless_mortar_mayhem

from environments.episode import (
    EpisodeEnv,
    Info,
    Step,
    discrete,
    one_line,
    picture_space,
    suggest,
    task_numbers,
)
from environments.numbers import COUNTED
from environments.section import MemoryGymSection

# The lowest and highest allowed values of reset options, of each element where the option is a list. Memory Gym checks
# only two of them itself; other values fail in the middle of an episode or make no sense. Scales below 0.1 draw
# nothing, speeds below 1 do not move, the screen is 84 wide, and more than 8 coins do not find room in every episode.
LIMITS = {
    "agent_health": (1, math.inf),
    "agent_scale": (0.1, math.inf),
    "agent_speed": (1, 84),
    "allowed_commands": (4, 9),
    "arena_size": (2, 6),
    "camera_offset_scale": (0, 5.5),
    "cardinal_origin_choice": (0, 3),
    "coin_scale": (0.1, math.inf),
    "coin_show_duration": (0, math.inf),
    "command_count": (1, math.inf),
    "command_show_delay": (0, math.inf),
    "command_show_duration": (1, math.inf),
    "exit_scale": (0.1, math.inf),
    "explosion_delay": (1, math.inf),
    "explosion_duration": (1, math.inf),
    "initial_command_count": (1, math.inf),
    "initial_spawn_interval": (0, math.inf),
    "initial_spawns": (0, math.inf),
    "light_dim_off_duration": (0, 255),
    "light_threshold": (0, 255),
    "max_steps": (1, math.inf),
    "num_coins": (1, 8),
    "num_spawns": (0, math.inf),
    "spawn_interval": (1, math.inf),
    "spawn_interval_decay": (0, math.inf),
    "spawn_interval_threshold": (0, math.inf),
    "spot_damage": (0, math.inf),
    "spot_max_radius": (1, 84),
    "spot_max_speed": (0, 1),
    "spot_min_radius": (1, 84),
    "spot_min_speed": (0, 1),
    "stamina_level": (1, math.inf),
    "steps_per_coin": (1, math.inf),
}
ORDERED_OPTIONS = (("spot_min_radius", "spot_max_radius"), ("spot_min_speed", "spot_max_speed"))
NO_STEP_LIMIT = -1


class OffscreenDisplay:
    """Stands in for pygame.display inside Memory Gym, whose tasks would all draw to the one window of the process.

    Sharing it, closing one task ends the others. Here each task gets a surface of its own from `set_mode`, and
    `get_surface` returns the one of the task that is about to be stepped.
    """

    def __init__(self) -> None:
        self.surface: pygame.Surface | None = None

    def set_mode(self, size: tuple[int, int], flags: int = 0) -> pygame.Surface:
        """Return a new surface."""
        return pygame.Surface(size)

    def get_surface(self) -> pygame.Surface | None:
        """Return the surface of the current task."""
        return self.surface

    def flip(self) -> None:
        """Do nothing: there is no window to be refreshed."""


def copy_pixels(surface: pygame.Surface) -> np.ndarray:
    """Return the pixels as pygame.surfarray.array3d does, shape (x, y, channel), but several times as fast.

    In memory the array is (y, x, channel): the picture as it is looked at, transposed.
    """
    width, height = surface.get_size()
    pixels = np.frombuffer(pygame.image.tobytes(surface, "RGB"), dtype=np.uint8)
    return pixels.reshape(height, width, 3).transpose(1, 0, 2)


def take_off_screen() -> OffscreenDisplay:
    """Let the modules of Memory Gym, and no others, draw off screen and read their pixels faster.

    Only what the name `pygame` means inside those modules changes. They need no `pygame.init` then, which would open
    the process's display.
    """
    display = OffscreenDisplay()
    stand_in: Any = types.ModuleType("pygame")
    vars(stand_in).update(vars(pygame))
    stand_in.init = lambda: None
    stand_in.display = display
    stand_in.surfarray = types.SimpleNamespace(array3d=copy_pixels)
    modules: dict[str, Any] = sys.modules
    for name, module in modules.items():
        if name.startswith(f"{memory_gym.__name__}.") and hasattr(module, "pygame"):
            module.pygame = stand_in
    return display


DISPLAY = take_off_screen()


class RoundedRect(pygame.Rect):
    """A rectangle whose center is rounded, halves away from zero, as by the pygame that Memory Gym was made with.

    Today's pygame-ce cuts fractions off: in Endless Mortar Mayhem the agent would drift to the upper left.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Round what the center is set to."""
        if name == "center":
            value = tuple(int(math.copysign(math.floor(abs(number) + 0.5), number)) for number in value)
        super().__setattr__(name, value)


class RoundedController(endless_mortar_mayhem.ScreenWrapCharacterController):
    """The agent of Endless Mortar Mayhem, moved by whole pixels without a drift."""

    def __init__(self, speed: float, scale: float, rotation: int = 0) -> None:
        super().__init__(speed, scale, rotation)
        self.rect: pygame.Rect = RoundedRect(self.rect)


endless_mortar_mayhem.ScreenWrapCharacterController = RoundedController


@contextlib.contextmanager
def kept_video_driver() -> Iterator[None]:
    """Keep the process's SDL_VIDEODRIVER, which a new Memory Gym task sets to a driver that shows nothing."""
    before = os.environ.get("SDL_VIDEODRIVER")
    try:
        yield
    finally:
        os.environ.pop("SDL_VIDEODRIVER", None)
        if before is not None:
            os.environ["SDL_VIDEODRIVER"] = before


def make_task(task_type: str) -> Any:
    """Return a task of Memory Gym that is looked at by nobody and has no wrappers around it."""
    with kept_video_driver():
        # This render mode draws only when asked to; with None, the task would want the events of a window.
        task = gymnasium.make(f"{task_type}-v0", render_mode="debug_rgb_array", disable_env_checker=True)
    return task.unwrapped


class MemoryGymEnv(EpisodeEnv):
    """A task of Memory Gym: the agent sees 84×84 pixels, an episode is determined by its seed and the actions.

    Time limits arrive as terminated, as Memory Gym reports them: they are part of the task (Mortar Mayhem has as many
    steps as its commands take, Searing Spotlights is to be solved in time), so that no value lies beyond them.
    """

    def __init__(self, section: MemoryGymSection, render_mode: str | None = None):
        """
        Args:
            section: of the config; the type is Memory Gym's id without its version.
            render_mode: "rgb_array", or None if nothing is to be looked at.

        Raises:
            ValueError: if a reset option is not allowed.
        """
        super().__init__(render_mode)
        self._type = section.type
        self._task = make_task(self._type)
        self.action_space = self._task.action_space
        self.observation_space = picture_space(3, self._task.screen_dim, self._task.screen_dim)

        self._options = section.options
        check_options(self._type, self._options, self._task.default_reset_parameters)
        self._try_options()
        max_episode_steps = int(self._task.max_episode_steps)
        self.max_episode_steps = None if max_episode_steps == NO_STEP_LIMIT else max_episode_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode.

        Args:
            seed: determines the episode.
            options: not used; the reset options come from the configuration.

        Returns:
            The observation, a picture of shape (3, 84, 84), and an empty info.
        """
        pixels = self._reset_task(seed, self._options)
        self._start_episode()
        return self._observe(pixels), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Take an action.

        Args:
            action: shape (branches,), or an int where there is only one branch.

        Returns:
            Observation (a picture of shape (3, 84, 84)), reward, terminated, truncated and info.
        """
        pixels, reward, terminated, truncated, task_info = self._step_task(action)
        # Memory Gym counts reward and length too.
        numbers = task_numbers({key: value for key, value in task_info.items() if key not in COUNTED})
        if terminated and self._type in ("MortarMayhem", "MortarMayhem-Grid"):
            numbers.update(self._mortar_mayhem_results())
        info = self._count_step(float(reward), terminated or truncated, numbers)
        return self._observe(pixels), float(reward), bool(terminated), bool(truncated), info

    def _reset_task(self, seed: int | None, options: dict[str, Any]) -> np.ndarray:
        # What would be seen of the previous episode: the agent in the first frames of Endless-MortarMayhem (and in the
        # global view of other tasks), and the spotlights in the first frame if they are not dimmed to begin with.
        self._task.rotated_agent_surface, self._task.rotated_agent_rect = None, None
        if hasattr(self._task, "spotlight_surface"):
            self._task.spotlight_surface.fill(0)
        DISPLAY.surface = self._task.screen
        # The options have to be given each time, or else the defaults hold.
        return self._task.reset(seed=None if seed is None else int(seed), options=options)[0]

    def _step_task(self, action: np.ndarray | int) -> Step:
        DISPLAY.surface = self._task.screen
        if isinstance(self.action_space, gymnasium.spaces.Discrete):
            # A list of one action would silently do nothing.
            return self._task.step(discrete(action))
        # Tasks keep a reference to the action until the next step, so they must not get the caller's array.
        return self._task.step(tuple(np.asarray(action).tolist()))

    def _observe(self, pixels: np.ndarray) -> np.ndarray:
        if self.render_mode is not None:
            # Drawing Mortar Mayhem's global view uses up its list of shown commands: exactly once for each state.
            self._global_view = np.ascontiguousarray(self._task.render())
        self._observation = pixels.transpose(2, 1, 0)
        return self._observation

    def _draw(self) -> np.ndarray:
        return self._global_view.copy()

    def _mortar_mayhem_results(self) -> dict[str, float]:
        """Return success and completed commands of an episode of Mortar Mayhem that has just ended.

        Memory Gym counts the last command as completed even if it fails, and does not count a command that was
        completed (and rewarded) if the agent leaves the target while the other tiles are deadly. An episode ends when
        all commands are completed, with the agent on its target, or else because the agent is not there: in the step
        that verifies the command, where `_command_verify_step` is 1, or later.
        """
        task = self._task
        success = task.normalized_agent_position == task._target_pos
        missed = not success and task._command_verify_step == 1
        completed = task._current_command - int(missed)
        return {"success": float(success), "commands_completed": float(completed / task.num_commands)}

    def _try_options(self) -> None:
        """Raise a ValueError if the task cannot be run with the options.

        Searing Spotlights, for instance, fails without an exit.
        """
        failure = self._failure(self._options)
        if failure is None:
            return
        defaults = self._task.default_reset_parameters
        for key, value in self._options.items():
            if self._failure({key: value}) is not None:
                raise ValueError(
                    f"reset_params: {key}: {value!r} does not work in {self._type} ({failure}); its default is "
                    f"{defaults[key]!r}"
                )
        raise ValueError(f"reset_params: {self._options!r} do not work together in {self._type} ({failure})")

    def _failure(self, options: dict[str, Any]) -> str | None:
        """Return what goes wrong when a new task's first episode has the options, None if nothing does."""
        self._task = make_task(self._type)
        try:
            # No seed, so that a later reset without one does not continue from the same state in all environments
            self._reset_task(None, options)
            self._step_task(np.zeros(self.action_space.shape, dtype=int))
        except Exception as error:
            return one_line(error)
        return None


def check_options(task_type: str, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Check reset options one by one.

    Args:
        task_type: the task, for the messages.
        options: the reset options of the configuration.
        defaults: all reset options of the task and their default values.

    Raises:
        ValueError: if an option is not known, has the wrong type or is out of its limits.
    """
    for key, value in options.items():
        if key not in defaults:
            raise ValueError(f"reset_params: {key}: {value!r} is not known in {task_type}{suggest(key, defaults)}")
        if not is_allowed(key, value, defaults[key]):
            expected = describe_allowed(key, defaults[key])
            raise ValueError(f"reset_params: {key}: {value!r} is not allowed in {task_type}; expected {expected}")
    for low, high in ORDERED_OPTIONS:
        if low in defaults and options.get(low, defaults[low]) > options.get(high, defaults[high]):
            raise ValueError(
                f"reset_params: {low}: {options.get(low, defaults[low])!r} is not allowed in {task_type}; expected no "
                f"more than {high}: {options.get(high, defaults[high])!r}"
            )


def is_allowed(key: str, value: Any, default: Any) -> bool:
    """Tells whether a value has the type of its option's default and is within its limits."""
    if isinstance(default, list):
        return isinstance(value, list) and bool(value) and all(is_allowed(key, item, default[0]) for item in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if not isinstance(value, int if isinstance(default, int) else int | float) or not math.isfinite(value):
        return False
    lowest, highest = LIMITS.get(key, (-math.inf, math.inf))
    return lowest <= value <= highest or (key == "max_steps" and value == NO_STEP_LIMIT)


def describe_allowed(key: str, default: Any) -> str:
    """Return in words what `is_allowed` allows."""
    if isinstance(default, list):
        return f"a list with at least one element, each {describe_allowed(key, default[0])}"
    if isinstance(default, bool):
        return "true or false"
    kind = "a whole number" if isinstance(default, int) else "a finite number"
    lowest, highest = LIMITS.get(key, (-math.inf, math.inf))
    if highest < math.inf:
        kind += f" from {lowest} to {highest}"
    elif lowest > -math.inf:
        kind += f" of at least {lowest}"
    return f"{kind}, or {NO_STEP_LIMIT} for no limit" if key == "max_steps" else kind
