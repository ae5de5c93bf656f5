"""Matrix products by the faster of two exact kernels, with their gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Multiply-adds from which on a product of float32 matrices on the CPU is worth a call of oneDNN, and from which on the
# gradient of its weights is.
PRODUCT_WORTH, GRADIENT_WORTH = 2**23, 2**25
# Whether this PyTorch was built with oneDNN.
ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Return x·Wᵀ + b, in `groups` independent blocks of channels.

    Args:
        x: (N, groups·in).
        weight: (groups·out, in).
        bias: (groups·out,) or None.
        groups: number of blocks; block g of the output reads block g of the input.
    """
    if by_onednn(x, weight):
        return Product.apply(x, weight, bias, groups)
    if groups == 1:
        return F.linear(x, weight, bias)
    y = torch.bmm(blocks_of(x, groups), weight.view(groups, -1, weight.shape[1]).transpose(1, 2))  # (groups, N, out)
    y = y.transpose(0, 1).reshape(x.shape[0], weight.shape[0])  # `len` is no symbol in an export
    return y if bias is None else y + bias


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether `Product` computes x·Wᵀ: whether both are float32 on a CPU, and large.

    PyTorch binds matrix products on the CPU to MKL, which leaves half of some AMD processors unused. Its convolutions
    and products for its compiler run in oneDNN, which does not. A compiler chooses for itself.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return len(x) * weight.numel() >= PRODUCT_WORTH and ONEDNN and not torch.is_autocast_enabled("cpu")


def blocks_of(x: Tensor, groups: int) -> Tensor:
    """Return (groups, N, channels): the blocks of channels of x (N, groups·channels)."""
    return x.view(x.shape[0], groups, x.shape[1] // groups).transpose(0, 1)


class Product(torch.autograd.Function):
    """`linear` for large float32 matrices on the CPU."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Return (N, groups·out); arguments as for `linear`."""
        context.save_for_backward(x, weight)
        context.groups, context.biased = groups, bias is not None
        if groups == 1:
            return product(x, weight, bias)
        # A 1×1 convolution over a picture of N×1 pixels is the same product; with a dilation, which its kernel does not
        # have, PyTorch asks oneDNN even where it computes with one thread.
        y = F.conv2d(as_pixels(x), weight[:, :, None, None], bias, dilation=(1, 2), groups=groups)
        return y.permute(0, 2, 3, 1).reshape(len(x), -1)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to x, weight and bias for that of the product, (N, groups·out)."""
        (x, weight), groups = context.saved_tensors, context.groups
        slope, of_x = slope.contiguous(), None
        if groups == 1:
            of_x = product(slope, weight.t()) if context.needs_input_grad[0] else None
            of_weight = weight_gradient(slope, x)
        else:
            of_x = convolution_gradient(slope, x, weight, groups, 0).permute(0, 2, 3, 1).reshape(x.shape)
            # oneDNN takes twice as long for this gradient of a grouped convolution.
            of_weight = (blocks_of(slope, groups).transpose(1, 2) @ blocks_of(x, groups)).view(weight.shape)
        return of_x, of_weight, slope.sum(dim=0) if context.biased else None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b by the faster of two exact kernels, without a gradient; x (N, in), weight (out, in)."""
    if by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add x·Wᵀ to `out` (N, out), without a gradient; x (N, in), weight (out, in)."""
    if by_onednn(x, weight) or torch.is_autocast_enabled(x.device.type):
        out += product(x, weight)
    else:
        out.addmm_(x, weight.t())


def weight_gradient(slope: Tensor, x: Tensor) -> Tensor:
    """Return (out, in): the gradient of x·Wᵀ with respect to W, for slopes (N, out) and x (N, in)."""
    weight = slope.new_empty(slope.shape[1], x.shape[1])
    if by_onednn(x, weight) and len(x) * weight.numel() >= GRADIENT_WORTH:
        return convolution_gradient(slope, x, weight, 1, 1).view(weight.shape)
    return slope.t() @ x


def as_pixels(x: Tensor) -> Tensor:
    """Return (1, channels, N, 1), channels last in memory, for x (N, channels)."""
    return x.view(1, x.shape[0], 1, -1).permute(0, 3, 1, 2)


def convolution_gradient(slope: Tensor, x: Tensor, weight: Tensor, groups: int, which: int) -> Tensor:
    """Return the gradient of the 1×1 convolution of `Product` with respect to x (`which` 0) or its weight (1)."""
    settings = [1, 1], [0, 0], [1, 2], False, [0, 0], groups, [which == 0, which == 1, False]
    matrices = as_pixels(slope), as_pixels(x), weight[:, :, None, None]
    return torch.ops.aten.convolution_backward(*matrices, None, *settings)[which]


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + b for x of shape (N, in)."""
        return linear(x, self.weight, self.bias)
