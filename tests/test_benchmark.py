"""benchmark.py: sides that take turns, the environments alone, ranks, and what is said where it cannot be measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmark

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *(f"--set={change}" for change in ("worker_steps=8", "epochs=1", "n_mini_batch=2", "transformer.num_blocks=1")),
    *(f"--config={ROOT}/configs/poc_memory_env.yaml", "--cpu", "--processes=1", "--threads=1"),
]


def run(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """Start the command line in a folder, under torchrun where there are ranks."""
    start = [sys.executable] if ranks == 1 else ["torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [*start, f"{ROOT}/benchmark.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_versions_take_turns(tmp_path):
    """Each update of each version is measured, the first one aside, and the profile names operators."""
    done = run(tmp_path, *SMALL, f"--against={ROOT}", "--updates=2", "--profile", "--output=found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["poc_memory_env", f"poc_memory_env {ROOT}"]
    rows = [row for rows in found.values() for row in rows]
    assert len(rows) == 4 and all(value > 0 for row in rows for value in row.values())
    order = [line.split(" of ")[0] for line in done.stderr.splitlines() if line.startswith("update")]
    assert order == ["update 1", "update 1", "update 2", "update 2"]
    assert "aten::addmm" in done.stdout and "to the first's" in done.stdout


def test_environments_alone_take_allowed_actions_only(tmp_path):
    """The toy raises where an action is not allowed."""
    task = "--set=environment={type: Gymnasium, name: 'tests.toy_environments:Masked-v0'}"
    done = run(tmp_path, *SMALL, task, "--environments", "--updates=1")
    assert done.returncode == 0 and "steps/s" in done.stdout, done.stderr


def test_ranks_are_measured_together(tmp_path):
    done = run(tmp_path, *SMALL, "--updates=1", ranks=2)
    assert done.returncode == 0 and done.stdout.count("CPU seconds") == 1, done.stderr


@pytest.mark.parametrize("wrong", ("--against=nothing", "--set=nothing=1"))
def test_what_cannot_be_measured_is_one_line(wrong, tmp_path):
    done = run(tmp_path, *SMALL, wrong)
    assert done.returncode == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr


def test_proportions_are_those_of_turns():
    """A machine that becomes slower changes medians, but not what one side takes of the other's time."""
    seconds = {"a": (1.0, 2.0, 9.0), "b": (2.0, 2.0, 9.0)}
    found = {name: [{"seconds": value} for value in values] for name, values in seconds.items()}
    assert [line.split()[-2:] for line in benchmark.table(found)[1:]] == [["2", "2"], ["1", "1"]]
