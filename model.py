"""The actor-critic: observation encoder, Transformer-XL, policy and value heads, optional observation decoder."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from products import Linear
from transformer import MemoryView, Transformer
from windows import Windows


@dataclass
class Prediction:
    """What the model says about N observations.

    Attributes:
        log_probs: one (N, actions) tensor of log-probabilities per action branch.
        value: (N,) predicted discounted return.
        inputs: (blocks, N, D) inputs of the blocks, detached: what memory is to keep of a step.
        output: (N, D) output of the transformer.
        attention: per block the attention weights, detached, as `Attention.forward` returns them.
    """

    log_probs: list[Tensor]
    value: Tensor
    inputs: Tensor
    output: Tensor
    attention: list[Tensor]

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return (N, branches): the log-probability of each branch of `actions` (N, branches)."""
        chosen = [branch.gather(1, action[:, None]) for branch, action in zip(self.log_probs, actions.T, strict=True)]
        return torch.cat(chosen, dim=1)

    def entropy(self) -> Tensor:
        """Return (N,): the entropy of the policy, summed over branches."""
        return -sum((branch.exp() * branch).sum(dim=1) for branch in self.log_probs)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw actions (N, branches): argmax of p/e, e exponentially distributed, is distributed as p."""
        draws = [
            (branch - torch.empty_like(branch).exponential_(generator=generator).log()).argmax(dim=1)
            for branch in self.log_probs
        ]
        return torch.stack(draws, dim=1)

    def mode(self) -> Tensor:
        """Return (N, branches): the most probable actions."""
        return torch.stack([branch.argmax(dim=1) for branch in self.log_probs], dim=1)


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """Initialise the weight of a layer orthogonally and return the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    return layer


class VisualEncoder(nn.Module):
    """The convolutional encoder of Mnih et al. 2015 for uint8 frames, followed by a linear layer to D.

    Args:
        shape: (C, H, W) of a frame, H and W at least 36.
        embed_dim: D.
    """

    def __init__(self, shape: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        self.conv1 = orthogonal(nn.Conv2d(shape[0], 32, 8, 4), math.sqrt(2))
        self.conv2 = orthogonal(nn.Conv2d(32, 64, 4, 2), math.sqrt(2))
        self.conv3 = orthogonal(nn.Conv2d(64, 64, 3, 1), math.sqrt(2))
        # What oneDNN and cuDNN compute fastest; the frames are stored this way too.
        self.to(memory_format=torch.channels_last)
        self.sizes = [shape[1:]]
        for conv in (self.conv1, self.conv2, self.conv3):
            self.sizes.append(tuple((s - conv.kernel_size[0]) // conv.stride[0] + 1 for s in self.sizes[-1]))
        self.hidden = orthogonal(Linear(64 * math.prod(self.sizes[-1]), embed_dim), math.sqrt(2))

    def forward(self, frames: Tensor) -> Tensor:
        """Return (N, D) for uint8 frames (N, C, H, W)."""
        # Pixels are 255ths: cheaper to say to the few weights than to the many pixels.
        x = F.conv2d(frames.to(torch.float32), self.conv1.weight * (1 / 255), self.conv1.bias, self.conv1.stride)
        for conv in (self.conv2, self.conv3):
            x = conv(F.relu_(x))
        x = F.relu_(x)
        return F.relu(self.hidden(x.flatten(1)))  # (N, 64·h·w), channels first as in the reference


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
    """Mean binary cross-entropy of logits and frames, with its gradient in the same pass.

    The logits of a minibatch are its largest tensor. `binary_cross_entropy_with_logits` reads or writes as much a dozen
    times; here a few frames at a time stay in the processor's cache.
    """

    @staticmethod
    def forward(context: FunctionCtx, logits: Tensor, frames: Tensor, which: Tensor) -> Tensor:
        """Return the mean over all pixels of softplus(x) − x·y.

        Args:
            context: keeps the gradient, sigmoid(x) − y, but for the number of pixels.
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
        return total / logits.numel()

    @staticmethod
    def backward(context: FunctionCtx, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the logits for that of the loss."""
        (gradient,) = context.saved_tensors
        return gradient.mul_(slope / gradient.numel()).permute(0, 3, 1, 2), None, None


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


class VectorEncoder(nn.Module):
    """One linear layer for float vectors.

    Args:
        size: n of the observations (n,).
        embed_dim: D.
    """

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        self.hidden = orthogonal(Linear(size, embed_dim), math.sqrt(2))

    def forward(self, observations: Tensor) -> Tensor:
        """Return (N, D) for observations (N, n)."""
        return F.relu(self.hidden(observations))


class ActorCriticModel(nn.Module):
    """Encoder → embedding → Transformer-XL over episodic memory → policy branches and value.

    Args:
        config: a checked config.
        observation_shape: (C, H, W) of uint8 frames or (n,) of float vectors.
        branches: number of actions of each action branch.
        max_episode_steps: longest episode, None for endless tasks.
    """

    def __init__(
        self, config: dict, observation_shape: tuple[int, ...], branches: list[int], max_episode_steps: int | None
    ) -> None:
        super().__init__()
        embed_dim, hidden = config["transformer"]["embed_dim"], config["hidden_layer_size"]
        self.branches, self.visual = list(branches), len(observation_shape) == 3
        if self.visual:
            self.encoder = VisualEncoder(observation_shape, embed_dim)
        else:
            self.encoder = VectorEncoder(observation_shape[0], embed_dim)
        self.embedding = orthogonal(Linear(embed_dim, embed_dim), math.sqrt(2))
        self.transformer = Transformer(config["transformer"], max_episode_steps)
        self.policy_hidden = orthogonal(Linear(embed_dim, hidden), math.sqrt(2))
        self.value_hidden = orthogonal(Linear(embed_dim, hidden), math.sqrt(2))
        self.policy = nn.ModuleList(orthogonal(Linear(hidden, n), math.sqrt(0.01)) for n in branches)
        self.value = orthogonal(Linear(hidden, 1), config["value_gain"])
        reconstructs = self.visual and config["reconstruction_coefficient"] > 0
        self.decoder = VisualDecoder(self.encoder, observation_shape, embed_dim) if reconstructs else None
        self.recall = Recall(embed_dim) if self.visual and config["recall_coefficient"] > 0 else None

    def embed(self, observations: Tensor) -> Tensor:
        """Return h⁰ (M, D), what the first block reads, for observations (M, *observation_shape)."""
        return F.relu(self.embedding(self.encoder(observations)))

    def forward(self, embedded: Tensor, memory: Windows | MemoryView) -> Prediction:
        """Predict from embedded observations (N, D) and what each may look at."""
        output, inputs, attention = self.transformer(embedded, memory)
        hidden = F.relu(self.policy_hidden(output))
        log_probs = [branch(hidden).float().log_softmax(dim=1) for branch in self.policy]
        value = self.value(F.relu(self.value_hidden(output))).float().squeeze(1)
        return Prediction(log_probs, value, inputs, output, attention)
