"""Any registered environment, whatever it shows and however it is acted in."""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from environments import BrokenContract
from environments.episode import Info, Observation, Step, WrappedEnv, picture_space
from environments.numbers import task_numbers
from environments.registered import make_registered
from environments.section import GymnasiumSection
from environments.spaces import Actor, Observer, as_picture, hidden_entries, short, shorten, vector_picture

OLD_API = "that is the API of gym, which Gymnasium has replaced: see https://gymnasium.farama.org on migrating from gym"


class GymnasiumEnv(WrappedEnv):
    """A registered Gymnasium environment with the observations, actions and infos that the trainer expects."""

    def __init__(self, section: GymnasiumSection, render_mode: str | None = None):
        """
        Args:
            section: of the config; docs/environments.md has an example of each key.
            render_mode: "rgb_array", or None if nothing is to be looked at.

        Raises:
            ValueError: if there is no such environment, or if its spaces or another entry are not supported.
        """
        super().__init__(render_mode)
        self._name = section.name
        self._env = self._make(section)
        self.max_episode_steps = self._env.spec.max_episode_steps
        self.reward_scale = section.reward_scale
        self._previous_action, self._previous_reward = section.previous_action, section.previous_reward
        self._last: tuple[Any, float] = (None, 0.0)

        try:
            self._observer = Observer(self._env.observation_space, section.observe)
            self._hidden = hidden_entries(section.hide, self._observer.size)
        except ValueError as error:
            described = short(self._env.observation_space)
            raise ValueError(f"name: {self._name!r} has the observation space {described}; {error}") from error
        try:
            self._actor = Actor(self._env.action_space)
        except ValueError as error:
            raise ValueError(
                f"name: {self._name!r} has the action space {short(self._env.action_space)}; {error}"
            ) from error
        self.action_space, self.action_bounds = self._actor.space, self._actor.bounds
        self._masks = action_masks_of(self._env)
        self.observation_space = self._declare()
        self.vector_names = self._named()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Start an episode.

        Args:
            seed: determines the episode.
            options: passed on to the section.

        Returns:
            The observation: shape (n,) or (channels, height, width), or a dict with a `vector` and a `frame` of these
            shapes; and an info, which is empty or has the `action_mask`.

        Raises:
            BrokenContract: if the environment returns something else than the Gymnasium API says.
        """
        try:
            result = self._env.reset(seed=seed, options=options)
        except TypeError as error:
            if "unexpected keyword argument 'seed'" in str(error) or "unexpected keyword argument 'options'" in str(
                error
            ):
                raise self._broken(f"reset takes no seed or no options ({error}): {OLD_API}") from error
            raise
        if not (
            isinstance(result, tuple) and len(result) == 2 and (result[1] is None or isinstance(result[1], Mapping))
        ):
            raise self._broken(
                f"reset returned {shorten(result)}, should be a tuple of observation and info: {OLD_API}"
            )
        self._start_episode()
        self._last = (None, 0.0)
        return self._observe(result[0]), self._mask(result[1])

    def step(self, action: np.ndarray | int) -> Step:
        """Take an action.

        Args:
            action: shape (branches,), int64, or (n,), float32, where actions are numbers; or an int for one branch.

        Returns:
            Observation as of `reset`, reward, terminated, truncated and info, with the `action_mask` if there is one.

        Raises:
            BrokenContract: if the environment returns something else than the Gymnasium API says.
        """
        observation, own_reward, terminated, truncated, own_info = self._step(self._actor.action(action))
        reward = self._number(own_reward)
        terminated, truncated = self._flag("terminated", terminated), self._flag("truncated", truncated)
        if not (own_info is None or isinstance(own_info, Mapping)):
            raise self._broken(f"the info is {shorten(own_info)}, should be a dict")
        ended = terminated or truncated
        numbers = task_numbers(own_info) if ended else {}
        if "is_success" in numbers:
            numbers["success"] = numbers.pop("is_success")
        info = self._count_step(reward, ended, numbers) | self._mask(own_info, ended)
        self._last = action, reward * self.reward_scale
        return self._observe(observation), reward * self.reward_scale, terminated, truncated, info

    @property
    def own_spaces(self) -> tuple[gymnasium.Space, gymnasium.Space]:
        """The observation and the action space of the registered environment itself."""
        return self._env.observation_space, self._env.action_space

    def observed(self, observation: Any, action: Any, reward: float | None) -> Observation:
        """Return what the agent sees of an observation of the registered environment, none of this one's own episode.

        Args:
            observation: of the registered environment.
            action: the agent's last, None at the beginning of an episode.
            reward: that came of it.

        Raises:
            BrokenContract: if the observation is not as declared, or the reward is missing where the agent sees it.
        """
        if action is not None and reward is None and self._previous_reward:
            raise self._broken("needs reward=…, the one of the last step: the agent sees it (previous_reward)")
        self._last = action, float(reward or 0.0) * self.reward_scale
        return self._observe(observation)

    def _make(self, section: GymnasiumSection) -> gymnasium.Env:
        env = make_registered(
            self._name,
            section.arguments,
            render_mode=self.render_mode,
            max_episode_steps=section.max_episode_steps,
        )
        self._draws = self.render_mode in (env.metadata or {}).get("render_modes", ())
        if self.render_mode is None or self._draws:
            return env
        # It draws nothing, and may do anything when it is told to.
        env.close()
        return make_registered(
            self._name, section.arguments, render_mode=None, max_episode_steps=section.max_episode_steps
        )

    def _declare(self) -> gymnasium.Space:
        """Return the space of what `_observe` returns."""
        size = self._observer.size + self._actor.size * self._previous_action + int(self._previous_reward)
        self._vector_size = size
        vector = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        if self._observer.frame_shape is None:
            return vector
        frame = picture_space(*self._observer.frame_shape)
        return spaces.Dict(frame=frame, vector=vector) if size else frame

    def _named(self) -> tuple[str, ...]:
        """Return what each entry of the vector is: `position[0]`, `suit=2`, `previous_action=1`, `previous_reward`."""
        actions = self._actor.names("previous_action") if self._previous_action else []
        return (*self._observer.names(), *actions, *["previous_reward"] * self._previous_reward)

    def _observe(self, observation: Any) -> Observation:
        try:
            frame = self._observer.frame(observation) if self._observer.frame_shape else None
            vector = self._vector(observation) if self._vector_size else None
        except BrokenContract as error:
            raise self._broken(str(error)) from error
        both = {"frame": frame, "vector": vector}
        self._observation = vector if frame is None else frame if vector is None else both
        return self._observation

    def _vector(self, observation: Any) -> np.ndarray:
        vector = np.zeros(self._vector_size, dtype=np.float32)
        size = self._observer.size
        self._observer.write_vector(observation, vector[:size])
        vector[self._hidden] = 0.0
        action, reward = self._last
        if self._previous_action and action is not None:
            self._actor.features(action, vector[size : size + self._actor.size])
        if self._previous_reward:
            vector[-1] = reward
        return vector

    def _step(self, action: Any) -> tuple:
        try:
            result = self._env.step(action)
        except ValueError as error:
            # Gymnasium's own wrappers take the five values apart before they get here.
            if "values to unpack (expected 5" in str(error) and raised_in(error).startswith("gymnasium."):
                raise self._broken(f"step returned other than 5 values ({error}): {OLD_API}") from error
            raise
        if not isinstance(result, tuple) or len(result) != 5:
            raise self._broken(
                f"step returned {len(result) if isinstance(result, tuple) else shorten(result)} values, should be 5: "
                f"observation, reward, terminated, truncated, info: {OLD_API}"
            )
        return result

    def _mask(self, info: Mapping | None, ended: bool = False) -> Info:
        """Return an info with the allowed actions, if the environment says which; at the end it need not."""
        if not self._actor.branches:
            return {}
        mask = (info or {}).get("action_mask")
        if mask is None and self._masks is not None:
            mask = self._masks()
        if mask is None:
            return {}
        try:
            return {"action_mask": self._actor.mask(mask)}
        except BrokenContract as error:
            if ended:
                return {}
            raise self._broken(str(error)) from error

    def _number(self, reward: Any) -> float:
        """Return a reward as a float, whether it is a number or an array of one."""
        try:
            return float(reward.item() if hasattr(reward, "item") else reward + 0.0)
        except (TypeError, ValueError, RuntimeError):
            raise self._broken(f"the reward is {shorten(reward)}, should be a number") from None

    def _flag(self, name: str, value: Any) -> bool:
        try:
            return bool(value)
        except (TypeError, ValueError, RuntimeError):
            raise self._broken(f"{name} is {shorten(value)}, should be True or False") from None

    def _broken(self, how: str) -> BrokenContract:
        return BrokenContract(f"{self._name}: {how}")

    def _draw(self) -> np.ndarray:
        if self._draws:
            return as_picture(self._env.render(), self._name)
        # What the agent sees is all there is to look at.
        view = self.agent_view()
        return vector_picture(self._observation) if view is None else view


def action_masks_of(env: Any) -> Callable | None:
    """Return the method `action_masks` of an environment or of a wrapper around it, None if there is none."""
    while True:
        if callable(getattr(type(env), "action_masks", None)):
            return env.action_masks
        if not isinstance(env, gymnasium.Wrapper):
            return None
        env = env.env


def raised_in(error: Exception) -> str:
    """Return the name of the module in which an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
