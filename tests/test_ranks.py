"""Several ranks train as one would: the same episodes and weights; and when one fails, none is left."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_faults import Process, command, same, write_config
from torch.utils._pytree import tree_leaves

import evaluate
import train
from run.checkpoint import load
from run.config import check_config
from run.distributed import Ranks, check_alike
from run.start import chosen_run
from tests.toy_environments import toy
from tests.walk import constant, tiny
from utils import UserError

ROOT = Path(__file__).parent.parent
PROGRAMS = {"train.py": train, "evaluate.py": evaluate}
TRAIN = ("train.py", "--config=run.yaml", "--cpu", "--processes=1", "--seed=5")


def small(environment: dict, **changes) -> dict:
    """Return a tiny config with minibatches of one rank's samples.

    Little is learned, since Adam turns rounding into steps where a gradient is nearly zero.
    """
    return tiny(environment, **{"updates": 3, "n_mini_batch": 16, "learning_rate_schedule": constant(1e-5)} | changes)


# Truncation, vectors, recall, novelty, prediction of frames and of vectors.
MEMORY = {"type": "Minigrid", "name": "MiniGrid-MemoryS9-v0", "max_episode_steps": 40}
TASKS = {
    "vector": small(toy("Toy", reset_params={"start-seed": 3}), normalize_observations=True, kl_limit=0.05,
                    prediction_coefficient=0.1),
    "visual": small(MEMORY, transformer={"positional_encoding": "absolute"}, novelty_schedule=constant(0.02),
                    prediction_coefficient=0.1, recall_coefficient=0.2),
}  # fmt: skip
LONG = small(toy("Toy"), updates=10_000)


class Launch:
    """The ranks of one run, started as torchrun does."""

    def __init__(self, folder: Path, count: int, *command: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
        place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TOY_FOLDER": str(folder)}
        self.processes = []
        for rank in range(count):
            variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(Process(folder, *command, log=f"rank{rank}.txt", variables=variables))

    def lines(self, words: str = "") -> list[str]:
        """Return the lines of all ranks that hold some words."""
        text = "".join(process.text for process in self.processes)
        return [line for line in text.splitlines() if words in line]

    def finish(self) -> list[int]:
        """Wait for all; return their exit codes. Nobody sees a traceback of ours, and nothing is left behind."""
        try:
            codes = [process.finish() for process in self.processes]
        finally:
            for process in self.processes:
                process.end()
        assert not self.lines("Traceback") or self.lines("the toy is broken"), "\n".join(self.lines())
        return codes


def checkpoint(folder: Path, run_id: str, update: int) -> dict:
    """Return what a run saved after an update."""
    return load(folder / "checkpoints" / run_id / f"checkpoint-{update:09d}.pt", "checkpoint")


def assert_alike(one: dict, other: dict) -> None:
    """Weights and the optimiser's moments, which have the scale of gradients, are equal but for rounding."""
    for name, few in (("weights", 1e-7), ("optimizer", 1e-6)):
        pairs = [*zip(tree_leaves(one[name]), tree_leaves(other[name]), strict=True)]
        pairs = [pair for pair in pairs if isinstance(pair[0], torch.Tensor) and pair[0].is_floating_point()]
        assert len(pairs) > 2 and all((a - b).abs().mean() <= few * max(1, a.abs().max()) for a, b in pairs), name


def episodes(state: object) -> list:
    """Return number, actions and digest of the running episodes, wherever a checkpoint has them."""
    if isinstance(state, dict) and "digest" in state:
        return [state["number"], [actions.tolist() for actions in state["actions"]], state["digest"]]
    return [found for value in state.values() for found in episodes(value)] if isinstance(state, dict) else []


# ------------------------------------------------------------------------------------------------------- the same run

# Several command lines, one after the other, in the same ranks: to start them takes the longest.
SERIES = """
import json, sys
from contextlib import contextmanager
import evaluate, run.cli, run.distributed, train
if __name__ == "__main__":
    with run.distributed.together(run.cli.Computing.model_validate({"--cpu": True})) as (ranks, device):
        run.distributed.together = contextmanager(lambda arguments: (yield ranks, device))
        for command in json.loads(sys.argv[1]):
            sys.argv = [*command, "--cpu", "--processes=1"]
            try:
                run.cli.command_line({"train.py": train, "evaluate.py": evaluate}[command[0]].main)
            except SystemExit as end:
                print("exit code", end.code, flush=True)
"""


def series(folder: Path, count: int, commands: list[tuple]) -> Launch:
    """Start ranks that carry out commands."""
    (folder / "series.py").write_text(SERIES)
    return Launch(folder, count, "series.py", json.dumps(commands))


def train_and_play(folder: Path, count: int) -> None:
    """Let so many ranks train three updates of all tasks, go on with what two have left, and play its models."""
    commands: list[tuple] = []
    for name in TASKS:
        train = ("train.py", f"--config={name}.yaml", "--seed=5", f"--run-id={name}-{count}")
        commands.append((*train, "--updates=4") if count == 1 else train)
        if count != 2:
            shutil.copytree(folder / "checkpoints" / f"{name}-2", folder / "checkpoints" / f"{name}-2-{count}")
            commands.append(("train.py", f"--resume={name}-2-{count}", "--updates=4"))
        play = ("evaluate.py", f"models/{name}-2.nn", "--seeds=2", "--repetitions=2", "--max-steps=24")
        commands.append((*play, f"--output={name}-{count}"))
    if count > 1:
        launch = series(folder, count, commands)
        assert launch.finish() == [0] * count and not launch.lines("exit code"), "\n".join(launch.lines())
        return
    for program, *arguments in commands:
        command(folder, *arguments, "--cpu", "--processes=1", program=PROGRAMS[program])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder where two ranks and then one have trained."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, config in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    for count in (2, 1):
        train_and_play(folder, count)
    return folder


@pytest.mark.parametrize("count", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_several_ranks_do_as_one(folder, count):
    """They train the same, go on from what another number of ranks has left, and evaluate the same."""
    if count == 4:
        train_and_play(folder, 4)
    for name in TASKS:
        one, several = (checkpoint(folder, f"{name}-{ranks}", 3) for ranks in (1, count))
        assert episodes(one) == episodes(several) and sum(episodes(one)[0]) > 0
        assert_alike(one, several)
        assert_alike(checkpoint(folder, f"{name}-1", 4), checkpoint(folder, f"{name}-2-{1 if count == 2 else 4}", 4))
        played = [json.loads((folder / f"{name}-{ranks}.json").read_text())["models"][0] for ranks in (1, count)]
        assert len(played[0]["episodes"]) == 4 and played[0]["episodes"] == played[1]["episodes"]


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("victim", (1, pytest.param(0, marks=pytest.mark.slow)))
def test_all_end_with_one(tmp_path, victim):
    """Where an environment raises, one is asked to stop, or one is killed; it is said once how to go on."""
    write_config(tmp_path, LONG)
    (tmp_path / "well").touch()
    commands = [("train.py", "--config=run.yaml", "--seed=5", f"--run-id=run-{updates}", f"--updates={updates}")
                for updates in (7001, 7002, 7003)]  # fmt: skip
    commands[0] += ("--set=environment.name=tests.toy_environments:Raise-v0",)
    launch = series(tmp_path, 2, commands)
    launch.processes[0].wait_for("update 2/7001")
    (tmp_path / "well").unlink()
    launch.processes[0].wait_for("update 2/7002")
    launch.processes[0].handle.terminate()
    launch.processes[0].wait_for("update 2/7003")
    launch.processes[victim].handle.kill()
    codes = launch.finish()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert sorted(launch.lines("exit code")) == [f"exit code {code}" for code in (1, 1, 130, 130)], launch.lines()
    for words in ("ArithmeticError: the toy is broken", "another rank of the run is gone"):
        assert len(launch.lines(words)) == 1, words
    assert [len(launch.lines(f"train.py --resume=run-{updates}")) for updates in (7001, 7002, 7003)] == [1, 1, 1]
    last = launch.lines("/7002")[-1].split()[1].split("/")[0]
    saved = sorted((tmp_path / "checkpoints" / "run-7002").glob("*.pt"))[-1]
    assert saved.name == f"checkpoint-{int(last):09d}.pt"


def test_ranks_that_differ_do_not_start(monkeypatch):
    own = {"commit": "one", "compile": False, "processes": 2}
    for name, other in (("commit", "other"), ("compile", True)):
        monkeypatch.setattr(Ranks, "gather", lambda self, own, change={name: other}: [own, own | change])
        with pytest.raises(UserError, match=f"^the ranks differ in {name}: .*, {other}$"):
            check_alike(Ranks(0, 2), own)
    monkeypatch.setattr(Ranks, "gather", lambda self, own: [own, own | {"processes": 1}])
    check_alike(Ranks(0, 2), own)


def test_environments_that_cannot_be_divided(monkeypatch):
    found = "run", check_config(TASKS["vector"], ""), 5, None
    monkeypatch.setattr(Ranks, "gather", lambda self, item: [item])
    monkeypatch.setattr(Ranks, "from_first", lambda self, item: found)
    with pytest.raises(UserError, match="4 environments cannot be divided among 3 ranks"):
        chosen_run(SimpleNamespace(updates=None), Ranks(1, 3), torch.device("cpu"))


@pytest.mark.slow
def test_torchrun_goes_on_by_itself(folder, tmp_path):
    """With the weights of an undisturbed run."""
    write_config(tmp_path, TASKS["vector"] | {"environment": TASKS["vector"]["environment"] | toy("KillTrainerOnce")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOY_FOLDER": str(tmp_path)}
    done = subprocess.run(
        [*command, str(ROOT / TRAIN[0]), *TRAIN[1:], "--run-id=disturbed"],
        cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr.count("continuing after") == 1, done.stderr
    disturbed, undisturbed = checkpoint(tmp_path, "disturbed", 3), checkpoint(folder, "vector-2", 3)
    assert same(disturbed["weights"], undisturbed["weights"])
