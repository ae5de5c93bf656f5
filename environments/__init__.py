"""The environments: one small wrapper per family, all with the signatures of the Gymnasium API."""

import os
import sys
import warnings
from typing import Literal, get_args

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

# All have to be set before Gymnasium or pygame is first imported: pygame greets on standard output otherwise, newer
# versions of Gymnasium open a sound device, SDL complains where there is no screen, and old versions of pygame use what
# some setuptools announce to remove.
os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")


class BrokenContract(ValueError):
    """What an environment returned breaks the Gymnasium API or the spaces that it declares; one line says how."""
