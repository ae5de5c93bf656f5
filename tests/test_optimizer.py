"""All parameters as one tensor are optimised as each of them by itself would be."""

import copy

import canonical
import pytest
import torch

from kernels.optimizer import Optimizer

CONFIG = canonical.BASE | {"visual": True, "positional_encoding": "learned"}
MODULES = {
    "encoder": "encoder.",
    "embedding": "embedding.",
    "position": "transformer.position",
    "block0": "transformer.blocks.0.",
    "block1": "transformer.blocks.1.",
    "policy": "policy",
    "value": "value",
}


def loss_of(model, step):
    """Returns a loss whose gradient with respect to every parameter is random, once long and once short."""
    generator = torch.Generator().manual_seed(step)
    noise = [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]
    terms = zip(model.parameters(), noise, strict=True)
    return (1e-3 if step % 2 else 1) * sum((parameter * slope).sum() for parameter, slope in terms)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_optimizer_is_adamw_with_clipped_gradients(amsgrad):
    """Weights and reported norms are those of PyTorch's AdamW and clip_grad_norm_ on separate parameters."""
    model = canonical.build(CONFIG, (3, 36, 36))
    plain = copy.deepcopy(model)
    optimizer = Optimizer({"": model}, 0.5, amsgrad)
    adamw = torch.optim.AdamW(plain.parameters(), lr=3e-3, amsgrad=amsgrad)
    optimizer.set_learning_rate(3e-3)
    assert set(optimizer.modules) == set(MODULES)
    for step in range(4):
        optimizer.clear()
        loss_of(model, step).backward()
        norms = optimizer.step()
        adamw.zero_grad()
        loss_of(plain, step).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
        torch.testing.assert_close(norms[-1], torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        for module, norm in zip(optimizer.modules, norms, strict=False):
            own = [gradient.flatten() for name, gradient in gradients.items() if name.startswith(MODULES[module])]
            torch.testing.assert_close(norm, torch.cat(own).norm())
        adamw.step()
        for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5, msg=name)
            assert found.stride() == expected.stride(), name
