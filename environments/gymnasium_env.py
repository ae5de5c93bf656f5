"""Any registered environment, whatever it shows and however it is acted in."""

import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from pydantic import Field, JsonValue

from environments.contract import BrokenContract
from environments.episode import Info, Observation, Step, WrappedEnv, make_registered, picture_space, vector_picture
from environments.numbers import task_numbers
from environments.section import Flag, Nothing, Number, Section, Steps, Text, Whole
from environments.spaces import Actor, Observer, hidden_entries


class GymnasiumEnv(WrappedEnv):
    """A registered environment as the trainer expects it; BrokenContract where it leaves its spaces."""

    def __init__(self, section: "GymnasiumSection", render_mode: str | None = None):
        super().__init__(section, render_mode)
        self.reward_scale = section.reward_scale
        arguments = {"max_episode_steps": section.max_episode_steps, **section.arguments}
        self._env = make_registered(section.name, **arguments)
        self._draws = render_mode in self._env.metadata.get("render_modes", ())
        if self._draws:
            self._env.close()
            self._env = make_registered(section.name, render_mode=render_mode, **arguments)
        self.max_episode_steps = self._env.spec.max_episode_steps
        shown, acted = self.own_spaces
        described = f"the observation space {textwrap.shorten(str(shown), 120)}"
        try:
            self._observer = Observer(shown, section.observe)
            self._hidden = hidden_entries(section.hide, self._observer.size)
            described = f"the action space {textwrap.shorten(str(acted), 120)}"
            self._actor = Actor(acted)
        except ValueError as error:
            raise BrokenContract(f"name: {section.name!r} has {described}; {error}") from error
        self.action_space, self.action_bounds = self._actor.space, self._actor.bounds
        actions = self._actor.names("previous_action") if section.previous_action else []
        self.vector_names = (*self._observer.names(), *actions, *["previous_reward"] * section.previous_reward)
        parts: dict[str, gymnasium.Space] = {}
        if self._observer.frame_shape is not None:
            parts["frame"] = picture_space(*self._observer.frame_shape)
        if self.vector_names:
            parts["vector"] = spaces.Box(-np.inf, np.inf, (len(self.vector_names),), np.float32)
        self.observation_space = spaces.Dict(parts) if len(parts) == 2 else next(iter(parts.values()))
        self._last: tuple[Any, float] = (None, 0.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Start an episode; the info is empty or has the `action_mask`."""
        observation, info = self._env.reset(seed=seed, options=options)
        self._start_episode()
        self._last = (None, 0.0)
        return self._observe(observation), self._mask(info or {})

    def step(self, action: np.ndarray | int) -> Step:
        """Take an action; the info has the `action_mask` if there is one, and at the end the environment's numbers."""
        observation, given, terminated, truncated, own_info = self._env.step(self._actor.action(action))
        terminated, truncated, own_info = bool(terminated), bool(truncated), own_info or {}
        reward = float(np.asarray(given).item())  # NumPy's arrays and PyTorch's tensors of one number, too
        ended = terminated or truncated
        numbers = task_numbers(own_info) if ended else {}
        if "is_success" in numbers:
            numbers["success"] = numbers.pop("is_success")
        info = self._count_step(reward, ended, numbers) | self._mask(own_info, ended)
        self._last = action, reward * self.reward_scale
        return self._observe(observation), reward * self.reward_scale, terminated, truncated, info

    def notices(self) -> list[str]:
        """Return a line if something inside the environment keeps running statistics."""
        layer = self._env
        while isinstance(layer, gymnasium.Wrapper):
            if isinstance(layer, NormalizeObservation | NormalizeReward):
                return [
                    f"{self.section.name}: {type(layer).__name__} inside it keeps running statistics, which start anew "
                    "in each process and in evaluation, so that what is seen and paid there differs; "
                    "normalize_observations: True in place of it is saved with the model"
                ]
            layer = layer.env
        return []

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
        frame, vector = self._observer.frame(observation), None
        if self.vector_names:
            action, reward = self._last
            shown = np.concatenate([np.zeros(0), *self._observer.vector(observation)])
            shown[self._hidden] = 0.0
            acted = [self._actor.features(action)] * self.section.previous_action
            vector = np.concatenate([shown, *acted, [reward] * self.section.previous_reward]).astype(np.float32)
        both = {"frame": frame, "vector": vector}
        self._observation = vector if frame is None else frame if vector is None else both
        return self._observation

    def _mask(self, info: Mapping, ended: bool = False) -> Info:
        """Return an info with the allowed actions, if the environment says which; none at the end."""
        if ended or not self._actor.branches:
            return {}
        mask = info.get("action_mask")
        if mask is None and self._env.has_wrapper_attr("action_masks"):
            mask = self._env.get_wrapper_attr("action_masks")()
        return {} if mask is None else {"action_mask": self._actor.mask(mask)}

    def render(self) -> np.ndarray:
        """Return what the environment draws; where it draws nothing, what the agent sees."""
        if self._draws:
            return super().render()
        view = self.agent_view()
        return vector_picture(self._observation) if view is None else view


class GymnasiumSection(Section):
    """Any environment that is registered with Gymnasium."""

    makes: ClassVar[type] = GymnasiumEnv
    type: Literal["Gymnasium"] = Field(description="Which environment.")
    name: Text = Field(min_length=1, description="The registered id; `package.module:Id-v0` imports the module first.")
    max_episode_steps: Steps | Nothing = Field(
        None, description="Episodes are truncated there: by default where the environment says."
    )
    arguments: dict[Text, JsonValue] = Field({}, description="Passed on to `gymnasium.make`.")
    observe: Annotated[list[Text], Field(min_length=1)] | Nothing = Field(
        None, description="Which entries of a Dict space are observed: by default all."
    )
    hide: list[Whole | Annotated[str, Field(strict=True, pattern=r"^(-?\d+)?:(-?\d+)?$")]] = Field(
        [], description="Entries of the observed vector that are set to zero."
    )
    previous_action: Flag = Field(False, description="The previous action is appended to the observed vector.")
    previous_reward: Flag = Field(False, description="The previous reward is appended to the observed vector.")
    reward_scale: Number = Field(
        1.0, ge=1e-6, le=10**6, description="Rewards are multiplied by it for learning, not for what is reported."
    )


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
