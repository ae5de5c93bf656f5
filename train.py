"""Train an agent with PPO and episodic memory.

Usage:
    train.py [--config=<file>] [--run-id=<id>] [--seed=<n>] [--set=<key>]...
             [--init-from=<model>] [--overwrite] [options]
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

from pathlib import Path

from run.cli import Computing, Count, Precision, Processes, RunId, Seed, arguments_of, command_line, use_cores
from utils import UserError, reason_of


class Arguments(Computing):
    """What the docstring says."""

    config: str
    set: list[str]
    run_id: RunId | None
    seed: Seed | None
    init_from: Path | None
    overwrite: bool
    resume: RunId | None
    updates: Count | None
    processes: Processes | None
    precision: Precision | None
    compile: bool


def main() -> None:
    """Parse the command line and train, together with the other ranks that torchrun started."""
    arguments = arguments_of(__doc__, Arguments)
    # Imports PyTorch, which neither --help nor the worker processes, which import this file, should have to.
    from run.distributed import together

    with together(arguments) as (ranks, device):
        train(arguments, ranks, device)


def train(arguments: Arguments, ranks, device) -> None:
    """Carry out a run and say how to watch the result."""
    from run.checkpoint import load
    from run.start import chosen_run
    from trainer import PPOTrainer
    from worker import inspect_environment

    run = chosen_run(arguments, ranks, device)
    if run.state["update"] >= run.config.updates:
        run.write_model()  # it is missing where the run was killed before that, or its folder copied
        return run.tell(f"{run.name} has finished its updates, {run.model} is written; --updates=<n> trains for longer")
    use_cores(device, ranks.local_size)
    with ranks.agree_on(UserError):
        task, notices = inspect_environment(run.config.environment)
        trainer = PPOTrainer(run.config, task, run.seed, run.options)
        if run.resumed:
            try:
                trainer.load_state_dict(run.state)
            except Exception as error:  # the file is ours by its marks, but holds something else
                raise UserError(f"{run.folder}: holds no run of this config ({reason_of(error)})") from error
        elif arguments.init_from is not None:
            try:
                trainer.model.load_state_dict(load(arguments.init_from, "model")["weights"])
            except RuntimeError as error:  # its first line names the class alone
                raise UserError(f"--init-from: {arguments.init_from}: {str(error).splitlines()[1].strip()}") from error
    for notice in notices:
        run.tell(notice)
    trainer.train(run)
    run.tell(f"The model is {run.model}. To watch it: python enjoy.py --model={run.model}\n"
             "The curves: tensorboard --logdir=summaries")  # fmt: skip


if __name__ == "__main__":
    command_line(main)
