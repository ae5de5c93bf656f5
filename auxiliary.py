"""What is learned beside PPO."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.frames import FrameCrossEntropy, upsample
from kernels.products import Linear
from model import VisualEncoder, orthogonal


class VisualDecoder(nn.Module):
    """The encoder upside down: reconstructs the frame from the transformer's output (Pleines et al. 2025).

    Args:
        encoder: whose sizes are to be reached.
        shape: (C, H, W) of a frame.
        embed_dim: D.
    """

    def __init__(self, encoder: VisualEncoder, shape: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        self.sizes = encoder.sizes
        self.hidden = orthogonal(Linear(embed_dim, encoder.hidden.in_features), math.sqrt(2))
        self.deconv3 = orthogonal(nn.ConvTranspose2d(64, 64, 3, 1), math.sqrt(2))
        self.deconv2 = orthogonal(nn.ConvTranspose2d(64, 32, 4, 2), math.sqrt(2))
        self.deconv1 = orthogonal(nn.ConvTranspose2d(32, shape[0], 8, 4), math.sqrt(2))
        self.to(memory_format=torch.channels_last)

    def forward(self, output: Tensor) -> Tensor:
        """Return the logits of the frame's pixels (N, C, H, W) for transformer outputs (N, D)."""
        x = F.relu(self.hidden(output)).view(-1, 64, *self.sizes[3])
        x = F.relu(self.deconv3(x))
        x = F.relu(upsample(x, self.deconv2, self.sizes[1]))
        return upsample(x, self.deconv1, self.sizes[0])


class Recall(nn.Module):
    """Says which frames the running episode has shown so far, from the transformer's output.

    As an auxiliary task it teaches attention to keep what was seen, and gives the encoder a reason to tell frames apart
    whose difference matters only later: memory is detached, so no gradient of the policy reaches their encoding.

    Args:
        embed_dim: D.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.query = Linear(embed_dim, embed_dim)
        self.prior = Linear(embed_dim, 1)

    def forward(self, output: Tensor, frames: Tensor) -> Tensor:
        """Return logits (N, M) for transformer outputs (N, D) and embedded frames (M, D)."""
        return F.linear(self.query(output), frames) / math.sqrt(frames.shape[1]) + self.prior(frames).T
