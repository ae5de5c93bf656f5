"""Exported agents: the graph acts as the model does for every memory, and a file that does not is not written."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs requirements-export.txt")

import onnx
import onnxruntime

import export
from evaluation import graph as graphs
from model import ActorCriticModel
from run.config import Config
from tests.test_agent import make_model, write
from utils import UserError

POC = {"type": "PocMemoryEnv"}
MASKED = {"type": "Gymnasium", "name": "tests.toy_environments:Masked-v0"}
ACTED = {"type": "Gymnasium", "name": "tests.toy_environments:Acted-v0"}
BOTH = {"type": "Minigrid", "name": "MiniGrid-GoToDoor-5x5-v0", "mission": True, "max_episode_steps": 20}
ABSOLUTE = "absolute, longer than the episode"
CASES: dict[str, tuple[dict, str, dict]] = {
    ABSOLUTE: (POC, "absolute", {"layer_norm": "post", "memory_length": 40}),
    "learned, gates, masks": (MASKED, "learned", {"gtrxl": True, "num_blocks": 1}),
    "relative, numbers as actions": (ACTED, "relative", {"query_position": True, "normalize": True}),
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
    """A function that exports the model, with another graph in place of its own, and returns the file."""

    def export_it(graph=small[1]):
        output = tmp_path / "agent.onnx"
        monkeypatch.setattr(graphs, "to_graph", lambda _: graph)
        monkeypatch.setattr(sys, "argv", ["export.py", f"--model={small[0]}", f"--output={output}"])
        try:
            export.main()
        except UserError as error:
            assert not list(tmp_path.glob("*.onnx")) and "\n" not in str(error)
            raise
        return output

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


def test_the_file_plays_without_pytorch(written):
    """The example plays an episode where there is no PyTorch; the file says what it takes and returns."""
    path = written()
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
    with pytest.raises(UserError, match=r"agent.onnx: not written: value is .* reset seed \d+, step 0"):
        written(graph)


def test_missing_packages_are_one_line(written, monkeypatch):
    """It names the command that installs them."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "evaluation.graph")
    with pytest.raises(UserError, match="pip install -r requirements-export.txt"):
        written()
