"""Where a run's files go: ids, folders, and whether they can be written to."""

import shutil
from pathlib import Path

from run.cli import check_writable
from utils import UserError


def run_paths(run_id: str) -> tuple[Path, Path]:
    """Return where a run's model and its checkpoints go."""
    return Path("models") / f"{run_id}.nn", Path("checkpoints") / run_id


def free_run_id(name: str) -> str:
    """Return the first of name, name-2, name-3, … that no run has."""
    run_id, number = name, 2
    while any(path.exists() for path in run_paths(run_id)):
        run_id, number = f"{name}-{number}", number + 1
    return run_id


def make_room(checkpoints: Path, overwrite: bool) -> None:
    """Create the run's folder, once nothing can go wrong any more; if to `overwrite`, in place of an earlier run's."""
    if overwrite:
        shutil.rmtree(checkpoints, ignore_errors=True)
    try:
        checkpoints.mkdir()
    except FileExistsError as error:
        raise UserError(f"{checkpoints}: another run took this id just now; choose another --run-id") from error
    except OSError as error:
        raise UserError(f"{checkpoints}: cannot be created: {error.strerror}") from error


def check_run_id(run_id: str) -> None:
    """Raise UserError unless a run id can be the name of a file."""
    if not run_id or run_id.startswith((".", "-")) or not all(c.isalnum() or c in "._-" for c in run_id):
        raise UserError(f"--run-id: {run_id!r} should be letters, digits, '.', '_' and '-'")


def make_folder(folder: Path) -> None:
    """Create a folder where there is none; UserError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from error
    check_writable(folder, f"{folder}:")
