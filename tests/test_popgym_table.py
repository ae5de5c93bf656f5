"""Tables of runs: which are trained, how long, and what POPGym's comes to."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from run.config import load_config
from tools.popgym_table import write_table
from tools.runs import Trial, add_row, chosen, fill, make_trial, read_table
from utils import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "popgym.yaml"
PUBLISHED = {
    name: {"task": name, "gru_2023": "0.1", "best": "0.5", "method": "GRU"} for name in ("AEasy", "BEasy", "CEasy")
}


def test_what_is_near_the_best_counts(tmp_path):
    """A task counts from .005 below the best published figure, whatever its MMER."""
    rows = []
    for task, seed, value in (("AEasy", 1, 0.3), ("AEasy", 2, 0.6894), ("BEasy", 1, 0.4944)):
        figures = dict.fromkeys(("mmer_65536", "reward_mean"), value) | {"mmer": 9, "steps": 100}
        rows.append({name: str(text) for name, text in {"task": task, "seed": seed, "setting": "s", **figures}.items()})
    write_table(PUBLISHED, rows, tmp_path / "table")
    text = (tmp_path / "table.md").read_text()
    assert "| AEasy | 2 | 100 | 0.495 ± 0.275 | 0.495 ± 0.275 | 9.000 ± 0.000 | 0.1 | 0.5 GRU |" in text
    assert "of 3 tasks: 1 by the mean over 65,536 steps and 1 by the final evaluation." in text


def test_what_a_table_lacks_is_trained(tmp_path, monkeypatch):
    """A run without checkpoints starts, another goes on; where one fails, the others go on."""
    monkeypatch.chdir(tmp_path)
    changes = {"a": ("x=1",), "c": ("broken",), "b": ()}
    trials = {name: Trial((name, "1"), "s", Path("c.yaml"), changed, 5) for name, changed in changes.items()}
    folder = tmp_path / "checkpoints" / trials["b"].run_id
    folder.mkdir(parents=True)
    (folder / "checkpoint-000000001.pt").touch()
    (tmp_path / "train.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit('--set=broken' in sys.argv)\n")
    (tmp_path / "evaluate.py").write_text(
        "import sys\nopen(sys.argv[2].split('=')[1] + '.csv', 'w').write('reward_mean\\n0.5\\n')\n"
    )
    columns, table = ("task", "seed", "reward", "steps", "setting"), tmp_path / "table.csv"
    arguments = SimpleNamespace(parallel=1, output=tmp_path / "table")

    def filled(names: str) -> int:
        def measure(trial, row):
            return {"reward": row["reward_mean"], "steps": trial.steps}

        with pytest.raises(SystemExit) as ended:
            fill([trials[name] for name in names], columns, measure, lambda rows, _: None, arguments)
        return int(ended.value.code or 0)

    add_row(table, columns, dict.fromkeys(columns, "9"))  # as another process may have meanwhile
    assert filled("acb") == 1
    assert [*read_table(table, columns)] == [("9", "9"), ("a", "1"), ("b", "1")]
    said = [(tmp_path / "summaries" / f"{trials[name].run_id}.log").read_text().split()[:2] for name in "ab"]
    assert said == [["--run-id=a-1-s-5", "--overwrite"], ["--resume=b-1-s-5", "--cpu"]]
    (tmp_path / "train.py").unlink()
    assert filled("ab") == 0, "what is there is not done again"


def test_names_of_tasks():
    """Whole names, or parts of them; those that fit nothing are refused."""
    known = ["NoisyCartEasy", "CartEasy", "CartHard"]
    assert chosen(None, known, "--tasks") == known and chosen("Easy", known, "--tasks") == known[:2]
    assert chosen("CartEasy", known, "--tasks") == ["CartEasy"]
    assert chosen("Noisy,Hard", known, "--tasks") == known[::2]
    for text, wrong in (("CartHard,Boat", "Boat"), ("Easy,", "")):
        with pytest.raises(UserError, match=f"--tasks: '{wrong}' is not known; there are NoisyCartEasy, "):
            chosen(text, known, "--tasks")


def test_a_longer_run_has_longer_schedules():
    """Twice the updates: at twice the update, schedules are where they were."""
    config = load_config(CONFIG)
    assert make_trial(("a", "1"), "s", CONFIG, [], None).changes == ()
    trial = make_trial(("a", "1"), "s", CONFIG, [], 2 * config.updates)
    longer = load_config(CONFIG, trial.changes)
    assert longer.updates == 2 * config.updates and trial.steps == longer.updates * longer.samples
    for update in range(0, 250, 50):
        assert longer.scheduled("gamma", 2 * update) == pytest.approx(config.scheduled("gamma", update))
