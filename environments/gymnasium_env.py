"""Any registered environment, whatever it shows and however it is acted in."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from pydantic import Field

from environments.contract import BrokenContract, check_sizes, reset_result, shorten, step_result
from environments.episode import Info, Observation, Step, WrappedEnv, as_picture, picture_space, vector_picture
from environments.numbers import task_numbers
from environments.registered import make_registered
from environments.section import Flag, Nothing, Number, Section, Steps, Text, Whole, Words
from environments.spaces import Actor, Observer, hidden_entries

# Wrappers that keep statistics of what they have seen, which start anew wherever the environment is made.
STATISTICS = ("NormalizeObservation", "NormalizeReward")


class GymnasiumSection(Section):
    """Any environment that is registered with Gymnasium."""

    type: Literal["Gymnasium"] = Field(description="Which environment.")
    name: Annotated[Text, Words("the registered id of a Gymnasium environment")] = Field(
        min_length=1, description="The registered id; `package.module:Id-v0` imports the module first."
    )
    max_episode_steps: Steps | Nothing = Field(
        None, description="Episodes are truncated there: by default where the environment says."
    )
    arguments: dict[Text, Any] = Field({}, description="Passed on to `gymnasium.make`.")
    observe: Annotated[list[Text], Field(min_length=1), Words("a list of names")] | Nothing = Field(
        None, description="Which entries of a Dict space are observed: by default all."
    )
    hide: Annotated[
        list[Whole | Annotated[str, Field(strict=True, pattern=r"^(-?\d+)?:(-?\d+)?$")]],
        Words('a list of indices and slices, such as [1, "3:5"]'),
    ] = Field([], description="Entries of the observed vector that are set to zero.")
    previous_action: Flag = Field(False, description="The previous action is appended to the observed vector.")
    previous_reward: Flag = Field(False, description="The previous reward is appended to the observed vector.")
    reward_scale: Number = Field(
        1.0, ge=1e-6, le=10**6, description="Rewards are multiplied by it for learning, not for what is reported."
    )

    def create(self, render_mode: str | None = None) -> "GymnasiumEnv":
        """Return a new environment of this section."""
        return GymnasiumEnv(self, render_mode)


class CartPoleSection(Section):
    """CartPole, whose velocities `CartPoleMasked` hides."""

    type: Literal["CartPole", "CartPoleMasked"] = Field(description="Which environment.")
    max_episode_steps: Steps = Field(200, description="Episodes are truncated there.")

    def create(self, render_mode: str | None = None) -> "GymnasiumEnv":
        """Return a new CartPole; a step's reward is 1/100 for learning, the return in the info is not divided."""
        entries = {"type": "Gymnasium", "name": "CartPole-v1", "max_episode_steps": self.max_episode_steps}
        entries |= {"reward_scale": 0.01, "hide": [1, 3] if self.type == "CartPoleMasked" else []}
        env = GymnasiumSection.model_validate(entries).create(render_mode)
        env.vector_names = ("cart position", "cart velocity", "pole angle", "pole velocity")
        return env


class GymnasiumEnv(WrappedEnv):
    """A registered environment as the trainer expects it; BrokenContract where it leaves the Gymnasium API."""

    def __init__(self, section: GymnasiumSection, render_mode: str | None = None):
        super().__init__(section, render_mode)
        self.reward_scale = section.reward_scale
        self._env = self._make(render_mode)
        self._draws = render_mode in (self._env.metadata or {}).get("render_modes", ())
        if render_mode is not None and not self._draws:
            # It draws nothing, and may do anything when it is told to.
            self._env.close()
            self._env = self._make(None)
        self.max_episode_steps = self._env.spec.max_episode_steps
        shown, acted = self._env.observation_space, self._env.action_space
        described = f"name: {section.name!r} has the observation space {shorten(shown, 120)}"
        try:
            self._observer = Observer(shown, section.observe)
            self._hidden = hidden_entries(section.hide, self._observer.size)
            described = f"name: {section.name!r} has the action space {shorten(acted, 120)}"
            self._actor = Actor(acted)
        except ValueError as error:
            raise ValueError(f"{described}; {error}") from error
        self.action_space, self.action_bounds = self._actor.space, self._actor.bounds
        self.observation_space = self._declare()
        self._last: tuple[Any, float] = (None, 0.0)

    def _make(self, render_mode: str | None) -> gymnasium.Env:
        limit = self.section.max_episode_steps
        return make_registered(
            self.section.name, self.section.arguments, render_mode=render_mode, max_episode_steps=limit
        )

    def _declare(self) -> gymnasium.Space:
        """Return the space of what `_observe` returns, and name what each entry of the vector is."""
        section, frame_shape = self.section, self._observer.frame_shape
        size = self._observer.size + self._actor.size * section.previous_action + int(section.previous_reward)
        check_sizes(frame_shape, size, named=f"name: {section.name!r}: ")
        actions = self._actor.names("previous_action") if section.previous_action else []
        self.vector_names = (*self._observer.names(), *actions, *["previous_reward"] * section.previous_reward)
        vector = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        if frame_shape is None:
            return vector
        return spaces.Dict(frame=picture_space(*frame_shape), vector=vector) if size else picture_space(*frame_shape)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Start an episode; the info is empty or has the `action_mask`."""
        observation, info = reset_result(self.section.name, self._env.reset(seed=seed, options=options))
        self._start_episode()
        self._last = (None, 0.0)
        return self._observe(observation), self._mask(info)

    def step(self, action: np.ndarray | int) -> Step:
        """Take an action; the info has the `action_mask` if there is one, and at the end the environment's numbers."""
        result = self._env.step(self._actor.action(action))
        observation, reward, terminated, truncated, own_info = step_result(self.section.name, result)
        ended = terminated or truncated
        numbers = task_numbers(own_info) if ended else {}
        if "is_success" in numbers:
            numbers["success"] = numbers.pop("is_success")
        info = self._count_step(reward, ended, numbers) | self._mask(own_info, ended)
        self._last = action, reward * self.reward_scale
        return self._observe(observation), reward * self.reward_scale, terminated, truncated, info

    def notices(self) -> list[str]:
        """Return a line if something inside the environment keeps running statistics."""
        inside: list[Any] = [self._env]
        for layer in inside:  # which grows while it is walked
            held = vars(layer).values()
            inside += [value for value in held if isinstance(value, gymnasium.Env) and value not in inside]
        named = [kind.__name__ for layer in inside for kind in type(layer).__mro__ if kind.__name__ in STATISTICS]
        if not named:
            return []
        return [
            f"{self.section.name}: {', '.join(dict.fromkeys(named))} inside it keeps running statistics, which start "
            "anew in each process and in evaluation, so that what is seen and paid there differs; "
            "normalize_observations: True in place of it is saved with the model"
        ]

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
        if action is not None and reward is None and self.section.previous_reward:
            raise BrokenContract("needs reward=…, the one of the last step: the agent sees it (previous_reward)")
        self._last = action, float(reward or 0.0) * self.reward_scale
        return self._observe(observation)

    def _observe(self, observation: Any) -> Observation:
        try:
            frame = self._observer.frame(observation)
            vector = self._vector(observation) if self.vector_names else None
        except BrokenContract as error:
            raise BrokenContract(f"{self.section.name}: {error}") from error
        both = {"frame": frame, "vector": vector}
        self._observation = vector if frame is None else frame if vector is None else both
        return self._observation

    def _vector(self, observation: Any) -> np.ndarray:
        vector = np.zeros(len(self.vector_names), dtype=np.float32)
        size = self._observer.size
        self._observer.write_vector(observation, vector[:size])
        vector[self._hidden] = 0.0
        action, reward = self._last
        if self.section.previous_action and action is not None:
            self._actor.features(action, vector[size : size + self._actor.size])
        if self.section.previous_reward:
            vector[-1] = reward
        return vector

    def _mask(self, info: Mapping, ended: bool = False) -> Info:
        """Return an info with the allowed actions, if the environment says which; at the end it need not."""
        if not self._actor.branches:
            return {}
        mask = info.get("action_mask")
        if mask is None and self._env.has_wrapper_attr("action_masks"):
            mask = self._env.get_wrapper_attr("action_masks")()
        if mask is None:
            return {}
        try:
            return {"action_mask": self._actor.mask(mask)}
        except BrokenContract as error:
            if ended:
                return {}
            raise BrokenContract(f"{self.section.name}: {error}") from error

    def _draw(self) -> np.ndarray:
        if self._draws:
            return as_picture(self._env.render(), self.section.name)
        # What the agent sees is all there is to look at.
        view = self.agent_view()
        return vector_picture(self._observation) if view is None else view
