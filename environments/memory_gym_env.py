"""The tasks of Memory Gym, without the defects of version 1.0.2."""

import functools
import math
import os
import sys
import types
from typing import Any, Literal, get_args
from unittest import mock

import gymnasium
import numpy as np
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from environments.contract import BrokenContract
from environments.gymnasium_env import GymnasiumEnv
from environments.numbers import COUNTED
from environments.section import SEEDS, Section, SeedCount, Seeds, StartSeed

MemoryGymType = Literal[
    "MortarMayhem", "MortarMayhem-Grid", "MysteryPath", "MysteryPath-Grid", "SearingSpotlights",
    "Endless-MortarMayhem", "Endless-MysteryPath", "Endless-SearingSpotlights",
]  # fmt: skip
MEMORY_GYM_TYPES: tuple[str, ...] = get_args(MemoryGymType)
TaskOptions = TypedDict("TaskOptions", {"start-seed": StartSeed, "num-seeds": SeedCount}, total=False)
with_config(ConfigDict(extra="allow"))(TaskOptions)


@functools.cache
def off_screen() -> Any:
    """Import Memory Gym, let its modules, and no others, draw off screen, and return what stands in for their display.

    All tasks of a process would draw to its one window, and closing one would end the others. Here each task gets a
    surface of its own, and `surface` has to be set to that of the task about to be stepped.
    """
    import memory_gym
    import pygame
    from memory_gym import endless_mortar_mayhem

    def array3d(surface: Any) -> np.ndarray:
        """As that of pygame.surfarray, shape (x, y, channel), but several times as fast; in memory (y, x, channel)."""
        pixels = np.frombuffer(pygame.image.tobytes(surface, "RGB"), dtype=np.uint8)
        return pixels.reshape(surface.get_height(), -1, 3).transpose(1, 0, 2)

    class RoundedRect(pygame.Rect):
        """Rounds its center as pygame 2.4 did; pygame-ce cuts fractions off, and these errors would add up."""

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
    stand_in.surfarray = types.SimpleNamespace(array3d=array3d)
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
        return gymnasium.make(f"{task_type}-v0", disable_env_checker=True, render_mode="debug_rgb_array").unwrapped


class MemoryGymTask(gymnasium.Wrapper):
    """A task of Memory Gym whose episodes are determined by their seed and the actions; it shows pictures (84, 84, 3).

    Time limits arrive as terminated, as Memory Gym reports them: they are part of the task (Mortar Mayhem has as many
    steps as its commands take, Searing Spotlights is to be solved in time), so that no value lies beyond them.
    The longest episode is `limit`, None where there is none. `render` can be called where it is `watched`.
    """

    def __init__(self, task_type: str, options: dict[str, Any], watched: bool) -> None:
        self._task, self._display = make_task(task_type), off_screen()
        super().__init__(self._task)
        for key, default in self._task.default_reset_parameters.items():
            if isinstance(options.get(key, default), list) != isinstance(default, list):  # 5 would draw from 0 to 4
                raise BrokenContract(
                    f"reset_params: {key}: should be a {type(default).__name__} like its default, {default}"
                )
        self._options, self._watched = options, watched
        self._is_mortar_mayhem = task_type in ("MortarMayhem", "MortarMayhem-Grid")
        self.reset()  # the limit is known only now; a seed would be that of later resets without one, too
        self.limit = max(0, int(self._task.max_episode_steps)) or None  # Memory Gym says −1 where there is none

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode with the task's options."""
        # What would be seen of the previous episode: the agent in the first frames of Endless-MortarMayhem (and in the
        # global view of other tasks), and the spotlights in the first frame if they are not dimmed to begin with.
        self._task.rotated_agent_surface, self._task.rotated_agent_rect = None, None
        if hasattr(self._task, "spotlight_surface"):
            self._task.spotlight_surface.fill(0)
        self._display.surface = self._task.screen
        # The options have to be given each time, or else the defaults hold.
        return self._seen(self._task.reset(seed=seed, options=self._options)[0]), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Play a step; the info holds what Memory Gym reports of it."""
        self._display.surface = self._task.screen
        # Some tasks keep a reference to the action: it must be nobody else's array.
        pixels, reward, terminated, truncated, info = self._task.step(action)
        # Memory Gym counts reward and length too.
        info = {key: value for key, value in info.items() if key not in COUNTED}
        if terminated and self._is_mortar_mayhem:
            info |= self._mortar_mayhem_results()
        return self._seen(pixels), reward, terminated, truncated, info

    def _seen(self, pixels: np.ndarray) -> np.ndarray:
        if self._watched:
            # Drawing Mortar Mayhem's global view uses up its list of shown commands: exactly once for each state.
            self._global_view = self._task.render()
        return pixels.transpose(1, 0, 2)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Return the global view."""
        return self._global_view

    def _mortar_mayhem_results(self) -> dict[str, float]:
        """Return success and completed commands of an episode of Mortar Mayhem that has just ended.

        Memory Gym counts the last command even if it fails, and does not count one that was completed (and rewarded) if
        the agent then leaves the target while the other tiles are deadly. An agent off its target has failed only in
        the step that verifies the command, where `_command_verify_step` is 1.
        """
        task = self._task
        success = task.normalized_agent_position == task._target_pos
        missed = not success and task._command_verify_step == 1
        completed = task._current_command - int(missed)
        return {"success": float(success), "commands_completed": float(completed / task.num_commands)}


class MemoryGymSection(Section):
    """The tasks of Memory Gym."""

    type: MemoryGymType = Field(description="Which environment.")
    reset_params: TaskOptions = Field(  # type: ignore[assignment]  # more keys, beside the same ones
        TaskOptions(), description=f"The task's own options, and {SEEDS}"
    )

    def create(self, render_mode: str | None = None) -> GymnasiumEnv:
        """Return a new task."""
        options = {key: value for key, value in self.reset_params.items() if key not in Seeds.__annotations__}
        task = MemoryGymTask(self.type, options, render_mode is not None)
        return GymnasiumEnv(task, task.limit)
