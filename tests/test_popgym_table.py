"""What the table of POPGym's tasks is made of: which runs, how long, and what they reached."""

import pytest

from play.popgym_table import Table, changes_of_length, chosen_tasks
from run.config import load_config
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
    with pytest.raises(UserError, match="--tasks: no task's name contains any of Boat"):
        chosen_tasks("Boat", known)


def test_a_longer_run_has_longer_schedules():
    config = load_config("configs/popgym.yaml")
    assert changes_of_length(config, config.updates) == []
    longer = load_config(
        "configs/popgym.yaml", [text.removeprefix("--set=") for text in changes_of_length(config, 490)]
    )
    assert longer.updates == 490
    for update in range(0, 250, 50):
        assert longer.scheduled("gamma", 2 * update) == pytest.approx(config.scheduled("gamma", update))
