"""What the command lines share: arguments read and checked, errors as one line, exit codes, the device."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from docopt import DocoptExit, docopt

from kernels.allocator import keep_memory
from utils import EnvironmentFailure, UserError

# Where nothing else ends an episode, watching and evaluating cut it after this many steps.
MAX_STEPS = 10_000


def command_line(main: Callable[[], None]) -> None:
    """Run a command line: exit code 2 and one line per problem for what the user can put right, no traceback.

    The exit code is 1 where an environment fails while it is played.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes that torchrun started, one speaks
            print(error, file=sys.stderr)
        sys.exit(2)
    except EnvironmentFailure as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output is gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def arguments_of(doc: str) -> dict:
    """Return the arguments that a docstring in docopt's language describes; UserError where they are wrong."""
    try:
        return docopt(doc)
    except DocoptExit as error:
        given = " ".join(sys.argv[1:]) or "no argument"
        raise UserError(f"{os.path.basename(sys.argv[0])}: cannot read {given!r}; see --help") from error


def whole_number(arguments: dict, name: str, low: int = 0, high: int = 2**31 - 1) -> int | None:
    """Return an option as a whole number, None where it was not given; UserError where it is none or out of range."""
    text = arguments[name]
    if text is None:
        return None
    if not text.lstrip("-").isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name}: {text!r} should be a whole number from {low:,} to {high:,}")
    return int(text)


def one_of(arguments: dict, name: str, allowed: tuple[str, ...]) -> str:
    """Return an option that must be one of a few words; UserError where it is not."""
    if arguments[name] not in allowed:
        raise UserError(f"{name}: {arguments[name]!r} should be one of {', '.join(allowed)}")
    return arguments[name]


def step_limit(max_steps: int | None, task) -> int | None:
    """Return after how many steps an episode is cut, None where it is not.

    Args:
        max_steps: of --max-steps, None where it was not given.
        task: a `Task`; where it has no longest episode, `MAX_STEPS` hold by default.
    """
    return MAX_STEPS if max_steps is None and task.max_episode_steps is None else max_steps


def output_file(arguments: dict, name: str, suffixes: tuple[str, ...]) -> Path | None:
    """Return the file that an option names, None where it was not given; UserError where it could not be written.

    Args:
        arguments: of the command line.
        name: of the option.
        suffixes: allowed endings of the file; "" where the option takes none.
    """
    if arguments[name] is None:
        return None
    path = Path(arguments[name])
    if path.suffix.lower() not in suffixes and suffixes != ("",):
        raise UserError(f"{name}: {str(path)!r} should end in {' or '.join(suffixes)}")
    if not path.name or path.is_dir():
        raise UserError(f"{name}: {str(path)!r} should be a file, not a folder")
    check_writable(path.parent, f"{name}: {str(path.parent)!r}")
    return path


def check_writable(folder: Path, name: str) -> None:
    """Write a megabyte to a folder; UserError where that fails, which calls the folder by `name`."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
    except OSError as error:
        raise UserError(f"{name} cannot be written to: {error.strerror}") from error


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(arguments: dict):
    """Return the torch.device that --device and --cpu ask for; UserError where there is none such."""
    import torch

    if arguments["--cpu"] and arguments["--device"] not in (None, "cpu"):
        raise UserError(f"--cpu: contradicts --device={arguments['--device']}")
    name = "cpu" if arguments["--cpu"] else arguments["--device"]
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise UserError(f"--device: {name!r} should be cpu, cuda or cuda:N")
    if int(number or 0) >= count:
        raise UserError(f"--device: {name!r} is not here; PyTorch {torch.__version__} sees {count} CUDA devices")
    return torch.device(name)


def use_cores(device, processes: int = 1) -> None:
    """Let PyTorch use this process's share of the cores on the CPU, and only one thread where a GPU does the work.

    Args:
        device: where it computes.
        processes: of the run on this machine. OMP_NUM_THREADS decides in their place where it is set.
    """
    import torch

    threads = max(1, cores() // processes)
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        threads = max(1, int(os.environ["OMP_NUM_THREADS"]))
    torch.set_num_threads(1 if device.type == "cuda" else threads)
    if device.type == "cpu":
        keep_memory()
