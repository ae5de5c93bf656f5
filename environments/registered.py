"""Makes environments that are registered with Gymnasium; where that fails, one line says why and what helps."""

import inspect
import warnings
from typing import Any

import gymnasium

from environments.contract import shorten
from environments.episode import suggest

# How ids begin that Gymnasium knows only once a module is imported, the module and its package.
PROVIDERS = (
    ("ALE/", "ale_py", "ale-py"),
    ("popgym-", "popgym", "popgym"),
    ("MiniGrid-", "minigrid", "minigrid"),
    ("BabyAI-", "minigrid", "minigrid"),
)


def make_registered(name: str, arguments: dict[str, Any] | None = None, **own: Any) -> gymnasium.Env:
    """Make a registered environment without Gymnasium's checker and warnings; ValueError if that cannot be done.

    Args:
        name: the registered id.
        arguments: the user's own arguments of gymnasium.make.
        own: further arguments of it. A render mode is left out where the environment does not take one.
    """
    arguments = arguments or {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _make(name, arguments, **own)
    except gymnasium.error.UnregisteredEnv as error:
        raise ValueError(f"name: {name!r} is not a registered environment{_hint(name)}") from error
    except ModuleNotFoundError as error:
        module = error.name or getattr(error.__cause__, "name", None) or "?"
        package = {module: package for _, module, package in PROVIDERS}.get(module)
        how = f"pip install {package}" if package else "install its package, or name its folder in PYTHONPATH"
        raise ValueError(f"name: {name!r} needs the module {module!r}, which is not installed: {how}") from error
    except Exception as error:  # whatever a constructor does
        given = f" with arguments {shorten(arguments)}" if arguments else ""
        takes = _signature(name) if isinstance(error, TypeError) else ""
        # Gymnasium adds all arguments to what was raised.
        reason = type(error)(str(error).split(" was raised from the environment creator")[0]) if takes else error
        raise ValueError(f"name: {name!r} cannot be made{given}: {shorten(reason, 400)}{takes}") from error


def _make(name: str, arguments: dict[str, Any], render_mode: str | None = None, **own: Any) -> gymnasium.Env:
    """Make an environment, whether or not its constructor takes or needs a render mode."""
    given: list[dict[str, Any]] = [{"render_mode": render_mode}, {}]
    first, second = given if render_mode else reversed(given)
    try:
        return gymnasium.make(name, disable_env_checker=True, **own, **first, **arguments)
    except TypeError as error:
        if "'render_mode'" not in str(error).split(" was raised from the environment creator")[0]:
            raise
    return gymnasium.make(name, disable_env_checker=True, **own, **second, **arguments)


def _hint(name: str) -> str:
    """Return the end of an error message on an id that is not registered: what to write instead."""
    module, _, plain = name.rpartition(":")
    for beginning, provider, package in PROVIDERS:
        if plain.startswith(beginning) and not module:
            return f"; write '{provider}:{plain}', after: pip install {package}"
    return suggest(plain, gymnasium.registry)


def _signature(name: str) -> str:
    """Return the end of an error message on wrong arguments: those that a registered environment takes."""
    spec = gymnasium.registry.get(name.rpartition(":")[2])
    creator: Any = spec.entry_point if spec else None
    if isinstance(creator, str):
        creator = gymnasium.envs.registration.load_env_creator(creator)
    return f"; it takes {inspect.signature(creator)}" if callable(creator) else ""
