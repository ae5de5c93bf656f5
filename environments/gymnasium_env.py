"""Any Gymnasium environment, whatever it shows and however it is acted in, as an agent plays it."""

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from pydantic import Field, JsonValue

from environments.contract import BrokenContract, Task
from environments.numbers import task_numbers
from environments.pictures import frame_picture, vector_picture
from environments.section import Flag, Nothing, Number, Section, Steps, Text, Whole
from environments.spaces import Actor, Observer, entry_names, hidden_entries

Info = dict[str, Any]


class GymnasiumEnv(gymnasium.Wrapper):
    """An environment as an agent plays it; BrokenContract where it cannot.

    An observation is a frame (channels, height, width), a vector (n,), or a dict of both, "frame" and "vector". An
    action is int64 (branches,), or an int where there is one branch, or float32 (n,) where it is numbers. The info is
    empty before the end, but for an `action_mask`; at the end it has reward and length of the episode, and the numbers
    in the environment's own info. `notices` are what someone who trains on it had better know, a line each.

    Args:
        max_episode_steps: the longest episode, None where episodes have no limit.
        names: what each entry of the observed vector is, if its space does not say that well.
        observe, hide, previous_action, previous_reward, reward_scale: see `GymnasiumSection`.
    """

    def __init__(
        self, env: gymnasium.Env, max_episode_steps: int | None, *, names: Sequence[str] = (),
        observe: list[str] | None = None, hide: Iterable[int | str] = (), previous_action: bool = False,
        previous_reward: bool = False, reward_scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(env)
        self.previous_action, self.previous_reward, self.reward_scale = previous_action, previous_reward, reward_scale
        self._observer, self._actor = Observer(env.observation_space, observe), Actor(env.action_space)
        self._hidden = hidden_entries(hide, self._observer.size)
        branches, self.action_bounds = self._actor.branches, self._actor.bounds
        size = self._observer.size + previous_action * self._actor.size + previous_reward
        continuous = 0 if branches else self._actor.size
        self.task = Task(self._observer.frame_shape, size, branches, continuous, max_episode_steps)
        self.observation_space, self.action_space = self.task.observation_space, self.task.action_space
        acted = entry_names(self.action_space, "previous_action") if previous_action else []
        self.vector_names = (*(names or self._observer.names), *acted, *["previous_reward"] * previous_reward)
        self.notices = statistics_inside(env)
        self._masks = env.get_wrapper_attr("action_masks") if env.has_wrapper_attr("action_masks") else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Start an episode; the info is empty or has the `action_mask`."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._reward, self._length = 0.0, 0  # of the episode, in the environment's own unit
        return self.observed(observation, None, None), self._mask(info)

    def step(self, action: np.ndarray | int) -> tuple[Any, float, bool, bool, Info]:
        """Take an action; return observation, reward, terminated, truncated, info."""
        observation, given, terminated, truncated, own_info = self.env.step(self._actor.action(action))
        reward = float(np.asarray(given).item())  # NumPy's arrays and PyTorch's tensors of one number, too
        if not math.isfinite(reward):
            raise BrokenContract(f"reward is not finite: {reward}")
        self._reward += reward
        self._length += 1
        ended = bool(terminated or truncated)
        info = task_numbers(own_info) | self.numbers_so_far() if ended else self._mask(own_info)
        seen = self.observed(observation, action, reward)
        return seen, reward * self.reward_scale, bool(terminated), bool(truncated), info

    def numbers_so_far(self) -> dict[str, float]:
        """Return reward, in the environment's own unit, and length of the running episode."""
        return {"reward": self._reward, "length": self._length}

    def observed(self, observation: Any, action: Any, reward: float | None) -> Any:
        """Return what the agent sees of an observation, given the action and reward before it, None at the start."""
        if action is not None and reward is None and self.previous_reward:
            raise BrokenContract("needs reward=…, that of the last step, which the agent sees (previous_reward)")
        frame, vector = self._observer.frame(observation), None
        if self.task.vector:
            shown = self._observer.vector(observation)
            shown[self._hidden] = 0.0
            acted = [self._actor.features(action)] if self.previous_action else []
            paid = [float(reward or 0.0) * self.reward_scale] * self.previous_reward
            vector = np.concatenate([shown, *acted, paid]).astype(np.float32)
            if not np.isfinite(vector).all():
                raise BrokenContract(f"observation is not finite: {vector}")
        both = {"frame": frame, "vector": vector}
        self._observation: Any = vector if frame is None else frame if vector is None else both
        return self._observation

    def _mask(self, info: Info | None) -> Info:
        """Return an info with the allowed actions, if the environment says which."""
        mask = (info or {}).get("action_mask")
        if mask is None and self._masks is not None:
            mask = self._masks()
        return {} if mask is None or self.task.continuous else {"action_mask": self._actor.mask(mask)}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Return a copy of the picture that the environment draws; where it draws nothing, what the agent sees."""
        drawn = self.env.render() if "rgb_array" in self.env.metadata.get("render_modes", ()) else None
        if drawn is None:
            view = self.agent_view()
            return vector_picture(self._observation) if view is None else view
        picture = np.array(drawn)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            found = f"{picture.dtype} {picture.shape}"
            raise BrokenContract(f"render returned {found}, should be uint8 (height, width, 3)")
        return picture

    def agent_view(self) -> np.ndarray | None:
        """Return the frame that the agent sees as a picture (height, width, 3), None where it sees numbers only."""
        frame = self._observation["frame"] if isinstance(self._observation, dict) else self._observation
        return frame_picture(frame) if frame.ndim == 3 else None


def statistics_inside(env: gymnasium.Env) -> list[str]:
    """Return a line if something inside an environment keeps running statistics."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, NormalizeObservation | NormalizeReward):
            return [
                f"{type(env).__name__} inside it keeps running statistics, which start anew in each process and in "
                "evaluation; those of normalize_observations: True are saved with the model"
            ]
        env = env.env
    return []


def make_registered(name: str, render_mode: str | None = None, **arguments: Any) -> gymnasium.Env:
    """Make a registered environment, without Gymnasium's checker and warnings; it need not know the render mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gymnasium.make(name, disable_env_checker=True, **arguments)
        if render_mode in env.metadata.get("render_modes", ()):
            with suppress(TypeError):  # an environment that inherits the modes of another may not take them
                drawing = gymnasium.make(name, disable_env_checker=True, render_mode=render_mode, **arguments)
                env.close()
                return drawing
        return env


class GymnasiumSection(Section):
    """Any environment that is registered with Gymnasium."""

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

    def create(self, render_mode: str | None = None) -> GymnasiumEnv:
        """Return a new environment."""
        env = make_registered(self.name, render_mode, **{"max_episode_steps": self.max_episode_steps, **self.arguments})
        limit = env.spec.max_episode_steps if env.spec else None
        return GymnasiumEnv(
            env, limit, observe=self.observe, hide=self.hide, previous_action=self.previous_action,
            previous_reward=self.previous_reward, reward_scale=self.reward_scale,
        )  # fmt: skip


class CartPoleSection(Section):
    """CartPole, whose velocities `CartPoleMasked` hides."""

    type: Literal["CartPole", "CartPoleMasked"] = Field(description="Which environment.")
    max_episode_steps: Steps = Field(200, description="Episodes are truncated there.")

    def create(self, render_mode: str | None = None) -> GymnasiumEnv:
        """Return a new CartPole; for learning, a step's reward is 1/100."""
        env = make_registered("CartPole-v1", render_mode, max_episode_steps=self.max_episode_steps)
        names = ("cart position", "cart velocity", "pole angle", "pole velocity")
        hidden = [1, 3] if self.type == "CartPoleMasked" else []
        return GymnasiumEnv(env, self.max_episode_steps, names=names, hide=hidden, reward_scale=0.01)
