"""What machines do to runs: kills, signals, dying environments, full disks, moved folders, damaged and malicious files.

Set FAULT_TESTS=full for the full number of kills.
"""

import contextlib
import copy
import io
import os
import pickle
import random
import re
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

import run.start
import train
import utils
import worker
from run import checkpoint
from run.cli import command_line
from run.config import check_config
from trainer import PPOTrainer
from utils import UserError
from worker import MAX_RESTARTS, Workers

ROOT = Path(__file__).parents[1]
KILLS = 10 if os.environ.get("FAULT_TESTS") == "full" else 2
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
        "updates": updates,
        "epochs": 2,
        "n_workers": 4,
        "worker_steps": 16,
        "n_mini_batch": 2,
        "hidden_layer_size": 16,
        "checkpoint_interval": 1,
        "transformer": {
            "num_blocks": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "memory_length": 12,
            "positional_encoding": "absolute",
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
        patch: Python that is executed before the program, to be able to disturb it at a certain point.
        streams: its standard output and error, by default nowhere and to be read here.
        environment: more variables.
    """

    def __init__(self, folder: Path, *arguments: str, patch: str = "", streams: dict | None = None, **environment: str):
        self.mark = f"FAULT_TEST={uuid.uuid4()}"
        command = [str(ROOT / "train.py")]
        if patch:
            command = ["-c", f"{patch}\nimport train\nfrom run import cli\ncli.command_line(train.main)"]
        name, _, value = self.mark.partition("=")
        environment = os.environ | {name: value, "PYTHONPATH": str(ROOT), "TOY_FOLDER": str(folder)} | environment
        streams = streams or {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self.handle = subprocess.Popen(
            [sys.executable, *command, *arguments], cwd=folder, env=environment, start_new_session=True,
            text=True, preexec_fn=use_one_core, **streams,
        )  # fmt: skip
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.ended = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.handle.stderr or ():
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
            assert not self.family(), "processes were left"
            self.reader.join(PATIENCE)
            return code
        finally:
            for pid in self.family():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def family(self) -> list[int]:
        """The processes that live and descend from it, itself included."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found


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


def start(folder: Path, config: dict, *arguments: str) -> tuple[int, str]:
    """Start a run named "run" on the CPU with seed 5 within this process."""
    options = ["--seed=5"] * (not any(argument.startswith("--seed") for argument in arguments))
    options += ["--processes=2"] * (not any(argument.startswith("--processes") for argument in arguments))
    return command(folder, "--config", write_config(folder, config), "--cpu", *options, *arguments)


def resume(folder: Path, *arguments: str, name: str = "run") -> tuple[int, str]:
    """Resume a run."""
    return command(folder, f"--resume={name}", "--cpu", "--processes=2", *arguments)


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


def events_of(folder: Path, name: str = "run", kind: str = "scalars") -> EventAccumulator:
    """The newest summaries of a run as TensorBoard shows them."""
    newest = sorted((folder / "summaries" / name).iterdir())[-1]
    return EventAccumulator(str(newest), {kind: 0}).Reload()


def scalars(folder: Path, name: str = "run") -> dict[str, list[tuple[int, float]]]:
    """The scalars of a run, without the measured times."""
    events = events_of(folder, name)
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("performance/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def read(path: Path) -> dict:
    """What a file of the product holds."""
    return torch.load(path, weights_only=True)


def newest(folder: Path, name: str = "run") -> dict:
    """The newest checkpoint of a run; it has to be intact."""
    return checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints" / name)[-1], "checkpoint")


def assert_same_result(folder: Path, undisturbed: Path, name: str = "run") -> None:
    """Weights, optimiser, memory, running episodes and curves are equal to the bit, and nothing is there twice."""
    models = [read(folder / "models" / f"{name}.nn"), read(undisturbed / "models" / "run.nn")]
    assert same(*(model["weights"] for model in models))
    ends = [newest(folder, name), newest(undisturbed)]
    for key in ends[0].keys() - {"run", "config"}:
        assert same(ends[0][key], ends[1][key]), key
    curves = scalars(folder, name)
    assert curves == scalars(undisturbed)
    for tag, points in curves.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    per_update = models[0]["config"]["n_workers"] * models[0]["config"]["worker_steps"]
    assert [step for step, _ in curves["losses/total"]] == [
        per_update * (n + 1) for n in range(models[0]["run"]["updates"])
    ]


def assert_plain(said: str) -> None:
    """Nobody sees a traceback."""
    assert "Traceback" not in said, said


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that nobody will ever look at."""
    return [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name.startswith(".evaluated")]


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
    code, said = start(folder, MEMORY_CONFIG)
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    """The folder of an undisturbed run on the toy."""
    folder = tmp_path_factory.mktemp("toy")
    code, said = start(folder, TOY_CONFIG)
    assert code == 0, said
    return folder


@pytest.fixture
def toy_copy(toy_run, tmp_path) -> Path:
    """A copy of it, to be disturbed."""
    shutil.copytree(toy_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


TOY_CONFIG = small_config(toy("Toy"), 6)
MEMORY_CONFIG = small_config(
    MEMORY,
    4 + 3 * KILLS,
    checkpoint_interval=2,
    novelty_schedule={"initial": 0.0, "final": 0.01, "power": 1.0, "max_decay_steps": 20},
)

# --------------------------------------------------------------------------------------------------------------- kills


def test_killed_and_resumed(memory_run, tmp_path):
    """The result is that of an undisturbed run, which nobody evaluated; nothing lives on without the trainer."""
    chance = random.Random(11)
    config = write_config(tmp_path, MEMORY_CONFIG | {"eval_interval": 3 * KILLS})
    new = ("--config", config, "--seed=5", "--overwrite", "--cpu", "--processes=2")
    for kill in range(KILLS + 1):
        started = bool(checkpoint.list_checkpoints(tmp_path / "checkpoints" / "run"))
        process = Process(tmp_path, *(("--resume=run", "--cpu", "--processes=2") if started else new))
        if kill == KILLS:
            assert process.finish() == 0, process.text
            break
        # The first kill comes before anything is saved, the others anywhere after the start of an update.
        assert process.wait_for("update" if kill else "run run", chance.randint(2, 3) if kill else 1), process.text
        time.sleep(chance.uniform(0, 0.1))
        process.handle.kill()
        assert process.finish() in (-signal.SIGKILL, 0)
    assert_same_result(tmp_path, memory_run)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_killed_while_saving(place, tmp_path, toy_run):
    """What is due with a checkpoint, models and histograms, belongs to the run as much as its weights."""
    patch = f"""
import os, signal
from run import checkpoint
true = checkpoint.os.{place}
def deadly(file, *rest):
    name = str(file) if isinstance(file, (str, checkpoint.Path)) else os.readlink(f"/proc/self/fd/{{file}}")
    if "checkpoint-000000003" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    return true(file, *rest)
checkpoint.os.{place} = deadly
"""
    config = write_config(tmp_path, TOY_CONFIG | {"histogram_interval": 1, "model_interval": 1})
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch)
    assert process.finish() == -signal.SIGKILL, process.text
    assert newest(tmp_path)["update"] == 2
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)
    assert not leftovers(tmp_path)
    assert len(list((tmp_path / "checkpoints" / "run").glob("model-*.nn"))) == 6
    events = events_of(tmp_path, kind="histograms")
    for tag in events.Tags()["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [64 * (n + 1) for n in range(6)], tag


def test_everything_but_the_trainer_killed(toy_run, tmp_path):
    """The system may kill what it likes: workers are replaced, the server that they are forked from too."""
    config = write_config(tmp_path, TOY_CONFIG | {"environment": toy("Slow")})
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2")
    assert process.wait_for("update", 2), process.text
    for pid in set(process.family()) - {process.handle.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.finish() == 0, process.text
    assert "replaying its episodes" in process.text
    assert_same_result(tmp_path, toy_run)


# --------------------------------------------------------------------------------------------- environments that break


def test_environment_takes_its_process_along(toy_run, toy_folder, tmp_path):
    code, said = start(tmp_path, TOY_CONFIG | {"environment": toy("ExitOnce")})
    assert code == 0, said
    assert len(list(toy_folder.iterdir())) == 2
    assert said.count("replaying its episodes") == 2
    assert_same_result(tmp_path, toy_run)


def test_environment_raises(toy_run, toy_folder, tmp_path):
    code, said = start(tmp_path, TOY_CONFIG | {"environment": toy("Raise")})
    assert code == 1
    assert said.count("Traceback") == 1 and "ArithmeticError: the toy is broken" in said
    where = re.search(r"environment (\d), reset seed (\d+), step (\d+)", said)
    section = check_config(TOY_CONFIG | {"environment": toy("Raise")}, "test").environment
    assert int(where[3]) == 9
    assert int(where[2]) == utils.training_seed(5, section, int(where[1]), 0)
    assert newest(tmp_path)["update"] == 0
    (toy_folder / "well").touch()
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("Exit", rf"died .*{MAX_RESTARTS + 1} times at the same step"),
        ("NotANumber", "observation is not finite"),
        ("InfiniteReward", "reward is not finite"),
        ("WrongShape", r"observation has the shape \(5,\), its space says \(3,\)"),
    ],
)
def test_environment_that_goes_wrong_every_time(name, fault, tmp_path):
    """It is named with its seed and step, and the state after the last update is saved."""
    code, said = start(tmp_path, TOY_CONFIG | {"environment": toy(name), "worker_steps": 8})
    assert code == 1, said
    assert_plain(said)
    assert re.search(fault, said) and re.search(r"environment \d, reset seed \d+, step 9", said), said
    assert newest(tmp_path)["update"] == 1 and "train.py --resume=run" in said


def test_environment_that_is_not_deterministic(tmp_path):
    code, said = start(tmp_path, small_config(toy("Random"), 4), "--updates=2")
    assert code == 0, said
    code, said = resume(tmp_path, "--updates=4")
    assert code == 0, said
    assert "are not deterministic and began fresh episodes" in said
    assert newest(tmp_path)["update"] == 4


# ---------------------------------------------------------------------------------------- same seed, same everything


def test_number_of_processes_does_not_matter(memory_run, tmp_path):
    code, said = start(tmp_path, MEMORY_CONFIG, "--processes=3")
    assert code == 0, said
    assert_same_result(tmp_path, memory_run)


def test_same_seed_same_run_other_seed_other_run(toy_run, tmp_path):
    for seed in (5, 6):
        (tmp_path / str(seed)).mkdir()
        assert start(tmp_path / str(seed), TOY_CONFIG, f"--seed={seed}")[0] == 0
    assert_same_result(tmp_path / "5", toy_run)
    models = [read(tmp_path / seed / "models" / "run.nn")["weights"] for seed in ("5", "6")]
    assert not any(torch.equal(models[0][name], models[1][name]) for name in models[0] if name.endswith("query.weight"))
    assert scalars(tmp_path / "5") != scalars(tmp_path / "6")


def test_a_model_knows_where_it_came_from(toy_copy):
    """Each start says by which code and where; the file holds nothing but the model."""
    with mock.patch("run.checkpoint._git_commit", lambda: "B"):
        assert resume(toy_copy, "--updates=7")[0] == 0
    model = read(toy_copy / "models" / "run.nn")
    about, (first, second) = model["run"], model["run"]["starts"]
    assert about["run_id"] == "run" and about["seed"] == 5 and about["updates"] == 7 and about["steps"] == 7 * 64
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert first["commit"].startswith(head or "unknown") and second["commit"] == about["commit"] == "B"
    assert (first["update"], second["update"]) == (0, 6)
    assert first["torch"] == torch.__version__ and first["numpy"] == np.__version__ and first["device"][:3] == "cpu"
    size = sum(weight.nbytes for weight in model["weights"].values())
    assert (toy_copy / "models" / "run.nn").stat().st_size < size + 400 * len(model["weights"]) + 10_000
    texts = events_of(toy_copy, kind="tensors")
    config = texts.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(config.strip("`")) == model["config"] | {"updates": 6}


def test_hyperparameters_are_those_that_were_chosen(toy_run):
    """Runs are compared by success and reward; what is as by default is not in the way."""
    from tensorboard.plugins.hparams import metadata

    found = events_of(toy_run).summary_metadata
    plugin = {tag: data.plugin_data.content for tag, data in found.items()}
    names = [info.name for info in metadata.parse_experiment_plugin_data(plugin["_hparams_/experiment"]).hparam_infos]
    metrics = metadata.parse_experiment_plugin_data(plugin["_hparams_/experiment"]).metric_infos
    assert [metric.name.tag for metric in metrics] == ["episode/success_mean", "episode/reward_mean"]
    assert {"seed", "environment.name", "learning_rate_schedule.initial"} <= {*names}
    assert "advantage_floor" not in names


# --------------------------------------------------------------------------------------------------------- being asked


@pytest.mark.parametrize(
    ("owner", "name", "count", "number", "update"),
    [
        (Workers, "start", 1, signal.SIGINT, 0),
        (Workers, "send", 40, signal.SIGTERM, 2),
        (run.start.StopRequest, "check_together", 10, signal.SIGHUP, 2),
        (checkpoint, "write_file", 3, signal.SIGUSR1, 3),
        (run.start.Run, "finish", 1, signal.SIGTERM, 6),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_asked_to_stop(owner, name, count, number, update, toy_run, tmp_path, monkeypatch):
    """The state after the last update is saved, whatever asks and whatever is going on."""
    true, calls = getattr(owner, name), []

    def ask(*arguments):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, ask)
        code, said = start(tmp_path, TOY_CONFIG | {"checkpoint_interval": 1 if owner is checkpoint else 100})
    assert_plain(said)
    assert not leftovers(tmp_path)
    assert newest(tmp_path)["update"] == update
    if update < 6:
        assert code == 130 and "python train.py --resume=run" in said, said
        code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(times, tmp_path):
    """Terminals send it to all processes: environments that hang have 10 s, the second does not wait for them."""
    config = write_config(tmp_path, small_config(toy("Hangs"), 100, worker_steps=8, checkpoint_interval=2 - times % 2))
    process = Process(tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2")
    assert process.wait_for("update"), process.text
    time.sleep(1)
    for _ in range(times):
        os.killpg(process.handle.pid, signal.SIGINT)
        time.sleep(1)
    code = process.finish()
    assert_plain(process.text)
    if times == 1:
        assert code == 1 and re.search(r"environment \d, reset seed \d+, step 9: hangs", process.text), process.text
        assert newest(tmp_path)["update"] == 1
    else:
        assert code == 130 and not checkpoint.list_checkpoints(tmp_path / "checkpoints" / "run"), process.text


# --------------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("place", ["value.bias", "policy_hidden.weight", "embedding.weight", "after"])
def test_bad_number_stops_the_run(place, toy_run, tmp_path, monkeypatch):
    """Whether a value, a log-probability, a gradient or the last step is not a number: no checkpoint holds it."""
    true, optimise = PPOTrainer.train_update, PPOTrainer.optimise

    def train_update(self):
        if self.update == 2 and place == "embedding.weight":
            self.model.embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
        elif self.update == 2 and place != "after":
            self.model.get_parameter(place).data.view(-1)[0] = float("nan")
        return true(self)

    def optimised(self):
        statistics = optimise(self)
        if self.update == 2 and place == "after":
            self.model.value.bias.data[0] = float("nan")
        return statistics

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "train_update", train_update)
        patch.setattr(PPOTrainer, "optimise", optimised)
        code, said = start(tmp_path, TOY_CONFIG)
    assert code == 1
    assert_plain(said)
    assert re.search("update 3, .* finite; .*checkpoints/run/checkpoint-000000002.pt", said), said
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path)["weights"].values())
    code, said = resume(tmp_path)
    assert code == 0, said
    assert_same_result(tmp_path, toy_run)


# ------------------------------------------------------------------------------------------------------- hostile files


class Evil:
    """A pickle that creates a file where it is executed."""

    def __init__(self, path: Path, how: str) -> None:
        self.does = {
            "call": (Path.touch, (path,)),
            "shell": (os.system, (f"touch {path}",)),
            "eval": (eval, (f"open({str(path)!r}, 'w')",)),
        }[how]

    def __reduce__(self):
        return self.does


DEEP: list = []
for _ in range(50):
    DEEP = [DEEP]
JUNK = [
    None, True, -1, 2**70, float("nan"), 1e300, "", "two\nlines", "x" * 10**5, b"bytes", [], {}, (), set(), [None] * 3,
    {"a": 1}, {1: {2: 3}}, 1j, torch.float32, torch.zeros(0), torch.zeros(3, 3), torch.zeros(2, dtype=torch.int64),
    torch.full((16, 16), float("nan")), torch.tensor(1.0), torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4).T,
    torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1).expand(10**6), torch.zeros(3, device="meta"), DEEP,
    torch.nn.Parameter(torch.zeros(2)),
]  # fmt: skip


def packed(value: object, digest: bool = True, **how) -> bytes:
    """A file of PyTorch's, with the digest that ours have."""
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    data = stream.getvalue()
    return data + checkpoint.xxhash.xxh3_128_digest(data) if digest else data


def with_pickle(data: bytes, pickled: bytes) -> bytes:
    """The same file with another pickle inside."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in source.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return target.getvalue() + checkpoint.xxhash.xxh3_128_digest(target.getvalue())


def mutations(good: Path, kind: str, canary: Path, count: int, seed: int):
    """Yield (what was done, bytes) of malicious, wrong and then that many damaged or changed files."""
    chance, data, content = random.Random(seed), good.read_bytes(), read(good)
    for how in ("call", "shell", "eval"):
        evil = Evil(canary, how)
        yield from ((f"raw pickle {protocol}", pickle.dumps(evil, protocol)) for protocol in range(5))
        yield "evil zip", packed(evil)
        yield "evil zip inside", packed(content | {"weights": evil, "run": [evil]})
        yield "evil first version", packed(content | {"run": evil, "version": 1}, digest=False)
        yield "evil old format", packed(content | {"run": evil}, _use_new_zipfile_serialization=False)
        yield "swapped pickle", with_pickle(data, pickle.dumps(evil, 2))
    for key, values in {
        "version": (checkpoint.FORMAT_VERSION + 1, "2", None, 1.5, True, -1, [1], torch.tensor([1, 2])),
        "kind": (
            "model" if kind == "checkpoint" else "checkpoint",
            "",
            None,
            "two\nlines",
            torch.zeros(2, 2),
            ["model"],
        ),
        "format": ("another", "", None, 5, torch.zeros(3), [1]),
    }.items():
        yield from ((f"{key} {value}", packed(content | {key: value})) for value in values)
    yield "no digest", packed(content, digest=False)

    def text(letters: str) -> bytes:
        return b"X" + len(letters).to_bytes(4, "little") + letters.encode()

    # Lists within lists, deeper than any recursion goes, in a file with all the right marks
    pickled = b"\x80\2}" + text("format") + text(checkpoint.FORMAT) + b"s" + text("version") + b"K\2s"
    pickled += text("kind") + text(kind) + b"s" + text("run")
    yield "deep", with_pickle(data, pickled + b"]" * 20_000 + b"a" * 19_999 + b"s.")
    stream = io.BytesIO()
    np.savez(stream, weights=np.zeros(3))
    yield "NumPy", stream.getvalue()
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    yield "TorchScript", stream.getvalue()
    yield from (("nothing but junk", packed(junk)) for junk in [content["weights"], *JUNK])
    for junk in (b"", b"\0" * 100, b"environment:\n", b"PK\3\4", b"PK\5\6" + b"\0" * 18, b"\x80\2.", data + data):
        yield "no file of ours", junk
    for number in range(count):
        if number % 5 == 0:
            yield "truncated", data[: chance.randrange(len(data))]
        elif number % 5 in (1, 2):
            damaged = bytearray(data)
            for _ in range(chance.choice((1, 1, 8, 64))):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            yield "flipped bits", bytes(damaged)
        else:
            yield changed_somewhere(copy.deepcopy(content), chance)


def changed_somewhere(content: dict, chance: random.Random) -> tuple[str, bytes]:
    """What was done to a file's content, and the file, with a digest that is right."""
    spot = content
    while True:
        key = chance.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
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
    return f"{deed} {key}", packed(content)


def test_damaged_and_malicious_models(toy_run, tmp_path):
    """Each is refused with one line, or is a model; nothing in it is executed."""
    good, canary, path = toy_run / "models" / "run.nn", tmp_path / "canary", tmp_path / "model.nn"
    original, refused, changed = read(good), 0, 0
    for number, (deed, data) in enumerate(mutations(good, "model", canary, 120, 13)):
        path.write_bytes(data)
        try:
            model, config, _, _ = checkpoint.load_model(path, torch.device("cpu"))
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), (number, deed, str(error))
            assert len(str(error)) < 1000, (number, deed, str(error)[:300])
            refused += 1
        else:
            unchanged = same(model.state_dict(), original["weights"]) and config.model_dump() == original["config"]
            assert unchanged or deed.startswith(("replaced", "removed", "added")), (number, deed)
            changed += 1
        assert not canary.exists(), (number, deed)
    assert refused > 150 and changed > 3, (refused, changed)


def test_damaged_and_malicious_checkpoints(toy_run, tmp_path, monkeypatch):
    """A checkpoint is refused with one line, or the run goes on from it."""
    good = checkpoint.list_checkpoints(toy_run / "checkpoints" / "run")[-1]
    canary, folder = tmp_path / "canary", tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    monkeypatch.setattr(PPOTrainer, "train", lambda self, run: run.lock.release())
    inspected = worker.inspect_environment(check_config(TOY_CONFIG, "").environment)
    monkeypatch.setattr(worker, "inspect_environment", lambda section: inspected)
    outcomes = {0: 0, 2: 0}
    for number, (deed, data) in enumerate(mutations(good, "checkpoint", canary, 60, 14)):
        (folder / good.name).write_bytes(data)
        code, said = resume(tmp_path)
        assert_plain(said)
        assert code == 0 or (code == 2 and len(said.splitlines()) <= 2), (number, deed, said)
        outcomes[code] += 1
        assert not canary.exists(), (number, deed)
    assert outcomes[2] > 100 and outcomes[0] > 0, outcomes


def test_a_damaged_checkpoint_gives_way_to_the_one_before(toy_copy, toy_run):
    path = checkpoint.list_checkpoints(toy_copy / "checkpoints" / "run")[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, said = resume(toy_copy)
    assert code == 0, said
    assert "after update 5" in said
    assert_same_result(toy_copy, toy_run)


# ---------------------------------------------------------------------------------------------------- disks, folders

# Its checkpoints are larger than a megabyte, which is what the program tries to write before it starts.
LARGE = small_config(toy("Toy"), 6, hidden_layer_size=2000)
LARGE["transformer"] = LARGE["transformer"] | {"embed_dim": 128}


@pytest.mark.parametrize("until", [5, 100])
def test_file_size_limit(until, tmp_path):
    """From the third update on files cannot become as large as a checkpoint, anywhere; for a while, or to the end."""
    patch = f"""
import resource
from run import start
true = start.Run.after_update
def after_update(self, state, scalars):
    limit = {2**18} if 3 <= state["update"] < {until} else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return true(self, state, scalars)
start.Run.after_update = after_update
"""
    config = write_config(tmp_path, LARGE)
    process = Process(
        tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2", patch=patch, TMPDIR=str(tmp_path)
    )
    code = process.finish()
    assert_plain(process.text)
    assert "File too large" in process.text
    assert (code, newest(tmp_path)["update"]) == ((0, 6) if until == 5 else (1, 2)), process.text
    assert not leftovers(tmp_path)
    assert resume(tmp_path)[0] == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 28 megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_fills_up(small_disk, tmp_path, monkeypatch):
    """The run goes on without its curves; its state goes where there is room, and it says where."""
    true = PPOTrainer.train_update

    def train_update(self):
        if self.update == 3:
            with contextlib.suppress(OSError), open("ballast", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return true(self)

    monkeypatch.setattr(PPOTrainer, "train_update", train_update)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    code, said = start(small_disk, LARGE | {"checkpoint_interval": 2, "histogram_interval": 1})
    assert code == 0, said
    assert_plain(said)
    assert "No space left on device" in said and f"written to {tmp_path / 'other' / 'run'}" in said
    assert newest(small_disk)["update"] == 2 and not leftovers(small_disk)
    place = tmp_path / "other" / "run"
    assert read(place / "run.nn")["run"]["updates"] == 6
    (small_disk / "ballast").unlink()
    shutil.copy(place / "checkpoint-000000006.pt", small_disk / "checkpoints" / "run")
    code, said = resume(small_disk, "--updates=7")
    assert code == 0, said
    assert newest(small_disk)["update"] == 7


def test_full_disk_is_noticed_at_once(small_disk):
    config = write_config(small_disk, small_config(toy("Toy"), 2))
    (small_disk / "ballast").write_bytes(bytes(28 * 2**20 - 2**19))
    code, said = command(small_disk, "--config", config, "--cpu")
    assert code == 2
    assert said.splitlines()[-1].endswith("No space left on device")
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "run.yaml"]


@pytest.mark.parametrize("name", ["models", "checkpoints", "summaries", "checkpoints/run", "models/run.nn", "/proc"])
def test_unwritable_folder(name, tmp_path):
    """It is named, and nothing is left of a start that failed."""
    path = tmp_path / ("models" if name == "/proc" else name)
    path.parent.mkdir(exist_ok=True)
    if name == "models/run.nn":
        path.mkdir()
    elif name == "/proc":
        path.symlink_to("/proc")
    else:
        path.write_text("in the way")
    before = sorted(tmp_path.rglob("*")) if name != "/proc" else []
    code, said = start(tmp_path, small_config(toy("Toy"), 1), "--overwrite")
    assert code == 2 and str(path.relative_to(tmp_path)) in said.splitlines()[-1], said
    assert_plain(said)
    assert name == "/proc" or sorted({*tmp_path.rglob("*")} - {tmp_path / "run.yaml", path.parent}) == sorted(
        {*before} - {path.parent}
    )


def test_existing_run_is_kept(tmp_path):
    config = small_config(toy("Toy"), 1)
    assert start(tmp_path, config)[0] == 0
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, said = start(tmp_path, config, "--run-id=run")
    assert code == 2 and said.count("\n") == 1 and "models/run.nn exists" in said and "--overwrite" in said
    assert start(tmp_path, config)[0] == 0  # without an id, a free one is taken
    assert (tmp_path / "models" / "run-2.nn").exists()
    # --overwrite replaces a run by another one, not by an error message.
    code, said = start(tmp_path, small_config(toy("Misspelt"), 1), "--overwrite")
    assert code == 2 and said.count("\n") == 1, said
    assert {path: path.read_bytes() for path in files if path.suffix != ".yaml"} == {
        path: data for path, data in files.items() if path.suffix != ".yaml"
    }
    code, said = start(tmp_path, config, "--overwrite", "--seed=6")
    assert code == 0, said
    assert read(tmp_path / "models" / "run.nn")["run"]["seed"] == 6 == newest(tmp_path)["seed"]
    assert len(scalars(tmp_path)["losses/total"]) == 1


def test_a_run_that_could_not_start_leaves_nothing(tmp_path):
    code, said = start(tmp_path, small_config(toy("Misspelt"), 1))
    assert code == 2 and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_copied_run_is_a_run_of_its_own(toy_run, toy_copy):
    """Its folder names it: events, model and checkpoints are its own, and the original's stay as they are."""
    shutil.copytree(toy_copy / "checkpoints" / "run", toy_copy / "checkpoints" / "mg-")
    code, said = resume(toy_copy, name="mg-")  # nothing but the model is left to do
    assert code == 0 and same(read(toy_copy / "models" / "mg-.nn")["weights"], newest(toy_run)["weights"]), said
    code, said = resume(toy_copy, "--updates=7", name="mg-")
    assert code == 0, said
    assert read(toy_copy / "models" / "mg-.nn")["run"]["run_id"] == "mg-"
    assert newest(toy_copy, "mg-")["update"] == 7
    assert [step for step, _ in scalars(toy_copy, "mg-")["losses/total"]] == [7 * 64]
    assert_same_result(toy_copy, toy_run)


def test_killed_between_the_last_checkpoint_and_the_model(toy_run, toy_copy):
    """Where the model is missing, or an earlier run's, it is written anew."""
    path = toy_copy / "models" / "run.nn"
    model = read(path)
    for other in (None, model["weights"] | {"value.bias": model["weights"]["value.bias"] + 1}):
        path.unlink()
        if other is not None:
            path.write_bytes(checkpoint.model_file(model | {"weights": other}, model["run"]))
        code, said = resume(toy_copy)
        assert code == 0, said
        assert_same_result(toy_copy, toy_run)
    code, said = resume(toy_copy)
    assert code == 0 and "nothing is left to do" in said


def disturbed_at(update: int, disturb, monkeypatch) -> None:
    """Let something happen before an update of a run within this process."""
    true = PPOTrainer.train_update

    def train_update(self):
        if self.update == update:
            disturb()
        return true(self)

    monkeypatch.setattr(PPOTrainer, "train_update", train_update)


def test_folders_that_go_away_while_it_trains(toy_run, tmp_path, monkeypatch):
    """Its folder is renamed, its models' removed: both go on where they can, and the moved run can be resumed."""

    def disturb():
        os.rename("checkpoints/run", "checkpoints/moved")
        os.rmdir("models")

    with monkeypatch.context() as patch:
        disturbed_at(3, disturb, patch)
        code, said = start(tmp_path, TOY_CONFIG)
    assert code == 0 and "checkpoints/run: is not where it was" in said, said
    assert_same_result(tmp_path, toy_run)
    assert newest(tmp_path, "moved")["update"] == 3
    code, said = resume(tmp_path, name="moved")
    assert code == 0 and same(newest(tmp_path, "moved")["weights"], newest(toy_run)["weights"]), said


def test_one_process_trains_a_run(toy_run, tmp_path, monkeypatch):
    """Neither --overwrite nor --resume gets hold of a run that trains; another run in its place keeps its files."""
    codes = []

    def disturb():
        arguments = ("--config=run.yaml", "--run-id=run", "--cpu")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for options in ((*arguments, "--overwrite"), ("--resume=run", "--cpu")):
            line = [sys.executable, str(ROOT / "train.py"), *options]
            codes.append(subprocess.run(line, env=environment, capture_output=True, text=True))
        os.rename("checkpoints/run", "checkpoints/moved")
        os.mkdir("checkpoints/run")
        Path("checkpoints/run/.lock").touch()

    disturbed_at(3, disturb, monkeypatch)
    code, said = start(tmp_path, TOY_CONFIG)
    assert code == 0, said
    for process in codes:
        assert process.returncode == 2 and "checkpoints/run: another process trains this run" in process.stderr
    assert [path.name for path in (tmp_path / "checkpoints" / "run").iterdir()] == [".lock"]
    assert same(newest(tmp_path, "run-2")["weights"], newest(toy_run)["weights"])
    assert (tmp_path / "models" / "run-2.nn").exists()


def test_output_that_cannot_be_written(toy_run, tmp_path):
    """A closed standard output and a full standard error cost nothing but themselves."""
    config = write_config(tmp_path, TOY_CONFIG)
    with open("/dev/full", "w") as full:
        process = Process(
            tmp_path, "--config", config, "--seed=5", "--cpu", "--processes=2",
            patch="import os; os.close(1)", streams={"stdout": subprocess.DEVNULL, "stderr": full},
        )  # fmt: skip
        assert process.finish() == 0
    assert_same_result(tmp_path, toy_run)


# --------------------------------------------------------------------------------------------------------- evaluations


def test_evaluations_beside_the_training(tmp_path):
    """All are logged at their steps that were not overtaken; the best model lies beside the last, with its numbers."""
    config = small_config(toy("Often"), 6, eval_interval=1, video_interval=6)
    code, said = start(tmp_path, config)
    assert code == 0, said
    (folder,) = (tmp_path / "summaries" / "run").glob("*/evaluation")
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    points = {event.step: event.value for event in events.Scalars("evaluation/success_mean")}
    assert 6 * 64 in points and set(points) <= {64 * (n + 1) for n in range(6)}
    best = read(tmp_path / "models" / "run-best.nn")["run"]
    assert best["evaluation"]["success"] == pytest.approx(max(points.values()))
    assert points[best["steps"]] == pytest.approx(best["evaluation"]["success"])
    assert not leftovers(tmp_path)
    assert "drawing an episode failed" in said or [event.step for event in events.Images("episode")] == [384]


# -------------------------------------------------------------------------------------------------------- command line


def test_flags(tmp_path):
    """Each flag through the real command line; a seed is drawn where none is given."""
    config = write_config(tmp_path, small_config(MEMORY, 9, n_workers=2))
    first = Process(tmp_path, "--config", config, "--run-id=named", "--updates=1", "--device=cpu", "--processes=2",
                    "--precision=bf16", "--set", "gamma=0.9")  # fmt: skip
    assert first.finish() == 0, first.text
    seed = int(re.search(r"run named, seed (\d+), Minigrid on cpu .* 1 updates of 32 steps", first.text)[1])
    processor = Path("/proc/cpuinfo")  # of Linux: avx512_bf16, amx_bf16, bf16
    assert not processor.exists() or ("emulated" in first.text) == ("bf16" not in processor.read_text())
    code, said = command(tmp_path, "--resume=named", "--updates=2", "--cpu", "--processes=1")
    assert code == 0 and "continuing named after update 1" in said, said
    model = read(tmp_path / "models" / "named.nn")
    assert model["run"]["updates"] == 2 and model["run"]["seed"] == seed and model["run"]["precision"] == "bf16"
    assert model["config"]["gamma"] == 0.9 and all(w.dtype != torch.bfloat16 for w in model["weights"].values())
    options = ("--config", config, "--run-id=next", "--init-from=models/named.nn", "--updates=1", "--cpu")
    learning_rate = "learning_rate_schedule={initial: 0, final: 0, max_decay_steps: 1}"
    code, said = command(tmp_path, *options, "--set", learning_rate)
    assert code == 0 and same(read(tmp_path / "models" / "next.nn")["weights"], model["weights"]), said
    code, said = command(tmp_path, *options, "--overwrite", "--set", "hidden_layer_size=8")
    assert code == 2 and "this config has it (8, 16)" in said.splitlines()[-1], said


@pytest.mark.slow
def test_compile(tmp_path):
    code, said = start(tmp_path, small_config(toy("Toy"), 2, prediction_coefficient=0.1), "--compile")
    assert code == 0, said
    checkpoint.load_model(tmp_path / "models" / "run.nn", torch.device("cpu"))


def test_help(tmp_path):
    """It fits on a small terminal, its example names a file that exists, and each flag is declared."""
    said = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0 and not said.stderr
    lines = said.stdout.rstrip("\n").split("\n")
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    example = next(line for line in lines if "python train.py" in line)
    assert (ROOT / re.search(r"--config[ =](\S+)", example)[1]).is_file(), example
    assert not list(tmp_path.iterdir())


WRONG = {
    "--seed=-1": "--seed: should be greater than or equal to 0",
    "--seed=--5": "--seed: should be a valid integer",
    "--updates=0": "--updates: should be greater than or equal to 1",
    "--processes=1.5": "--processes: should be a valid integer",
    "--precision=fp8": "--precision: should be 'float32' or 'bf16'",
    "--device=tpu": "--device: should match",
    "--device=cuda:99": "--device: cuda:99 is not here",
    "--config=nowhere.yaml": "nowhere.yaml: cannot be read",
    "--run-id=a/b": "--run-id: should match",
    "--run-id=-run": "--run-id: should match",
    "--run-id=" + "x" * 300: "--run-id: should match",
    "--resume=../run": "--resume: should match",
    "--resume=unheard-of": "there is no such folder",
    "--unknown": "cannot read",
    "--seed": "cannot read",
}


@pytest.mark.parametrize("argument, message", WRONG.items(), ids=lambda text: text[:20])
def test_wrong_arguments(argument, message, tmp_path):
    """One line, exit code 2, and nothing is left in the way."""
    config = [] if argument.startswith(("--config", "--resume")) else ["--config", write_config(tmp_path, LARGE)]
    code, said = command(tmp_path, *config, argument)
    assert code == 2 and said.count("\n") == 1 and message in said, said
    assert [path.name for path in tmp_path.iterdir() if path.name != "run.yaml"] == []
