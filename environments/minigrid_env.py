"""The grid worlds of MiniGrid, seen as pictures."""

import itertools
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from pydantic import Field

from environments.gymnasium_env import GymnasiumEnv, make_registered
from environments.section import Flag, Nothing, Section, Steps, Text, Whole

# Grid worlds show the same few views over and over, and rendering one takes longer than the rest of a step. So pictures
# are kept for all environments of a process by (environment, tile size, bytes of the symbolic view). 1,000 are 21 MB.
MAX_KEPT_PICTURES = 1000
_kept_pictures: dict[tuple[str, int, bytes], np.ndarray] = {}

# BabyAI's missions are sentences of one language, which its mission spaces do not tell.
BABY_PHRASES = "go to, pick up, open, put a, next to the, object, and, then, after you, in front of you, on your"
# So many missions of a task are looked at for its vocabulary.
MOST_MISSIONS = 100_000


class Pictures(gymnasium.ObservationWrapper):
    """Shows a picture of the part of the grid before the agent, (height, width, 3); reports success.

    With a vocabulary, observations are a dict of `frame`, the picture, and `vector`, how often each of these words, and
    any other, is in the mission. Only the first actions can be taken.
    """

    def __init__(self, env: gymnasium.Env, tile_size: int, num_actions: int, vocabulary: list[str] | None) -> None:
        super().__init__(env)
        grid: Any = env.unwrapped
        self._grid, self._tile_size, self._vocabulary = grid, tile_size, vocabulary
        self.action_space: gymnasium.Space = spaces.Discrete(min(num_actions, int(grid.action_space.n)))
        side = grid.agent_view_size * tile_size
        self.observation_space: gymnasium.Space = spaces.Box(0, 255, (side, side, 3), np.uint8)
        if vocabulary is not None:
            words = spaces.Box(0, np.inf, (len(vocabulary) + 1,), np.float32)
            self.observation_space = spaces.Dict(frame=self.observation_space, vector=words)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Take one of MiniGrid's actions."""
        # MiniGrid compares with its enumeration, at which NumPy's numbers are slow.
        seen, reward, terminated, truncated, _ = super().step(int(action))
        return seen, reward, terminated, truncated, {"success": float(reward) > 0}

    def observation(self, shown: dict[str, Any]) -> Any:
        """Return what is seen where MiniGrid has `shown` something."""
        key = (self._grid.spec.id, self._tile_size, shown["image"].tobytes())
        if key not in _kept_pictures:
            if len(_kept_pictures) >= MAX_KEPT_PICTURES:
                _kept_pictures.clear()
            picture = self._grid.get_frame(tile_size=self._tile_size, agent_pov=True)
            _kept_pictures[key] = np.ascontiguousarray(picture)
        if self._vocabulary is None:
            return _kept_pictures[key]
        words = words_of(shown["mission"])
        counts = [words.count(word) for word in self._vocabulary]
        return {"frame": _kept_pictures[key], "vector": np.array([*counts, len(words) - sum(counts)])}


class MinigridSection(Section):
    """Any environment of MiniGrid or BabyAI, seen as pictures."""

    type: Literal["Minigrid"] = Field(description="Which environment.")
    name: Text = Field(min_length=1, description="Which of the registered environments.")
    max_episode_steps: Steps | Nothing = Field(
        None, description="Episodes are truncated there: by default at 96 for Memory tasks, else at 64."
    )
    view_size: Literal[3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25] | Nothing = Field(
        None, description="Tiles along each side of the view: by default 3 for Memory tasks, else 7."
    )
    tile_size: Annotated[Whole, Field(ge=1, le=64)] | Nothing = Field(
        None, description="Pixels per tile: by default 28 for Memory tasks, else 8."
    )
    num_actions: Annotated[Whole, Field(ge=1, le=7)] | Nothing = Field(
        None,
        description="How many of MiniGrid's actions, from the first on: by default 3 for Memory tasks, else all.",
    )
    mission: Flag = Field(False, description="The mission's words are observed as a vector beside the picture.")

    def create(self, render_mode: str | None = None) -> GymnasiumEnv:
        """Return a new environment."""
        import minigrid  # noqa: F401  (registers its environments)

        memory = "Memory" in self.name
        view_size, tile_size = self.view_size or (3 if memory else 7), self.tile_size or (28 if memory else 8)
        num_actions, limit = self.num_actions or (3 if memory else 7), self.max_episode_steps or (96 if memory else 64)
        # Gymnasium's time limit truncates episodes earlier than MiniGrid's own one, `max_steps`, which has to stay as
        # it is: the reward for success, 1 − 0.9·step/max_steps, depends on it.
        grid = make_registered(self.name, render_mode, agent_view_size=view_size, max_episode_steps=limit)
        missions = missions_of(grid.observation_space["mission"])  # type: ignore[index]
        vocabulary = sorted({word for mission in missions for word in words_of(mission)}) if self.mission else None
        names = [f"mission[{word}]" for word in (*(vocabulary or ()), "other words")] if self.mission else []
        env = GymnasiumEnv(Pictures(grid, tile_size, num_actions, vocabulary), limit, names=names)
        if not self.mission and len([*itertools.islice(missions, 2)]) > 1:
            env.notices.append("missions differ, and the agent does not see them without environment.mission: True")
        return env


def words_of(mission: str) -> list[str]:
    """Return the words of a mission in lower case, without punctuation."""
    return re.findall(r"\w+", mission.lower())


def missions_of(space: Any) -> Iterator[str]:
    """Yield the first missions of a mission space; for BabyAI's, the words and phrases that missions consist of."""
    from minigrid.core.constants import COLOR_NAMES
    from minigrid.envs.babyai.core.roomgrid_level import BabyAIMissionSpace
    from minigrid.envs.babyai.core.verifier import LOC_NAMES, OBJ_TYPES

    if isinstance(space, BabyAIMissionSpace):
        return iter([BABY_PHRASES, *COLOR_NAMES, *OBJ_TYPES, *LOC_NAMES])
    choices = itertools.product(*(space.ordered_placeholders or []))
    return (space.mission_func(*each) for each in itertools.islice(choices, MOST_MISSIONS))
