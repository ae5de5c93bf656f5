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
    --precision=<name>   float32 (default), or bf16 products; --resume keeps it.
    --compile            Compile the model first (torch.compile).
    -h --help            Show this.

Example: python train.py --config configs/minigrid.yaml --run-id=my-run
"""

import sys
from pathlib import Path

from run.cli import arguments_of, command_line, cores, one_of, use_cores, whole_number
from run.config import Config
from run.folders import make_room, run_paths
from utils import UserError


def main() -> None:
    """Parse the command line and train, together with the other processes that torchrun started."""
    arguments = arguments_of(__doc__)
    # Imports PyTorch, which neither --help nor the worker processes, which import this file, should have to.
    from run.distributed import together

    with together(arguments) as (world, device):
        train(arguments, world, device)


def train(arguments: dict, world, device) -> None:
    """Carry out a run and say how to watch the result; process 0 alone speaks."""
    from run.lifecycle import Interrupted, NonFinite, Unwritable, share_start
    from run.options import PRECISIONS, Options
    from run.start import chosen_run
    from trainer import PPOTrainer
    from utils import EnvironmentFailure

    def tell(line: str) -> None:
        """Show a line once."""
        if world.first:
            print(line, file=sys.stderr, flush=True)

    config, run_id, seed, checkpoint = chosen_run(arguments, world)
    # One that was killed behind its last checkpoint lacks the model.
    complete = world.from_first(run_paths(run_id)[0].exists())
    if checkpoint is not None and checkpoint["update"] >= config.updates and complete:
        updates = f"{config.updates:,} updates"
        return tell(f"{run_id} has had its {updates}, nothing is left to do; --updates=<n> trains for longer")
    go_on = f"{'python' if world.size == 1 else 'torchrun …'} train.py --resume={run_id}"
    world.how_to_go_on = f"; to go on from the last checkpoint: {go_on}"
    use_cores(device, world.local_size)
    with world.agree_on(UserError):
        processes = whole_number(arguments, "--processes", 1, 4096) or max(1, cores() // world.local_size)
        precision = arguments["--precision"] and one_of(arguments, "--precision", PRECISIONS)
        options = Options(device, processes, precision=precision, compile=arguments["--compile"], world=world)
        trainer = PPOTrainer(config, run_id, seed, options, checkpoint)
        if world.first:
            prepare(trainer, arguments, new=checkpoint is None)
    share_start(trainer)
    tell(f"run {run_id}, seed {seed}, {config.environment.type} on {trainer.run['device']}, "
         f"{config.updates} updates of {trainer.samples:,} steps")  # fmt: skip
    try:
        trainer.train()
    except Interrupted:
        tell(f"stopped; to go on: {go_on}")
        sys.exit(130)
    except (EnvironmentFailure, NonFinite, Unwritable) as error:
        tell(f"{error}\nto go on from the last checkpoint: {go_on}")
        sys.exit(1)
    model = trainer.keeper.model_path
    tell(f"The model is {model}. To watch it: python enjoy.py --model={model}\n"
         "The curves: tensorboard --logdir=summaries")  # fmt: skip


def film(config: Config):
    """Return what draws episodes for TensorBoard, None where the config wants none: it takes seconds to import."""
    if not config.video_interval:
        return None
    from evaluation.watch import episode_summary

    return episode_summary


def prepare(trainer, arguments: dict, new: bool) -> None:
    """Try what a trainer's run will need only later, say what its user should know, and make room for its files."""
    from run.checkpoint import load_model
    from run.lifecycle import start_from

    trainer.options.film = film(trainer.config)
    if trainer.options.film is not None:
        from evaluation.watch import check_drawing

        check_drawing(trainer.model, trainer.config, trainer.task)
    for notice in [*trainer.options.notices(), *trainer.notices]:
        print(notice, file=sys.stderr)
    if not new:
        return
    if arguments["--init-from"] is not None:
        path = Path(arguments["--init-from"])
        start_from(trainer, load_model(path, trainer.device)[0], path)
    if trainer.world.restarts == 0 or not trainer.keeper.checkpoints.is_dir():
        make_room(trainer.keeper.checkpoints, arguments["--overwrite"])


if __name__ == "__main__":
    command_line(main)
