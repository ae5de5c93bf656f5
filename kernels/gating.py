"""The arithmetic of a GTrXL gate, with its gradient by hand."""

from typing import Any

import torch
from torch import Tensor

from kernels.products import add_product, product, weight_gradient

# Elements from which on tanh takes longer than four operations that are vectorised.
TANH_WORTH = 4096


class Gating(torch.autograd.Function):
    """What a `Gate` computes, with its gradient by hand: autograd takes more operations."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        y: Tensor,
        from_update: Tensor,
        from_state: Tensor,
        candidate: Tensor,
        bg: Tensor,
    ) -> Tensor:
        """Return (N, D); x and y (N, D), weights (3D, D), (2D, D) and (D, D) and the bias (D,) of a `Gate`."""
        width = x.shape[1]
        x = x.float()  # bf16 products leave a float32 state
        values = product(y, from_update).float()  # (N, 3D)
        gates, (reset, update, new) = values[:, : 2 * width], values.split(width, dim=1)
        add_product(gates, x, from_state)
        update -= bg
        gates.sigmoid_()
        kept = reset * x
        add_product(new, kept, candidate)
        if new.numel() >= TANH_WORTH and new.device.type == "cpu":
            new.mul_(2).sigmoid_().mul_(2).sub_(1)  # tanh(c) = 2σ(2c) − 1
        else:
            new.tanh_()
        context.save_for_backward(x, y, values, kept, from_update, from_state, candidate)
        context.low = torch.is_autocast_enabled(x.device.type)
        return torch.lerp(x, new, update)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients with respect to all arguments of `forward` for that of its result, (N, D)."""
        x, y, values, kept, from_update, from_state, candidate = context.saved_tensors
        width = x.shape[1]
        reset, update, new = values.split(width, dim=1)
        slopes = torch.empty_like(values)  # before the nonlinearities
        of_gates, (of_reset, of_update, of_new) = slopes[:, : 2 * width], slopes.split(width, dim=1)
        tanh_gradient = torch.ops.aten.tanh_backward.grad_input
        sigmoid_gradient = torch.ops.aten.sigmoid_backward.grad_input
        with torch.autocast(x.device.type, torch.bfloat16, enabled=context.low):
            tanh_gradient(slope * update, new, grad_input=of_new)
            sigmoid_gradient((new - x).mul_(slope), update, grad_input=of_update)
            of_kept = product(of_new, candidate.t()).float()
            sigmoid_gradient(of_kept * x, reset, grad_input=of_reset)
            of_x = torch.addcmul(slope, slope, update, value=-1).addcmul_(of_kept, reset)
            add_product(of_x, of_gates, from_state.t())
            of_y = product(slopes, from_update.t())
            of_weights = weight_gradient(slopes, y), weight_gradient(of_gates, x), weight_gradient(of_new, kept)
        return of_x, of_y, *of_weights, -of_update.sum(dim=0)
