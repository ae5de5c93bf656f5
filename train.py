"""Train an agent with PPO and Transformer-XL memory.

Usage:
    train.py [--config=<file>] [--run-id=<id>] [--seed=<n>] [--set=<key>]...
             [--init-from=<model>] [options]
    train.py --resume=<id> [options]

Options:
    --config=<file>      A config [default: configs/poc_memory_env.yaml].
    --set=<key>          Change a key of it, key=value; may be given repeatedly.
    --run-id=<id>        Name of the run; by default the config's, or numbered.
    --seed=<n>           Everything random derives from it; by default drawn.
    --init-from=<model>  Start from a model's weights.
    --overwrite          Replace an earlier run of the same id.
    --resume=<id>        Continue an interrupted run as if nothing had happened.
    --updates=<n>        Stop after that many updates instead of the config's.
    --device=<name>      cpu, cuda or cuda:N; by default cuda if there is one.
    --cpu                The same as --device=cpu.
    --processes=<n>      Processes for environments, by default one per core.
    --precision=<name>   float32, or bf16 matrix products [default: float32].
    --compile            Compile the model first (torch.compile).
    -h --help            Show this.

Example: python train.py --config configs/minigrid.yaml --run-id=my-run
"""

import secrets
import sys
from pathlib import Path

from run.cli import arguments_of, choose_device, command_line, cores, one_of, use_cores, whole_number
from run.config import Config, load_config
from run.folders import check_run_id, free_run_id, make_folder, make_room, run_paths
from utils import UserError


def main() -> None:
    """Parse the command line, train, and say how to watch the result."""
    arguments = arguments_of(__doc__)
    config, run_id, seed, checkpoint = new_run(arguments) if arguments["--resume"] is None else resumed_run(arguments)
    config = config.model_copy(update={"updates": whole_number(arguments, "--updates", 1) or config.updates})
    if checkpoint is not None and checkpoint["update"] >= config.updates:
        print(
            f"{run_id} has had its {config.updates:,} updates, nothing is left to do; --updates=<n> trains for longer"
        )
        return
    # Imports PyTorch, which neither --help nor the worker processes, which import this file, should have to.
    from run.lifecycle import Interrupted, NonFinite, Unwritable
    from trainer import Options, PPOTrainer
    from utils import EnvironmentFailure

    device = choose_device(arguments)
    use_cores(device)
    processes = whole_number(arguments, "--processes", 1, 4096) or cores()
    precision = one_of(arguments, "--precision", ("float32", "bf16"))
    options = Options(device, processes, precision=precision, compile=arguments["--compile"], film=film(config))
    trainer = PPOTrainer(config, run_id, seed, options, checkpoint)
    prepare(trainer, arguments)
    print(f"run {run_id}, seed {seed}, {config.environment.type} on {trainer.run['device']}, "
          f"{config.updates} updates of {trainer.samples:,} steps", file=sys.stderr)  # fmt: skip
    try:
        trainer.train()
    except Interrupted:
        print(f"stopped; to go on: python train.py --resume={run_id}", file=sys.stderr)
        sys.exit(130)
    except (EnvironmentFailure, NonFinite, Unwritable) as error:
        print(f"{error}\nto go on from the last checkpoint: python train.py --resume={run_id}", file=sys.stderr)
        sys.exit(1)
    model = trainer.keeper.model_path
    print(f"The model is {model}. To watch it: python enjoy.py --model={model}\n"
          "The curves: tensorboard --logdir=summaries", file=sys.stderr)  # fmt: skip


def film(config: Config):
    """Return what draws episodes for TensorBoard, None where the config wants none: it takes seconds to import."""
    if not config.video_interval:
        return None
    from play.watch import episode_summary

    return episode_summary


def prepare(trainer, arguments: dict) -> None:
    """Try what a trainer's run will need only later, say what its user should know, and make room for its files."""
    from run.checkpoint import load_model
    from run.lifecycle import start_from

    if trainer.options.film is not None:
        from play.watch import check_drawing

        check_drawing(trainer.model, trainer.config, trainer.task)
    for notice in trainer.notices:
        print(notice, file=sys.stderr)
    if arguments["--resume"] is not None:
        return
    if arguments["--init-from"] is not None:
        path = Path(arguments["--init-from"])
        start_from(trainer, load_model(path, trainer.device)[0], path)
    make_room(trainer.keeper.checkpoints, arguments["--overwrite"])


def new_run(arguments: dict) -> tuple[Config, str, int, None]:
    """Return config, id and seed of a new run, whose folders exist and can be written to; UserError otherwise."""
    config = load_config(arguments["--config"], arguments["--set"])
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


def resumed_run(arguments: dict) -> tuple[Config, str, int, dict]:
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


if __name__ == "__main__":
    command_line(main)
