"""Tools that train many runs: which are to be compared, which are trained, how long, and the tables of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from run.config import load_config
from tools.compare import COLUMNS, draw
from tools.ladder import LADDERS, RUNGS, trial
from tools.popgym_table import write_table
from tools.runs import Trial, add_row, chosen, fill, make_trial, read_table
from utils import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
MEMORIES = ("_trxl", "_gtrxl", "_segments", "_gru", "_lstm", "_none")
PATHS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem.endswith(MEMORIES)]
POPGYM = CONFIGS / "popgym.yaml"
PUBLISHED = {"gru_2023": "0.1", "best": "0.5", "method": "GRU"}
MAY_DIFFER = {"transformer", "recurrence", "memoryless", "segment_length"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_only_memory_differs(path):
    """Core, gates and segment_length are all that may; the width is the same, and so is a transformer's own shape."""
    task, memory = path.stem.rsplit("_", 1)
    base, own = load_config(CONFIGS / f"{task}.yaml"), load_config(path)
    differing = {name for name, value in base if getattr(own, name) != value}
    assert differing and differing <= MAY_DIFFER
    assert own.core.embed_dim == base.core.embed_dim
    if own.transformer:
        kept = base.transformer.model_dump(exclude={"gtrxl", "gtrxl_bias"})
        assert own.transformer.model_dump(exclude={"gtrxl", "gtrxl_bias"}) == kept
        assert own.transformer.gtrxl == (memory == "gtrxl")
    if own.recurrence:
        assert own.recurrence.layer_type == memory and own.recurrence.hidden_state_size == base.core.embed_dim
    assert (own.segment_length > 1) == (memory in ("segments", "gru", "lstm"))


@pytest.mark.parametrize("task", LADDERS)
def test_rungs_of_the_ladder_can_be_trained(task):
    """All have the same width and as many steps, and memory holds a whole episode."""
    for memory in RUNGS:
        rungs = [trial(task, length, memory, 1) for length in LADDERS[task][2]]
        configs = [load_config(rung.config, rung.changes) for rung in rungs]
        assert len({(config.core.embed_dim, config.updates * config.samples) for config in configs}) == 1
        for config in configs:
            longest = config.environment.create().task.max_episode_steps
            assert config.transformer is None or config.transformer.memory_length >= longest - 1


def test_the_comparison_is_drawn(tmp_path):
    """Success counts where there is some, reward elsewhere; runs of one memory are averaged."""
    row = dict.fromkeys(COLUMNS, "2") | {"memory": "gru", "curve": " ".join(["0.5"] * 20)}
    rows = [row | {"task": "a", "success": value} for value in ("0.5", "1")] + [row | {"task": "b", "success": ""}]
    draw(rows, tmp_path / "found")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.md", "found_a.png", "found_b.png"]
    lines = (tmp_path / "found.md").read_text().splitlines()
    assert "| 0.750 | 0.50 1.00 |" in lines[2] and "| 2.000 | 2.00 |" in lines[3]


def test_what_is_near_the_best_counts(tmp_path):
    """A task counts from .005 below the best published figure, whatever its MMER."""
    published, rows = {name: {"task": name} | PUBLISHED for name in ("AEasy", "BEasy", "CEasy")}, []
    for task, seed, value in (("AEasy", 1, 0.3), ("AEasy", 2, 0.6894), ("BEasy", 1, 0.4944)):
        figures = dict.fromkeys(("mmer_65536", "reward_mean"), value) | {"mmer": 9, "steps": 100}
        rows.append({name: str(text) for name, text in {"task": task, "seed": seed, "setting": "s", **figures}.items()})
    write_table(published, rows, tmp_path / "table")
    text = (tmp_path / "table.md").read_text()
    assert "| AEasy | s | 2 | 100 | 0.495 ± 0.275 | 0.495 ± 0.275 | 9.000 ± 0.000 | 0.1 | 0.5 GRU |" in text
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
    config = load_config(POPGYM)
    assert make_trial(("a", "1"), POPGYM, [], None).changes == ()
    trial = make_trial(("a", "1"), POPGYM, [], 2 * config.updates)
    longer = load_config(POPGYM, trial.changes)
    assert longer.updates == 2 * config.updates and trial.steps == longer.updates * longer.samples
    for update in range(0, 250, 50):
        assert longer.scheduled("gamma", 2 * update) == pytest.approx(config.scheduled("gamma", update))
