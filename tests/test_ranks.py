"""Several processes train as one would: the same episodes, actions and weights; and when one fails, none is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from run.checkpoint import load
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
        place = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
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
                    env=os.environ | place | {name: str(value) for name, value in numbers.items()} | environment,
                )
            )  # fmt: skip
        self.folder = folder

    def text(self) -> str:
        """Return all that was said."""
        return "".join((self.folder / f"rank{rank}.txt").read_text() for rank in range(len(self.processes)))

    def said_within(self, words: str, seconds: float) -> bool:
        """Wait until something is said, and return whether it was."""
        until = time.monotonic() + seconds
        while words not in self.text():
            if time.monotonic() > until or self.processes[0].poll() is not None:
                return False
            time.sleep(0.05)
        return True

    def wait_for(self, words: str) -> None:
        """Wait until something is said that has to be."""
        assert self.said_within(words, 120), self.text()

    def finish(self, timeout: float = 400) -> list[int]:
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
SLOW = {"initial": 1e-5, "final": 1e-5, "max_decay_steps": 1, "power": 1.0}
TASKS = {
    "vector": small("poc_memory_env", normalize_observations=True, prediction_coefficient=0.1),
    "visual": small("minigrid", prediction_coefficient=0.1, recall_coefficient=0.2, learning_rate_schedule=SLOW),
}
TASKS["vector"]["transformer"]["positional_encoding"] = "learned"
TASKS["vector"]["environment"] = {
    "type": "Gymnasium", "name": "tests.toy_environments:Toy-v0", "reset_params": {"start-seed": 3}
}  # fmt: skip


def train_small(folder: Path) -> None:
    """Train all tasks and write down what came of them; go on with what two processes left. Run by each process."""
    from run.options import Options

    from evaluation.agent import play_episodes
    from run.checkpoint import load_newest
    from run.config import check_config
    from run.distributed import Ranks, together
    from trainer import PPOTrainer

    def trained(world: Ranks, name: str, checkpoint: dict | None = None) -> PPOTrainer:
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
            found |= {"weights": trainer.optimizer.weights.clone(), "finished": trainer.finished}
            found["played"] = play_episodes(
                trainer.model, trainer.config, trainer.task, [*range(7)], action_seed=3, world=world
            )
            # A minibatch of process 0's samples alone: the others have nothing to differentiate, but take part.
            trainer._train_minibatch(np.arange(0, 16, 2), 0.1, 0.001)
            found["gradient"] = trainer.optimizer.gradient
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
    assert (one["gradient"] - several["gradient"]).abs().max() < 1e-4 * one["gradient"].abs().max()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", (2, 4))
def test_several_processes_evaluate_as_one(runs, name, count):
    assert runs[name, 1]["played"] == runs[name, count]["played"]


@pytest.mark.parametrize("name", TASKS)
def test_a_run_of_two_goes_on_with_one_and_with_four(runs, name):
    one, four = runs[name, 1]["resumed"], runs[name, 4]["resumed"]
    assert (one - four).abs().max() < 1e-5
    assert not torch.equal(one, runs[name, 1]["weights"])


# ------------------------------------------------------------------------------------------------------------- failures

LONG = small("poc_memory_env", updates=10_000, checkpoint_interval=2)


def said_of(text: str, words: str) -> list[str]:
    """Return the lines that hold some words."""
    return [line for line in text.splitlines() if words in line]


@pytest.mark.parametrize("victim", (1, pytest.param(0, marks=pytest.mark.slow)))
def test_a_process_is_killed(tmp_path, victim):
    ranks = train(tmp_path, 3, write(tmp_path, LONG | {"n_workers": 6}))
    ranks.wait_for("update 2/")
    started = time.monotonic()
    # One finds out late: by then the other has said it, and process 0 may not have left with the store yet.
    ranks.processes[2].send_signal(signal.SIGSTOP)
    ranks.processes[victim].kill()
    if victim:
        # Where process 0 waits for the suspended one in turn, it finds out only once that one goes on.
        ranks.said_within("another process of the run is gone", 5)
    ranks.processes[2].send_signal(signal.SIGCONT)
    codes = ranks.finish(PATIENCE)
    assert codes[victim] == -signal.SIGKILL and codes.count(1) == 2, ranks.text()
    lines = said_of(ranks.text(), "another process of the run is gone")
    # Process 0 keeps the store in which they tell each other who has said so; with torchrun that is torchrun.
    assert 1 <= len(lines) <= (2 if victim == 0 else 1)
    assert "--resume=run" in lines[0] and "Traceback" not in ranks.text()
    assert time.monotonic() - started < PATIENCE


@pytest.mark.slow
def test_a_process_is_suspended(tmp_path):
    """As a machine that hangs or a cable that is cut, it closes no connection."""
    ranks = train(tmp_path, 2, write(tmp_path, LONG))
    ranks.wait_for("update 2/")
    ranks.processes[1].send_signal(signal.SIGSTOP)
    try:
        assert ranks.processes[0].wait(PATIENCE) == 1
    finally:
        ranks.processes[1].kill()
        ranks.finish()
    assert len(said_of(ranks.text(), "nothing heard of process 1 for 20 s")) == 1
    assert "Traceback" not in ranks.text()


def test_one_is_asked_to_stop_and_all_stop(tmp_path):
    ranks = train(tmp_path, 2, write(tmp_path, LONG))
    ranks.wait_for("update 2/")
    ranks.processes[1].terminate()
    assert ranks.finish(PATIENCE) == [130, 130], ranks.text()
    assert len(said_of(ranks.text(), "stopped; to go on: torchrun … train.py --resume=run")) == 1
    checkpoints = sorted((tmp_path / "checkpoints" / "run").glob("*.pt"))
    done = said_of(ranks.text(), "update ")[-1].split()[1].split("/")[0]
    assert checkpoints[-1].name == f"checkpoint-{int(done):09d}.pt"


def test_an_environment_raises(tmp_path):
    (tmp_path / "well").touch()
    environment = {"type": "Gymnasium", "name": "tests.toy_environments:Raise-v0"}
    ranks = train(tmp_path, 2, write(tmp_path, LONG | {"environment": environment}), TOY_FOLDER=str(tmp_path))
    ranks.wait_for("update 2/")
    (tmp_path / "well").unlink()
    assert ranks.finish(PATIENCE) == [1, 1], ranks.text()
    assert len(said_of(ranks.text(), "ArithmeticError: the toy is broken")) == 1
    assert len(said_of(ranks.text(), "to go on from the last checkpoint")) == 1


START = "import train; from run import cli, launch; {}; cli.command_line(train.main)"


@pytest.mark.parametrize(
    ("changes", "patch", "message"),
    [
        ({"gamma": 0.5}, "", "processes 0 and 1 differ in config gamma: 0.9, 0.5"),
        ({}, "launch.code_digest = lambda: 'other'", "processes 0 and 1 differ in code: own, other"),
        ({"n_workers": 3}, "", "n_workers: 3 environments cannot be divided among 2 processes; "
                               "allowed numbers of processes are 1, 3"),
    ],
    ids=("config", "code", "not divisible"),
)  # fmt: skip
def test_what_cannot_start_says_why(tmp_path, changes, patch, message):
    """On two machines, each with a folder of its own."""
    config, other = LONG | {"gamma": 0.9, "n_workers": changes.get("n_workers", 4)}, tmp_path / "other"
    other.mkdir()
    patch = ("launch.code_digest = lambda: 'own'", patch or "launch.code_digest = lambda: 'own'")
    arguments = [write(tmp_path, config), "--seed=5", "--cpu"]
    write(other, config | changes)
    commands = [["-c", START.format(text), *arguments] for text in patch]
    ranks = Ranks(tmp_path, commands, prefixes=[["env"], ["env", "-C", str(other)]])
    assert ranks.finish(90) == [2, 2]
    assert {*ranks.text().splitlines()} == {message} and len(ranks.text().splitlines()) == 2  # one on each machine
    assert not list(tmp_path.glob("checkpoints/*"))


# The first sign of life is late: a process that waits for others must not keep its own from being heard.
LATE = "run.pulse.Pulse._beat = lambda pulse, beat=run.pulse.Pulse._beat: (time.sleep(pulse.rank), beat(pulse))"


def test_one_is_late_with_its_first_sign_of_life(tmp_path):
    command = ["-c", START.format(f"import time, run.pulse; {LATE}"), write(tmp_path, LONG | {"updates": 1}), "--cpu"]
    ranks = Ranks(tmp_path, [command] * 2)
    assert ranks.finish() == [0, 0], ranks.text()


# Signs of life without a pause, so that one is on its way at any time; and what threads there are at the end.
OFTEN = """
import atexit, glob, run.pulse
run.pulse.INTERVAL, run.pulse.LOST_AFTER = 1e-5, 1e6
atexit.register(lambda: print("threads:", *(open(path).read() for path in glob.glob("/proc/self/task/*/comm"))))
"""


def test_they_leave_in_order(tmp_path):
    """Nobody uses the store when process 0 takes it away; PyTorch's threads have ended before Python does."""
    config = write(tmp_path, LONG | {"updates": 1})
    ranks = Ranks(tmp_path, [["-c", f"{OFTEN}\n{START.format('pass')}", config, "--cpu"]] * 2)
    assert ranks.finish() == [0, 0], ranks.text()
    assert len(said_of(ranks.text(), "threads:")) == 2
    assert "failed on Socket" not in ranks.text() and "gloo" not in ranks.text()


@pytest.mark.slow
def test_the_others_never_come(tmp_path):
    ranks = train(tmp_path, 1, write(tmp_path, LONG), WORLD_SIZE="2")
    assert ranks.finish(90) == [1]
    lines = ranks.text().splitlines()
    assert len(lines) == 1 and "not all of the 2 processes came to 127.0.0.1:" in lines[0]


# A process that kills itself in its third update, unless it was started anew or is told not to.
DEADLY = """
import os, signal
import train, trainer
from run import cli
true = trainer.PPOTrainer.train_update
def train_update(self):
    if (self.update, self.world.rank, self.world.restarts) == (2, int(os.environ["VICTIM"]), 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return true(self)
trainer.PPOTrainer.train_update = train_update
if __name__ == "__main__":
    cli.command_line(train.main)
"""


def test_torchrun_goes_on_by_itself(tmp_path):
    """With the weights of an undisturbed run."""
    config = write(tmp_path, LONG | {"updates": 4, "checkpoint_interval": 1})
    (tmp_path / "deadly.py").write_text(DEADLY)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    arguments = ["deadly.py", config, "--seed=5", "--cpu", "--processes=1"]
    text = ""
    for victim, run_id in ((0, "disturbed"), (-1, "undisturbed")):
        command = [sys.executable, *launcher, "--max-restarts=1", *arguments, f"--run-id={run_id}"]
        place = {"PYTHONPATH": str(ROOT), "VICTIM": str(victim), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | place, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr
        text += done.stderr
    assert len(said_of(text, "continuing disturbed behind update 2")) == 1
    one, two = (load(tmp_path / "models" / f"{name}.nn", "model")["weights"] for name in ("disturbed", "undisturbed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --------------------------------------------------------------------------------------------------------- two machines


@pytest.fixture
def cable():
    """Two network namespaces with an address each, 10.77.0.1 and 10.77.0.2, and a cable between them."""
    names = [f"ranks{os.getpid()}{side}" for side in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(
        f"ip link add va{os.getpid()} netns {names[0]} type veth peer name vb{os.getpid()} netns {names[1]}"
    )
    for side, name in zip("ab", names, strict=True):
        inside = f"ip -n {name}"
        commands.append(f"{inside} addr add 10.77.0.{1 + (side == 'b')}/24 dev v{side}{os.getpid()}")
        commands += [f"{inside} link set v{side}{os.getpid()} up", f"{inside} link set lo up"]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {command}: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_two_machines(folder: Path, names: list[str], config: str, run_id: str) -> Ranks:
    """Start a process on each of two machines."""
    command = [str(ROOT / "train.py"), config, "--seed=5", "--cpu", "--processes=1", f"--run-id={run_id}"]
    interfaces = [f"GLOO_SOCKET_IFNAME=v{side}{os.getpid()}" for side in "ab"]
    prefixes = [["ip", "netns", "exec", name, "env", own] for name, own in zip(names, interfaces, strict=True)]
    return Ranks(folder, [command] * 2, prefixes, "10.77.0.1")


@pytest.mark.slow
def test_two_machines_train_as_two_processes_of_one(cable, tmp_path):
    config = write(tmp_path, LONG | {"updates": 3})
    ranks = on_two_machines(tmp_path, cable, config, "machines")
    assert ranks.finish() == [0, 0], ranks.text()
    assert train(tmp_path, 2, config, "--run-id=local").finish() == [0, 0]
    one, two = (load(tmp_path / "models" / f"{name}.nn", "model")["weights"] for name in ("machines", "local"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_the_cable_is_cut(cable, tmp_path):
    ranks = on_two_machines(tmp_path, cable, write(tmp_path, LONG), "run")
    ranks.wait_for("update 2/")
    subprocess.run(["ip", "-n", cable[1], "link", "set", f"vb{os.getpid()}", "down"], check=True)
    started = time.monotonic()
    assert ranks.finish(PATIENCE) == [1, 1], ranks.text()
    assert time.monotonic() - started < PATIENCE
    lines = said_of(ranks.text(), "nothing heard of process")
    assert len(lines) == 2 and "Traceback" not in ranks.text(), ranks.text()
