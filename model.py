"""The actor-critic: observation encoder, Transformer-XL, policy and value heads, optional observation decoder."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from kernels.products import Linear
from transformer import MemoryView, Transformer
from kernels.windows import Windows


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
