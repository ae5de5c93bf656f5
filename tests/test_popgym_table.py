"""What the table of POPGym's tasks is made of: which runs, how long, and what they reached."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from run.config import load_config
from tools.popgym_table import COLUMNS, changes_of_length, chosen_tasks, lines, main
from tools.runs import Failed, Job, Rows, carry_out
from utils import UserError

PUBLISHED = {
    name: {"task": name, "gru_2023": "0.1", "best": "0.5", "method": "GRU"} for name in ("AEasy", "BEasy", "CEasy")
}


def row(task: str, seed: int, value: float) -> dict:
    """What a run came to: the same by all figures, but for MMER."""
    figures = dict.fromkeys(("mmer_65536", "reward_mean", "reward_low", "reward_high"), value) | {"mmer": 9}
    return {"task": task, "seed": seed, "steps": 100, "seconds": 3, "setting": "s"} | figures


def test_two_tables_in_one_file_lose_nothing_and_count_what_is_near(tmp_path):
    """Rows are added to those that others wrote; a task counts from .005 below the best, whatever its MMER."""
    first, second = (Rows(tmp_path / "table.csv", COLUMNS, keys=2) for _ in range(2))
    first.add(row("AEasy", 1, 0.3))
    second.add(row("AEasy", 2, 0.9))
    first.add(row("AEasy", 2, 0.6894))
    first.add(row("BEasy", 1, 0.4944))
    rows = Rows(tmp_path / "table.csv", COLUMNS, keys=2).rows
    assert [(*key, found["mmer_65536"]) for key, found in rows.items()] == [
        ("AEasy", "1", "0.3"), ("AEasy", "2", "0.6894"), ("BEasy", "1", "0.4944")
    ]  # fmt: skip
    text = "\n".join(lines(list(rows.values()), PUBLISHED))
    assert "| AEasy | 2 | 100 | 0.495 ± 0.275 | 0.495 ± 0.275 | 9.000 ± 0.000 | 0.1 | 0.5 GRU |" in text
    assert "of 3 tasks: 1 by the mean over 65,536 steps and 1 by the final evaluation." in text


def test_jobs_are_carried_out_one_on_each_core(tmp_path, monkeypatch):
    """A run without checkpoints starts, another goes on; one that fails is named, and the others go on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "b").mkdir(parents=True)
    (tmp_path / "checkpoints" / "b" / "checkpoint-000000001.pt").touch()
    (tmp_path / "train.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit('broken' in sys.argv)\n")
    done = []
    jobs = [Job("a", ("--seed=1",), 5), Job("c", ("broken",), 5), Job("b", ("--seed=2",), 5)]
    assert not carry_out(jobs, lambda job, core: done.append(job.run_id))
    assert sorted(done) == ["a", "b"]
    said = [(tmp_path / "summaries" / f"{name}.log").read_text().split()[:2] for name in "ab"]
    assert said == [["--run-id=a", "--overwrite"], ["--resume=b", "--cpu"]]

    def fail(job, core):
        raise Failed("no episode has ended")

    assert not carry_out(jobs[:1], fail) and carry_out([], fail)


def test_names_of_tasks():
    """Whole names, or parts of them; those that fit nothing are refused."""
    known = ["NoisyCartEasy", "CartEasy", "CartHard"]
    assert chosen_tasks("", known) == known and chosen_tasks("Easy", known) == known[:2]
    assert chosen_tasks("CartEasy", known) == ["CartEasy"] and chosen_tasks("Noisy,Hard", known) == known[::2]
    for text, wrong in (("Boat", "Boat"), ("CartHard,Boat", "Boat"), ("Easy,", "")):
        with pytest.raises(UserError, match=f"--tasks: no task's name contains '{wrong}'; there are NoisyCartEasy, "):
            chosen_tasks(text, known)


def test_what_is_no_table_is_refused(monkeypatch, tmp_path):
    """A config of another environment, and a file with other columns."""
    monkeypatch.setattr(sys, "argv", ["popgym_table", "--config=configs/minigrid.yaml"])
    with pytest.raises(UserError, match="--config: configs/minigrid.yaml: environment.type is Minigrid, should be Gym"):
        main()
    for text in ("task,steps\nA,1\n", f"{','.join(COLUMNS)}\nA,1\n"):
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(UserError, match=r"table.csv: should have the columns task, seed"):
            Rows(tmp_path / "table.csv", COLUMNS, keys=2)


def test_a_longer_run_has_longer_schedules():
    """Twice the updates: at twice the update, schedules are where they were."""
    config = load_config("configs/popgym.yaml")
    assert changes_of_length(config, config.updates) == []
    changes = [text.removeprefix("--set=") for text in changes_of_length(config, 2 * config.updates)]
    longer = load_config("configs/popgym.yaml", changes)
    assert longer.updates == 2 * config.updates
    for update in range(0, 250, 50):
        assert longer.scheduled("gamma", 2 * update) == pytest.approx(config.scheduled("gamma", update))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_trainings_stop_with_the_table(tmp_path):
    """However it ends: a training that went on would write beside the one that resumes it."""
    (tmp_path / "train.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    (tmp_path / "table.py").write_text("from tools.runs import command\ncommand('train.py', core=-1, log='run')\n")
    place = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    table = subprocess.Popen([sys.executable, "table.py"], cwd=tmp_path, env=place)
    said, until = tmp_path / "summaries" / "run.log", time.monotonic() + 60
    while not (said.exists() and said.read_text().strip()):
        assert time.monotonic() < until and table.poll() is None
        time.sleep(0.05)
    training = Path("/proc") / said.read_text().strip()
    assert training.exists()
    table.send_signal(signal.SIGKILL)
    table.wait()
    while training.exists() and "zombie" not in (training / "status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
