"""What all tests share: a folder for what toy environments leave behind, hypothesis, a trainer that has sampled."""

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
from trainer import PPOTrainer
from worker import inspect_environment

# The processes of environments inherit it from the server that they are forked from, which starts only once.
os.environ["TOY_FOLDER"] = tempfile.mkdtemp(prefix="toys-")
atexit.register(shutil.rmtree, os.environ["TOY_FOLDER"], ignore_errors=True)

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
def sampled():
    """Return a function that makes a trainer, lets it learn from one rollout and sample another."""
    trainers = []

    def make(config: Config, seed: int = 3) -> PPOTrainer:
        task, _ = inspect_environment(config.environment)
        trainer = PPOTrainer(config, task, seed, Options(torch.device("cpu")))
        trainers.append(trainer)
        trainer.start_workers()
        trainer.train_update()
        trainer.sample()
        return trainer

    yield make
    for trainer in trainers:
        trainer.workers.close()
