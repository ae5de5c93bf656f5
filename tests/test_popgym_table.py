"""What the table of POPGym's tasks is made of: which runs, how long, and what they reached."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from run.config import load_config
from tools.popgym_table import COLUMNS, Table, changes_of_length, chosen_tasks, main
from utils import UserError

PUBLISHED = {"AEasy": {"task": "AEasy", "gru_mmer": "0.1", "best_mmer": "0.5", "best_model": "GRU"}}


def row(task: str, seed: int, value: float) -> dict:
    """What a run came to: the same by all figures."""
    figures = dict.fromkeys(("mmer", "mmer_65536", "reward_mean", "reward_low", "reward_high"), value)
    return {"task": task, "seed": seed, "steps": 100, "seconds": 3} | figures


def test_a_table_goes_on_where_it_was_left(tmp_path):
    Table(tmp_path / "table", PUBLISHED, "other").add(row("AEasy", 2, 0.0))
    table = Table(tmp_path / "table", PUBLISHED, "one")
    table.add(row("AEasy", 1, 0.3))
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3
    table = Table(tmp_path / "table", PUBLISHED, "one")
    assert (table.steps("AEasy", 1), table.steps("AEasy", 2)) == (100, 0) and table.reached("mmer") == 0
    table.add(row("AEasy", 2, 0.6994))  # a mean of .4997, published with three decimals
    table.add(row("BEasy", 1, 1.0))
    text = (tmp_path / "table.md").read_text()
    assert "| AEasy | 2 | 100 | 0.500 ± 0.282 | 0.500 ± 0.282 | 0.500 ± 0.282 | 0.1 | 0.5 GRU |" in text
    assert "its 1 tasks: 1 by MMER (65,536 steps), 1 by MMER, 1 by final evaluation." in text


def test_names_of_tasks():
    known = ["NoisyCartEasy", "CartEasy", "CartHard"]
    assert chosen_tasks("", known) == known and chosen_tasks("Easy", known) == known[:2]
    assert chosen_tasks("CartEasy", known) == ["CartEasy"] and chosen_tasks("Noisy,Hard", known) == known[::2]
    for text in ("Boat", "CartHard,Boat"):
        with pytest.raises(UserError, match="--tasks: no task's name contains 'Boat'; there are NoisyCartEasy, "):
            chosen_tasks(text, known)
    with pytest.raises(UserError, match="contains ''"):
        chosen_tasks("Easy,", known)


def test_a_config_of_another_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["popgym_table", "--config=configs/minigrid.yaml"])
    with pytest.raises(UserError, match="--config: configs/minigrid.yaml: environment.type is Minigrid, should be Gym"):
        main()


def test_two_tables_in_one_file_lose_nothing(tmp_path):
    first, second = (Table(tmp_path / "table", PUBLISHED, "one") for _ in range(2))
    first.add(row("AEasy", 1, 0.3))
    second.add(row("AEasy", 2, 0.5))
    assert Table(tmp_path / "table", PUBLISHED, "one").rows.keys() == {("AEasy", 1), ("AEasy", 2)}


@pytest.mark.parametrize(
    "text", ("task,steps\nA,1\n", "{columns},note\n{values},x\n", "{columns}\nA,one,1,1,1,1,1,1,1,s\n")
)
def test_a_file_that_is_no_table(tmp_path, text):
    values = "A,1,1,1,1,1,1,1,1,s"
    (tmp_path / "table.csv").write_text(text.format(columns=",".join(COLUMNS), values=values))
    with pytest.raises(UserError, match="--output: .*table.csv: should have the columns task, seed"):
        Table(tmp_path / "table", PUBLISHED, "one")


def test_a_longer_run_has_longer_schedules():
    config = load_config("configs/popgym.yaml")
    assert changes_of_length(config, config.updates) == []
    longer = load_config(
        "configs/popgym.yaml", [text.removeprefix("--set=") for text in changes_of_length(config, 490)]
    )
    assert longer.updates == 490
    for update in range(0, 250, 50):
        assert longer.scheduled("gamma", 2 * update) == pytest.approx(config.scheduled("gamma", update))
    shorter = [text.removeprefix("--set=") for text in changes_of_length(config, 12)]
    assert load_config("configs/popgym.yaml", shorter).updates == 12


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_trainings_stop_with_the_table(tmp_path):
    """However it ends: a training that went on would write beside the one that resumes it."""
    (tmp_path / "train.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    (tmp_path / "table.py").write_text(
        "from tools.popgym_table import command\ncommand('train.py', core=-1, log='run')\n"
    )
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
