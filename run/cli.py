"""What the command lines share: arguments read and checked, errors as one line, exit codes, output, the device."""

import difflib
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from docopt import DocoptExit, docopt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kernels.allocator import keep_memory
from utils import EnvironmentFailure, UserError

# Where nothing else ends an episode, watching and evaluating cut it after this many steps.
MAX_STEPS = 10_000

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Processes = Annotated[int, Field(ge=1, le=4096)]
Precision = Literal["float32", "bf16"]
# Names files and folders; what may be started may be resumed, for both are checked by this.
RUN_ID = r"^\w[\w.-]{0,63}$"
RunId = Annotated[str, Field(pattern=RUN_ID)]


class Arguments(BaseModel):
    """Base of what command lines take: a field for each flag of the docstring."""

    model_config = ConfigDict(alias_generator=lambda name: f"--{name.replace('_', '-')}", extra="forbid", frozen=True)


class Computing(Arguments):
    """Base of what command lines take that compute on a device."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d{1,2})?)$")] | None = None
    cpu: bool = False


Given = TypeVar("Given", bound=Arguments)


def arguments_of(doc: str, kind: type[Given]) -> Given:
    """Return the command line that a docstring describes; UserError has a line for each argument that is wrong."""
    try:
        given = docopt(doc)
    except DocoptExit as error:
        name, found = os.path.basename(sys.argv[0]), " ".join(sys.argv[1:]) or "no argument"
        raise UserError(f"{name}: cannot read {found!r}; see --help") from error
    given.pop("--help", None)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UserError("\n".join(problems(error, given))) from error


def problems(error: ValidationError, given: Any, known: Sequence[str] = ()) -> list[str]:
    """Return a line for each key that pydantic found wrong; for an unknown one, it suggests the nearest known key."""
    lines: dict[str, str] = {}
    for found in error.errors(include_url=False, include_context=False):
        path, value = list[str](), given
        for part in found["loc"]:
            with suppress(LookupError, TypeError):  # names of types, which are nowhere in what was given
                value = value[part]
                path.append(str(part))
        text = found["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
        if found["type"] == "missing":
            path, text = [*path, str(found["loc"][-1])], "has to be given"
        elif found["type"] == "extra_forbidden":
            text = f"is not a key{nearest(path, known)}"
        elif found["type"] == "union_tag_invalid":
            path, text = [*path, "type"], f"should be one of {text.partition('tags: ')[2]}, not {value.get('type')!r}"
        elif path and not isinstance(value, dict):
            text = f"{text}, not {textwrap.shorten(repr(value), 60)}"
        lines.setdefault(".".join(path), text)  # of a value that fits none of several types, the first
    return [f"{key}: {line}" if key else line for key, text in lines.items() for line in text.splitlines()]


def nearest(path: list[str], known: Sequence[str]) -> str:
    """Return which of the known keys, dotted, an unknown one may have been meant to be."""
    prefix = "".join(f"{part}." for part in path[:-1])
    beside = [name.removeprefix(prefix) for name in known if name.rpartition(".")[0] == prefix[:-1]]
    near = difflib.get_close_matches(path[-1], beside, 1)
    near += [name for name in known if name.rpartition(".")[2] == path[-1]]  # it belongs elsewhere
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(beside)}" * bool(beside)


def to_file(*suffixes: str) -> AfterValidator:
    """Return the check of an option that names a file to be written, with one of these endings."""

    def check(path: Path) -> Path:
        """Return the path; ValueError, saying what it should be, where it is not that."""
        if path.is_dir():
            raise ValueError("should be a file")
        if not path.name.lower().endswith(suffixes):
            raise ValueError(f"should end in {' or '.join(suffixes)}")
        check_writable(path.parent)
        return path

    return AfterValidator(check)


def check_writable(folder: Path) -> None:
    """Make a folder and write a megabyte to it; UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from error


def step_limit(max_steps: int | None, task) -> int | None:
    """Return after how many steps an episode is cut: as --max-steps says, else if nothing else ends it, `MAX_STEPS`."""
    return MAX_STEPS if max_steps is None and task.max_episode_steps is None else max_steps


# ----------------------------------------------------------------------------------------------- errors and output


def command_line(main: Callable[[], None]) -> None:
    """Run a command line; exit with code 2 after printing the user's mistakes, with 1 where an environment failed."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        main()
    except (UserError, EnvironmentFailure) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes that torchrun started, one a machine speaks
            print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


class Lasting:
    """A standard stream, or None, which may be closed or full: then what it should show is lost, and nothing else."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream or open(os.devnull, "w")

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed, or cannot show a letter
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# ---------------------------------------------------------------------------------------------- where it computes


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(arguments: Computing):
    """Return the torch.device that --device and --cpu ask for; UserError where there is none such."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cpu" if arguments.cpu else arguments.device or ("cuda" if count else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device: {device} is not here; PyTorch {torch.__version__} sees {count} CUDA devices")
    return device


def use_cores(device, processes: int = 1) -> None:
    """Let PyTorch use this process's share of the cores on the CPU, and only one thread where a GPU does the work."""
    import torch

    if device.type == "cuda":
        torch.set_num_threads(1)
        return
    if "OMP_NUM_THREADS" not in os.environ:  # PyTorch reads it
        torch.set_num_threads(max(1, cores() // processes))
    keep_memory()
