"""The grid worlds of MiniGrid, seen as pictures."""

import itertools
import re
from typing import Annotated, Any, ClassVar, Literal

import gymnasium
import numpy as np
from pydantic import AfterValidator, Field

from environments.episode import Info, Observation, Step, WrappedEnv, discrete, make_registered, picture_space
from environments.section import Flag, Nothing, Section, Steps, Text, Whole

# Grid worlds show the same few views over and over, and rendering one takes longer than the rest of a step. The
# symbolic view determines its picture, so pictures are kept by (environment, tile size, bytes of the symbolic view),
# the oldest leaving first. 1,000 pictures of 84×84 are 21 MB, shared by all environments of a process.
MAX_KEPT_PICTURES = 1000
_kept_pictures: dict[tuple[str, int, bytes], np.ndarray] = {}

# BabyAI's missions are sentences of one language, which its mission spaces do not tell.
BABY_PHRASES = "go to, pick up, open, put a, next to the, object, and, then, after you, in front of you, on your"
# Missions beyond so many of a task are not looked at for its vocabulary.
MOST_MISSIONS = 100_000


def odd(value: int) -> int:
    """Return an odd number; ValueError where it is even."""
    if value % 2 == 0:
        raise ValueError("even")
    return value


class MinigridEnv(WrappedEnv):
    """A MiniGrid environment whose observation is a picture of the part of the grid before the agent.

    With `mission` it is a dict of the picture (`frame`) and of the mission's words (`vector`).
    """

    def __init__(self, section: "MinigridSection", render_mode: str | None = None):
        import minigrid  # noqa: F401  (registers its environments)

        super().__init__(section, render_mode)
        defaults = (3, 28, 3, 96) if "Memory" in section.name else (7, 8, 7, 64)
        given = (section.view_size, section.tile_size, section.num_actions, section.max_episode_steps)
        view_size, self._tile_size, num_actions, self.max_episode_steps = (
            default if value is None else value for value, default in zip(given, defaults, strict=True)
        )
        # Gymnasium's time limit truncates episodes earlier than MiniGrid's own one, `max_steps`, which has to stay as
        # it is: the reward for success, 1 − 0.9·step/max_steps, depends on it.
        self._env = make_registered(
            section.name, agent_view_size=view_size, max_episode_steps=self.max_episode_steps, render_mode=render_mode
        )
        self._grid = self._env.unwrapped
        self.action_space = gymnasium.spaces.Discrete(min(num_actions, int(self._grid.action_space.n)))

        side = view_size * self._tile_size
        self.observation_space: gymnasium.Space = picture_space(3, side, side)
        self._vocabulary: dict[str, int] | None = None
        if section.mission:
            self._vocabulary = vocabulary_of(self._grid.observation_space["mission"])
            self.vector_names = tuple(f"mission[{word}]" for word in (*self._vocabulary, "other words"))
            vector = gymnasium.spaces.Box(0, np.inf, (len(self.vector_names),), np.float32)
            self.observation_space = gymnasium.spaces.Dict(frame=self.observation_space, vector=vector)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Start an episode; its pictures, of shape (3, height, width), cannot be written to."""
        observation, _ = self._env.reset(seed=seed, options=options)
        self._start_episode()
        return self._observe(observation), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Take one of MiniGrid's actions."""
        observation, reward, terminated, truncated, _ = self._env.step(discrete(action))
        reward = float(reward)
        info = self._count_step(reward, terminated or truncated, {"success": float(reward > 0)})
        return self._observe(observation), reward, bool(terminated), bool(truncated), info

    def notices(self) -> list[str]:
        """Return a line if the agent may have another goal in each episode and is not told."""
        space = self._grid.observation_space["mission"]
        if self.section.mission or not (is_babyai(space) or space.ordered_placeholders):
            return []
        return [
            f"{self.section.name}: the mission may change from episode to episode, and the agent is not told; "
            "environment.mission: True shows it the mission's words"
        ]

    def _observe(self, shown: dict[str, Any]) -> Observation:
        frame = self._picture(shown["image"])
        self._observation = frame
        if self._vocabulary is not None:
            self._observation = {"frame": frame, "vector": bag_of_words(shown["mission"], self._vocabulary)}
        return self._observation

    def _picture(self, symbols: np.ndarray) -> np.ndarray:
        key = (self.section.name, self._tile_size, symbols.tobytes())
        if key not in _kept_pictures:
            if len(_kept_pictures) >= MAX_KEPT_PICTURES:
                del _kept_pictures[next(iter(_kept_pictures))]
            picture = self._grid.get_frame(tile_size=self._tile_size, agent_pov=True)
            picture = np.array(picture, dtype=np.uint8, order="C")
            # Everyone who sees this view gets the same array.
            picture.setflags(write=False)
            _kept_pictures[key] = picture.transpose(2, 0, 1)
        return _kept_pictures[key]


class MinigridSection(Section):
    """Any environment of MiniGrid or BabyAI, seen as pictures."""

    makes: ClassVar[type] = MinigridEnv
    type: Literal["Minigrid"] = Field(description="Which environment.")
    name: Text = Field(min_length=1, description="Which of the registered environments.")
    max_episode_steps: Steps | Nothing = Field(
        None, description="Episodes are truncated there: by default at 96 for Memory tasks, else at 64."
    )
    view_size: Annotated[Whole, Field(ge=3, le=99), AfterValidator(odd)] | Nothing = Field(
        None, description="Tiles along each side of the view: by default 3 for Memory tasks, else 7."
    )
    tile_size: Annotated[Whole, Field(ge=1, le=64)] | Nothing = Field(
        None, description="Pixels per tile: by default 28 for Memory tasks, else 8."
    )
    num_actions: Annotated[Whole, Field(ge=1, le=7)] | Nothing = Field(
        None, description="The first so many of MiniGrid's actions: by default 3 for Memory tasks, else all."
    )
    mission: Flag = Field(False, description="The mission's words are observed as a vector beside the picture.")


def words_of(mission: str) -> list[str]:
    """Return the words of a mission in lower case, without punctuation."""
    return re.findall(r"\w+", mission.lower())


def is_babyai(space: Any) -> bool:
    """Return whether a mission space is one of BabyAI's, which says nothing of its missions."""
    return type(space).__name__ == "BabyAIMissionSpace"


def vocabulary_of(space: Any) -> dict[str, int]:
    """Return the words that a task's missions may have, by its mission space, in alphabetical order, numbered."""
    from minigrid.core.constants import COLOR_NAMES
    from minigrid.envs.babyai.core.verifier import LOC_NAMES, OBJ_TYPES

    if is_babyai(space):
        missions: Any = [BABY_PHRASES, *COLOR_NAMES, *OBJ_TYPES, *LOC_NAMES]
    else:
        choices = itertools.product(*(space.ordered_placeholders or []))
        missions = (space.mission_func(*each) for each in itertools.islice(choices, MOST_MISSIONS))
    return {word: number for number, word in enumerate(sorted({word for each in missions for word in words_of(each)}))}


def bag_of_words(mission: str, vocabulary: dict[str, int]) -> np.ndarray:
    """Return how often each word of the vocabulary is in a mission, and how many others: (words + 1,), float32."""
    bag = np.zeros(len(vocabulary) + 1, dtype=np.float32)
    for word in words_of(mission):
        bag[vocabulary.get(word, len(vocabulary))] += 1
    return bag
