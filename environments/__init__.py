"""The environments: each family beside the section of the config that it reads; all are played as `GymnasiumEnv`."""

import os
import sys
import warnings
from typing import Annotated, get_args

# All have to be set before Gymnasium or pygame is first imported: pygame greets on standard output otherwise, newer
# versions of Gymnasium open a sound device, SDL complains where there is no screen, and old versions of pygame use what
# some setuptools announce to remove.
os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

from pydantic import Field

from environments.contract import BrokenContract as BrokenContract
from environments.gymnasium_env import CartPoleSection, GymnasiumSection
from environments.key_to_door_env import KeyToDoorSection
from environments.memory_gym_env import MEMORY_GYM_TYPES as MEMORY_GYM_TYPES
from environments.memory_gym_env import MemoryGymSection
from environments.minigrid_env import MinigridSection
from environments.poc_memory_env import PocMemorySection
from environments.section import Section
from environments.tmaze_env import TMazeSection

warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

Environment = Annotated[
    PocMemorySection
    | CartPoleSection
    | MinigridSection
    | MemoryGymSection
    | GymnasiumSection
    | TMazeSection
    | KeyToDoorSection,
    Field(discriminator="type"),
]
# Name of a type → its section
SECTIONS: dict[str, type[Section]] = {
    name: section
    for section in get_args(get_args(Environment)[0])
    for name in get_args(section.model_fields["type"].annotation)
}
