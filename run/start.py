"""Which run a command line means: a new one, or one that goes on."""

import os
import secrets
import sys
from pathlib import Path

from run.checkpoint import list_checkpoints, load_newest, stored_config
from run.cli import whole_number
from run.config import Config, load_config
from run.distributed import Ranks, check_alike, check_divisible
from run.folders import check_run_id, free_run_id, make_folder, run_paths
from utils import UserError


def chosen_run(arguments: dict, world: Ranks) -> tuple[Config, str, int, dict | None]:
    """Return config, id, seed and checkpoint of the run: process 0 reads and draws, all know.

    Raises:
        UserError: on all processes, where anything is wrong or they are not alike.
    """
    config = None
    with world.agree_on(UserError):
        if arguments["--resume"] is None:
            config = load_config(arguments["--config"], arguments["--set"])
        updates = whole_number(arguments, "--updates", 1)
    check_alike(world, config, arguments)
    run: tuple | None = None
    with world.agree_on(UserError):
        if world.first:
            resumed = arguments["--resume"] if not check_restarts(arguments, world.restarts) else arguments["--run-id"]
            run = new_run(config, arguments, world.restarts) if resumed is None else resumed_run(resumed, arguments)
    config, *rest = world.from_first(run)
    config = config.model_copy(update={"updates": updates or config.updates})
    check_divisible(world, config)
    return config, *rest


def check_restarts(arguments: dict, restarts: int) -> bool:
    """Return whether torchrun has started the processes anew and their run has a checkpoint to go on from.

    Raises:
        UserError: if the command line does not say which run that is.
    """
    if arguments["--resume"] is not None or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return False
    if arguments["--run-id"] is None:
        raise UserError("--run-id: is needed with torchrun's --max-restarts, to find the run again")
    if arguments["--overwrite"]:
        raise UserError("--overwrite: contradicts torchrun's --max-restarts, which continues the run")
    check_run_id(arguments["--run-id"])
    return restarts > 0 and bool(list_checkpoints(run_paths(arguments["--run-id"])[1]))


def new_run(config: Config, arguments: dict, restarts: int) -> tuple[Config, str, int, None]:
    """Return config, id and seed of a new run, whose folders exist and can be written to; UserError otherwise.

    Args:
        config: of the run.
        arguments: of the command line.
        restarts: how often torchrun has started it anew.
    """
    run_id = arguments["--run-id"] or Path(arguments["--config"]).stem
    if not arguments["--run-id"] and not arguments["--overwrite"]:
        run_id = free_run_id(run_id)
    check_run_id(run_id)
    seed = whole_number(arguments, "--seed")
    seed = secrets.randbelow(2**31) if seed is None else seed
    model, checkpoints = run_paths(run_id)
    taken = [path for path in (model, checkpoints) if path.exists()]
    if taken and not arguments["--overwrite"] and not restarts:
        raise UserError(f"--run-id: {taken[0]} exists; choose another id, or --overwrite, or --resume={run_id}")
    for folder in (model.parent, checkpoints.parent, Path("summaries")):
        make_folder(folder)
    if model.is_dir() or checkpoints.is_symlink() or (checkpoints.exists() and not checkpoints.is_dir()):
        raise UserError(f"--run-id: something else is in the place of {model} or {checkpoints}")
    return config, run_id, seed, None


def resumed_run(run_id: str, arguments: dict) -> tuple[Config, str, int, dict]:
    """Return config, id, seed and newest checkpoint of an interrupted run."""
    if arguments["--overwrite"]:
        raise UserError("--overwrite: contradicts --resume, which continues the run")
    check_run_id(run_id)
    checkpoint, path = load_newest(run_paths(run_id)[1])
    for folder in ("models", path.parent, "summaries"):
        make_folder(Path(folder))
    if type(checkpoint.get("seed")) is not int or type(checkpoint.get("update")) is not int:
        raise UserError(f"{path}: holds no run")
    print(f"continuing {run_id} behind update {checkpoint['update']} from {path}", file=sys.stderr)
    return stored_config(checkpoint, path), run_id, checkpoint["seed"], checkpoint
