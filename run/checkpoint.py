"""Files: models and checkpoints, written whole or not at all, and read without trusting them."""

import io
import os
import platform
import subprocess
import warnings
from importlib import metadata
from pathlib import Path

import torch
import xxhash

from environments.contract import Task
from model import ActorCriticModel
from run.config import Config, check_config
from utils import UserError, reason_of

FORMAT = "ppo-transformer-xl"
FORMAT_VERSION = 1
# How many checkpoints of a run are kept.
KEPT = 2


def fingerprint(content: object) -> str:
    """Return a digest of nested dicts, lists, tensors and plain values, to notice damaged files."""
    digest = xxhash.xxh3_128()

    def feed(value: object) -> None:
        """Digest a value after those before it, with its type and size."""
        if isinstance(value, dict):
            for key in value:
                feed(key)
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f"[{len(value)}".encode())
            for item in value:
                feed(item)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{type(value).__name__}:{value!r};".encode())

    feed(content)
    return digest.hexdigest()


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it, so that a crash or a full disk leaves the old one intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, kind: str, content: dict) -> None:
    """Write tensors and plain data atomically.

    Args:
        path: the file.
        kind: "model" or "checkpoint".
        content: nested dicts, lists, tensors, numbers and text.
    """
    content = {"format": FORMAT, "version": FORMAT_VERSION, "kind": kind} | content
    stream = io.BytesIO()
    torch.save(content | {"fingerprint": fingerprint(content)}, stream)
    # Released here, also by an error: the collector of Python 3.12 crashes over a view that an error's traceback holds.
    with stream.getbuffer() as data:
        write_file(path, data)


def load(path: Path, kind: str) -> dict:
    """Read what `save` wrote, executing nothing.

    Raises:
        UserError: with one line that says what is wrong with the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch warns of is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path}: is damaged or was not written by this program ({reason_of(error)})") from error
    marks = [content.get(key) if isinstance(content, dict) else None for key in ("format", "version", "kind")]
    kinds = [type(mark) for mark in marks]
    if kinds != [str, int, str] or marks[0] != FORMAT or marks[2] not in ("model", "checkpoint"):
        raise UserError(f"{path}: was not written by this program")
    if not 1 <= marks[1] <= FORMAT_VERSION:
        raise UserError(f"{path}: has format version {marks[1]:.3g}, this program reads up to {FORMAT_VERSION}")
    if marks[2] != kind:
        raise UserError(f"{path}: is a {marks[2]}, should be a {kind}")
    stored = content.pop("fingerprint", None)
    try:
        intact = type(stored) is str and stored == fingerprint(content)
    except Exception:  # tensors of an unknown kind, or nested too deep
        intact = False
    if not intact:
        raise UserError(f"{path}: is damaged, its contents do not match their fingerprint")
    return content


def save_model(path: Path, model: ActorCriticModel, config: Config, run: dict) -> None:
    """Write a trained model with everything that is needed to use it.

    Args:
        path: the file.
        model: the model.
        config: its config.
        run: seed, steps, versions and whatever else is worth knowing about the training.
    """
    task = vars(model.task) | {"branches": list(model.task.branches)}
    task["frame"] = model.task.frame and list(model.task.frame)
    weights = model.state_dict()
    save(path, "model", {"config": config.model_dump(), "task": task, "run": run, "weights": weights})


def load_model(path: Path, device: torch.device) -> tuple[ActorCriticModel, Config, Task, dict]:
    """Read a model.

    Returns:
        The model on `device`, its config, its task and what is known about its training.

    Raises:
        UserError: with one line that says what is wrong with the file.
    """
    content = load(path, "model")
    try:
        config = stored_config(content, path)
        task = stored_task(content["task"])
        model = ActorCriticModel(config, task)
        model.load_state_dict(without_auxiliary(content["weights"])[0])
        return model.to(device), config, task, dict(content["run"])
    except UserError:
        raise
    except Exception as error:  # the file is ours by its marks, but holds something else
        raise UserError(f"{path}: does not hold a model ({reason_of(error)})") from error


def stored_task(stored: dict) -> Task:
    """Return the task that a model file describes; older ones show a frame (C, H, W) or a vector (n,)."""
    if "observation_shape" in stored:
        shape = tuple(stored["observation_shape"])
        frame, vector = (shape, 0) if len(shape) == 3 else (None, shape[0])
        return Task(frame, vector, tuple(stored["branches"]), 0, stored["max_episode_steps"])
    frame = stored["frame"] and tuple(stored["frame"])
    return Task(**stored | {"frame": frame, "branches": tuple(stored["branches"])})


def without_auxiliary(weights: dict) -> tuple[dict, dict]:
    """Divide the weights of older files, where auxiliary heads lie within the model; return the model's and theirs."""
    heads = {"decoder.": "reconstruction.", "recall.": "recall.", "prediction.": "prediction."}
    rest, auxiliary = {}, {}
    for name, weight in weights.items():
        old = next((prefix for prefix in heads if name.startswith(prefix)), None)
        if old is None:
            rest[name] = weight
        else:
            auxiliary[heads[old] + name.removeprefix(old)] = weight
    return rest, auxiliary


def stored_config(content: dict, path: Path) -> Config:
    """Return the config that a file holds, checked; UserError of one line: a file is wrong or right."""
    try:
        return check_config(content.get("config"), str(path))
    except UserError as error:
        raise UserError(str(error).splitlines()[0]) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def load_newest(folder: Path) -> tuple[dict, Path]:
    """Read the newest checkpoint of a run that is intact.

    Raises:
        UserError: if there is none.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load(path, "checkpoint"), path
        except UserError as error:
            problems.append(str(error))
    raise UserError("\n".join(problems) or f"{folder}: holds no checkpoint; --resume takes the id of a started run")


def save_checkpoint(folder: Path, update: int, state: dict) -> Path:
    """Write the checkpoint behind `update` updates and forget all but the last two."""
    path = folder / f"checkpoint-{update:09d}.pt"
    save(path, "checkpoint", state)
    # Temporary files are left by a process that was killed while it wrote.
    for old in (*list_checkpoints(folder)[:-KEPT], *folder.glob(".*.tmp")):
        old.unlink()
    return path


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter to the numbers."""
    packages = ("numpy", "gymnasium", "minigrid", "memory-gym", "pygame-ce")
    # PyTorch says itself what it was built for, which its package does not always.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def provenance(device: torch.device) -> dict[str, str]:
    """Return the git commit, the versions of what matters to the numbers, and the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return package_versions() | {"device": f"{device.type} ({name})", "commit": _git_commit()}


def _git_commit() -> str:
    """Return the checkout's commit, marked where files were changed since; "unknown" outside of one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parents[1]),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
