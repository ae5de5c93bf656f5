"""Frames from features: transposed convolutions by plain ones, cross-entropy and its gradient in one pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def channels_last(module: nn.Module) -> None:
    """Let kernels lie in memory as frames do, their channels last: what oneDNN and cuDNN compute fastest."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's declarations leave it out


def upsample(x: Tensor, layer: nn.ConvTranspose2d, size: tuple[int, int]) -> Tensor:
    """Return what a transposed convolution returns, by a plain one that is up to twice as fast on the CPU.

    A kernel of r·s pixels and stride s lets each s×s block of the output depend on r×r inputs: a convolution with r×r
    kernels gives the block's pixels as s·s·out channels, which are then laid out in space.

    Args:
        x: (N, in, h, w).
        layer: whose kernel size is a multiple of its stride.
        size: (H, W) of the output; pixels that no input reaches hold the bias.
    """
    stride, (inputs, outputs) = layer.stride[0], layer.weight.shape[:2]
    reach = layer.kernel_size[0] // stride
    kernel = layer.weight.reshape(inputs, outputs, reach, stride, reach, stride).flip(2, 4)
    kernel = kernel.permute(3, 5, 1, 0, 2, 4).reshape(-1, inputs, reach, reach)  # (s·s·out, in, r, r)
    missing = [int(whole > (part + reach - 1) * stride) for whole, part in zip(size, x.shape[2:], strict=True)]
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    kernel, bias = kernel.contiguous(memory_format=torch.channels_last), layer.bias.repeat(stride * stride)
    y = F.conv2d(x, kernel, bias, padding=reach - 1).permute(0, 2, 3, 1)  # (N, h+r-1, w+r-1, s·s·out)
    n, height, width, _ = y.shape
    y = y.reshape(n, height, width, stride, stride, outputs).transpose(2, 3)
    y = y.reshape(n, height * stride, width * stride, outputs)
    return y[:, : size[0], : size[1]].permute(0, 3, 1, 2)


class FrameCrossEntropy(torch.autograd.Function):
    """Binary cross-entropy of logits and frames, summed over all pixels, with its gradient in the same pass.

    The logits of a minibatch are its largest tensor. `binary_cross_entropy_with_logits` reads or writes as much a dozen
    times; here a few frames at a time stay in the processor's cache.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, frames: Tensor, which: Tensor) -> Tensor:
        """Return the sum over all pixels of softplus(x) − x·y.

        Args:
            context: keeps the gradient, sigmoid(x) − y.
            logits: x (N, C, H, W).
            frames: (M, C, H, W) uint8, in 255ths.
            which: (N,) of them is y.
        """
        at_once = 32 if logits.device.type == "cpu" else 120
        logits, frames = logits.permute(0, 2, 3, 1), frames.permute(0, 2, 3, 1)  # as they lie in memory
        gradient, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        for x, slope, chosen in zip(*(tensor.split(at_once) for tensor in (logits, gradient, which)), strict=True):
            y = frames.index_select(0, chosen).to(torch.float32).mul_(1 / 255)
            x = x.float()
            probability = torch.sigmoid(x)
            # softplus(x) = max(x, 0) − log σ(|x|), and one logarithm does for all frames: their product is at least
            # 2^−120, which is still a normal number.
            certainty = torch.maximum(probability, 1 - probability).prod(dim=0)
            total += x.clamp(min=0).sub_(x * y).sum() - certainty.log().sum()
            slope.copy_(probability.sub_(y))
        context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the logits for that of the loss."""
        (gradient,) = context.saved_tensors
        return gradient.mul_(slope).permute(0, 3, 1, 2), None, None
