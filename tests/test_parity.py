"""The product computes what the reference implementation computed: outputs, losses, gradients and advantages.

Reads every fixture (`*.npz`) of the folder that the environment variable PARITY_FIXTURES names, by default the
project's own. Nothing in here depends on their sizes.
"""

import json
import os
from pathlib import Path

import canonical
import numpy as np
import pytest
import torch
from canonical import GRADIENT_TOLERANCE, TOLERANCE, assert_close

from buffer import Minibatch, generalised_advantages, normalised
from trainer import LOSS_PARTS, ppo_loss
from transformer import MemoryView

FOLDER = Path(os.environ.get("PARITY_FIXTURES") or Path(__file__).parent / "parity")


def fixtures(estimations):
    """Returns the fixtures of advantage estimations, or all others, as test parameters."""
    chosen = []
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path) as file:
            if ("rewards" in file.files) == estimations:
                chosen.append(pytest.param(path, id=path.stem))
    assert chosen, FOLDER
    return chosen


class Computed:
    """The product's computation of one fixture, and the fixture's arrays as tensors."""

    def __init__(self, path):
        with np.load(path) as file:
            config, self.names = json.loads(str(file["config"])), json.loads(str(file["parameters"]))
            self.data = {k: torch.from_numpy(file[k]) for k in file.files if k not in ("config", "parameters")}
        observations = self.data["in/frames" if config["visual"] else "in/obs"]
        self.model = canonical.build(config, tuple(observations.shape[1:]))
        canonical.load(self.model, {name: self.data[f"param/{name}"] for name in self.names})
        which = self.data.get("in/frame_index", torch.arange(len(observations)))
        self.output = self.model(self.model.embed(observations)[which], self.memory())
        actions, log_probs, values, advantages = (
            self.data[f"in/{name}"] for name in ("actions", "log_probs", "values", "advantages")
        )
        unread = dict.fromkeys(("vectors", "masks", "past", "step"))  # the memory is given to the model above
        batch = Minibatch(
            samples=np.arange(len(which)), size=len(which), observations=observations, which=which, actions=actions,
            log_probs=log_probs, values=values, returns=values + advantages, advantages=normalised(advantages),
            **unread,
        )  # fmt: skip
        coefficients = (config[name] for name in ("value_loss_coefficient", "clip_range", "beta"))
        loss, parts = ppo_loss(self.output, batch, *coefficients)
        self.parts = dict(zip(LOSS_PARTS, parts, strict=True))
        loss.backward()
        self.loss = loss.item()

    def memory(self):
        """Returns the fixture's windows as a view with one query per group, which stands after its valid items."""
        windows, mask = self.data["in/memory"], self.data["in/mask"]
        samples, slots, blocks, width = windows.shape
        step, valid = self.data["in/positions"].masked_fill(~mask, 0), mask.sum(dim=1, keepdim=True)
        assert (mask == (torch.arange(slots, device=mask.device) < valid)).all()
        inputs = windows.permute(2, 0, 1, 3).reshape(blocks, samples * slots, width)
        return MemoryView(
            items=self.model.transformer.to_items(inputs, step.flatten()).view(blocks, samples, slots, width),
            distance=valid,
            valid=valid,
            nonempty=(valid > 0).float(),
            item_step=step,
        )


@pytest.fixture(scope="module", params=fixtures(estimations=False))
def minibatch(request):
    return Computed(request.param)


def test_outputs(minibatch):
    data, output = minibatch.data, minibatch.output
    branches = [name for name in data if name.startswith("out/log_softmax")]
    assert len(branches) == len(output.policy.log_probs)
    for index, found in enumerate(output.policy.log_probs):
        assert_close(found, data[f"out/log_softmax{index}"], f"branch {index}")
    assert_close(output.value, data["out/value"], "value")
    assert_close(output.kept.transpose(0, 1), data["out/memory"], "memory")


def test_losses(minibatch):
    assert_close(minibatch.loss, minibatch.data["out/loss"], "loss")
    for name, fixture_name in canonical.LOSS_PARTS.items():
        assert_close(minibatch.parts[name], minibatch.data[f"out/{fixture_name}"], name)


def test_gradients(minibatch):
    gradients = canonical.gradients(minibatch.model)
    for name, found in gradients.items():
        expected = minibatch.data.get(f"grad/{name}", torch.zeros_like(found))
        assert canonical.excess(found, expected, **GRADIENT_TOLERANCE) <= 1, name
    norm, expected = torch.stack([g.norm() for g in gradients.values()]).norm(), minibatch.data["out/grad_norm"]
    assert abs(norm - expected) <= TOLERANCE * expected + TOLERANCE


@pytest.mark.parametrize("path", fixtures(estimations=True))
def test_generalised_advantages(path):
    """The reference knows no truncation: every end is a terminal state."""
    with np.load(path) as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    next_values = torch.cat((data["values"][:, 1:], data["last_value"][:, None]), dim=1)
    rewards, dones, values = (data[name] for name in ("rewards", "dones", "values"))
    gamma, lamda = (data[name].item() for name in ("gamma", "lamda"))
    found = generalised_advantages(rewards, dones, dones, values, next_values, gamma, lamda)
    assert_close(found, data["advantages"], "advantages")
