"""What all tests share: a folder for what toy environments leave behind, hypothesis, and trainers."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from run.config import Config
from run.start import Options
from tests.walk import task_of
from trainer import PPOTrainer

# The processes of environments inherit it from the server that they are forked from, which starts only once.
os.environ["TOY_FOLDER"] = tempfile.mkdtemp(prefix="toys-")
atexit.register(shutil.rmtree, os.environ["TOY_FOLDER"], ignore_errors=True)

# The tests' products are so small that a second thread only waits, for very long where the cores are busy.
torch.set_num_threads(1)

settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("reproducible")


@pytest.fixture
def toy_folder() -> Path:
    """Return the folder for what toys want to remember beyond the end of their process, emptied."""
    folder = Path(os.environ["TOY_FOLDER"])
    for file in folder.iterdir():
        file.unlink()
    return folder


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module of the user's into the current folder, with an environment Mine-v0."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "mine.py").write_text(
            f"import os, random, sys, gymnasium\nimport numpy as np\nfrom tests.toy_environments import Toy\n{text}\n"
            "gymnasium.register('Mine-v0', entry_point=Mine, max_episode_steps=24)\n"
        )
        return "mine:Mine-v0"

    return write


@pytest.fixture
def started():
    """Return a function that makes a trainer, lets it go on from a state if there is one, and starts its workers."""
    trainers = []

    def make(config: Config, options: Options | None = None, state: dict | None = None) -> PPOTrainer:
        trainer = PPOTrainer(config, task_of(config.environment), 3, options or Options(torch.device("cpu")))
        trainers.append(trainer)
        if state is not None:
            trainer.load_state_dict(state)
        trainer.start_workers()
        return trainer

    yield make
    for trainer in trainers:
        trainer.workers.close()


@pytest.fixture
def sampled(started):
    """Return a function that starts a trainer, lets it learn from one rollout and sample another."""

    def make(config: Config) -> PPOTrainer:
        trainer = started(config)
        trainer.train_update()
        trainer.sample()
        return trainer

    return make
