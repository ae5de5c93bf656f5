"""What machines do to runs: kills, signals, dying environments, full disks, damaged and malicious files.

Set FAULT_TESTS=full for the full number of kills.
"""

import contextlib
import copy
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import utils
from environments.contract import Task
from memory import Timeline
from model import ActorCriticModel
from run import checkpoint, lifecycle
from run.cli import command_line
from run.config import Config, check_config
from trainer import Options, PPOTrainer
from utils import UserError
from worker import MAX_RESTARTS

ROOT = Path(__file__).parents[1]
KILLS = 10 if os.environ.get("FAULT_TESTS") == "full" else 3
# Nothing here takes as long, unless it hangs.
PATIENCE = 120

MEMORY = {"type": "Minigrid", "name": "MiniGrid-MemoryS9-v0"}


def toy(name: str) -> dict:
    """The `environment` section of a toy."""
    return {"type": "Gymnasium", "name": f"tests.toy_environments:{name}-v0"}


def small_config(environment: dict, updates: int, **changes) -> dict:
    """A config that trains in moments."""
    schedule = {"final": 1e-4, "power": 1.0, "max_decay_steps": 20}
    return {
        "environment": environment,
        "gamma": 0.99,
        "lamda": 0.95,
        "updates": updates,
        "epochs": 2,
        "n_workers": 4,
        "worker_steps": 16,
        "n_mini_batch": 2,
        "value_loss_coefficient": 0.5,
        "hidden_layer_size": 16,
        "max_grad_norm": 0.5,
        "checkpoint_interval": 1,
        "transformer": {
            "num_blocks": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "memory_length": 12,
            "positional_encoding": "absolute",
            "layer_norm": "pre",
            "gtrxl": False,
        },
        "learning_rate_schedule": {"initial": 3e-3} | schedule,
        "beta_schedule": {"initial": 1e-3} | schedule,
        "clip_range_schedule": {"initial": 0.2} | schedule,
    } | changes


def write_config(folder: Path, config: dict) -> str:
    """Write a config into a folder; return its name there. The run's id is then "run"."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return "run.yaml"


# ------------------------------------------------------------------------------------------------ running the product


def use_one_core() -> None:
    """Keep a process to one core: the threads of tiny models would mostly wait for each other."""
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {available[os.getpid() % len(available)]})


class Process:
    """train.py as a process of its own, in a session of its own.

    Args:
        folder: where it runs.
        arguments: its command line.
        patch: Python that is executed in front of the program, to be able to disturb it at a certain point.
    """

    def __init__(self, folder: Path, *arguments: str, patch: str = "", **environment: str) -> None:
        self.mark = f"FAULT_TEST={uuid.uuid4()}"
        command = [str(ROOT / "train.py")]
        if patch:
            command = ["-c", f"{patch}\nimport train\nfrom run import cli\ncli.command_line(train.main)"]
        name, _, value = self.mark.partition("=")
        environment = os.environ | {name: value, "PYTHONPATH": str(ROOT), "TOY_FOLDER": str(folder)} | environment
        self.handle = subprocess.Popen(
            [sys.executable, *command, *arguments], cwd=folder, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=use_one_core,
        )  # fmt: skip
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.ended = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.handle.stderr:
            with self.news:
                self.lines.append(line)
                self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    @property
    def text(self) -> str:
        """All that it said so far."""
        return "".join(self.lines)

    def wait_for(self, beginning: str, count: int = 1) -> bool:
        """Wait until it has said so many lines with that beginning; False if it ended before."""

        def heard() -> bool:
            return sum(line.startswith(beginning) for line in self.lines) >= count

        with self.news:
            assert self.news.wait_for(lambda: heard() or self.ended, PATIENCE), f"nothing happens\n{self.text}"
            return heard()

    def finish(self) -> int:
        """Wait for its end and that of all its processes; return the exit code."""
        try:
            code = self.handle.wait(PATIENCE)
            deadline = time.monotonic() + 20
            while self.family() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not self.family(), "processes were left behind"
            self.reader.join(PATIENCE)
            self.handle.stderr.close()
            return code
        finally:
            for pid in self.family():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the trainer by SIGKILL; everything else has to follow by itself."""
        self.handle.kill()
        assert self.finish() in (-signal.SIGKILL, 0)

    def family(self) -> list[int]:
        """The processes that live and descend from it, itself included."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:
                pass
        return found

    def workers(self) -> list[int]:
        """The processes of the environments: the children of the fork server."""
        family = self.family()
        parents = {}
        for pid in family:
            with contextlib.suppress(OSError):
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return [pid for pid, parent in parents.items() if parent in family and parent != self.handle.pid]


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run train.py's main program within this process; return its exit code and what it said."""
    said, before = io.StringIO(), os.getcwd()
    # TensorBoard orders the files of a run by the second of their creation. A process takes longer than that to start.
    real = not (folder / "summaries").is_symlink()
    events = [int(path.name.split(".")[3]) for path in folder.glob("summaries/*/*/events.out.*")] if real else []
    time.sleep(max(0.0, max(events, default=0) + 1 - time.time()))
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stderr(said),
            mock.patch.object(sys, "argv", ["train.py", *arguments]),
            mock.patch("run.cli.cores", lambda: 1),
        ):
            command_line(train.main)
        return 0, said.getvalue()
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        os.chdir(before)


def run(folder: Path, config: dict, *arguments: str) -> tuple[int, str]:
    """Start a run named "run" on the CPU with seed 5 within this process."""
    options = ["--seed=5"] * (not any(argument.startswith("--seed") for argument in arguments))
    options += ["--processes=2"] * (not any(argument.startswith("--processes") for argument in arguments))
    return command(folder, "--config", write_config(folder, config), "--cpu", *options, *arguments)


def resume(folder: Path, *arguments: str) -> tuple[int, str]:
    """Resume the run named "run"."""
    return command(folder, "--resume=run", "--cpu", "--processes=2", *arguments)


# -------------------------------------------------------------------------------------------------- comparing results


def same(one: object, other: object) -> bool:
    """Tell whether nested data with tensors are equal to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of the run that the model came from as TensorBoard shows them, without the measured times."""
    name = read(folder / "models" / "run.nn")["run"]["summaries"]
    events = EventAccumulator(str(folder / "summaries" / name), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("performance/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def read(path: Path) -> dict:
    """What a file of the product holds."""
    return torch.load(path, weights_only=True)


def newest(folder: Path) -> dict:
    """The newest checkpoint of the run named "run"; it has to be intact."""
    return checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints" / "run")[-1], "checkpoint")


def assert_same_result(folder: Path, undisturbed: Path) -> None:
    """Weights, optimiser, memory, running episodes and curves are equal to the bit, and nothing is there twice."""
    models = [read(place / "models" / "run.nn") for place in (folder, undisturbed)]
    assert same(*(model["weights"] for model in models))
    ends = [newest(place) for place in (folder, undisturbed)]
    for key in ends[0].keys() - {"run", "config"}:
        assert same(ends[0][key], ends[1][key]), key
    curves = scalars(folder)
    assert curves == scalars(undisturbed)
    for tag, points in curves.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    per_update = models[0]["config"]["n_workers"] * models[0]["config"]["worker_steps"]
    updates = models[0]["run"]["updates"]
    assert [step for step, _ in curves["losses/total"]] == [per_update * (n + 1) for n in range(updates)]


def assert_plain(said: str) -> None:
    """Nobody sees a traceback."""
    assert "Traceback" not in said, said


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that nobody will ever look at."""
    return [path for path in folder.rglob("*") if path.suffix == ".tmp"]


@pytest.fixture(autouse=True)
def no_leaked_shared_memory():
    """No test leaves a segment in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    yield
    deadline = time.monotonic() + 10
    while (leaked := set(os.listdir("/dev/shm")) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not leaked


@pytest.fixture
def toy_folder():
    """An empty folder for what toys want to remember beyond the end of their process."""
    folder = Path(os.environ["TOY_FOLDER"])
    for file in folder.iterdir():
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def memory_run(tmp_path_factory) -> Path:
    """The folder of an undisturbed run on MiniGrid Memory."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = run(folder, MEMORY_CONFIG)
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    """The folder of an undisturbed run on the toy."""
    folder = tmp_path_factory.mktemp("toy")
    code, said = run(folder, small_config(toy("Toy"), 6))
    assert code == 0, said
    return folder


MEMORY_CONFIG = small_config(
    MEMORY,
    6 + 4 * KILLS,
    worker_steps=32,
    checkpoint_interval=2,
    novelty_schedule={"initial": 0.0, "final": 0.01, "power": 1.0, "max_decay_steps": 20},
)

# --------------------------------------------------------------------------------------------------------- 1, 2: kills


def test_trainer_killed_and_resumed(memory_run, tmp_path):
    chance = random.Random(11)
    new = ("--config", write_config(tmp_path, MEMORY_CONFIG), "--seed=5", "--overwrite", "--cpu", "--processes=2")
    kills = 0
    while True:
        started = bool(checkpoint.list_checkpoints(tmp_path / "checkpoints" / "run"))
        process = Process(tmp_path, *(("--resume=run", "--cpu", "--processes=2") if started else new))
        if kills == KILLS:
            assert process.finish() == 0, process.text
            break
        # The first kill comes before anything is saved, the others anywhere behind the start of an update.
        if process.wait_for("run run" if not kills else "update", 1 if not kills else chance.randint(1, 4)):
            time.sleep(chance.uniform(0, 0.2))
            if process.handle.poll() is None:
                process.kill()
                kills += 1
                continue
        process.finish()
        pytest.fail(f"ended before its kill {kills + 1}\n{process.text}")
    assert_same_result(tmp_path, memory_run)


KILL_AT = {
    "a checkpoint that is written": "checkpoint.os.fsync",
    "a checkpoint that is renamed": "checkpoint.os.replace",
    "old checkpoints that are removed": "checkpoint.list_checkpoints",
}


@pytest.mark.parametrize("place", KILL_AT.values(), ids=KILL_AT)
def test_trainer_killed_while_saving(place, toy_run, tmp_path):
    patch = f"""
import os, signal
from run import checkpoint
true, calls = {place}, []
def deadly(*arguments, **options):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return true(*arguments, **options)
{place} = deadly
"""
    config = write_config(tmp_path, small_config(toy("Toy"), 6))
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    assert process.finish() == -signal.SIGKILL, process.text
    assert 1 <= newest(tmp_path)["update"] < 6
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)
    assert not leftovers(tmp_path)


def test_what_is_due_with_a_checkpoint_survives_a_kill_behind_it(tmp_path):
    """Models and histograms of an update belong to the run as much as its weights."""
    patch = """
import os, signal
from run import lifecycle
true = lifecycle.save_checkpoint
def deadly(folder, update, state):
    true(folder, update, state)
    if update == 2:
        os.kill(os.getpid(), signal.SIGKILL)
lifecycle.save_checkpoint = deadly
"""
    config = small_config(toy("Toy"), 4, histogram_interval=1, model_interval=1)
    config = write_config(tmp_path, config)
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    assert process.finish() == -signal.SIGKILL, process.text
    code, said = resume(tmp_path)
    assert code == 0, said
    assert len(list((tmp_path / "checkpoints" / "run").glob("model-*.nn"))) == 4
    name = read(tmp_path / "models" / "run.nn")["run"]["summaries"]
    events = EventAccumulator(str(tmp_path / "summaries" / name), {"histograms": 0}).Reload()
    for tag in events.Tags()["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [64, 128, 192, 256], tag


def test_workers_killed(memory_run, tmp_path):
    chance = random.Random(12)
    config = write_config(tmp_path, MEMORY_CONFIG)
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2")
    for kill in range(KILLS):
        assert process.wait_for("update", 2 + 4 * kill), process.text
        time.sleep(chance.uniform(0, 0.1))
        os.kill(chance.choice(process.workers()), signal.SIGKILL)
    assert process.finish() == 0, process.text
    assert process.text.count("died (exit code -9); replaying its episodes") == KILLS
    assert_same_result(tmp_path, memory_run)


def test_fork_server_killed(toy_run, tmp_path):
    """The system may kill what it likes; the run needs the server only to replace workers."""
    config = write_config(tmp_path, small_config(toy("Slow"), 6))
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2")
    assert process.wait_for("update", 2), process.text
    for pid in set(process.family()) - {process.handle.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.finish() == 0, process.text
    assert_same_result(tmp_path, toy_run)


def test_kill_of_the_trainer_ends_everything(tmp_path):
    config = write_config(tmp_path, small_config(toy("Slow"), 100))
    process = Process(tmp_path, "--config", config, "--cpu", "--processes=3")
    assert process.wait_for("update"), process.text
    assert len(process.workers()) == 3
    process.kill()  # fails if processes are left


# ------------------------------------------------------------------------------------------ 2: environments that break


def test_environment_takes_its_process_along(toy_run, toy_folder, tmp_path):
    code, said = run(tmp_path, small_config(toy("ExitOnce"), 6))
    assert code == 0, said
    assert len(list(toy_folder.iterdir())) == 2
    assert said.count("died (exit code 7); replaying its episodes") == 2
    assert_same_result(tmp_path, toy_run)


def test_environment_takes_its_process_along_every_time(tmp_path):
    code, said = run(tmp_path, small_config(toy("Exit"), 6))
    assert code == 1
    assert_plain(said)
    assert said.count("replaying its episodes") == MAX_RESTARTS
    assert f"died (exit code 7) {MAX_RESTARTS + 1} times at the same step" in said
    assert "train.py --resume=run" in said
    assert newest(tmp_path)["update"] == 0


def test_environment_raises(toy_run, toy_folder, tmp_path):
    code, said = run(tmp_path, small_config(toy("Raise"), 6))
    assert code == 1
    assert said.count("Traceback") == 1
    assert 'toy_environments.py", line' in said and "ArithmeticError: the toy is broken" in said
    where = re.search(r"environment (\d), reset seed (\d+), step (\d+)", said)
    section = check_config(small_config(toy("Raise"), 6), "test").environment
    assert int(where[3]) == 9
    assert int(where[2]) == utils.training_seed(5, section, int(where[1]), 0)
    assert newest(tmp_path)["update"] == 0
    (toy_folder / "well").touch()
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


@pytest.mark.parametrize("name, fault", [("NotANumber", "observation"), ("InfiniteReward", "reward")])
def test_environment_shows_what_is_no_number(name, fault, tmp_path):
    code, said = run(tmp_path, small_config(toy(name), 6, worker_steps=8))
    assert code == 1, said
    assert_plain(said)
    assert re.search(rf"{fault} is not finite", said)
    assert re.search(r"environment \d, reset seed \d+, step 9", said), said
    assert "checkpoint-000000001.pt" in said or "--resume=run" in said
    assert newest(tmp_path)["update"] == 1


def test_environment_breaks_its_contract_later(tmp_path):
    code, said = run(tmp_path, small_config(toy("WrongShape"), 6))
    assert code in (1, 2)
    assert_plain(said)
    assert "observation has the shape (5,), its space says (3,)" in said
    assert re.search(r"environment \d, reset seed \d+, step 9", said), said


class Contract:
    """Keeps the contract, unless something is replaced."""

    import gymnasium

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    max_episode_steps = 10
    observation = np.zeros(3, dtype=np.float32)
    reward: object = 0.0

    def reset(self, *, seed=None, options=None):
        return self.observation, {}

    def step(self, action):
        return self.observation, self.reward, False, False, {}

    def close(self):
        pass


BREACHES = {
    "shape": ({"observation": np.zeros(4, dtype=np.float32)}, r"observation is \(4,\) float32, declared are \(3,\)"),
    "type": ({"observation": np.zeros(3)}, r"observation is \(3,\) float64, declared are \(3,\) float32"),
    "no array": ({"observation": [0.0, 0.0, 0.0]}, "observation is None list"),
    "not finite": ({"observation": np.full(3, np.nan, dtype=np.float32)}, "observation is not finite"),
    "reward": ({"reward": float("nan")}, "reward is not finite: nan"),
    "no reward": ({"reward": None}, "(reward is None|fails at its first step.* TypeError: must be real number)"),
    "four-tuple": ({"step": lambda self, action: (self.observation, 0.0, False, {})}, "step returned 4 values.* 5"),
    "no tuple": ({"step": lambda self, action: None}, "step returned NoneType"),
    "old reset": ({"reset": lambda self, seed: self.observation}, "reset returned"),
    "no limit": ({"max_episode_steps": property(lambda self: [][0])}, "max_episode_steps is missing"),
    "limit 0": ({"max_episode_steps": 0}, "max_episode_steps is 0, should be a whole number above 0"),
    "limit 2.5": ({"max_episode_steps": 2.5}, "max_episode_steps is 2.5, should be a whole number above 0"),
    "observation space": ({"observation_space": Contract.action_space}, "observation_space is Discrete"),
    "action space": (
        {"action_space": Contract.gymnasium.spaces.Box(-1, 1, (3, 2), np.float32)},
        "action_space is Box",
    ),
    "small frames": (
        {"observation_space": Contract.gymnasium.spaces.Box(0, 255, (3, 2, 20), np.uint8)},
        "observation_space .* at least 3×3",
    ),
}


@pytest.mark.parametrize("changes, message", BREACHES.values(), ids=BREACHES)
def test_broken_contract_is_named(changes, message, monkeypatch):
    monkeypatch.setattr(utils, "create_env", lambda environment: type("Broken", (Contract,), changes)())
    if message == "max_episode_steps is missing":
        monkeypatch.delattr(Contract, "max_episode_steps")
        changes.clear()
    with pytest.raises(UserError, match=f"^Broken: {message}"):
        utils.inspect_environment({})


def test_kept_contract_is_accepted(monkeypatch):
    for limit in (10, None):
        monkeypatch.setattr(Contract, "max_episode_steps", limit)
        monkeypatch.setattr(utils, "create_env", lambda environment: Contract())
        assert utils.inspect_environment({}) == (Task(None, 3, (2,), 0, limit), [])


def test_environment_that_is_not_deterministic(tmp_path):
    config = small_config(toy("Random"), 4)
    code, said = run(tmp_path, config, "--updates=2")
    assert code == 0, said
    before = newest(tmp_path)
    running = [index for index, episode in enumerate(before["episodes"]) if len(episode["actions"])]
    assert len(running) > 1
    code, said = resume(tmp_path, "--updates=4")
    assert code == 0, said
    assert f"environments {running} are not deterministic and began fresh episodes" in said
    assert newest(tmp_path)["update"] == 4


# --------------------------------------------------------------------------------- 3, 10: same seed, same everything


@pytest.mark.parametrize("processes", [1, 5])
def test_number_of_processes_does_not_matter(processes, memory_run, tmp_path):
    code, said = run(tmp_path, MEMORY_CONFIG | {"n_workers": 4}, f"--processes={processes}")
    assert code == 0, said
    assert_same_result(tmp_path, memory_run)


def test_same_seed_same_run_other_seed_other_run(toy_run, tmp_path):
    config = small_config(toy("Toy"), 6)
    for seed in (5, 6):
        (tmp_path / str(seed)).mkdir()
        assert run(tmp_path / str(seed), config, f"--seed={seed}")[0] == 0
    assert_same_result(tmp_path / "5", toy_run)
    models = [read(tmp_path / seed / "models" / "run.nn")["weights"] for seed in ("5", "6")]
    assert not any(torch.equal(models[0][name], models[1][name]) for name in models[0] if name.endswith("query.weight"))
    assert scalars(tmp_path / "5") != scalars(tmp_path / "6")


def test_a_seed_is_drawn_printed_and_stored(tmp_path):
    seeds = []
    for name in ("a", "b"):
        config = write_config(tmp_path, small_config(toy("Toy"), 1))
        code, said = command(tmp_path, "--config", config, f"--run-id={name}", "--cpu", "--processes=1")
        assert code == 0, said
        seeds.append(int(re.search(r"seed (\d+)", said)[1]))
        model = read(tmp_path / "models" / f"{name}.nn")
        assert model["run"]["seed"] == seeds[-1]
    assert seeds[0] != seeds[1]


def test_a_model_knows_where_it_came_from(toy_run):
    model = read(toy_run / "models" / "run.nn")
    about = model["run"]
    assert about["run_id"] == "run" and about["seed"] == 5 and about["updates"] == 6 and about["steps"] == 6 * 64
    assert about["torch"] == torch.__version__ and about["numpy"] == np.__version__
    assert about["python"] == ".".join(map(str, sys.version_info[:3]))
    assert about["device"].startswith("cpu")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert about["commit"].startswith(head or "unknown")
    given = small_config(toy("Toy"), 6)
    assert {key: model["config"][key] for key in given if key not in ("environment", "transformer")} == {
        key: given[key] for key in given if key not in ("environment", "transformer")
    }
    events = EventAccumulator(str(toy_run / "summaries" / about["summaries"]), {"tensors": 0}).Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert yaml.safe_load(texts["config/text_summary"].strip("`")) == model["config"]
    for key in ("seed", "commit", "torch", "device"):
        assert f"- {key}: {about[key]}" in texts["run/text_summary"]


# ----------------------------------------------------------------------------------------------------- 4: being asked

# Code that asks the run to stop at a certain moment, by `ask()`: here while the file of that number is written.
WRITING = """
from run import checkpoint
true, calls = checkpoint.os.fsync, []
def fsync(file):
    calls.append(file)
    if len(calls) == number:
        ask()
    return true(file)
checkpoint.os.fsync = fsync
"""
MOMENTS = {
    "start": """
import worker
true = worker.Workers.start
def start(self, *arguments):
    ask()
    return true(self, *arguments)
worker.Workers.start = start
""",
    "sampling": """
true = trainer.PPOTrainer._act
def act(self, group, t, *rest):
    if self.update == 2 and t == 7:
        ask()
    return true(self, group, t, *rest)
trainer.PPOTrainer._act = act
""",
    "optimisation": """
true = trainer.PPOTrainer._train_minibatch
def train_minibatch(self, samples, *rest):
    if self.update == 2:
        ask()
    return true(self, samples, *rest)
trainer.PPOTrainer._train_minibatch = train_minibatch
""",
    "checkpoint": WRITING.replace("number", "2"),
    "last checkpoint": WRITING.replace("number", "7"),
}
ASKING = """
import os, signal, trainer
asked = []
def ask():
    if not asked:
        asked.append(True)
        {}
"""
CTRL_C = "os.killpg(os.getpgrp(), signal.SIGINT)"  # as terminals do it, to all processes
TERM = "os.kill(os.getpid(), signal.SIGTERM)"
TERM_ALL = "os.killpg(os.getpgrp(), signal.SIGTERM)"


@pytest.mark.parametrize(
    "moment, how",
    [
        ("start", CTRL_C),
        ("sampling", CTRL_C),
        ("sampling", TERM_ALL),
        ("optimisation", CTRL_C),
        ("optimisation", TERM),
        ("checkpoint", CTRL_C),
        ("checkpoint", TERM),
        ("last checkpoint", TERM),
    ],
    ids=lambda value: value.replace("signal.", "").removeprefix("os.") if "os." in value else value,
)
def test_asked_to_stop(moment, how, toy_run, tmp_path):
    config = write_config(tmp_path, small_config(toy("Toy"), 6, checkpoint_interval=3 if moment == "sampling" else 1))
    patch = ASKING.format(how) + MOMENTS[moment]
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    code = process.finish()
    assert_plain(process.text)
    assert not leftovers(tmp_path)
    if moment == "last checkpoint" and code == 0:  # it was asked too late to matter
        assert_same_result(tmp_path, toy_run)
        return
    assert code == 130, process.text
    assert "to go on: python train.py --resume=run" in process.text
    expected = {"start": (0,), "sampling": (2,), "optimisation": (2,), "checkpoint": (1, 2, 3), "last checkpoint": (6,)}
    assert newest(tmp_path)["update"] in expected[moment]
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    config = write_config(tmp_path, small_config(toy("Slow"), 100))
    patch = ASKING.format(f"{CTRL_C}; {CTRL_C}") + MOMENTS["sampling"]
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    assert process.finish() == 130
    assert_plain(process.text)
    assert newest(tmp_path)["update"] == 2


# -------------------------------------------------------------------------------------------------- 5: bad numbers


def poison_weight(trainer: PPOTrainer) -> None:
    trainer.model.value.bias.data[0] = float("nan")


def poison_log_probability(trainer: PPOTrainer) -> None:
    trainer.model.policy_hidden.weight.data[0, 0] = float("nan")


def poison_advantage(trainer: PPOTrainer) -> None:
    true = trainer.buffer.compute_advantages

    def compute(next_values, gamma, lamda):
        next_values[0, 0] = float("inf")
        true(next_values, gamma, lamda)

    trainer.buffer.compute_advantages = compute


def poison_loss(trainer: PPOTrainer) -> None:
    true = trainer.buffer.compute_advantages

    def compute(next_values, gamma, lamda):
        true(next_values, gamma, lamda)
        trainer.buffer.advantages *= 1e30  # whose square is beyond float32

    trainer.buffer.compute_advantages = compute


def poison_gradient(trainer: PPOTrainer) -> None:
    trainer.model.embedding.weight.register_hook(lambda gradient: gradient * float("nan"))


POISONS = {
    poison_weight: "sampling: a predicted value",
    poison_log_probability: "sampling: a log-probability",
    poison_advantage: "sampling: an advantage",
    poison_loss: r"epoch 1, minibatch 1: the (policy|value) loss",
    poison_gradient: "epoch 1, minibatch 1: a gradient of embedding",
}


@pytest.mark.parametrize("poison, place", POISONS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_bad_number_stops_the_run(poison, place, toy_run, tmp_path, monkeypatch):
    true = PPOTrainer.train_update

    def train_update(self):
        if self.update == 2:
            poison(self)
        return true(self)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "train_update", train_update)
        code, said = run(tmp_path, small_config(toy("Toy"), 6))
    assert code == 1
    assert_plain(said)
    last = "checkpoints/run/checkpoint-000000002.pt"
    assert re.search(f"update 3, {place} is not finite; the last good checkpoint is {last}", said), said
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints" / "run")] == [
        "checkpoint-000000001.pt",
        "checkpoint-000000002.pt",
    ]
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path)["weights"].values())
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    """The last optimiser step of an update can go wrong although all its losses and gradients were fine."""
    true = PPOTrainer.optimise

    def optimise(self):
        statistics = true(self)
        if self.update == 1:
            poison_weight(self)
        return statistics

    monkeypatch.setattr(PPOTrainer, "optimise", optimise)
    code, said = run(tmp_path, small_config(toy("Toy"), 2))
    assert code == 1, said
    assert "the last good checkpoint is checkpoints/run/checkpoint-000000001.pt" in said
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path)["weights"].values())


# --------------------------------------------------------------------------------------------------- 6: hostile files


class Canary:
    """A pickle that creates a file where it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Shell(Canary):
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evaluated(Canary):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


def deep(levels: int) -> list:
    nested: list = []
    for _ in range(levels):
        nested = [nested]
    return nested


JUNK = [
    None, True, -1, 0, 2**70, float("nan"), float("inf"), 1e300, "", "text", "two\nlines", "x" * 10**5, b"bytes", [],
    {}, (), set(), [[]], [None] * 3, {"a": 1}, {1: {2: 3}}, 1j, torch.float32, torch.Size([3]), torch.zeros(0),
    torch.zeros(3, 3), torch.zeros(2, dtype=torch.int64), torch.full((16, 16), float("nan")), torch.tensor(1.0),
    torch.zeros(4, 4).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(4, 4).T,
    torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1).expand(10**6), torch.zeros(3, device="meta"), deep(50),
    torch.nn.Parameter(torch.zeros(2)),
]  # fmt: skip


def archive_of(data: bytes, pickled: bytes) -> bytes:
    """The same file with another pickle inside."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in source.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


def mutations(good: Path, kind: str, canary: Path, count: int, seed: int):
    """Yield (what was done, bytes) of that many damaged, wrong and malicious files."""
    chance = random.Random(seed)
    data, content = good.read_bytes(), read(good)
    content.pop("fingerprint")

    def packed(value: object) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    def signed(value: dict) -> bytes:
        try:
            mark = checkpoint.fingerprint(value)
        except Exception:  # junk that the fingerprint cannot take: any mark must do
            mark = "?"
        return packed(value | {"fingerprint": mark})

    for evil in (Canary(canary), Shell(canary), Evaluated(canary)):
        for protocol in range(5):
            yield f"raw pickle {protocol}", pickle.dumps(evil, protocol)
        yield "evil zip", packed(evil)
        yield "evil zip inside", packed(content | {"weights": evil, "fingerprint": "?"})
        yield "evil zip with a mark", packed(content | {"run": [evil], "fingerprint": checkpoint.fingerprint(content)})
        stream = io.BytesIO()
        torch.save(content | {"run": evil}, stream, _use_new_zipfile_serialization=False)
        yield "evil old format", stream.getvalue()
        yield "swapped pickle", archive_of(data, pickle.dumps(evil, 2))
    for version in (checkpoint.FORMAT_VERSION + 1, 10**9, "2", None, 1.5, True, -1, [1], torch.tensor([1, 2])):
        yield f"version {version}", signed(content | {"version": version})
    for other in ("model", "checkpoint", "", None, "two\nlines", torch.zeros(2, 2), ["model"]):
        if other != kind:
            yield f"kind {other}", signed(content | {"kind": other})
    for mark in ("another", "", None, 5, torch.zeros(3), [1]):
        yield f"format {mark}", signed(content | {"format": mark})
        yield f"fingerprint {mark}", packed(content | {"fingerprint": mark})
    yield "unmarked", packed(content)

    def text(letters: str) -> bytes:
        return b"X" + len(letters).to_bytes(4, "little") + letters.encode()

    # Lists within lists, deeper than any recursion goes, in a file with all the right marks
    pickled = b"\x80\2}" + text("format") + text(checkpoint.FORMAT) + b"s" + text("version") + b"K\1s"
    pickled += text("kind") + text(kind) + b"s" + text("fingerprint") + text("?") + b"s" + text("run")
    yield "deep", archive_of(data, pickled + b"]" * 20_000 + b"a" * 19_999 + b"s.")
    stream = io.BytesIO()
    np.savez(stream, weights=np.zeros(3))
    yield "NumPy", stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weights": 1}))
    yield "foreign zip", stream.getvalue()
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    yield "TorchScript", stream.getvalue()
    yield "plain tensors", packed(content["weights"])
    for junk in JUNK:
        yield "nothing but junk", packed(junk)
    for text in (b"", b"\0" * 100, b"environment:\n", b"PK\3\4", b"PK\5\6" + b"\0" * 18, b"\x80\2.", data + data):
        yield "no file of ours", text

    done = 0
    while True:
        what = done % 5
        if what == 0:
            yield "truncated", data[: chance.randrange(len(data))]
        elif what in (1, 2):
            damaged = bytearray(data)
            for _ in range(chance.choice((1, 1, 1, 8, 64))):
                place = chance.randrange(len(damaged))
                damaged[place] ^= 1 << chance.randrange(8)
            yield "flipped bits", bytes(damaged)
        elif what == 3 and chance.random() < 0.3:
            low, high = sorted(chance.randrange(len(data)) for _ in range(2))
            yield "zeros", data[:low] + bytes(high - low) + data[high:]
        else:
            damaged = copy.deepcopy(content)
            spot = damaged
            while True:
                keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
                key = chance.choice(keys)
                if not isinstance(spot[key], (dict, list)) or not spot[key] or chance.random() < 0.2:
                    break
                spot = spot[key]
            deed = chance.choice(("replaced", "replaced", "removed", "added"))
            if deed == "removed":
                del spot[key]
            elif deed == "replaced" or isinstance(spot, list):
                spot[key] = chance.choice(JUNK)
            else:
                spot[chance.choice(("unknown", 5, ""))] = chance.choice(JUNK)
            yield f"{deed} {key}", signed(damaged)
        done += 1
        if done == count:
            return


def play(model: ActorCriticModel, config: Config, task: Task) -> None:
    """Let a model act once."""
    vectors = torch.zeros(2, task.vector)
    observation = vectors if task.frame is None else torch.zeros(2, *task.frame, dtype=torch.uint8)
    timeline, step = Timeline(model, config.transformer, 2, 1, torch.device("cpu")), np.zeros(2, dtype=np.int64)
    with torch.no_grad():
        x = model.complete(model.embed(observation), vectors, torch.from_numpy(step))
        prediction = model(x, timeline.window(slice(0, 2), 0, step))
    assert prediction.value.shape == (2,)
    assert [branch.shape[1] for branch in prediction.policy.log_probs] == list(task.branches)


def test_damaged_and_malicious_models(toy_run, tmp_path):
    good, canary, path = toy_run / "models" / "run.nn", tmp_path / "canary", tmp_path / "model.nn"
    original, outcomes = read(good), {"refused": 0, "works, as it was": 0, "works, changed and signed": 0}
    for number, (deed, data) in enumerate(mutations(good, "model", canary, 400, 13)):
        path.write_bytes(data)
        try:
            model, config, task, _ = checkpoint.load_model(path, torch.device("cpu"))
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), (number, deed, str(error))
            assert len(str(error)) < 1000, (number, deed, str(error)[:300])
            outcomes["refused"] += 1
        else:
            play(model, config, task)
            unchanged = same(model.state_dict(), original["weights"]) and config.model_dump() == original["config"]
            assert unchanged or deed.startswith(("replaced", "removed", "added")), (number, deed)
            outcomes["works, as it was" if unchanged else "works, changed and signed"] += 1
        assert not canary.exists(), (number, deed)
    print(outcomes)
    assert sum(outcomes.values()) >= 500
    assert outcomes["refused"] > 400


def test_damaged_and_malicious_checkpoints(toy_run, tmp_path):
    """A checkpoint is refused with one line, or the run goes on from it."""
    good = checkpoint.list_checkpoints(toy_run / "checkpoints" / "run")[-1]
    canary, folder = tmp_path / "canary", tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    outcomes = {0: 0, 1: 0, 2: 0}
    for number, (deed, data) in enumerate(mutations(good, "checkpoint", canary, 200, 14)):
        (folder / good.name).write_bytes(data)
        with mock.patch.object(PPOTrainer, "train"):
            code, said = resume(tmp_path)
        assert_plain(said)
        assert code == 0 or (code == 2 and len(said.splitlines()) <= 2), (number, deed, said)
        outcomes[code] += 1
        assert not canary.exists(), (number, deed)
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
    print(outcomes)
    assert outcomes[2] > 150


@pytest.mark.parametrize("summaries", ["../outside", "/outside", "run/../../outside", "", 5, None])
def test_a_checkpoint_does_not_choose_where_to_write(summaries, toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path / "run")
    path = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints" / "run")[-1]
    content = read(path)
    content["run"]["summaries"] = f"{tmp_path}/outside" if summaries == "/outside" else summaries
    for mark in ("format", "version", "kind", "fingerprint"):
        content.pop(mark)
    checkpoint.save(path, "checkpoint", content)
    code, said = resume(tmp_path / "run", "--updates=7")
    assert code == 2 and said.count("\n") <= 2, said
    assert [place.name for place in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path, dirs_exist_ok=True)
    path = checkpoint.list_checkpoints(tmp_path / "checkpoints" / "run")[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, said = resume(tmp_path)
    assert code == 0, said
    assert "behind update 5" in said
    assert_same_result(tmp_path, toy_run)


# -------------------------------------------------------------------------------------------- 7: disks and folders

# Its checkpoints are larger than a megabyte, which is what the program tries to write before it starts.
LARGE = small_config(toy("Toy"), 6, hidden_layer_size=2000)
LARGE["transformer"] = LARGE["transformer"] | {"embed_dim": 128}


def test_file_size_limit(tmp_path):
    """From some moment on, files cannot become as large as a checkpoint."""
    config = write_config(tmp_path, LARGE)
    patch = f"""
import resource
from run import lifecycle
true = lifecycle.Keeper.at_intervals
def at_intervals(self, *arguments):
    if self.trainer.update == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({2**18}, resource.RLIM_INFINITY))
    if self.trainer.update == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return true(self, *arguments)
lifecycle.Keeper.at_intervals = at_intervals
"""
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    assert process.finish() == 0, process.text
    assert_plain(process.text)
    assert process.text.count("the checkpoint could not be written: File too large") == 2
    assert newest(tmp_path)["update"] == 6
    assert not leftovers(tmp_path)


def test_file_size_limit_until_the_end(tmp_path):
    config = write_config(tmp_path, LARGE)
    patch = f"""
import resource
from run import lifecycle
true = lifecycle.Keeper.at_intervals
def at_intervals(self, *arguments):
    if self.trainer.update == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({2**18}, {2**18}))
    return true(self, *arguments)
lifecycle.Keeper.at_intervals = at_intervals
"""
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    assert process.finish() in (1, 2), process.text
    assert_plain(process.text)
    assert "File too large" in process.text
    assert newest(tmp_path)["update"] == 2
    assert not leftovers(tmp_path)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # it was the process's own
    code, said = resume(tmp_path)
    assert code == 0, said


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 28 megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_fills_up(small_disk):
    """Nothing can be written any more, checkpoints, models and TensorBoard alike."""
    config = write_config(small_disk, LARGE | {"updates": 12, "checkpoint_interval": 2, "histogram_interval": 1})
    patch = """
import trainer
true = trainer.PPOTrainer.train_update
def train_update(self):
    if self.update == 3:
        try:
            with open("ballast", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            pass
    return true(self)
trainer.PPOTrainer.train_update = train_update
"""
    process = Process(small_disk, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    code = process.finish()
    assert_plain(process.text)
    assert code in (1, 2), process.text
    assert "No space left on device" in process.text
    assert not leftovers(small_disk)
    assert newest(small_disk)["update"] == 2
    (small_disk / "ballast").unlink()
    code, said = resume(small_disk, "--updates=4")
    assert code == 0, said
    assert [step for step, _ in scalars(small_disk)["losses/total"]] == [64, 128, 192, 256]


def test_full_disk_is_noticed_at_once(small_disk):
    config = write_config(small_disk, small_config(toy("Toy"), 2))
    (small_disk / "ballast").write_bytes(bytes(28 * 2**20 - 2**19))
    code, said = command(small_disk, "--config", config, "--cpu")
    assert code == 2
    assert said.count("\n") == 1 and "No space left on device" in said
    assert not leftovers(small_disk)


@pytest.mark.parametrize("name", ["models", "checkpoints", "summaries", "checkpoints/run", "models/run.nn"])
@pytest.mark.parametrize("obstacle", ["file", "read-only"])
def test_unwritable_folder(name, obstacle, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name == "models/run.nn":
        path.mkdir()
    elif obstacle == "file":
        path.write_text("in the way")
    elif os.path.exists("/proc/self"):
        path.symlink_to("/proc")
    code, said = run(tmp_path, small_config(toy("Toy"), 1), "--overwrite")
    if code == 0:  # what was in the way could be replaced
        assert path.exists() and (tmp_path / "models" / "run.nn").is_file()
        return
    assert code == 2
    assert said.count("\n") == 1 and name in said, said


@pytest.mark.parametrize("name, size", [("Toy", 1), ("Acted", 8)])
def test_a_long_episode_costs_a_checkpoint_little(name, size, tmp_path):
    """Actions take a byte per branch, or 4 per number, novelty 16 per observation; older files hold lists of them."""
    schedule = {"initial": 0.1, "final": 0.1, "power": 1.0, "max_decay_steps": 1}
    changes = {"n_workers": 1, "novelty_schedule": schedule}
    trainer = PPOTrainer(
        check_config(small_config(toy(name), 1, **changes), ""), "run", 1, Options(torch.device("cpu"))
    )
    steps, data = 10_000, np.random.default_rng(1).bytes
    empty = checkpoint.save_checkpoint(tmp_path, 1, lifecycle.state_of(trainer)).stat().st_size
    actions, seen = data(steps * size), [data(16) for _ in range(steps)]
    trainer.workers.episodes[0].actions, trainer.novelty.seen[0] = bytearray(actions), dict.fromkeys(seen)
    path = checkpoint.save_checkpoint(tmp_path, 2, lifecycle.state_of(trainer))
    assert path.stat().st_size < empty + steps * (size + 16) + 1000
    state = checkpoint.load(path, "checkpoint")
    trainer.workers.episodes[0].actions, trainer.novelty.seen[0] = bytearray(), {}
    lifecycle.restore(trainer, state)
    assert trainer.workers.episodes[0].actions == actions and list(trainer.novelty.seen[0]) == seen
    lifecycle.restore(trainer, state | {"seen": [seen]})
    assert list(trainer.novelty.seen[0]) == seen


def test_existing_run_is_kept(tmp_path):
    config = small_config(toy("Toy"), 1)
    assert run(tmp_path, config)[0] == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, said = run(tmp_path, config, "--run-id=run")
    assert code == 2
    assert said.count("\n") == 1 and "models/run.nn exists" in said and "--overwrite" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert run(tmp_path, config)[0] == 0  # without an id, a free one is taken
    assert (tmp_path / "models" / "run-2.nn").exists()
    assert {path: path.read_bytes() for path in files} == files
    before = read(tmp_path / "models" / "run.nn")
    code, said = run(tmp_path, config, "--overwrite", "--seed=6")
    assert code == 0, said
    assert read(tmp_path / "models" / "run.nn")["run"]["seed"] == 6 != before["run"]["seed"]
    assert newest(tmp_path)["seed"] == 6


def test_runs_that_start_together_keep_out_of_each_others_way(tmp_path):
    """Several seeds started by one line of shell, two of them under the same id by mistake."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small_config(toy("Toy"), 1)))
    ids = ("a", "b", "same", "same")
    runs = [Process(tmp_path, "--config=run.yaml", f"--run-id={name}", "--cpu", "--processes=1") for name in ids]
    codes = [process.finish() for process in runs]
    said = "".join(process.text for process in runs)
    assert codes[:2] == [0, 0] and sorted(codes[2:]) == [0, 2], said
    assert "same: another run took this id" in said or "same exists" in said
    assert sorted(path.stem for path in (tmp_path / "models").iterdir()) == ["a", "b", "same"]


def test_nothing_is_lost_to_a_run_that_cannot_start(tmp_path):
    """--overwrite replaces a run by another one, not by an error message."""
    config = small_config(toy("Toy"), 1)
    assert run(tmp_path, config)[0] == 0
    code, said = run(tmp_path, small_config(toy("Misspelt"), 1), "--overwrite")
    assert code == 2 and said.count("\n") == 1, said
    assert newest(tmp_path)["update"] == 1
    code, said = command(tmp_path, "--config=run.yaml", "--overwrite", "--device=cuda:77")
    assert code == 2 and said.count("\n") == 1, said
    assert newest(tmp_path)["update"] == 1


def test_a_run_that_could_not_start_is_in_nobodys_way(tmp_path):
    code, said = run(tmp_path, small_config(toy("Misspelt"), 1))
    assert code == 2 and said.count("\n") == 1, said
    code, said = run(tmp_path, small_config(toy("Toy"), 1))
    assert code == 0, said


def test_killed_before_the_first_checkpoint(toy_run, tmp_path):
    config = write_config(tmp_path, small_config(toy("Toy"), 6, checkpoint_interval=100))
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2")
    assert process.wait_for("update"), process.text
    process.kill()
    if not checkpoint.list_checkpoints(tmp_path / "checkpoints" / "run"):
        code, said = resume(tmp_path)
        assert code == 2 and said.count("\n") == 1 and "no checkpoint" in said
        code, said = run(tmp_path, small_config(toy("Toy"), 6), "--run-id=run")
        assert code == 2 and said.count("\n") == 1 and "--overwrite" in said
        code, said = run(tmp_path, small_config(toy("Toy"), 6), "--overwrite")
    else:
        code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


def test_killed_between_the_last_checkpoint_and_the_model(toy_run, tmp_path):
    shutil.copytree(toy_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models" / "run.nn").unlink()
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


@pytest.mark.parametrize("name", ["", "..", "../run", "a/b", "-run", ".run", "a b", "x" * 300])
def test_run_ids_that_are_no_names(name, tmp_path):
    for option in ("--run-id", "--resume"):
        code, said = command(tmp_path, f"{option}={name}", "--cpu", *["--seed=1"] * (option == "--run-id"))
        assert code == 2 and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("models", "checkpoints", "summaries")] == []


# ------------------------------------------------------------------------------------------------- 11: command line


def test_flags(tmp_path):
    """Each flag through the real command line."""
    config = write_config(tmp_path, small_config(MEMORY, 9, n_workers=2))
    first = Process(tmp_path, "--config", config, "--run-id=named", "--seed=3", "--updates=2", "--device=cpu",
                    "--processes=2", "--precision=bf16")  # fmt: skip
    assert first.finish() == 0, first.text
    assert "run named, seed 3, Minigrid on cpu" in first.text and "2 updates of 32 steps" in first.text
    assert "--model=models/named.nn" in first.text
    again = Process(tmp_path, "--config", config, "--run-id=named", "--seed=4", "--updates=1", "--cpu", "--overwrite",
                    "--processes=1", "--precision=bf16")  # fmt: skip
    assert again.finish() == 0, again.text
    assert read(tmp_path / "models" / "named.nn")["run"]["seed"] == 4
    more = Process(tmp_path, "--resume=named", "--updates=3", "--cpu", "--processes=1")
    assert more.finish() == 0, more.text
    assert "continuing named behind update 1" in more.text
    model = read(tmp_path / "models" / "named.nn")
    assert model["run"]["updates"] == 3 and model["run"]["seed"] == 4 and model["run"]["precision"] == "bf16"


@pytest.mark.slow
def test_compile(tmp_path):
    code, said = run(tmp_path, small_config(toy("Toy"), 2, prediction_coefficient=0.1), "--compile")
    assert code == 0, said
    checkpoint.load_model(tmp_path / "models" / "run.nn", torch.device("cpu"))


def test_bf16_is_used(toy_run, tmp_path):
    code, said = run(tmp_path, small_config(toy("Toy"), 6), "--precision=bf16")
    assert code == 0, said
    model, _, _, _ = checkpoint.load_model(tmp_path / "models" / "run.nn", torch.device("cpu"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not same(model.state_dict(), read(toy_run / "models" / "run.nn")["weights"])
    processor = Path("/proc/cpuinfo")  # of Linux: avx512_bf16, amx_bf16, bf16
    if processor.exists():
        assert ("emulates" in said) == ("bf16" not in processor.read_text())


def test_help(tmp_path):
    said = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0 and not said.stderr
    lines = said.stdout.rstrip("\n").split("\n")
    assert len(lines) <= 24, len(lines)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    example = next(line for line in lines if "python train.py" in line)
    assert (ROOT / re.search(r"--config[ =](\S+)", example)[1]).is_file(), example
    assert not list(tmp_path.iterdir())


WRONG = {
    "--seed=-1": "--seed: '-1' should be a whole number from 0",
    "--seed=x": "--seed: 'x' should be a whole number",
    "--updates=0": "--updates: '0' should be a whole number from 1",
    "--processes=0": "--processes: '0' should be",
    "--processes=1.5": "--processes: '1.5' should be",
    "--precision=fp8": "--precision: 'fp8' should be one of float32, bf16",
    "--device=tpu": "--device: 'tpu' should be cpu, cuda or cuda:N",
    "--device=cuda:999": "--device: 'cuda:999' is not here",
    "--config=nowhere.yaml": "nowhere.yaml: cannot be read",
    "--config=.": "cannot be read",
    "--run-id=a/b": "--run-id: 'a/b' should be",
    "--resume=unheard-of": "holds no checkpoint",
    "--unknown": "cannot read",
    "--seed": "cannot read",
    "surplus": "cannot read",
}


@pytest.mark.parametrize("argument, message", WRONG.items(), ids=WRONG)
def test_wrong_arguments(argument, message, tmp_path):
    config = [] if argument.startswith(("--config", "--resume")) else ["--config", write_config(tmp_path, LARGE)]
    code, said = command(tmp_path, *config, argument)
    assert code == 2
    assert said.count("\n") == 1 and message in said, said
    code, said = run(tmp_path, small_config(toy("Toy"), 1), "--run-id=run")
    assert code == 0, f"a wrong argument left something in the way: {said}"
