"""Makes environments that are registered with Gymnasium; where that fails, one line says why and what helps."""

import importlib
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterable
from typing import Any

import gymnasium

from environments.episode import one_line, suggest

# What an id looks like whose environment Gymnasium knows only once a module is imported, the module and its package.
PROVIDERS = (
    (r"ALE/|.*NoFrameskip-v\d+$", "ale_py", "ale-py"),
    (r"popgym-", "popgym", "popgym"),
    (r"MiniGrid-|BabyAI-", "minigrid", "minigrid"),
)
# Arguments of gymnasium.make that have another place
PLACES = {
    "id": "`name` is its place",
    "max_episode_steps": "its place is beside `arguments`",
    "render_mode": "the command line decides what is drawn",
    "disable_env_checker": "it is always True",
}


def make_registered(name: Any, arguments: dict[str, Any] | None = None, **own: Any) -> gymnasium.Env:
    """Make a registered environment without Gymnasium's checker and warnings.

    Args:
        name: the registered id.
        arguments: the user's own arguments of gymnasium.make.
        own: further arguments of it. A render mode is left out where the environment does not take one.

    Raises:
        ValueError: if there is no such environment, or if it cannot be made.
    """
    arguments = arguments or {}
    for key in arguments:
        if key in PLACES or key in own:
            raise ValueError(f"arguments: {key}: is not allowed here; {PLACES.get(key, 'it is set already')}")
    if not isinstance(name, str):
        raise ValueError(f"name: {name!r} should be the id of a registered environment")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make_with_render_mode(name, {**own, **arguments})
    except gymnasium.error.UnregisteredEnv as error:
        raise ValueError(f"name: {name!r} is not a registered environment{hint(name)}") from error
    except gymnasium.error.DependencyNotInstalled as error:
        commands = " and ".join(re.findall(r"pip install [^`]+", str(error)))
        raise ValueError(
            f"name: {name!r} needs a package that is not installed: {commands or one_line(error)}"
        ) from error
    except ModuleNotFoundError as error:
        raise ValueError(f"name: {name!r} {missing_module(error)}") from error
    except Exception as error:
        raise ValueError(failure(name, arguments, error)) from error


def make_with_render_mode(name: str, arguments: dict[str, Any]) -> gymnasium.Env:
    """Make an environment, whether or not its constructor takes or needs a render mode."""
    render_mode = arguments.pop("render_mode", None)
    given: dict[str, Any] = {"render_mode": render_mode}
    left_out: dict[str, Any] = {}
    first, second = (left_out, given) if render_mode is None else (given, left_out)
    try:
        return gymnasium.make(name, disable_env_checker=True, **arguments, **first)
    except TypeError as error:
        if "'render_mode'" not in cause(error):
            raise
    return gymnasium.make(name, disable_env_checker=True, **arguments, **second)


def cause(error: Exception) -> str:
    """Return what an error says, without what Gymnasium adds to it: all arguments."""
    return str(error).split(" was raised from the environment creator")[0]


def provider(name: str) -> tuple[str, str, str] | None:
    """Return pattern, module and package of where an id comes from, None if that is not known."""
    return next((entry for entry in PROVIDERS if re.match(entry[0], name)), None)


def hint(name: str) -> str:
    """Return the end of an error message on an id that is not registered: what to write instead."""
    module, _, plain = name.rpartition(":")
    known = provider(plain)
    if known is not None:
        pattern, module, package = known
        if importlib.util.find_spec(module) is None:
            return f"; write '{module}:{plain}', after: pip install {package}"
        importlib.import_module(module)
        if plain in gymnasium.registry:
            return f"; write '{module}:{plain}'"
        return nearest(module, plain, (key for key in gymnasium.registry if re.match(pattern, key)))
    return nearest(module, plain, ids_of(module)) if module else suggest(name, gymnasium.registry)


def nearest(module: str, name: str, ids: Iterable[str]) -> str:
    """Return the end of an error message: the nearest ids of a module, which has to be imported for them."""
    ids = list(ids)
    if not ids:
        return f"; {module} registers none"
    return re.sub(r"(?<=[:,] )(?=\S)", f"{module}:", suggest(name, ids))


def ids_of(module: str) -> list[str]:
    """Return the ids whose environments are made by a module or one inside it."""
    made_by = {
        key: spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
        for key, spec in gymnasium.registry.items()
    }
    return [key for key, maker in made_by.items() if re.match(rf"{re.escape(module)}\b", maker or "")]


def missing_module(error: ModuleNotFoundError) -> str:
    """Return the end of an error message on a module that is not there: how to get it."""
    name = error.name or getattr(error.__cause__, "name", None) or "?"
    packages = {module: package for _, module, package in PROVIDERS} | {"mujoco": '"gymnasium[mujoco]"'}
    package = packages.get(name.split(".")[0])
    if package is not None:
        return f"needs a package that is not installed: pip install {package}"
    return f"needs the module {name!r}: install its package, or name its folder in PYTHONPATH"


def failure(name: str, arguments: dict[str, Any], error: Exception) -> str:
    """Return why an environment cannot be made: an argument that it does not take or lacks, or what it says itself.

    Args:
        name: the registered id.
        arguments: the user's own arguments.
        error: what was raised.
    """
    taken = constructor_arguments(name)
    takes = f"; it takes {', '.join(taken) or 'none'}" if taken is not None else ""
    refused = re.search(r"unexpected keyword argument '(\w+)'", cause(error))
    if isinstance(error, TypeError) and refused and refused[1] in arguments:
        return f"arguments: {refused[1]}: is not known in {name!r}{takes or f' ({cause(error)})'}"
    lacking = [key for key, is_needed in (taken or {}).items() if is_needed and key not in arguments]
    if isinstance(error, TypeError) and lacking:
        return f"arguments: {', '.join(lacking)} has to be given for {name!r}{takes}"
    reason = one_line(type(error)(cause(error))) if isinstance(error, TypeError) else one_line(error)
    return f"name: {name!r} cannot be made{f' with arguments {arguments!r}' if arguments else ''}: {reason}"


def constructor_arguments(name: str) -> dict[str, bool] | None:
    """Return what a constructor takes and whether it has to be given, None if that cannot be told."""
    spec = gymnasium.registry.get(name.rpartition(":")[2])
    if spec is None or spec.entry_point is None:
        return None
    creator: Any = spec.entry_point
    if isinstance(creator, str):
        creator = gymnasium.envs.registration.load_env_creator(creator)
    takes: dict[str, bool] = {}
    # Where further arguments go to the constructor of the base, they are those of the base.
    for each in inspect.getmro(creator) if inspect.isclass(creator) else (creator,):
        parameters = inspect.signature(each).parameters.values()
        named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
        for item in named:
            if item.name != "render_mode":
                takes.setdefault(item.name, item.default is item.empty and item.name not in spec.kwargs)
        if len(named) == len(parameters):
            return takes
    return takes or None
