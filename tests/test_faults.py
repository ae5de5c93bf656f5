"""What machines do to runs: kills, signals, broken environments, full disks, moved folders, bad files."""

import contextlib
import io
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import xxhash
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_flatten

import run.start
import train
import worker
from run import checkpoint
from run.cli import command_line
from run.distributed import Ranks
from tests.toy_environments import toy
from tests.walk import tiny
from trainer import PPOTrainer
from utils import UserError
from worker import Workers

ROOT = Path(__file__).parents[1]
# Of an update of a tiny config.
SAMPLES = 64
# Nothing here takes as long, unless it hangs.
PATIENCE = 120
START = ("--config=run.yaml", "--seed=5", "--cpu", "--processes=2")


TOY_CONFIG = tiny(toy("Toy"))


def write_config(folder: Path, config: dict) -> None:
    """Write a config into a folder for `START`. The run's id is then "run"."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


# ------------------------------------------------------------------------------------------------ running the product


class Process:
    """Python as a process of its own, in a session of its own; its command may begin with one of our command lines."""

    def __init__(self, folder: Path, *command: str, log: str = "said.txt", variables=(), **streams):
        self.mark, self.log = str(uuid.uuid4()), folder / log
        own = {"MARK": self.mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        if (ROOT / command[0]).is_file():
            command = (str(ROOT / command[0]), *command[1:])
        with open(self.log, "w") as said:
            self.handle = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=os.environ | own | dict(variables),
                start_new_session=True, **{"stdout": said, "stderr": said} | streams,
            )  # fmt: skip

    @property
    def text(self) -> str:
        """All that it said so far."""
        return self.log.read_text()

    def wait_for(self, words: str) -> None:
        """Wait until it has said something."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.text:
            assert self.handle.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def finish(self) -> int:
        """Wait for its end and return the exit code; no process that descends from it may live on."""
        try:
            code = self.handle.wait(PATIENCE)
            assert not psutil.wait_procs(self.family(), 20)[1], "processes were left"
            return code
        finally:
            self.end()

    def end(self) -> None:
        """Kill what is left."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def family(self) -> list[psutil.Process]:
        """The processes that live and descend from it, itself included."""
        everyone = psutil.process_iter(["environ"])
        return [process for process in everyone if (process.info["environ"] or {}).get("MARK") == self.mark]


def patched(patch: str) -> tuple[str, str]:
    """Return a command for train.py after Python that is to disturb it at a certain point."""
    return "-c", f"{patch}\nimport train\nfrom run import cli\ncli.command_line(train.main)"


def command(folder: Path, *arguments: object, program: ModuleType = train, code: int = 0) -> str:
    """Run a main program within this process, to end with an exit code; return what it said."""
    said, found = io.StringIO(), 0
    # TensorBoard orders the files of a run by the second of their creation. A process takes longer than that to start.
    events = [int(path.name.split(".")[3]) for path in folder.glob("summaries/*/*/events.out.*")]
    time.sleep(max(0.0, max(events, default=0) + 1 - time.time()))
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        mock.patch.object(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)]),
        mock.patch("torch.set_num_threads"),
    ):
        try:
            command_line(program.main)
        except SystemExit as end:
            found = int(end.code or 0)
    assert found == code, said.getvalue()
    return said.getvalue()


def start(folder: Path, config: dict, *arguments: str, code: int = 0) -> str:
    """Start a run named "run" on the CPU with seed 5 within this process."""
    write_config(folder, config)
    return command(folder, *START, *arguments, code=code)


def resume(folder: Path, *arguments: str, name: str = "run", code: int = 0) -> str:
    """Resume a run."""
    return command(folder, f"--resume={name}", "--cpu", "--processes=2", *arguments, code=code)


def disturb_call(owner: object, name: str, count: int, deed: Callable, monkeypatch) -> None:
    """Let something happen to what a function or method is called with, before the call of that number."""
    true, calls = getattr(owner, name), []

    def disturbed(*arguments):
        calls.append(0)
        if len(calls) == count:
            deed(*arguments)
        return true(*arguments)

    monkeypatch.setattr(owner, name, disturbed)


# -------------------------------------------------------------------------------------------------- comparing results


def same(one: object, other: object) -> bool:
    """Tell whether nested data with tensors are equal to the bit."""
    (leaves, layout), (others, other_layout) = tree_flatten(one), tree_flatten(other)
    return layout == other_layout and all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


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
    assert [step for step, _ in curves["losses/total"]] == [SAMPLES * (n + 1) for n in range(ends[0]["update"])]


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that nobody will ever look at."""
    return [path for path in folder.rglob(".*") if path.suffix != ".lock"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    """The folder of an undisturbed run on the toy."""
    folder = tmp_path_factory.mktemp("toy")
    start(folder, TOY_CONFIG)
    return folder


@pytest.fixture
def toy_copy(toy_run, tmp_path) -> Path:
    """A copy of it, to be disturbed."""
    shutil.copytree(toy_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


MEMORY_CONFIG = tiny(
    {"type": "Minigrid", "name": "MiniGrid-MemoryS9-v0", "max_episode_steps": 40},
    checkpoint_interval=2,
    novelty_schedule={"initial": 0.0, "final": 0.01, "max_decay_steps": 20},
)

# --------------------------------------------------------------------------------------------------------------- kills


# A kill while the fourth update is saved, when a model is being played.
KILL_AT_4 = """
import os, signal
from run import checkpoint
true = checkpoint.os.replace
def deadly(file, *rest):
    if "checkpoint-000000004" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    return true(file, *rest)
checkpoint.os.replace = deadly
"""


def test_killed_and_resumed(tmp_path):
    """The result is that of an undisturbed run, which nobody evaluated; nothing lives on without the trainer.

    What is due with a checkpoint, models and histograms, belongs to the run as much as its weights.
    """
    for folder in (undisturbed := tmp_path / "undisturbed", disturbed := tmp_path / "disturbed"):
        folder.mkdir()
    start(undisturbed, MEMORY_CONFIG)
    write_config(disturbed, MEMORY_CONFIG | {"eval_interval": 4, "histogram_interval": 1, "model_interval": 1})
    process = Process(disturbed, *patched(KILL_AT_4), *START)
    assert process.finish() == -signal.SIGKILL, process.text
    assert newest(disturbed)["update"] == 2
    resume(disturbed)
    assert_same_result(disturbed, undisturbed)
    assert not leftovers(disturbed)
    assert len(list((disturbed / "checkpoints" / "run").glob("model-*.nn"))) == 6
    events = events_of(disturbed, kind="histograms")
    for tag in events.Tags()["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [SAMPLES * (n + 1) for n in range(6)], tag


def test_what_is_missing_at_the_end_is_made_up_for(toy_copy, toy_run):
    """The model, of a run that was killed before it was written; updates, where the newest checkpoint is damaged."""
    (toy_copy / "models" / "run.nn").unlink()
    said = resume(toy_copy)
    assert "has finished its updates" in said, said
    assert_same_result(toy_copy, toy_run)
    path = checkpoint.list_checkpoints(toy_copy / "checkpoints" / "run")[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = resume(toy_copy)
    assert "continuing after update 5" in said, said
    assert_same_result(toy_copy, toy_run)


# ----------------------------------------------------------------------------------- it goes wrong, or is asked to stop


def test_an_environment_that_raises_can_be_mended(toy_run, toy_folder, tmp_path):
    """The state after the last update is saved: the run goes on to the result of an undisturbed one."""
    said = start(tmp_path, TOY_CONFIG | {"environment": toy("Raise")}, code=1)
    assert said.count("Traceback") == 1 and "ArithmeticError: the toy is broken" in said
    assert newest(tmp_path)["update"] == 0 and "train.py --resume=run" in said
    (toy_folder / "well").touch()
    resume(tmp_path)
    assert_same_result(tmp_path, toy_run)


def spoil_value(trainer: PPOTrainer, *_: object) -> None:
    """Make a weight, and with it values, something else than a number."""
    trainer.model.value.bias.data[0] = math.nan


def spoil_gradient(trainer: PPOTrainer) -> None:
    """Make a gradient something else than a number."""
    trainer.model.embedding.weight.register_hook(lambda gradient: gradient * math.nan)


def asks(number: signal.Signals) -> Callable:
    """Return what sends this process a signal."""
    return lambda *_: os.kill(os.getpid(), number)


NOT_FINITE = "update 3, .* finite; .*checkpoints/run/checkpoint-000000002.pt"
RESUMABLE = "stopped; to go on from .*: python train.py --resume=run"
DISTURBANCES = {
    "at the start": (Workers, "start", 1, asks(signal.SIGINT), 0, RESUMABLE),
    "sampling": (Workers, "send", 40, asks(signal.SIGTERM), 2, RESUMABLE),
    "hanging": (Workers, "send", 9, asks(signal.SIGINT), 0, r"environment \d, reset seed \d+, step 9: hangs, 0.3 s"),
    "learning": (Ranks, "any", 10, asks(signal.SIGHUP), 2, RESUMABLE),
    "saving": (checkpoint, "write_file", 3, asks(signal.SIGUSR1), 3, RESUMABLE),
    "at the end": (run.start.Run, "finish", 1, asks(signal.SIGTERM), 6, "The model is"),
    "value": (PPOTrainer, "train_update", 3, spoil_value, 2, NOT_FINITE),
    "gradient": (PPOTrainer, "train_update", 3, spoil_gradient, 2, NOT_FINITE),
    "last step": (PPOTrainer, "check_finite", 3, spoil_value, 2, NOT_FINITE),
}


@pytest.mark.parametrize(("owner", "name", "count", "deed", "update", "words"), DISTURBANCES.values(), ids=DISTURBANCES)
def test_what_ends_a_run_early_loses_nothing(owner, name, count, deed, update, words, toy_run, tmp_path, monkeypatch):
    """The state after the last good update is saved, whoever asks for the end and whatever is going on."""
    hangs, code = "hangs" in words, 0 if update == 6 else 130 if words == RESUMABLE else 1
    interval = 1 if name == "write_file" or words == NOT_FINITE else 100
    config = tiny(toy("Hangs" if hangs else "Toy"), checkpoint_interval=interval)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "STOP_SECONDS", 0.3)
        disturb_call(owner, name, count, deed, patch)
        said = start(tmp_path, config, code=code)
    assert re.search(words, said) and "Traceback" not in said and not leftovers(tmp_path), said
    assert newest(tmp_path)["update"] == update and not multiprocessing.active_children()
    if not hangs:
        resume(tmp_path)
        assert_same_result(tmp_path, toy_run)


def test_ctrl_c_twice(tmp_path):
    """Terminals send it to all processes; the second does not wait for environments that hang."""
    write_config(tmp_path, tiny(toy("Hangs"), updates=100, worker_steps=8, checkpoint_interval=100))
    process = Process(tmp_path, *patched("import worker; worker.STOP_SECONDS = 100"), *START)
    process.wait_for("update 1/")
    for _ in range(2):
        time.sleep(0.5)
        os.killpg(process.handle.pid, signal.SIGINT)
    assert process.finish() == 130 and "Traceback" not in process.text, process.text
    assert not checkpoint.list_checkpoints(tmp_path / "checkpoints" / "run")


# ------------------------------------------------------------------------------------------------------- hostile files


class Evil:
    """A pickle that creates a file where it is executed."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def packed(content: object, **how) -> bytes:
    """A file of PyTorch's, with the digest that ours have."""
    stream = io.BytesIO()
    torch.save(content, stream, **how)
    return stream.getvalue() + xxhash.xxh3_128_digest(stream.getvalue())


def bad_files(good: Path, kind: str, canary: Path) -> dict[str, bytes]:
    """Malicious, damaged and wrong files, by what was done."""
    data, content, evil = good.read_bytes(), read(good), Evil(canary)
    return {
        "pickle": pickle.dumps(evil) + xxhash.xxh3_128_digest(pickle.dumps(evil)),
        "evil inside": packed(content | {"weights": evil}),
        "truncated": data[: len(data) // 2],
        "other version": packed(content | {"version": checkpoint.FORMAT_VERSION + 1}),
        "other kind": packed(content | {"kind": "model" if kind == "checkpoint" else "checkpoint"}),
        "without weights": packed({key: value for key, value in content.items() if key != "weights"}),
        "other weights": packed(content | {"weights": {"value.bias": torch.zeros(2)}}),
        "other config": packed(content | {"config": content["config"] | {"gamma": 2.0}}),
    }


def test_bad_files(toy_copy, tmp_path):
    """Each is refused with one line, and nothing in it is executed."""
    canary, folder = tmp_path / "canary", toy_copy / "checkpoints" / "run"
    model = toy_copy / "models" / "run.nn"
    for deed, data in bad_files(model, "model", canary).items():
        (tmp_path / "bad.nn").write_bytes(data)
        with pytest.raises(UserError, match=rf"\A{tmp_path}/bad.nn: .*\Z"):
            checkpoint.load_model(tmp_path / "bad.nn", torch.device("cpu"))
        assert not canary.exists(), deed
    *earlier, newest = checkpoint.list_checkpoints(folder)
    for path in earlier:
        path.unlink()
    for deed, data in bad_files(newest, "checkpoint", canary).items():
        newest.write_bytes(data)
        said = resume(toy_copy, "--updates=7", code=2)
        assert said.startswith("checkpoints/run") and said.count("\n") == 1, (deed, said)
        assert not canary.exists(), deed


# ---------------------------------------------------------------------------------------------------- disks, folders

# Its checkpoints are larger than a megabyte, which is what the program tries to write before it starts.
LARGE = tiny(toy("Toy"), hidden_layer_size=400)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 28 megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_fills_up(small_disk, monkeypatch):
    """The run goes on without its curves, and says at its end that it failed and from where it can go on."""

    def fill(trainer):
        with contextlib.suppress(OSError), open("ballast", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with monkeypatch.context() as patch:
        disturb_call(PPOTrainer, "train_update", 4, fill, patch)
        said = start(small_disk, LARGE | {"checkpoint_interval": 2, "histogram_interval": 1}, code=1)
    assert "No space left on device" in said and "Traceback" not in said, said
    assert newest(small_disk)["update"] == 2 and not leftovers(small_disk)
    assert "the model could not be written; to go on from checkpoints/run/checkpoint" in said, said
    (small_disk / "ballast").unlink()
    said = resume(small_disk, "--updates=7")
    assert newest(small_disk)["update"] == 7, said


def test_unwritable_folder(tmp_path):
    """Whether nobody may write there, or a file is in the way."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run").write_text("in the way")
    (tmp_path / "models").symlink_to("/proc")
    for name in ("models", "checkpoints/run"):
        said = start(tmp_path, TOY_CONFIG, "--overwrite", code=2)
        assert said.count("\n") == 1 and f"{name}: cannot be written to" in said, said
        (tmp_path / name).unlink()


def test_existing_run_is_kept(tmp_path):
    """--overwrite replaces a run by another one, not by an error message, which leaves nothing."""
    config, wrong = tiny(toy("Toy"), updates=1), tiny(toy("Misspelt"))
    said = start(tmp_path, wrong, code=2)
    assert said.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["run.yaml"], said
    start(tmp_path, config)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".yaml"}
    said = start(tmp_path, config, "--run-id=run", code=2)
    assert said.count("\n") == 1 and "--run-id: run exists; choose another id, or --overwrite" in said
    start(tmp_path, config)  # without an id, a free one is taken
    assert (tmp_path / "models" / "run-2.nn").exists()
    start(tmp_path, wrong, "--overwrite", code=2)
    assert {path: path.read_bytes() for path in files} == files
    first = read(tmp_path / "models" / "run.nn")
    write_config(tmp_path, config)
    command(tmp_path, START[0], "--seed=6", "--cpu", "--overwrite")
    second = read(tmp_path / "models" / "run.nn")
    assert (first["run"]["seed"], second["run"]["seed"], newest(tmp_path)["seed"]) == (5, 6, 6)
    assert not same(first["weights"], second["weights"]) and len(scalars(tmp_path)["losses/total"]) == 1


def test_a_copied_run_is_a_run_of_its_own(toy_run, toy_copy):
    """Its folder names it: events, model and checkpoints are its own, and the original's stay as they are."""
    shutil.copytree(toy_copy / "checkpoints" / "run", toy_copy / "checkpoints" / "mg-")
    resume(toy_copy, name="mg-")  # nothing but the model is left to do
    assert same(read(toy_copy / "models" / "mg-.nn")["weights"], newest(toy_run)["weights"])
    resume(toy_copy, "--updates=7", name="mg-")
    assert read(toy_copy / "models" / "mg-.nn")["run"]["run_id"] == "mg-"
    assert newest(toy_copy, "mg-")["update"] == 7
    assert [step for step, _ in scalars(toy_copy, "mg-")["losses/total"]] == [7 * 64]
    assert_same_result(toy_copy, toy_run)


def test_a_run_keeps_its_id_while_it_trains(toy_run, tmp_path, monkeypatch):
    """Nobody else gets hold of it; its folder, renamed, and that of models, removed, are made anew; both can go on."""

    def disturb(trainer):
        for options in (("--config=run.yaml", "--run-id=run", "--overwrite"), ("--resume=run",)):
            said = command(tmp_path, *options, "--cpu", code=2)
            assert "checkpoints/run: another process trains this run" in said, said
        os.rename("checkpoints/run", "checkpoints/moved")
        os.rmdir("models")

    with monkeypatch.context() as patch:
        disturb_call(PPOTrainer, "train_update", 4, disturb, patch)
        start(tmp_path, TOY_CONFIG)
    assert_same_result(tmp_path, toy_run)
    assert newest(tmp_path, "moved")["update"] == 3
    said = resume(tmp_path, name="moved")
    assert same(newest(tmp_path, "moved")["weights"], newest(toy_run)["weights"]), said


SPEAKS = """
import os, sys
from run.cli import command_line
os.close(1)
command_line(lambda: [print("said", file=stream, flush=True) for stream in (sys.stdout, sys.stderr)])
"""


def test_output_that_cannot_be_written(tmp_path):
    """A closed standard output and a full standard error cost nothing but themselves."""
    with open("/dev/full", "w") as full:
        assert Process(tmp_path, "-c", SPEAKS, stderr=full).finish() == 0


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_model_knows_where_it_came_from(toy_copy):
    """Each start says by which code and where."""
    with mock.patch("run.checkpoint.git_commit", lambda: "B"):
        resume(toy_copy, "--updates=7")
    model = read(toy_copy / "models" / "run.nn")
    about, (first, second) = model["run"], model["run"]["starts"]
    assert about["run_id"] == "run" and about["seed"] == 5 and about["updates"] == 7 and about["steps"] == 7 * 64
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert first["commit"].startswith(head or "unknown") and second["commit"] == about["commit"] == "B"
    assert (first["update"], second["update"]) == (0, 6)
    assert first["torch"] == torch.__version__ and first["numpy"] == np.__version__ and first["device"][:3] == "cpu"
    texts = events_of(toy_copy, kind="tensors")
    config = texts.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(config.strip("`")) == model["config"] | {"updates": 6}


def test_evaluations_beside_the_training(tmp_path):
    """All are logged at their steps that were not overtaken; the best model lies beside the last, with its numbers."""
    said = start(tmp_path, tiny(toy("Often"), eval_interval=1, video_interval=6))
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
    """A seed is drawn where none is given, and what was chosen is kept by --resume."""
    write_config(tmp_path, tiny(toy("Toy"), n_workers=2))
    options = (START[0], "--updates=1", "--processes=2")
    said = command(tmp_path, *options, "--device=cpu", "--run-id=named", "--precision=bf16", "--set=gamma=0.9")
    seed = int(re.search(r"run named, seed (\d+), Gymnasium on cpu .* 1 updates of 32 steps", said)[1])
    said = command(tmp_path, "--resume=named", "--updates=2", "--cpu", "--processes=1")
    assert "continuing after update 1" in said, said
    model = read(tmp_path / "models" / "named.nn")
    assert model["run"]["updates"] == 2 and model["run"]["seed"] == seed and model["run"]["precision"] == "bf16"
    assert model["config"]["gamma"] == 0.9 and all(w.dtype != torch.bfloat16 for w in model["weights"].values())
    options += ("--run-id=next", "--init-from=models/named.nn", "--cpu")
    learning_rate = "learning_rate_schedule={initial: 0, final: 0, max_decay_steps: 1}"
    said = command(tmp_path, *options, "--set", learning_rate)
    assert same(read(tmp_path / "models" / "next.nn")["weights"], model["weights"]), said
    said = command(tmp_path, *options, "--overwrite", "--set", "hidden_layer_size=9", code=2)
    assert "--init-from: models/named.nn: size mismatch for policy_hidden.weight" in said.splitlines()[-1], said


WRONG = {
    "--seed=-1": "--seed: should be greater than or equal to 0",
    "--precision=fp8": "--precision: should be 'float32' or 'bf16'",
    "--device=cuda:99": "--device: cuda:99 is not here",
    "--config=nowhere.yaml": "nowhere.yaml: cannot be read",
    "--run-id=a/b": "--run-id: should match",
    "--resume=unheard-of": "checkpoints/unheard-of: holds no checkpoint",
    "--unknown": "cannot read",
}


@pytest.mark.parametrize("argument, message", WRONG.items(), ids=lambda text: text[:20])
def test_wrong_arguments(argument, message, tmp_path):
    """One line, exit code 2, and nothing is left in the way."""
    write_config(tmp_path, TOY_CONFIG)
    config = () if argument.startswith(("--config", "--resume")) else START[:1]
    said = command(tmp_path, *config, argument, code=2)
    assert said.count("\n") == 1 and message in said, said
    assert not [path.name for path in tmp_path.iterdir() if path.name != "run.yaml"]
