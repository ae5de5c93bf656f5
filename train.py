"""Train an agent with PPO and Transformer-XL memory.

Usage:
    train.py [--config=<file>] [--run-id=<id>] [--seed=<n>] [options]
    train.py --resume=<id> [options]
    train.py -h | --help

Options:
    --config=<file>     A config [default: configs/poc_memory_env.yaml].
    --run-id=<id>       Name of the run; by default the config's, or numbered.
    --seed=<n>          Everything random derives from it; by default drawn.
    --overwrite         Replace an earlier run of the same id.
    --resume=<id>       Continue an interrupted run as if nothing had happened.
    --updates=<n>       Stop after that many updates instead of the config's.
    --device=<name>     cpu, cuda or cuda:N; by default cuda where there is one.
    --cpu               The same as --device=cpu.
    --processes=<n>     Processes for the environments, by default one per core.
    --precision=<name>  float32, or bf16 matrix products [default: float32].
    --compile           Compile the model first (torch.compile).
    -h --help           Show this.

Example: python train.py --config configs/minigrid.yaml --run-id=my-run
"""

import secrets
import shutil
import sys
from pathlib import Path

from run.cli import arguments_of, check_writable, choose_device, command_line, cores, one_of, use_cores, whole_number
from run.config import load_config
from utils import UserError


def main() -> None:
    """Parse the command line, train, and say how to watch the result."""
    arguments = arguments_of(__doc__)
    config, run_id, seed, checkpoint = new_run(arguments) if arguments["--resume"] is None else resumed_run(arguments)
    config["updates"] = whole_number(arguments, "--updates", 1) or config["updates"]
    # Imports PyTorch, which neither --help nor the worker processes, which import this file, should have to.
    from trainer import EnvironmentFailure, Interrupted, NonFinite, Options, PPOTrainer, Unwritable

    device = choose_device(arguments)
    use_cores(device)
    processes = whole_number(arguments, "--processes", 1, 4096) or cores()
    precision = one_of(arguments, "--precision", ("float32", "bf16"))
    options = Options(device, processes, precision=precision, compile=arguments["--compile"])
    trainer = PPOTrainer(config, run_id, seed, options, checkpoint)
    if checkpoint is None:
        make_room(trainer.checkpoints, arguments["--overwrite"])
    print(f"run {run_id}, seed {seed}, {config['environment']['type']} on {trainer.run['device']}, "
          f"{config['updates']} updates of {trainer.samples:,} steps", file=sys.stderr)  # fmt: skip
    try:
        trainer.train()
    except Interrupted:
        print(f"stopped; to go on: python train.py --resume={run_id}", file=sys.stderr)
        sys.exit(130)
    except (EnvironmentFailure, NonFinite, Unwritable) as error:
        print(f"{error}\nto go on from the last checkpoint: python train.py --resume={run_id}", file=sys.stderr)
        sys.exit(1)
    print(f"The model is {trainer.model_path}. To watch it: python enjoy.py --model={trainer.model_path}\n"
          "The curves: tensorboard --logdir=summaries", file=sys.stderr)  # fmt: skip


def new_run(arguments: dict) -> tuple[dict, str, int, None]:
    """Return config, id and seed of a new run, whose folders exist and can be written to; UserError otherwise."""
    config = load_config(arguments["--config"])
    run_id = arguments["--run-id"] or Path(arguments["--config"]).stem
    if not arguments["--run-id"] and not arguments["--overwrite"]:
        run_id = free_run_id(run_id)
    check_run_id(run_id)
    seed = whole_number(arguments, "--seed")
    seed = secrets.randbelow(2**31) if seed is None else seed
    model, checkpoints = run_paths(run_id)
    taken = [path for path in (model, checkpoints) if path.exists()]
    if taken and not arguments["--overwrite"]:
        raise UserError(f"--run-id: {taken[0]} exists; choose another id, or --overwrite, or --resume={run_id}")
    for folder in (model.parent, checkpoints.parent, Path("summaries")):
        make_folder(folder)
    if model.is_dir() or checkpoints.is_symlink() or (checkpoints.exists() and not checkpoints.is_dir()):
        raise UserError(f"--run-id: something else is in the place of {model} or {checkpoints}")
    return config, run_id, seed, None


def run_paths(run_id: str) -> tuple[Path, Path]:
    """Return where a run's model and its checkpoints go."""
    return Path("models") / f"{run_id}.nn", Path("checkpoints") / run_id


def free_run_id(name: str) -> str:
    """Return the first of name, name-2, name-3, … that no run has."""
    run_id, number = name, 2
    while any(path.exists() for path in run_paths(run_id)):
        run_id, number = f"{name}-{number}", number + 1
    return run_id


def make_room(checkpoints: Path, overwrite: bool) -> None:
    """Create the run's folder, once nothing can go wrong any more; if to `overwrite`, in place of an earlier run's."""
    if overwrite:
        shutil.rmtree(checkpoints, ignore_errors=True)
    try:
        checkpoints.mkdir()
    except FileExistsError as error:
        raise UserError(f"{checkpoints}: another run took this id just now; choose another --run-id") from error
    except OSError as error:
        raise UserError(f"{checkpoints}: cannot be created: {error.strerror}") from error


def resumed_run(arguments: dict) -> tuple[dict, str, int, dict]:
    """Return config, id, seed and newest checkpoint of an interrupted run."""
    from run.checkpoint import load_newest, stored_config

    if arguments["--overwrite"]:
        raise UserError("--overwrite: contradicts --resume, which continues the run")
    run_id = arguments["--resume"]
    check_run_id(run_id)
    checkpoint, path = load_newest(run_paths(run_id)[1])
    for folder in ("models", path.parent, "summaries"):
        make_folder(Path(folder))
    if type(checkpoint.get("seed")) is not int or type(checkpoint.get("update")) is not int:
        raise UserError(f"{path}: holds no run")
    print(f"continuing {run_id} behind update {checkpoint['update']} from {path}", file=sys.stderr)
    return stored_config(checkpoint, path), run_id, checkpoint["seed"], checkpoint


def check_run_id(run_id: str) -> None:
    """Raise UserError unless a run id can be the name of a file."""
    if not run_id or run_id.startswith((".", "-")) or not all(c.isalnum() or c in "._-" for c in run_id):
        raise UserError(f"--run-id: {run_id!r} should be letters, digits, '.', '_' and '-'")


def make_folder(folder: Path) -> None:
    """Create a folder where there is none; UserError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from error
    check_writable(folder, f"{folder}:")


if __name__ == "__main__":
    command_line(main)
