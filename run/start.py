"""A run: which one a command line means, how it is carried out, and all that keeps it from being lost."""

import itertools
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from environments.contract import Task
from run.checkpoint import compact, list_checkpoints, load_newest, model_file, provenance, save_checkpoint, write_file
from run.cli import RUN_ID, check_writable, cores
from run.config import Config, check_config, load_config
from run.distributed import Interrupted, Ranks
from run.evaluations import Evaluations
from run.logger import Logger
from utils import EnvironmentFailure, NonFinite, UserError

# So many environments with frames take turns in two halves on several cores, too: half a batch costs the policy more
# than half, which has to be less than what the other half of the environments takes.
OVERLAP_WORTH = 32
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last two: of clusters, before the end
MODELS, CHECKPOINTS, SUMMARIES = Path("models"), Path("checkpoints"), Path("summaries")


class StopRequest:
    """Whether somebody asked this rank to stop: `asked`."""

    asked = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn the first signal that asks to stop into a request; a second SIGINT stops at once."""

        def request(number: int, frame: object) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        previous = {number: signal.signal(number, request) for number in SIGNALS}
        if previous[signal.SIGHUP] is signal.SIG_IGN:  # by nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@dataclass
class Options:
    """How a run is carried out; nothing in here changes what is learned but for rounding.

    `processes` step the environments; `precision` is "float32", or "bf16" for matrix products.
    """

    device: torch.device
    processes: int = 1
    precision: str = "float32"
    compile: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    stop: StopRequest = field(default_factory=StopRequest)

    def overlaps(self, task: Task, n_workers: int) -> bool:
        """Return whether half of a run's environments step while the policy looks at the other half."""
        worth = task.frame is not None and n_workers >= OVERLAP_WORTH and cores() > 1
        return self.device.type == "cuda" or worth


class Run:
    """What surrounds a training: a folder with its checkpoints, whose name is that of the run; a log; models.

    It knows nothing of the trainer, whose `state` is plain data: a resumed run begins with the checkpoint's.
    """

    def __init__(
        self, run_id: str, config: Config, seed: int, options: Options, checkpoint: dict | None = None
    ) -> None:
        self.name, self.config, self.seed, self.options = run_id, config, seed, options
        self.resumed, self.ranks = checkpoint is not None, options.ranks
        self.model, self.folder = MODELS / f"{run_id}.nn", CHECKPOINTS / run_id
        self.state: dict[str, Any] = checkpoint or {"update": 0}  # after the last update
        self.command = f"{'python' if self.ranks.size == 1 else 'torchrun …'} train.py --resume={run_id}"
        self.ranks.how_to_go_on = f"; to go on from the last checkpoint: {self.command}"
        made_by = provenance(options.device)
        start = {"time": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}", "update": self.state["update"]}
        starts = checkpoint["run"]["starts"] if checkpoint else []
        self.about: dict[str, Any] = {"run_id": run_id, "seed": seed, "precision": options.precision} | made_by
        self.about["starts"] = [*starts, start | made_by]

    def tell(self, line: str) -> None:
        """Show a line once."""
        if self.ranks.first:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def open(self, state: dict[str, Any]) -> Iterator[None]:
        """Take the run's folders and let signals ask to stop; where the block ends early: save, tell and exit."""
        self.state, config = state, self.config
        with self.ranks.agree_on(UserError):
            if self.ranks.first:
                self._settle()
        after = f"continuing after update {state['update']}, " if self.resumed else ""
        self.tell(f"run {self.name}, seed {self.seed}, {config.environment.type} on {self.about['device']}, "
                  f"{after}{config.updates} updates of {config.samples:,} steps")  # fmt: skip
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
        """Keep the trainer's state after an update, log its scalars by tag, and do what is due."""
        self.state, update = state, state["update"]
        intervals = {name: getattr(self.config, f"{name}_interval") for name in
                     ("checkpoint", "model", "eval", "video", "histogram")}  # fmt: skip
        due = {name for name, interval in intervals.items() if interval and update % interval == 0}
        if self.ranks.first:
            self.log.log(update, scalars, state["weights"] if "histogram" in due else {})
            model = model_file(self._kept()) if due & {"model", "eval", "video"} else b""
            if "model" in due:
                with self._telling(self.folder):
                    write_file(self.folder / f"model-{update * self.config.samples:012d}.nn", model)
            with self._telling(self.log.folder):
                if due & {"eval", "video"}:
                    self.evaluations.offer(model, due & {"eval", "video"})
                self.evaluations.go_on()
        if "checkpoint" in due:  # last: a resumed run repeats nothing before it
            self._save()

    def finish(self) -> None:
        """Write the last checkpoint and the model, and wait for evaluations."""
        self._save()
        self.write_model()
        if self.ranks.first:
            with self._telling(self.log.folder):
                self.evaluations.finish(lambda: self.options.stop.asked)

    def write_model(self) -> None:
        """Write the model of the last update; SystemExit where that fails."""
        written = False
        with self._telling(self.model.parent):
            if self.ranks.first:
                write_file(self.model, model_file(self._kept()))
            written = True
        if not self.ranks.from_first(written):
            self.tell(f"the model could not be written; {self._how_to_go_on()}")
            sys.exit(1)

    def _how_to_go_on(self) -> str:
        last = list_checkpoints(self.folder)[-1:]
        return f"to go on from {last[0]}: {self.command}" if last else "no checkpoint could be written"

    def _kept(self) -> dict[str, Any]:
        """Return the state after the last update, with what is known about the run so far."""
        update = self.state["update"]
        return self.state | {"run": self.about | {"updates": update, "steps": update * self.config.samples}}

    def _save(self) -> None:
        """Write the state after the last update, with the environments of all ranks."""
        environments = joined(self.ranks.gather(compact(self.state["environments"])))
        with self.ranks.agree_on():  # the others wait, lest torchrun ends all when the first of them has left
            if self.ranks.first:
                with self._telling(self.folder):
                    save_checkpoint(self.folder, self._kept() | {"environments": environments})

    def _settle(self) -> None:
        """Make the folders and take the run's; UserError where that fails."""
        for place in (MODELS, SUMMARIES, self.folder):
            check_writable(place)
        # Beside the folder: it holds for the run's id, also where the folder is moved, removed or copied.
        self.lock = FileLock(CHECKPOINTS / f".{self.name}.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self.folder}: another process trains this run") from error
        best = MODELS / f"{self.name}-best.nn"
        if not self.resumed:  # what is there is an earlier run's
            for path in (*self.folder.glob("*.pt"), *self.folder.glob("*.nn"), self.model, best):
                path.unlink(missing_ok=True)
        self.log = Logger(SUMMARIES / self.name, self.config, self.about, self.state["update"])
        self.evaluations = Evaluations(self.log.folder / "evaluation", best)

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


def chosen_run(arguments: Any, ranks: Ranks, device: torch.device) -> Run:
    """Return the run that train.py's command line means: rank 0 reads and draws for all ranks."""
    chosen = None
    with ranks.agree_on(UserError):
        if ranks.first:
            chosen = found_run(arguments, ranks.restarts > 0)
    run_id, config, seed, checkpoint = ranks.from_first(chosen)
    config = config.model_copy(update={"updates": arguments.updates or config.updates})
    if config.n_workers % ranks.size:
        fitting = ", ".join(str(size) for size in range(1, config.n_workers + 1) if config.n_workers % size == 0)
        raise UserError(f"n_workers: {config.n_workers} environments cannot be divided among {ranks.size} ranks; "
                        f"allowed numbers of ranks are {fitting}")  # fmt: skip
    processes = arguments.processes or max(1, cores() // ranks.local_size)
    precision = arguments.precision or (checkpoint["run"]["precision"] if checkpoint else "float32")
    options = Options(device, processes, precision=precision, compile=arguments.compile, ranks=ranks)
    return Run(run_id, config, seed, options, checkpoint)


def found_run(arguments: Any, restarted: bool) -> tuple[str, Config, int, dict | None]:
    """Return id, config and seed of a run, and its newest checkpoint if it is to go on."""
    run_id = arguments.resume or free_run_id(arguments, restarted)
    folder = CHECKPOINTS / run_id
    if arguments.resume or (restarted and list_checkpoints(folder)):
        checkpoint, path = load_newest(folder)
        return run_id, check_config(checkpoint["config"], str(path)), checkpoint["seed"], checkpoint
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    return run_id, load_config(arguments.config, arguments.set), seed, None


def free_run_id(arguments: Any, restarted: bool) -> str:
    """Return the id of a new run, or of one that torchrun has started again; UserError where it is not free."""
    run_id = arguments.run_id or Path(arguments.config).stem
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and (arguments.overwrite or not arguments.run_id):
        raise UserError("torchrun's --max-restarts goes on with the run: it needs --run-id and no --overwrite")
    if not re.fullmatch(RUN_ID, run_id):
        raise UserError(f"--run-id: should match {RUN_ID!r}, not {run_id!r}")
    numbered = (f"{run_id}-{number}" if number > 1 else run_id for number in itertools.count(1))
    free = next(name for name in numbered if not (CHECKPOINTS / name).exists() and not (MODELS / f"{name}.nn").exists())
    if free != run_id and arguments.run_id and not (arguments.overwrite or restarted):
        raise UserError(f"--run-id: {run_id} exists; choose another id, or --overwrite, or --resume={run_id}")
    return run_id if arguments.overwrite or restarted else free
