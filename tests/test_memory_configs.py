"""Configs that compare memories differ in nothing else."""

from pathlib import Path

import pytest

from run.config import load_config
from tools.compare import COLUMNS, draw
from tools.ladder import LADDERS, RUNGS, trial

CONFIGS = Path(__file__).parent.parent / "configs"
MEMORIES = ("_trxl", "_gtrxl", "_segments", "_gru", "_lstm", "_none")
PATHS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem.endswith(MEMORIES)]
CORES = {"transformer", "recurrence", "memoryless"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_only_memory_differs(path):
    """Core, gates and segment_length are all that may; the width is the same, and so is a transformer's own shape."""
    task, memory = path.stem.rsplit("_", 1)
    base, own = load_config(CONFIGS / f"{task}.yaml"), load_config(path)
    differing = {name for name, value in base if getattr(own, name) != value}
    assert differing and differing <= CORES | {"segment_length"}
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
