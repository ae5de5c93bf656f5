"""Configs that compare memories differ in nothing else."""

from pathlib import Path

import pytest

from run.config import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
TASKS = ("poc_memory_env", "cartpole_masked", "minigrid", "popgym", "mystery_path_grid", "mortar_mayhem_grid")
MEMORIES = ("trxl", "gtrxl", "segments", "gru", "lstm", "none")
PATHS = [CONFIGS / f"{task}_{memory}.yaml" for task in TASKS for memory in MEMORIES]
PATHS = [path for path in PATHS if path.exists()]
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
