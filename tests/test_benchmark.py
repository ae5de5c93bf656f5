"""benchmark.py: sides that take turns, the environments alone, ranks, and what is said where it cannot be measured."""

import json
from pathlib import Path

import pytest
from test_faults import command
from test_ranks import Launch

import benchmark
from tests.toy_environments import toy

ROOT = Path(__file__).resolve().parent.parent
CHANGES = ("n_workers=2", "worker_steps=8", "epochs=1", "n_mini_batch=2", "transformer.num_blocks=1")
SMALL = [
    *(f"--set={change}" for change in CHANGES),
    *(f"--config={ROOT}/configs/poc_memory_env.yaml", "--cpu", "--processes=1", "--threads=1", "--updates=1"),
]


def test_versions_take_turns_with_their_environments(tmp_path):
    """Each is measured once, the first time aside; the toy raises where an action is not allowed."""
    task = f"--set=environment={toy('Masked')}"
    arguments = (*SMALL, task, f"--against={ROOT}", "--environments", "--output=found.json")
    said = command(tmp_path, *arguments, program=benchmark)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["poc_memory_env", f"poc_memory_env {ROOT}"]
    assert all(len(rows) == 1 and rows[0]["steps/s"] > 0 for rows in found.values())
    warm, turn = (lambda name: f"warming up {name}"), (lambda name: f"environments 1 of {name}")
    assert said.splitlines()[:4] == [say(name) for say in (warm, turn) for name in found] and "steps/s" in said


def test_ranks_measure_updates_together(tmp_path):
    """There is one table, and the profile names operators."""
    launch = Launch(tmp_path, 2, "benchmark.py", *SMALL, "--profile")
    assert launch.finish() == [0, 0] and len(launch.lines("CPU seconds")) == 1, "\n".join(launch.lines())
    assert launch.lines("aten::addmm")


@pytest.mark.parametrize("wrong", ("--against=nothing", "--set=nothing=1"))
def test_what_cannot_be_measured_is_one_line(wrong, tmp_path, capfd):
    """Whether it is this process that notices or that of a side."""
    said = command(tmp_path, *SMALL, wrong, program=benchmark, code=2) + capfd.readouterr().err
    assert "nothing" in said and "Traceback" not in said


def test_proportions_are_those_of_turns():
    """A machine that becomes slower changes medians, but not what one side takes of the other's time."""
    seconds = {"a": (1.0, 2.0, 9.0), "b": (2.0, 2.0, 9.0)}
    found = {name: [{"seconds": value} for value in values] for name, values in seconds.items()}
    assert [line.split()[-2:] for line in benchmark.table(found)[1:]] == [["2", "2"], ["1", "1"]]
