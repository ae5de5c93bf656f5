"""Files: models and checkpoints, written whole or not at all, and read without trusting them."""

import io
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from environments.contract import Task
from model import ActorCriticModel
from run.config import Config, check_config
from utils import UserError, reason_of

FORMAT, FORMAT_VERSION = "ppo-transformer-xl", 2
DIGEST_SIZE = 16


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it, so that a crash or a full disk leaves the old one intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def marks(kind: str) -> dict[str, Any]:
    """Return what tells a "model" or a "checkpoint" of ours from other files."""
    return {"format": FORMAT, "version": FORMAT_VERSION, "kind": kind}


def encode(kind: str, content: dict) -> bytes:
    """Return nested dicts, lists, tensors, numbers and text as the bytes of a file, at whose end is their digest."""
    stream = io.BytesIO()
    torch.save(marks(kind) | compact(content), stream)
    return stream.getvalue() + xxhash.xxh3_128_digest(stream.getbuffer())


def compact(content: Any) -> Any:
    """Return nested content whose tensors, on the CPU, share no storage: all of a storage would be written."""
    if isinstance(content, dict):
        return {key: compact(value) for key, value in content.items()}
    if isinstance(content, list):
        return [compact(value) for value in content]
    return content.detach().cpu().clone() if isinstance(content, Tensor) else content


def load(path: Path, kind: str) -> dict:
    """Return what `encode` was given, executing nothing of it; UserError says in one line what is wrong with a file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if xxhash.xxh3_128_digest(data[:-DIGEST_SIZE]) != data[-DIGEST_SIZE:]:
        raise UserError(f"{path}: is damaged or was not written by this program")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whoever made it by hand may have made it fail in any way
        raise UserError(f"{path}: holds more than data ({reason_of(error)})") from error
    if not isinstance(content, dict) or not marks(kind).items() <= content.items():
        raise UserError(f"{path}: is no {kind} of format version {FORMAT_VERSION}")
    return content


def model_file(state: dict) -> bytes:
    """Return the bytes of a model's file: the part of a run's state that acts, and what is known about its training."""
    return encode("model", {key: state[key] for key in ("config", "task", "weights", "run")})


def load_model(path: Path, device: torch.device) -> tuple[ActorCriticModel, Config, Task, dict]:
    """Return a model on a device, its config, its task and what is known about its training; UserError as in `load`."""
    content = load(path, "model")
    config = check_config(content.get("config"), str(path))
    try:
        task = Task(**content["task"])
        model = ActorCriticModel(config, task)
        model.load_state_dict(content["weights"])
        return model.to(device), config, task, dict(content["run"])
    except Exception as error:  # the file is ours by its marks, but of another version, or made by hand
        raise UserError(f"{path}: does not hold a model ({reason_of(error)})") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def load_newest(folder: Path) -> tuple[dict, Path]:
    """Read the newest checkpoint of a run that is intact; UserError where there is none."""
    found = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load(path, "checkpoint"), path
        except UserError as error:
            found.append(str(error))
    raise UserError("\n".join(found) or f"{folder}: holds no checkpoint; --resume takes the id of a started run")


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write the checkpoint after `state["update"]` updates and forget all but the last two."""
    write_file(folder / f"checkpoint-{state['update']:09d}.pt", encode("checkpoint", state))
    # Temporary files are left by a process that was killed while it wrote.
    for old in (*list_checkpoints(folder)[:-2], *folder.glob(".*.tmp")):
        old.unlink()


def provenance(device: torch.device) -> dict[str, str]:
    """Return the git commit, the versions of what matters to the numbers, and the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("numpy", "gymnasium", "minigrid", "memory-gym", "pygame-ce"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions | {"device": f"{device.type} ({name})", "commit": git_commit()}


def git_commit() -> str:
    """Return the checkout's commit, marked where files were changed since; "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
