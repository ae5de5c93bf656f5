"""Several processes train as one would: the same episodes, actions and weights; and when one fails, none is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from run.config import load_config

ROOT = Path(__file__).parent.parent
# What the last of several processes to notice may take, on a machine that does other things, too.
PATIENCE = 30
SMALL = {"embed_dim": 32, "num_blocks": 2, "memory_length": 16}


def small(name: str, **changes) -> dict:
    """Return a shipped config scaled down to a fraction of a second."""
    config = load_config(ROOT / "configs" / f"{name}.yaml").model_dump()
    config["transformer"] |= SMALL
    config |= {"n_workers": 4, "worker_steps": 64, "n_mini_batch": 2, "epochs": 2, "hidden_layer_size": 16}
    return config | {"updates": 3, "checkpoint_interval": 1} | changes


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Ranks:
    """The processes of one run, started as torchrun does.

    Args:
        folder: where they run.
        commands: one per process, behind `python`.
        prefixes: what precedes `python` in each.
        address: where process 0 is.
        environment: beside what is inherited.
    """

    def __init__(self, folder, commands, prefixes=None, address="127.0.0.1", **environment):
        place = {"MASTER_ADDR": address, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        local = len(commands) if prefixes is None else 1
        self.processes = []
        for rank, command in enumerate(commands):
            numbers = {"RANK": rank, "WORLD_SIZE": len(commands), "LOCAL_RANK": rank if local > 1 else 0}
            numbers |= {"LOCAL_WORLD_SIZE": local}
            log = open(folder / f"rank{rank}.txt", "w")
            self.processes.append(
                subprocess.Popen(
                    [*(prefixes[rank] if prefixes else ()), sys.executable, *command],
                    cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env=os.environ | place | environment | {name: str(value) for name, value in numbers.items()},
                )
            )  # fmt: skip
        self.folder = folder

    def text(self) -> str:
        """Return all that was said."""
        return "".join((self.folder / f"rank{rank}.txt").read_text() for rank in range(len(self.processes)))

    def wait_for(self, words: str) -> None:
        """Wait until something is said."""
        until = time.monotonic() + 120
        while words not in self.text():
            assert time.monotonic() < until and self.processes[0].poll() is None, self.text()
            time.sleep(0.05)

    def finish(self, timeout: float = 120) -> list[int]:
        """Wait for all; return their exit codes. Nothing that they started is left behind."""
        until = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return codes


def train(folder: Path, count: int, *arguments: str, **environment: str) -> Ranks:
    """Start train.py in several processes."""
    command = [str(ROOT / "train.py"), "--cpu", "--processes=1", "--seed=5", *arguments]
    return Ranks(folder, [command] * count, **environment)


def write(folder: Path, config: dict) -> str:
    """Write a config; return its name."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return "--config=run.yaml"


# ------------------------------------------------------------------------------------------------------- the same run

# Truncation, vectors, recall, prediction of frames and of vectors; few steps, since Adam turns rounding into steps
# where a gradient is nearly zero.
SLOW = {"initial": 2e-5, "final": 2e-5, "max_decay_steps": 1, "power": 1.0}
TASKS = {
    "vector": small("poc_memory_env", normalize_observations=True, prediction_coefficient=0.1),
    "visual": small("minigrid", prediction_coefficient=0.1, recall_coefficient=0.2, learning_rate_schedule=SLOW),
}
TASKS["vector"]["environment"] = {
    "type": "Gymnasium", "name": "tests.toy_environments:Toy-v0", "reset_params": {"start-seed": 3}
}  # fmt: skip


def train_small(folder: Path) -> None:
    """Train all tasks and write down what came of them; go on with what two processes left. Run by each process."""
    from run.checkpoint import load_newest
    from run.config import check_config
    from run.launch import together
    from run.options import Options
    from run.world import World
    from trainer import PPOTrainer

    def trained(world: World, name: str, checkpoint: dict | None = None) -> PPOTrainer:
        """Return a trainer behind its last update; `first` are its first rollout's actions and episodes."""
        config = check_config(TASKS[name] | {"updates": 3 if checkpoint is None else 4}, name)
        trainer = PPOTrainer(config, f"{name}-{world.size}", 5, Options(device, folder=folder, world=world), checkpoint)
        trainer.keeper.checkpoints.mkdir(parents=True, exist_ok=True)
        trainer.keeper.model_path.parent.mkdir(parents=True, exist_ok=True)
        sample = trainer.sample

        def sample_and_tell() -> None:
            """Sample as usual and keep what was done."""
            sample()
            trainer.buffer.actions_done = world.join_rows(trainer.buffer.actions).clone()
            if trainer.update == 0:
                trainer.first = trainer.buffer.actions_done, [episode.number for episode in trainer.workers.episodes]

        trainer.sample = sample_and_tell
        trainer.train()
        return trainer

    torch.set_num_threads(1)
    with together({"--cpu": True, "--device": None}) as (world, device):
        for name in TASKS:
            trainer = trained(world, name)
            actions, numbers = trainer.first
            found = {"actions": actions, "episodes": [n for part in world.gather(numbers) for n in part]}
            found |= {"weights": trainer.optimizer.weights, "finished": trainer.finished}
            if world.size != 2:
                checkpoint, _ = load_newest(folder / "checkpoints" / f"{name}-2")
                found["resumed"] = trained(world, name, checkpoint).optimizer.weights
            if world.first:
                torch.save(found, folder / f"{name}-{world.size}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """What one, two and four processes made of each task, by name and number."""
    folder = tmp_path_factory.mktemp("ranks")
    for count in (2, 4, 1):
        script = f"from pathlib import Path; from tests.test_ranks import *; train_small(Path({str(folder)!r}))"
        (folder / "run_ranks.py").write_text(f"if __name__ == '__main__':\n    {script}\n")
        ranks = Ranks(folder, [["run_ranks.py"]] * count)
        assert ranks.finish() == [0] * count, ranks.text()
    return {
        (name, count): torch.load(folder / f"{name}-{count}.pt", weights_only=False)
        for name in TASKS
        for count in (1, 2, 4)
    }


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", (2, 4))
def test_several_processes_train_as_one(runs, name, count):
    one, several = runs[name, 1], runs[name, count]
    assert torch.equal(one["actions"], several["actions"])
    assert one["episodes"] == several["episodes"] and sum(one["episodes"]) > 0
    assert one["finished"] == several["finished"]
    assert (one["weights"] - several["weights"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", TASKS)
def test_a_run_of_two_goes_on_with_one_and_with_four(runs, name):
    one, four = runs[name, 1]["resumed"], runs[name, 4]["resumed"]
    assert (one - four).abs().max() < 1e-5
    assert not torch.equal(one, runs[name, 1]["weights"])
