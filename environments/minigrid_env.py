"""The grid worlds of MiniGrid, seen as pictures."""

import contextlib
import io
import itertools
import re
from typing import Any, cast

import gymnasium
import minigrid  # noqa: F401  (registers its environments)
import numpy as np
from minigrid.core.constants import COLOR_NAMES
from minigrid.envs.babyai.core.roomgrid_level import BabyAIMissionSpace
from minigrid.envs.babyai.core.verifier import LOC_NAMES, OBJ_TYPES
from minigrid.minigrid_env import MiniGridEnv

from environments.episode import (
    Info,
    Observation,
    Step,
    WrappedEnv,
    check_picture_size,
    discrete,
    picture_space,
)
from environments.registered import make_registered
from environments.section import MinigridSection

# Grid worlds show the same few views over and over, and rendering one takes longer than the rest of a step. The
# symbolic view determines its picture, so pictures are kept by (environment, tile size, bytes of the symbolic view),
# the oldest leaving first. 1,000 pictures of 84×84 are 21 MB, shared by all environments of a process.
MAX_KEPT_PICTURES = 1000
_kept_pictures: dict[tuple[str, int, bytes], np.ndarray] = {}

# BabyAI's missions are sentences of one language, which its mission spaces do not tell.
BABY_PHRASES = "go to, pick up, open, put a, next to the, object, and, then, after you, in front of you, on your"
# Missions beyond so many of a task are not looked at for its vocabulary.
MOST_MISSIONS = 100_000
SAMPLED_MISSIONS = 8


class MinigridEnv(WrappedEnv):
    """A MiniGrid environment whose observation is a picture of the part of the grid in front of the agent.

    Memory tasks default to a view of 3×3 tiles of 28 pixels, the first 3 actions (the turns and forward) and 96 steps;
    all others to 7×7 tiles of 8 pixels, all 7 actions and 64 steps.
    """

    def __init__(self, section: MinigridSection, render_mode: str | None = None):
        """
        Args:
            section: of the config.
            render_mode: "rgb_array", or None if nothing is to be looked at.

        Raises:
            ValueError: if there is no such MiniGrid environment, or if another entry is not allowed.
        """
        super().__init__(render_mode)
        self._name = section.name
        defaults = (3, 28, 3, 96) if "Memory" in self._name else (7, 8, 7, 64)
        given = (section.view_size, section.tile_size, section.num_actions, section.max_episode_steps)
        view_size, self._tile_size, num_actions, self.max_episode_steps = (
            default if value is None else value for value, default in zip(given, defaults, strict=True)
        )
        side = view_size * self._tile_size
        check_picture_size(side, side, f"tile_size: {self._tile_size} with view_size: {view_size}")

        # Gymnasium's time limit truncates episodes earlier than MiniGrid's own one, `max_steps`, which has to stay as
        # it is: the reward for success, 1 − 0.9·step/max_steps, depends on it.
        self._env = make_registered(
            self._name, agent_view_size=view_size, max_episode_steps=self.max_episode_steps, render_mode=render_mode
        )
        if not isinstance(self._env.unwrapped, MiniGridEnv):
            raise ValueError(f"name: {self._name!r} is not a MiniGrid environment")
        self._grid = cast(Any, self._env.unwrapped)
        available = int(self._grid.action_space.n)
        if (section.num_actions or 0) > available:
            raise ValueError(f"num_actions: {num_actions} is not allowed; expected no more than {available}")
        self.action_space = gymnasium.spaces.Discrete(min(num_actions, available))

        self.observation_space: gymnasium.Space = picture_space(3, side, side)
        self._vocabulary: dict[str, int] | None = None
        if section.mission:
            self._vocabulary = vocabulary_of(self._grid.observation_space["mission"])
            self.vector_names = tuple(f"mission[{word}]" for word in (*self._vocabulary, "other words"))
            vector = gymnasium.spaces.Box(0, np.inf, (len(self.vector_names),), np.float32)
            self.observation_space = gymnasium.spaces.Dict(frame=self.observation_space, vector=vector)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Start an episode.

        Args:
            seed: determines the episode.
            options: passed on to MiniGrid.

        Returns:
            The observation, a read-only picture of shape (3, height, width) or, with `mission`, a dict of it (`frame`)
            and of the words (`vector`), and an empty info.
        """
        observation, _ = self._env.reset(seed=seed, options=options)
        self._start_episode()
        return self._observe(observation), {}

    def step(self, action: np.ndarray | int) -> Step:
        """Take one of MiniGrid's actions.

        Args:
            action: shape (1,), or an int.

        Returns:
            Observation as of `reset`, reward, terminated, truncated and info.
        """
        observation, reward, terminated, truncated, _ = self._env.step(discrete(action))
        reward = float(reward)
        info = self._count_step(reward, terminated or truncated, {"success": float(reward > 0)})
        return self._observe(observation), reward, bool(terminated), bool(truncated), info

    def notices(self) -> list[str]:
        """Return a line if the mission changes from episode to episode and the agent is not told."""
        if self._vocabulary is not None or not self._mission_changes():
            return []
        return [
            f"{self._name}: the mission changes from episode to episode and the agent is never told its goal; "
            "environment.mission: True shows it the mission's words"
        ]

    def _mission_changes(self) -> bool:
        env = make_registered(self._name)
        try:
            # BabyAI prints which missions it has rejected.
            with contextlib.redirect_stdout(io.StringIO()):
                missions = [env.reset(seed=seed)[0]["mission"] for seed in range(SAMPLED_MISSIONS)]
        finally:
            env.close()
        # "a ball" and "the ball" are the same goal.
        return len({tuple(word for word in words_of(mission) if word not in ("a", "the")) for mission in missions}) > 1

    def _observe(self, shown: dict[str, Any]) -> Observation:
        frame = self._picture(shown["image"])
        self._observation = frame
        if self._vocabulary is not None:
            self._observation = {"frame": frame, "vector": bag_of_words(shown["mission"], self._vocabulary)}
        return self._observation

    def _picture(self, symbols: np.ndarray) -> np.ndarray:
        key = (self._name, self._tile_size, symbols.tobytes())
        if key not in _kept_pictures:
            if len(_kept_pictures) >= MAX_KEPT_PICTURES:
                del _kept_pictures[next(iter(_kept_pictures))]
            picture = self._grid.get_frame(tile_size=self._tile_size, agent_pov=True)
            picture = np.array(picture, dtype=np.uint8, order="C")
            # Everyone who sees this view gets the same array.
            picture.setflags(write=False)
            _kept_pictures[key] = picture.transpose(2, 0, 1)
        return _kept_pictures[key]


def words_of(mission: str) -> list[str]:
    """Return the words of a mission in lower case, without punctuation."""
    return re.findall(r"\w+", mission.lower())


def vocabulary_of(space: Any) -> dict[str, int]:
    """Return the words that a task's missions may have, in alphabetical order, and their numbers.

    Args:
        space: the task's mission space.
    """
    if isinstance(space, BabyAIMissionSpace):
        missions: Any = [BABY_PHRASES, *COLOR_NAMES, *OBJ_TYPES, *LOC_NAMES]
    else:
        choices = itertools.product(*(space.ordered_placeholders or []))
        missions = (space.mission_func(*each) for each in itertools.islice(choices, MOST_MISSIONS))
    return {word: number for number, word in enumerate(sorted({word for each in missions for word in words_of(each)}))}


def bag_of_words(mission: str, vocabulary: dict[str, int]) -> np.ndarray:
    """Return how often each word of the vocabulary is in a mission, and at last how many words are not in it.

    Args:
        mission: the sentence.
        vocabulary: the words and their numbers.

    Returns:
        Shape (words + 1,), float32.
    """
    bag = np.zeros(len(vocabulary) + 1, dtype=np.float32)
    for word in words_of(mission):
        bag[vocabulary.get(word, len(vocabulary))] += 1
    return bag
