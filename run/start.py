"""A run: which one a command line means, how it is carried out, and all that keeps it from being lost."""

import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, ValidationError

from environments.contract import Task
from run.checkpoint import (
    compact,
    fingerprint,
    list_checkpoints,
    load,
    load_newest,
    model_file,
    provenance,
    save_checkpoint,
    write_file,
)
from run.cli import RUN_ID, Precision, Seed, check_writable, cores, problems
from run.config import Config, load_config
from run.distributed import Interrupted, Ranks, check_alike, check_divisible
from run.evaluations import Evaluations
from run.logger import Logger
from utils import EnvironmentFailure, NonFinite, UserError

# So many environments with frames take turns in two halves on the CPU, too: half a batch costs the policy more than
# half, which has to be less than what the other half of the environments takes.
OVERLAP_WORTH = 32
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # the last two are what clusters send before the end
LOCK = ".lock"
Lock = BaseFileLock | None


class StopRequest:
    """Whether somebody asked the run to stop.

    Args:
        ranks: of the run, by default this one alone; who asks one of them asks all.

    Attributes:
        asked: whether this rank was.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks, self.asked = ranks or Ranks(), False

    def __call__(self) -> bool:
        """Return whether any rank was asked, as far as is known here; not to be called at every step."""
        return self.asked or self.ranks.stopping

    def check(self) -> None:
        """Raise Interrupted if this rank was asked."""
        if self.asked:
            raise Interrupted

    def check_together(self) -> None:
        """Raise Interrupted on all ranks if any of them was asked; all have to call this at the same place."""
        if self.ranks.any(self.asked):
            raise Interrupted

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn the first signal that asks to stop into a request; a second SIGINT stops at once."""

        def request(number: int, frame: object) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        previous = {number: signal.signal(number, request) for number in numbers}
        if previous.get(getattr(signal, "SIGHUP", None)) is signal.SIG_IGN:  # by nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@dataclass
class Options:
    """How a run is carried out; nothing in here changes what is learned but for rounding.

    Attributes:
        device: where the model and the buffer live.
        processes: how many processes step the environments.
        overlap: whether half of the environments step while the policy looks at the other half; by default where a GPU
            computes, or from `OVERLAP_WORTH` environments with frames on.
        precision: "float32", or "bf16" for matrix products.
        compile: whether to compile the model with torch.compile.
        folder: where the folders models, checkpoints and summaries lie.
        ranks: all that train together.
        stop: whether somebody asked the run to stop.
    """

    device: torch.device
    processes: int = 1
    overlap: bool | None = None
    precision: str = "float32"
    compile: bool = False
    folder: Path = Path(".")
    ranks: Ranks = field(default_factory=Ranks)
    stop: StopRequest = field(init=False)

    def __post_init__(self) -> None:
        self.stop = StopRequest(self.ranks)

    def overlaps(self, task: Task, n_workers: int) -> bool:
        """Return whether half of a run's environments step while the policy looks at the other half."""
        if self.overlap is not None:
            return self.overlap
        return self.device.type == "cuda" or (task.frame is not None and n_workers >= OVERLAP_WORTH)


class Run:
    """What surrounds a training: a folder with its checkpoints, whose name is that of the run; a log; models.

    Everything comes to it as plain data, so that it knows nothing of the trainer.

    Args:
        run_id: names the folders and the model.
        config: what is trained.
        seed: everything random derives from it.
        options: how it is carried out.
        checkpoint: what it goes on from, None for a new run.
        lock: of its folder, held, where there is that folder already.
    """

    def __init__(
        self,
        run_id: str,
        config: Config,
        seed: int,
        options: Options,
        checkpoint: dict | None = None,
        lock: Lock = None,
    ) -> None:
        self.name, self.config, self.seed, self.options = run_id, config, seed, options
        self.checkpoint, self.lock, self.ranks = checkpoint, lock, options.ranks
        self.state: dict[str, Any] = checkpoint or {"update": 0}  # after the last update
        self.ranks.how_to_go_on = f"; to go on from the last checkpoint: {self.command}"
        made_by = provenance(options.device)
        start = {"time": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}", "update": self.state["update"]}
        starts = checkpoint["run"]["starts"] if checkpoint else []
        self.about: dict[str, Any] = {"run_id": run_id, "seed": seed, "precision": options.precision} | made_by
        self.about["starts"] = [*starts, start | made_by]

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self.options.folder / "checkpoints" / self.name

    @property
    def model(self) -> Path:
        """The file of the trained model."""
        return self.options.folder / "models" / f"{self.name}.nn"

    @property
    def command(self) -> str:
        """What goes on with the run."""
        return f"{'python' if self.ranks.size == 1 else 'torchrun …'} train.py --resume={self.name}"

    def done(self) -> bool:
        """Return whether all updates are done, and the model is that of the last of them."""
        done = self.checkpoint is not None and self.checkpoint["update"] >= self.config.updates
        if done and self.ranks.first:
            try:
                done = fingerprint(load(self.model, "model")["weights"]) == fingerprint(self.checkpoint["weights"])
            except (UserError, LookupError, AttributeError, RuntimeError):  # there is none, or another's
                done = False
        return self.ranks.from_first(done)

    def tell(self, line: str) -> None:
        """Show a line once."""
        if self.ranks.first:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def open(self, state: dict[str, Any]) -> Iterator[None]:
        """Take the run's folders, let signals ask to stop, and lose nothing where the block ends early.

        Args:
            state: of the trainer, at the beginning.

        Raises:
            UserError: if the folders cannot be written to.
            SystemExit: where the run was stopped or failed, which has been told, its last state being saved.
        """
        self.state = state
        with self.ranks.agree_on(UserError):
            if self.ranks.first:
                self._settle()
        self.checkpoint = None  # as large as three models
        try:
            with self.options.stop.on_signals():
                yield
        except (Interrupted, EnvironmentFailure, NonFinite) as error:
            if not isinstance(error, NonFinite):
                self._save()
            self.tell(f"{error if str(error) else 'stopped'}; {self._how_to_go_on()}")
            sys.exit(130 if isinstance(error, Interrupted) else 1)
        except Exception:
            if self.ranks.size == 1:  # others may be anywhere
                self._save()
            raise
        finally:
            if self.ranks.first:
                self.evaluations.end()
                self.log.close()
                self.lock.release()

    def after_update(self, state: dict[str, Any], scalars: dict[str, float]) -> None:
        """Keep the state after an update, log it, and do what is due.

        Args:
            state: of the trainer.
            scalars: what is logged of the update, by tag.
        """
        self.state, update = state, state["update"]
        intervals = {name: getattr(self.config, f"{name}_interval") for name in
                     ("checkpoint", "model", "eval", "video", "histogram")}  # fmt: skip
        due = {name for name, interval in intervals.items() if interval and update % interval == 0}
        if self.ranks.first:
            self.log.log(update, scalars, state["weights"] if "histogram" in due else {})
            if "model" in due:
                path = self._home() / f"model-{update * self.config.samples:012d}.nn"
                self._write(lambda folder: write_file(folder / path.name, self._model()), path.parent)
            with self._telling(self.folder):
                if due & {"eval", "video"}:
                    self.evaluations.offer(self._home(), update, self._model(), due & {"eval", "video"})
                self.evaluations.go_on()
        if "checkpoint" in due:  # last: a resumed run repeats nothing before it
            self._save()

    def finish(self) -> None:
        """Write the last checkpoint and the model, and wait for evaluations; SystemExit where there is no place."""
        self._save()
        written = False
        if self.ranks.first:
            places = self.model.parent, self._home()
            written = self._write(lambda folder: write_file(folder / self.model.name, self._model()), *places)
            self.evaluations.finish(lambda: self.options.stop.asked)
        if not self.ranks.from_first(written):
            self.tell(f"the model could not be written; {self._how_to_go_on()}")
            sys.exit(1)

    def _how_to_go_on(self) -> str:
        last = list_checkpoints(self.folder)[-1:]
        return f"to go on from {last[0]}: {self.command}" if last else "no checkpoint could be written"

    def _about(self) -> dict[str, Any]:
        """Return what is known about the run so far."""
        update = self.state["update"]
        return self.about | {"run_id": self.name, "updates": update, "steps": update * self.config.samples}

    def _model(self) -> bytes:
        return model_file(self.state, self._about())

    def _save(self) -> None:
        """Write the state after the last update, with the environments of all ranks."""
        environments = joined(self.ranks.gather(compact(self.state["environments"])))
        with self.ranks.agree_on():  # the others wait, lest torchrun ends all when the first of them has left
            if self.ranks.first:
                state = self.state | {"environments": environments, "run": self._about()}
                self._write(lambda folder: save_checkpoint(folder, state), self._home())

    # -------------------------------------------------------------------------------------------------- where it lies

    def _settle(self) -> None:
        """Make the folders and take them; UserError where that fails, and they are gone again."""
        made: list[Path] = []
        summaries = self.options.folder / "summaries"
        try:
            for place in (self.model.parent, summaries, self.folder.parent, self.folder):
                if place == self.folder or not place.exists():
                    place.mkdir(exist_ok=self.lock is not None or place != self.folder)
                    made.append(place)
                check_writable(place)
            if self.model.is_dir():
                raise UserError(f"{self.model}: is a folder, should be a file")
            self._take(self.lock or locked(self.folder))
        except (OSError, UserError) as error:
            for folder in reversed(made):
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
            reason = f"{place}: cannot be written to: {getattr(error, 'strerror', None)}"
            raise UserError(str(error) if isinstance(error, UserError) else reason) from error
        for left in self.folder.glob(".evaluated-*"):  # by a run that was killed
            left.unlink()
        best = self.model.with_name(f"{self.name}-best.nn")
        if self.checkpoint is None:  # what is there is an earlier run's
            for path in (*self.folder.iterdir(), best):
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        self.log = Logger(summaries / self.name, self.config, self.about, self.state["update"])
        self.evaluations = Evaluations(self.log.folder / "evaluation", best)

    def _take(self, lock: BaseFileLock) -> None:
        self.lock, self.own = lock, os.stat(self.folder / LOCK)

    def _home(self) -> Path:
        """Return the run's folder, a new one where somebody has moved it or put another in its place."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self.folder / LOCK), self.own):
                return self.folder
        lost, self.name = self.folder, free_run_id(self.options.folder, self.name)
        with self._telling(self.folder):
            self.folder.mkdir(parents=True)
            self.lock.release()
            self._take(locked(self.folder))
            self.tell(f"\n{lost}: is not where it was; the run goes on in {self.folder}")
        return self.folder

    def _write(self, write: Callable[[Path], object], *folders: Path) -> bool:
        """Let a file be written into the first folder where it can be; the system's for temporary ones is the last."""
        for folder in (*folders, Path(tempfile.gettempdir()) / self.name):
            with self._telling(folder):
                write(folder)
                if folder != folders[0]:
                    self.tell(f"it was written to {folder}")
                return True
        return False

    @contextmanager
    def _telling(self, place: Path) -> Iterator[None]:
        """Say where something could not be written, and go on."""
        try:
            yield
        except OSError as error:
            self.tell(f"\n{place}: cannot be written to any more: {error.strerror}")


def joined(parts: list[Any]) -> Any:
    """Return the state of all environments from that of each rank's: nested dicts of lists and tensors (n, …)."""
    if isinstance(parts[0], dict):
        return {key: joined([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return [entry for part in parts for entry in part]


# ------------------------------------------------------------------------------------------------ which run is meant


class Described(BaseModel):
    """What a checkpoint says about its run."""

    precision: Precision
    starts: list[dict[str, Any]]


class Stored(BaseModel):
    """What has to be known of a checkpoint before a trainer takes the rest."""

    config: Config
    seed: Seed
    update: int
    run: Described


def chosen_run(arguments: Any, ranks: Ranks, device: torch.device) -> Run:
    """Return the run that a command line means: rank 0 reads and draws, all know.

    Args:
        arguments: of train.py.
        ranks: all that train together.
        device: of this rank.

    Raises:
        UserError: on all ranks, where anything is wrong or they are not alike.
    """
    config, lock, chosen = None, None, None
    with ranks.agree_on(UserError):
        if arguments.resume is None:
            config = load_config(arguments.config, arguments.set)
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and (arguments.overwrite or not arguments.run_id):
            raise UserError("torchrun's --max-restarts, which goes on with the run, needs its --run-id, no --overwrite")
    check_alike(ranks, config, arguments.model_dump(by_alias=True))
    with ranks.agree_on(UserError):
        if ranks.first:
            again = ranks.restarts and list_checkpoints(Path("checkpoints", str(arguments.run_id)))
            resumed = arguments.run_id if again else arguments.resume
            lock, *chosen = resumed_run(resumed) if resumed else new_run(config, arguments, ranks)
    run_id, config, seed, checkpoint = ranks.from_first(chosen)
    config = config.model_copy(update={"updates": arguments.updates or config.updates})
    check_divisible(ranks, config)
    processes = arguments.processes or max(1, cores() // ranks.local_size)
    precision = arguments.precision or (checkpoint["run"]["precision"] if checkpoint else "float32")
    options = Options(device, processes, precision=precision, compile=arguments.compile, ranks=ranks)
    return Run(run_id, config, seed, options, checkpoint, lock)


def new_run(config: Config, arguments: Any, ranks: Ranks) -> tuple[Lock, str, Config, int, None]:
    """Return lock, id, config and seed of a new run; UserError where its id is not free."""
    run_id = arguments.run_id or Path(arguments.config).stem
    if not re.fullmatch(RUN_ID, run_id):
        raise UserError(f"--run-id: should match {RUN_ID!r}, not {run_id!r}")
    if not arguments.run_id and not arguments.overwrite:
        run_id = free_run_id(Path("."), run_id)
    folder = Path("checkpoints", run_id)
    taken = [path for path in (Path("models", f"{run_id}.nn"), folder) if path.exists()]
    if taken and not arguments.overwrite and not ranks.restarts:
        raise UserError(f"--run-id: {taken[0]} exists; choose another id, or --overwrite, or --resume={run_id}")
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    return locked(folder) if folder.exists() else None, run_id, config, seed, None


def resumed_run(run_id: str) -> tuple[Lock, str, Config, int, dict]:
    """Return lock, id, config, seed and newest checkpoint of an interrupted run."""
    folder = Path("checkpoints", run_id)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; --resume takes the id of a started run")
    lock = locked(folder)  # first: what is read must not change
    checkpoint, path = load_newest(folder)
    try:
        stored = Stored.model_validate(checkpoint)
    except ValidationError as error:
        raise UserError(f"{path}: {problems(error, checkpoint)[0]}") from error
    print(f"continuing {run_id} after update {stored.update} from {path}", file=sys.stderr)
    return lock, run_id, stored.config, stored.seed, checkpoint


def locked(folder: Path) -> BaseFileLock:
    """Return the lock of a run's folder, which is now held; UserError where somebody else holds it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process trains this run") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from error
    return lock


def free_run_id(root: Path, name: str) -> str:
    """Return the first of name, name-2, name-3, … that no run has."""
    run_id, number = name, 2
    while any(path.exists() for path in (root / "models" / f"{run_id}.nn", root / "checkpoints" / run_id)):
        run_id, number = f"{name}-{number}", number + 1
    return run_id
