"""What keeps a run: requests to stop, the state of a checkpoint, what is due at intervals, what is not finite."""

import copy
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from environments.contract import Task
from model import ActorCriticModel
from run.checkpoint import list_checkpoints, save_checkpoint, save_model, without_auxiliary
from run.config import Config
from run.distributed import Interrupted, Ranks
from run.logger import Logger
from run.options import PRECISIONS
from utils import EnvironmentFailure, UserError, reason_of
from worker import DIGEST_SIZE

if TYPE_CHECKING:
    from trainer import PPOTrainer


class Unwritable(Exception):
    """The disk is full or gone."""


class NonFinite(Exception):
    """A loss, a gradient or a prediction is not a number."""


class StopRequest:
    """Whether somebody asked the run to stop.

    Args:
        world: all processes of the run, by default this one; who asks one of them asks all.
    """

    def __init__(self, world: Ranks | None = None) -> None:
        self.world, self.asked = world or Ranks(), False

    def check(self) -> None:
        """Raise Interrupted if this process was asked."""
        if self.asked:
            raise Interrupted

    def check_together(self) -> None:
        """Raise Interrupted on all processes if any of them was asked; all have to call this at the same place."""
        if self.world.any(self.asked):
            raise Interrupted

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request to stop; a second SIGINT stops at once."""

        def request(number: int, frame: object) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Keeper:
    """Keeps what a trainer's run comes to: its checkpoints and its models.

    Args:
        trainer: whose run it is; its state is replaced by the checkpoint's.
        folder: where the folders models and checkpoints lie.
        checkpoint: the state to continue from, or None for a new run.

    Raises:
        UserError: if the checkpoint holds no run of the trainer's config.
    """

    def __init__(self, trainer: "PPOTrainer", folder: Path, checkpoint: dict | None) -> None:
        self.trainer, self.world, self.cannot_film = trainer, trainer.world, False
        self.checkpoints = folder / "checkpoints" / trainer.run["run_id"]
        self.model_path = folder / "models" / f"{trainer.run['run_id']}.nn"
        if checkpoint is not None:
            try:
                restore(trainer, checkpoint)
                state_of(trainer)
            except Exception as error:  # the file is ours by its marks, but holds something else
                found = f"the checkpoint holds no run of this config ({reason_of(error)})"
                raise UserError(f"{self.checkpoints}: {found}") from error
        self.boundary: dict = state_of(trainer)  # behind the last update

    def remember(self) -> None:
        """Take the trainer's state for that behind its last update."""
        self.boundary = {}  # freed before its successor is made: the two are as large as six models
        self.boundary = state_of(self.trainer)

    @contextmanager
    def nothing_lost(self) -> Iterator[None]:
        """Save the state behind the last update where a run is stopped or its environments fail."""
        try:
            yield
        except (Interrupted, EnvironmentFailure, UserError):
            self.try_checkpoint()
            raise
        except OSError as error:
            message = f"update {self.trainer.update}: cannot write any more: {error.strerror}"
            raise Unwritable(message) from error

    @contextmanager
    def log(self) -> Iterator[Logger | None]:
        """Open the run's log, on process 0."""
        trainer, logger = self.trainer, None
        with self.world.agree_on(OSError):
            if self.world.first:
                folder = trainer.options.folder / "summaries"
                logger = Logger(folder, trainer.config, trainer.run, trainer.update * trainer.samples)
        try:
            yield logger
        finally:
            if logger is not None:
                with suppress(OSError):
                    logger.close()

    def finish(self, logger: Logger | None) -> None:
        """Write the last checkpoint and the model."""
        state = whole_state(self.world, self.boundary)
        with self.world.agree_on(OSError):
            if logger is not None:
                save_checkpoint(self.checkpoints, self.trainer.update, state)
                self.save_model(self.model_path)
                logger.close()

    def try_checkpoint(self) -> None:
        """Write the state behind the last update; a failure is reported, and the older checkpoints stay intact."""
        state = whole_state(self.world, self.boundary)
        with self.world.agree_on():  # the others wait, lest torchrun ends all when the first of them has left
            if self.world.first:
                self._write(state)

    def _write(self, state: dict) -> None:
        try:
            save_checkpoint(self.checkpoints, state["update"], state)
        except OSError as error:
            print(f"{self.checkpoints}: the checkpoint could not be written: {error.strerror}", file=sys.stderr)

    def at_intervals(self, logger: Logger | None, scalars: dict[str, float]) -> None:
        """Log an update, and do what is due every so many of them, where there is a logger: on process 0."""
        config, update = self.trainer.config, self.trainer.update
        due = update % config.checkpoint_interval == 0
        state = whole_state(self.world, self.boundary) if due else {}
        with self.world.agree_on(OSError):
            if logger is None:
                return
            steps = update * self.trainer.samples
            logger.log(update, steps, scalars)
            if config.model_interval and update % config.model_interval == 0:
                self.save_model(self.checkpoints / f"model-{steps:012d}.nn")
            if config.histogram_interval and update % config.histogram_interval == 0:
                logger.histograms(steps, self.trainer.model)
            if config.video_interval and update % config.video_interval == 0:
                self._film(logger, steps)
            if due:  # last: a resumed run repeats nothing in front of it
                logger.flush()
                self._write(state)

    def _film(self, logger: Logger, steps: int) -> None:
        """Log an episode as a video; where that fails, say so once and go on."""
        trainer = self.trainer
        if trainer.options.film is None or self.cannot_film:
            return
        try:
            logger.video(steps, trainer.options.film(trainer.model, trainer.config, trainer.task, "episode"))
        except OSError:  # the disk is full
            raise
        except Exception as error:  # whatever an environment's own drawing does
            self.cannot_film = True
            print(f"\nno more videos: drawing an episode failed ({reason_of(error)})", file=sys.stderr)

    def save_model(self, path: Path) -> None:
        """Write the model as it is now."""
        trainer = self.trainer
        progress = {"updates": trainer.update, "steps": trainer.update * trainer.samples}
        save_model(path, trainer.model, trainer.config, trainer.run | progress)


def check_task(config: Config, task: Task) -> None:
    """Raise UserError where a config does not fit its task."""
    encoding = config.transformer.positional_encoding
    if task.max_episode_steps is None and encoding in ("absolute", "learned"):
        raise UserError(
            f"transformer.positional_encoding: {encoding!r} needs a longest episode, which this task does not have; "
            "allowed are '' and 'relative'"
        )
    if config.normalize_observations and not task.vector:
        raise UserError("normalize_observations: True needs vectors, this task shows frames; allowed is False")


def check_finite(trainer: "PPOTrainer", statistics: Tensor) -> None:
    """Raise NonFinite naming the first number of an update that is not finite.

    Args:
        trainer: whose update it was.
        statistics: (minibatches, names) of `PPOTrainer.optimise`.
    """
    found = ""
    if not torch.isfinite(trainer.buffer.values).all():
        found = "sampling: a predicted value"
    elif not torch.isfinite(trainer.buffer.log_probs).all():
        found = "sampling: a log-probability"
    elif not torch.isfinite(trainer.buffer.advantages).all():
        found = "sampling: an advantage"
    elif not torch.isfinite(statistics).all():
        bad = (~torch.isfinite(statistics)).cpu().numpy()
        minibatch = int(bad.any(axis=1).argmax())
        losses = [f"the {name} loss" for name in trainer.reports]
        names = [*losses, *(f"a gradient of {module}" for module in trainer.optimizer.modules), "the gradient norm"]
        name = names[bad[minibatch].argmax()]
        epoch, minibatch = divmod(minibatch, trainer.config.n_mini_batch)
        found = f"epoch {epoch + 1}, minibatch {minibatch + 1}: {name}"
    elif not torch.isfinite(trainer.optimizer.weights).all():
        found = "the last optimiser step: a weight"
    if found:
        saved = list_checkpoints(trainer.keeper.checkpoints)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been written"
        raise NonFinite(f"update {trainer.update + 1}, {found} is not finite; {last}")


def state_of(trainer: "PPOTrainer") -> dict[str, Any]:
    """Return a copy of all that the rest of a run depends on, with the environments of this process."""
    timeline = trainer.buffer.timeline
    return {
        "config": trainer.config.model_dump(),
        "seed": trainer.seed,
        "run": trainer.run,
        "update": trainer.update,
        "weights": copy.deepcopy(trainer.model.state_dict()),
        "auxiliary": copy.deepcopy(trainer.auxiliary.state_dict()),
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "memory": timeline.items[:, :, : timeline.length].clone(),
        "item_step": timeline.item_step[:, : timeline.length].clone(),
        "step": trainer.step.tolist(),
        "episodes": trainer.workers.state_dict(),
        "seen": [as_tensor(b"".join(seen)) for seen in trainer.novelty.seen],
        "finished": list(trainer.finished),
    }


def whole_state(world: Ranks, state: dict[str, Any]) -> dict[str, Any]:
    """Return what `state_of` returns with the environments of all processes, so that any number of them can go on."""
    if world.size == 1:
        return state
    own = {name: state[name] for name in ("step", "seen")} | state["episodes"]
    tensors = {"memory": state["memory"].transpose(0, 1).cpu(), "item_step": state["item_step"].cpu()}
    parts = world.gather(own | tensors)
    merged: dict[str, Any] = {name: [entry for part in parts for entry in part[name]] for name in own}
    merged |= {name: torch.cat([part[name] for part in parts]) for name in tensors}
    episodes = {name: merged.pop(name) for name in state["episodes"]}
    return state | merged | {"memory": merged["memory"].transpose(0, 1), "episodes": episodes}


def restore(trainer: "PPOTrainer", state: dict[str, Any]) -> None:
    """Let a trainer continue from what `state_of` returned."""
    weights, auxiliary = without_auxiliary(state["weights"])
    trainer.model.load_state_dict(weights)
    trainer.auxiliary.load_state_dict(state.get("auxiliary", auxiliary))
    trainer.optimizer.load_state_dict(state["optimizer"])
    timeline, own = trainer.buffer.timeline, trainer.world.share(len(state["step"]))
    rows = slice(own.start, own.stop)
    timeline.items[:, :, : timeline.length] = state["memory"][:, rows].to(trainer.device)
    timeline.item_step[:, : timeline.length] = state["item_step"][rows].to(trainer.device)
    trainer.update, trainer.finished = state["update"], state["finished"]
    trainer.run = {"precision": PRECISIONS[0]} | state["run"]  # checkpoints of earlier versions lack it
    # These become a path and lines; a file must not choose where else to write.
    if (
        not {str} >= {type(trainer.run[key]) for key in ("run_id", "device", "commit")}
        or not re.fullmatch(r"[\w.-]*\w/[\d-]+", trainer.run.get("summaries", "x/0"))
        or trainer.run["precision"] not in PRECISIONS
    ):
        raise ValueError("its description is none")
    trainer.step = np.array(state["step"][rows], dtype=np.int64)
    trainer.novelty.seen = [dict.fromkeys(digests_of(seen)) for seen in state["seen"][rows]]
    trainer.workers.load_state_dict({name: entries[rows] for name, entries in state["episodes"].items()})


def share_start(trainer: "PPOTrainer") -> None:
    """Let a run on all processes start with the weights of process 0."""
    for module in (trainer.model, trainer.auxiliary):
        weights = {name: weight.cpu() for name, weight in module.state_dict().items()}
        module.load_state_dict(trainer.world.from_first(weights))
    trainer.keeper.remember()


def start_from(trainer: "PPOTrainer", model: ActorCriticModel, path: Path) -> None:
    """Give a new run the weights of a model; UserError, which calls it by its path, where it has others."""
    own, given = trainer.model.state_dict(), model.state_dict()
    shapes = [{name: tuple(weight.shape) for name, weight in weights.items()} for weights in (own, given)]
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        here, there = (shape.get(name, "not there") for shape in shapes)
        if here != there:
            raise UserError(f"--init-from: {path}: {name} is {there}, this config has it {here}")
    trainer.model.load_state_dict(given)


def as_tensor(data: bytes | bytearray) -> Tensor:
    """Return a copy of bytes as a tensor: a million of them cost next to nothing in a checkpoint."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def digests_of(stored: Any) -> list[bytes]:
    """Return digests as novelty keeps them; older checkpoints hold a list of them."""
    if isinstance(stored, list):
        return stored
    data = stored.numpy().tobytes()
    return [data[first : first + DIGEST_SIZE] for first in range(0, len(data), DIGEST_SIZE)]
