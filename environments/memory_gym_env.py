"""The tasks of Memory Gym, without the defects of version 1.0.2."""

import functools
import math
import os
import sys
import types
from typing import Any, ClassVar, Literal, get_args
from unittest import mock

import gymnasium
import numpy as np
from pydantic import ConfigDict, Field, ValidationError, create_model, with_config
from typing_extensions import TypedDict

from environments.contract import BrokenContract
from environments.episode import EpisodeEnv, Info, Step, discrete, make_registered, picture_space
from environments.numbers import COUNTED, task_numbers
from environments.section import SEEDS, Section, SeedCount, Seeds, StartSeed

MemoryGymType = Literal[
    "MortarMayhem",
    "MortarMayhem-Grid",
    "MysteryPath",
    "MysteryPath-Grid",
    "SearingSpotlights",
    "Endless-MortarMayhem",
    "Endless-MysteryPath",
    "Endless-SearingSpotlights",
]
MEMORY_GYM_TYPES: tuple[str, ...] = get_args(MemoryGymType)
TaskOptions = TypedDict("TaskOptions", {"start-seed": StartSeed, "num-seeds": SeedCount}, total=False)
with_config(ConfigDict(extra="allow"))(TaskOptions)

NO_STEP_LIMIT = -1


def copy_pixels(surface: Any) -> np.ndarray:
    """Return the pixels as pygame.surfarray.array3d does, shape (x, y, channel), but several times as fast.

    In memory the array is (y, x, channel): the picture as it is looked at, transposed.
    """
    import pygame

    width, height = surface.get_size()
    pixels = np.frombuffer(pygame.image.tobytes(surface, "RGB"), dtype=np.uint8)
    return pixels.reshape(height, width, 3).transpose(1, 0, 2)


@functools.cache
def off_screen() -> Any:
    """Import Memory Gym, let its modules, and no others, draw off screen, and return what stands in for their display.

    All tasks of a process would draw to its one window, and closing one would end the others. Here each task gets a
    surface of its own, and `surface` has to be set to that of the task about to be stepped. Only what the name `pygame`
    means inside those modules changes. They need no `pygame.init` then, which would open the process's display.
    """
    import memory_gym
    import pygame
    from memory_gym import endless_mortar_mayhem

    class RoundedRect(pygame.Rect):
        """A rectangle whose center is rounded, halves away from zero, as by the pygame Memory Gym was made with.

        Today's pygame-ce cuts fractions off: in Endless Mortar Mayhem the agent would drift to the upper left.
        """

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "center":
                value = tuple(int(math.copysign(math.floor(abs(number) + 0.5), number)) for number in value)
            super().__setattr__(name, value)

    class RoundedController(endless_mortar_mayhem.ScreenWrapCharacterController):
        """The agent of Endless Mortar Mayhem, moved by whole pixels without a drift."""

        def __init__(self, speed: float, scale: float, rotation: int = 0) -> None:
            super().__init__(speed, scale, rotation)
            self.rect: Any = RoundedRect(self.rect)

    endless_mortar_mayhem.ScreenWrapCharacterController = RoundedController
    display: Any = types.SimpleNamespace(surface=None, flip=lambda: None)
    display.get_surface = lambda: display.surface
    display.set_mode = lambda size, flags=0: pygame.Surface(size)
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


def make_task(task_type: str) -> Any:
    """Return a task of Memory Gym that is looked at by nobody and has no wrappers around it."""
    off_screen()
    # A new task sets SDL_VIDEODRIVER to one that shows nothing, for the whole process.
    with mock.patch.dict(os.environ):
        # This render mode draws only when asked to; with None, the task would want the events of a window.
        return make_registered(f"{task_type}-v0", render_mode="debug_rgb_array").unwrapped


class MemoryGymEnv(EpisodeEnv):
    """A task of Memory Gym: the agent sees 84×84 pixels, an episode is determined by its seed and the actions.

    Time limits arrive as terminated, as Memory Gym reports them: they are part of the task (Mortar Mayhem has as many
    steps as its commands take, Searing Spotlights is to be solved in time), so that no value lies beyond them.
    """

    def __init__(self, section: "MemoryGymSection", render_mode: str | None = None):
        super().__init__(section, render_mode)
        self._type, self._options, self._display = section.type, section.options, off_screen()
        self._task = make_task(self._type)
        self.action_space = self._task.action_space
        self.observation_space = picture_space(3, self._task.screen_dim, self._task.screen_dim)
        check_options(self._type, self._options, self._task.default_reset_parameters)
        self._reset_task(None)  # the limit is known only now; a seed would be that of later resets without one, too
        max_episode_steps = int(self._task.max_episode_steps)
        self.max_episode_steps = None if max_episode_steps == NO_STEP_LIMIT else max_episode_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        """Start an episode with the options of the config; the observation is a picture of shape (3, 84, 84)."""
        pixels = self._reset_task(seed)
        self._start_episode()
        return self._observe(pixels), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Play a step; at an episode's end, its info holds what Memory Gym reports of it."""
        pixels, reward, terminated, truncated, task_info = self._step_task(action)
        # Memory Gym counts reward and length too.
        numbers = task_numbers({key: value for key, value in task_info.items() if key not in COUNTED})
        if terminated and self._type in ("MortarMayhem", "MortarMayhem-Grid"):
            numbers.update(self._mortar_mayhem_results())
        info = self._count_step(float(reward), terminated or truncated, numbers)
        return self._observe(pixels), float(reward), bool(terminated), bool(truncated), info

    def _reset_task(self, seed: int | None) -> np.ndarray:
        # What would be seen of the previous episode: the agent in the first frames of Endless-MortarMayhem (and in the
        # global view of other tasks), and the spotlights in the first frame if they are not dimmed to begin with.
        self._task.rotated_agent_surface, self._task.rotated_agent_rect = None, None
        if hasattr(self._task, "spotlight_surface"):
            self._task.spotlight_surface.fill(0)
        self._display.surface = self._task.screen
        # The options have to be given each time, or else the defaults hold.
        return self._task.reset(seed=None if seed is None else int(seed), options=self._options)[0]

    def _step_task(self, action: np.ndarray | int) -> Step:
        self._display.surface = self._task.screen
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

    def render(self) -> np.ndarray:
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


class MemoryGymSection(Section):
    """The tasks of Memory Gym."""

    makes: ClassVar[type] = MemoryGymEnv
    type: MemoryGymType = Field(description="Which environment.")
    reset_params: TaskOptions = Field(  # type: ignore[assignment]  # more keys, beside the same ones
        TaskOptions(), description=f"The task's own options, and {SEEDS}"
    )

    @property
    def options(self) -> dict[str, Any]:
        """Return the reset options of the task."""
        return {key: value for key, value in self.reset_params.items() if key not in Seeds.__annotations__}


def check_options(task_type: str, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise BrokenContract if a reset option of a task is not among its defaults or has another type than there."""
    types: dict[str, Any] = {
        key: (list[type(default[0])] if isinstance(default, list) else type(default), default)  # type: ignore[misc]
        for key, default in defaults.items()
    }
    allowed = create_model("Options", __config__=ConfigDict(extra="forbid", strict=True), **types)
    try:
        allowed.model_validate(options)
    except ValidationError as error:
        found = error.errors()[0]
        key, known = found["loc"][0], ", ".join(defaults)
        raise BrokenContract(f"reset_params: {key}: {found['msg']}; {task_type} has {known}") from error
