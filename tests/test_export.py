"""Exported agents: the graph acts as the model does for every memory, and a file that does not is not written."""

import json
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs requirements-export.txt")

import onnx
import onnxruntime
from test_faults import command

import export
from evaluation import graph as graphs
from model import ActorCriticModel
from run.config import Config
from tests.test_agent import make_model, write
from tests.toy_environments import toy

POC = {"type": "PocMemoryEnv"}
BOTH = {"type": "Minigrid", "name": "MiniGrid-GoToDoor-5x5-v0", "mission": True, "max_episode_steps": 20}
ABSOLUTE = "absolute, longer than the episode"
CASES: dict[str, tuple[dict, str, dict]] = {
    ABSOLUTE: (POC, "absolute", {"layer_norm": "post", "memory_length": 40}),
    "learned, gates, masks": (toy("Masked"), "learned", {"gtrxl": True, "num_blocks": 1}),
    "relative, numbers as actions": (toy("Acted"), "relative", {"query_position": True, "normalize": True}),
    "gru, frames beside vectors": (BOTH, "gru", {"num_layers": 2}),
    "lstm": (POC, "lstm", {}),
    "none": (POC, "none", {}),
}


@cache
def made(case: str) -> tuple[ActorCriticModel, Config, onnx.ModelProto]:
    """A small model with random weights, biases and gates included, and its graph."""
    environment, core, more = CASES[case]
    model, config, _ = make_model(environment, core, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, config, graphs.to_graph(model)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model file and its graph."""
    model, config, graph = made(ABSOLUTE)
    return write(tmp_path_factory.mktemp("models") / "small.nn", model, config, model.task), graph


@pytest.fixture
def written(small, tmp_path, monkeypatch):
    """A function that exports the model, with another graph in place of its own, and returns what export.py says."""

    def export_it(graph=small[1], code=0):
        monkeypatch.setattr(graphs, "to_graph", lambda _: graph)
        said = command(tmp_path, f"--model={small[0]}", "--output=agent.onnx", program=export, code=code)
        assert (tmp_path / "agent.onnx").exists() == (code == 0) and (said.count("\n") == 1 or code == 0)
        return said

    return export_it


@pytest.mark.parametrize("case", CASES)
def test_the_graph_acts_as_the_model_does(case):
    """PyTorch and onnxruntime agree over whole episodes; at step 0, nothing depends on what memory holds."""
    model, config, graph = made(case)
    assert max(graphs.play_beside(graph, model, config, None).values()) <= graphs.TOLERANCE
    given = {name: np.ones((2, *shape), kind) for name, (kind, shape) in graphs.Step(model).inputs.items()}
    if "memory" in given:
        given["memory"][0], given["step"][:] = 7, 0
    results = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, given)
    for result in results[: -1 if "memory" in given else None]:
        np.testing.assert_array_equal(*result)


def test_the_file_plays_without_pytorch(written, tmp_path):
    """The example plays an episode where there is no PyTorch; the file says what it takes and returns."""
    written()
    path = tmp_path / "agent.onnx"
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(about["inputs"]) == {
        "vector": ["float32", [3]], "memory": ["float32", [2, 40, 16]], "step": ["int64", []]
    }  # fmt: skip
    alone = "import sys; sys.modules['torch'] = None; from tools.play_onnx import main; main()"
    done = subprocess.run([sys.executable, "-c", alone, path, "100000"], capture_output=True, text=True, check=True)
    assert "reward" in done.stdout


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_graph_that_acts_otherwise_is_not_written(written, small, change):
    """The error says which output is wrong and where."""
    graph = onnx.ModelProto()
    graph.CopyFrom(small[1])
    (bias,) = (entry for entry in graph.graph.initializer if entry.name.endswith("value.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(change), bias.name))
    assert re.search(r"nothing was written: value is .* reset seed \d+, step 0", written(graph, code=2))


def test_missing_packages_are_one_line(written, monkeypatch):
    """It names the command that installs them."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "evaluation.graph")
    assert "pip install -r requirements-export.txt" in written(code=2)
