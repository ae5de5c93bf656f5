"""The product model by the canonical names of the parity fixtures and of `textbook.py`.

Configs in here are flat, as the fixtures hold them: the transformer's settings, `branches`, `visual`,
`max_episode_steps` and the loss's coefficients side by side.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from environments.contract import Task
from model import ActorCriticModel
from recurrence import MemorylessConfig, RecurrenceConfig
from run.config import Config
from transformer import TransformerConfig

TOLERANCE = 1e-5  # of outputs and losses, absolute
GRADIENT_TOLERANCE = {"relative": 1e-4, "floor": 1e-6}
# A small flat config of vectors, which tests change as they need
BASE = {
    "visual": False,
    "branches": [3, 2],
    "num_blocks": 2,
    "embed_dim": 12,
    "num_heads": 3,
    "memory_slots": 5,
    "max_episode_steps": 24,
    "positional_encoding": "",
    "layer_norm": "pre",
    "gtrxl": True,
    "gtrxl_bias": 0.5,
    "hidden_layer_size": 10,
    "value_loss_coefficient": 0.5,
}
TRANSFORMER = ("num_blocks", "embed_dim", "num_heads", "positional_encoding", "layer_norm", "gtrxl", "gtrxl_bias")
RENAMES = (
    (r"^encoder\.", ""),
    (r"^transformer\.blocks\.(\d+)", r"block\1"),
    (r"^(transformer|recurrence)\.", ""),
    (r"^policy\.(\d+)", r"policy_branch\1"),
)
# Matrices that a gate stacks for one product, in the order of their rows
STACKED = {"from_update": ("Wr", "Wz", "Wg"), "from_state": ("Ur", "Uz"), "candidate": ("Ug",)}
# Each part of the product's loss by its name in fixtures and textbook, where policy_loss is what is maximised
LOSS_PARTS = {
    "policy": "policy_loss",
    "value": "value_loss",
    "entropy": "entropy",
    "kl": "approx_kl",
    "clip_fraction": "clip_fraction",
}


def product_config(config: dict[str, Any]) -> Config:
    """Returns what model and loss read of a product config; `memory_slots` become the memory length.

    With a `layer_type`, "gru", "lstm" or "" for none, there is no transformer.
    """
    transformer = {name: config[name] for name in TRANSFORMER} | {"memory_length": config["memory_slots"]}
    transformer["query_position"] = config.get("query_position", False)
    kind, width = config.get("layer_type"), config["embed_dim"]
    recurrence = {"layer_type": kind, "embed_dim": width, "num_layers": config.get("num_layers")}
    return Config.model_construct(  # not validated: there is no environment
        transformer=TransformerConfig.model_construct(**transformer) if kind is None else None,
        recurrence=RecurrenceConfig(**recurrence, hidden_state_size=config["hidden_state_size"]) if kind else None,
        memoryless=MemorylessConfig(embed_dim=width) if kind == "" else None,
        hidden_layer_size=config["hidden_layer_size"],
        value_loss_coefficient=config["value_loss_coefficient"],
        reconstruction_coefficient=config.get("reconstruction_coefficient", 0.0),
    )


def build(config: dict[str, Any], shape: tuple[int, ...]) -> ActorCriticModel:
    """Returns the product model of a flat config for a task that shows frames (C, H, W) or vectors (n,)."""
    frame, vector = (shape, 0) if len(shape) == 3 else (None, shape[0])
    task = Task(frame, vector, tuple(config["branches"]), 0, config["max_episode_steps"])
    return ActorCriticModel(product_config(config), task)


def places(model: ActorCriticModel) -> dict[str, tuple[nn.Parameter, slice]]:
    """Maps every canonical name to the product's parameter and the rows of it that bear the name."""
    found = {}
    for name, parameter in model.named_parameters():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        *path, layer, kind = ["", *name.split(".")]
        if layer in STACKED:
            rows = parameter.shape[0] // len(STACKED[layer])
            for index, matrix in enumerate(STACKED[layer]):
                stacked = ".".join([*path[1:], matrix, kind])
                found[stacked] = parameter, slice(index * rows, (index + 1) * rows)
        else:
            found[name] = parameter, slice(None)
    return found


def load(model: ActorCriticModel, parameters: dict[str, Tensor]) -> None:
    """Sets every parameter of the product; KeyError where one is missing."""
    with torch.no_grad():
        for name, (parameter, rows) in places(model).items():
            assert parameter[rows].shape == parameters[name].shape, name
            parameter[rows] = parameters[name]


def parameters(model: ActorCriticModel) -> dict[str, Tensor]:
    """Returns the textbook's parameters: float64 leaves with the product's values."""
    return {
        name: parameter[rows].detach().double().requires_grad_() for name, (parameter, rows) in places(model).items()
    }


def gradients(model: ActorCriticModel) -> dict[str, Tensor]:
    """Returns the product's gradients; where there is none, zeros."""
    return {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)[rows]
        for name, (parameter, rows) in places(model).items()
    }


def excess(found: Tensor, expected: Tensor, relative: float, floor: float) -> float:
    """Returns the largest error in multiples of what is allowed: `relative` to the largest entry, at least `floor`."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max().item()
    return error / max(relative * expected.abs().max().item(), floor)


def assert_close(found: Tensor | float, expected: Tensor, what: object = "", tolerance: float = TOLERANCE) -> None:
    assert excess(torch.as_tensor(found), expected, 0, tolerance) <= 1, what
