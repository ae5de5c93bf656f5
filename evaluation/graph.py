"""One step of a model, memory included, as an ONNX graph, and the proof that it acts as the model does."""

import json
import logging
import warnings
from contextlib import closing
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401  (PyTorch needs it to write graphs: it is missed here, not there)
import torch
from torch import Tensor, nn

from evaluation.watch import Player
from memory import Timeline
from model import ActorCriticModel, Normal, Output
from recurrence import Fragments
from run.config import Config
from transformer import MemoryView, Transformer
from utils import UserError, training_seeds

# Type and shape of tensors by name; before the shape comes the batch.
Kinds = dict[str, tuple[str, tuple[int, ...]]]
# How far results may lie apart, and in how many episodes that is looked at.
TOLERANCE, EPISODES = 1e-4, 3
ABOUT_MEMORY = (
    "Start with zeros, and give the next step as memory what this one returns as next_memory. step counts from 0 in "
    "each episode; at 0 the graph looks at nothing that memory holds, so that it need not be cleared."
)


class Step(nn.Module):
    """One step of a model as a function of the tensors `inputs`, which returns `outputs`."""

    def __init__(self, model: ActorCriticModel) -> None:
        super().__init__()
        self.model, self.core, task = model, model.core, model.task
        if isinstance(self.core, Transformer):
            shape: tuple[int, ...] = len(self.core.blocks), self.core.memory_length, self.core.embed_dim
        else:
            shape = (self.core.state_size,)
        memory, remembers = ("float32", shape), shape != (0,)
        known: dict[str, tuple[Any, str, tuple]] = {
            "frame": (task.frame, "uint8", task.frame),
            "vector": (task.vector, "float32", (task.vector,)),
            "memory": (remembers, *memory),
            "step": (remembers, "int64", ()),
            "mask": (task.masked, "bool", (sum(task.branches),)),
        }
        self.inputs: Kinds = {name: (kind, size) for name, (there, kind, size) in known.items() if there}
        self.outputs: Kinds = {f"logits_{branch}": ("float32", (n,)) for branch, n in enumerate(task.branches)}
        if task.continuous:
            self.outputs = dict.fromkeys(("mean", "log_std"), ("float32", (task.continuous,)))
        self.outputs["value"] = "float32", ()
        if remembers:
            self.outputs["next_memory"] = memory

    def forward(self, *given: Tensor) -> list[Tensor]:
        """Return `outputs` for `inputs`."""
        named = dict(zip(self.inputs, given, strict=True))
        frame, vector, memory, step = map(named.get, ("frame", "vector", "memory", "step"))
        x = self.model.complete(self.model.embed(vector if frame is None else frame), vector, step)
        output = self.model(x, self.past(x if memory is None else memory, step), named.get("mask"))
        if memory is None:
            return results_of(output)
        if not isinstance(self.core, Transformer):
            return [*results_of(output), output.kept]
        item = self.core.to_items(output.kept, step).transpose(0, 1)  # (N, blocks, D)
        return [*results_of(output), torch.cat((memory[:, :, 1:], item[:, :, None]), dim=2)]

    def past(self, memory: Tensor, step: Tensor | None) -> MemoryView | Fragments:
        """Return what the core may look at, as `Timeline.past` and `States.past` do."""
        if not isinstance(self.core, Transformer):
            state, count = memory if step is None else memory * (step > 0)[:, None], memory.shape[0]
            return Fragments(state, torch.arange(count), torch.full((1,), count))
        length = self.core.memory_length
        valid = step.clamp(max=length)[:, None]
        return MemoryView(
            items=memory.transpose(0, 1),
            distance=torch.full_like(valid, length),
            valid=valid,
            nonempty=(valid > 0).float(),
            item_step=(step[:, None] - torch.arange(length, 0, -1)).clamp(min=0),
        )


def results_of(output: Output) -> list[Tensor]:
    """Return policy and value of a model's output as the graph returns them."""
    policy = output.policy
    if isinstance(policy, Normal):
        return [policy.mean, policy.log_std.expand_as(policy.mean), output.value]
    return [*policy.log_probs, output.value]


def to_graph(model: ActorCriticModel) -> onnx.ModelProto:
    """Return one step of a model on the CPU as a graph for any batch, which says itself how it is used."""
    step, batch = Step(model).eval(), torch.export.Dim("batch")
    given = tuple(torch.zeros(2, *shape, dtype=getattr(torch, kind)) for kind, shape in step.inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses a package that has nothing to do with this
    with warnings.catch_warnings(action="ignore"), model.core.constant_weights():  # what PyTorch says to itself
        program = torch.export.export(step, given, dynamic_shapes={"given": tuple({0: batch} for _ in given)})
        names, results = list(step.inputs), list(step.outputs)
        written = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names, output_names=results)
    graph = written.model_proto
    for node in graph.graph.node:
        node.ClearField("metadata_props")  # which line of which file it comes from
    about = ABOUT_MEMORY if "memory" in step.inputs else "There is none."
    describe(graph, format="ppo-transformer-xl step 1", inputs=step.inputs, outputs=step.outputs, memory=about)
    return graph


def describe(graph: onnx.ModelProto, **entries: Any) -> None:
    """Add to a graph's metadata, as JSON what is not text."""
    for name, entry in entries.items():
        graph.metadata_props.add(key=name, value=entry if isinstance(entry, str) else json.dumps(entry))


def play_beside(graph: onnx.ModelProto, model: ActorCriticModel, config: Config, cut: int | None) -> dict[str, float]:
    """Let onnxruntime and PyTorch see the same episodes, which training has not, each with its own memory.

    Args:
        cut: after how many steps an episode is cut, if at all.

    Returns:
        The largest difference of each output; UserError says where one is larger than `TOLERANCE`.
    """
    step, session = Step(model), onnxruntime.InferenceSession(graph.SerializeToString())
    largest, first = dict.fromkeys(step.outputs, 0.0), training_seeds(config.environment).stop
    with closing(Player(model, config, model.task, render=False, max_steps=cut)) as player:
        for seed in range(first, first + EPISODES):
            memory = np.zeros((1, *step.inputs.get("memory", ("", ()))[1]), np.float32)
            for moment in player.play(seed):
                if moment.result is not None:
                    break
                agent, after = player.agent, player.agent.t + 1
                expected = results_of(agent.outputs[0])
                if isinstance(agent.memory, Timeline):
                    expected.append(agent.memory.items[:, :, after : after + agent.length].transpose(0, 1))
                elif "memory" in step.inputs:
                    expected.append(agent.memory.states[:, after])
                known = {"vector": agent.arrays.vectors, "mask": agent.arrays.masks, "memory": memory}
                known["step"] = np.array([moment.step])
                if "frame" in step.inputs:
                    known["frame"] = np.ascontiguousarray(agent.arrays.frames.transpose(0, 3, 1, 2))
                *_, memory = found = session.run(None, {name: known[name] for name in step.inputs})
                for name, ours, theirs in zip(largest, found, expected, strict=True):
                    difference = float(np.abs(ours - theirs.numpy()).max())
                    largest[name] = max(largest[name], difference)
                    if not difference <= TOLERANCE:  # nor is what is not a number
                        where = f"reset seed {seed}, step {moment.step}; allowed: {TOLERANCE}"
                        raise UserError(f"nothing was written: {name} is {difference:.1e} from PyTorch's, {where}")
    return largest
