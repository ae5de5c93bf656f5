"""The actor-critic: observation encoder, a core that remembers, policy and value heads."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn import functional as F

from environments.contract import Task
from environments.pictures import SMALLEST_PICTURE
from environments.section import Declared, Flag, Number, Whole
from recurrence import Fragments, Memoryless, MemorylessConfig, Recurrence, RecurrenceConfig
from transformer import MASKED, MemoryView, Transformer, TransformerConfig

# Normalised vectors are clipped to this many standard deviations.
FURTHEST = 10.0
Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d | nn.ConvTranspose2d)


class ModelConfig(Declared):
    """What of a config decides what the model is like."""

    hidden_layer_size: Whole = Field(
        384, ge=1, le=10**5, description="Width of the hidden layers before the policy and before the value."
    )
    value_gain: Number = Field(
        1.0, ge=0, le=1000, description="Gain of the value head's orthogonal initialisation: with 1, as in the "
        "reference, an untrained agent may predict up to about ±1 whatever it sees; near 0, it predicts about 0.",
    )  # fmt: skip
    normalize_observations: Flag = Field(
        False, description="Observed vectors are brought to mean 0 and variance 1 by running statistics."
    )
    transformer: TransformerConfig | None = Field(None, description="Memory by a transformer: its shape.")
    recurrence: RecurrenceConfig | None = Field(None, description="Memory by a recurrent cell: its shape.")
    memoryless: MemorylessConfig | None = Field(None, description="No memory.")

    @property
    def core(self) -> TransformerConfig | RecurrenceConfig | MemorylessConfig:
        """Return the section that is there: exactly one is (checked by run/config.py)."""
        return self.transformer or self.recurrence or self.memoryless


@dataclass
class Categorical:
    """A policy of N observations over discrete action branches."""

    log_probs: list[Tensor]  # (N, actions) of each branch

    def parameters(self) -> Tensor:
        """Return (N, sum of actions): all that tells this policy from others."""
        return torch.cat(self.log_probs, dim=1)

    def kl(self, old: Tensor) -> Tensor:
        """Return (N,): KL(old ‖ this), summed over branches, for the `parameters` of an older policy."""
        return (old.exp() * (old - self.parameters())).sum(dim=1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return (N, branches): the log-probability of each branch of `actions` (N, branches)."""
        chosen = [branch.gather(1, action[:, None]) for branch, action in zip(self.log_probs, actions.T, strict=True)]
        return torch.cat(chosen, dim=1)

    def entropy(self) -> Tensor:
        """Return (N,): the entropy, summed over branches."""
        return -reduce(torch.add, [(branch.exp() * branch).sum(dim=1) for branch in self.log_probs])

    def sample(self, noise: Tensor) -> Tensor:
        """Draw actions (N, branches): argmax p/e is distributed as p, for exponential noise e (N, sum of actions)."""
        parts = noise.log().split([branch.shape[1] for branch in self.log_probs], dim=1)
        return torch.stack([(b - e).argmax(dim=1) for b, e in zip(self.log_probs, parts, strict=True)], dim=1)

    def mode(self) -> Tensor:
        """Return (N, branches): the most probable actions."""
        return torch.stack([branch.argmax(dim=1) for branch in self.log_probs], dim=1)


@dataclass
class Normal:
    """A policy of N observations over continuous actions: independent normal distributions."""

    mean: Tensor  # (N, entries)
    log_std: Tensor  # (entries,), learned and the same for all observations

    @property
    def distribution(self) -> torch.distributions.Normal:
        """Return what PyTorch computes with; unchecked, since a check would wait for the device."""
        return torch.distributions.Normal(self.mean, self.log_std.exp(), validate_args=False)

    def parameters(self) -> Tensor:
        """Return (N, 2·entries): all that tells this policy from others."""
        return torch.cat((self.mean, self.log_std.expand_as(self.mean)), dim=1)

    def kl(self, old: Tensor) -> Tensor:
        """Return (N,): KL(old ‖ this), summed over entries, for the `parameters` of an older policy."""
        return kl_divergence(Normal(*old.chunk(2, dim=1)).distribution, self.distribution).sum(dim=1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return (N, 1): the logarithm of the joint density of `actions` (N, entries)."""
        return self.distribution.log_prob(actions).sum(dim=1, keepdim=True)

    def entropy(self) -> Tensor:
        """Return (N,): the differential entropy, summed over entries."""
        return self.distribution.entropy().sum(dim=1)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw actions (N, entries) by standard normal `noise` (N, entries)."""
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        """Return (N, entries): the most probable actions."""
        return self.mean


def action_noise(task: Task, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return (*shape, entries) what `sample` of the task's policy draws actions by."""
    noise = torch.empty(*shape, task.continuous or sum(task.branches), device=generator.device)
    return noise.normal_(generator=generator) if task.continuous else noise.exponential_(generator=generator)


@dataclass
class Output:
    """What the model returns for N observations."""

    policy: Categorical | Normal
    value: Tensor  # (N,) expected discounted return
    kept: Tensor  # for memory, detached: inputs of a transformer's blocks (blocks, N, D), or states (N, state_size)
    output: Tensor  # (N, output_dim) of the core
    attention: list[Tensor]  # per block the attention weights, detached, as `Attention.forward` returns them


def orthogonal(layer: Layer, gain: float = math.sqrt(2)) -> Layer:
    """Initialise the weight of a layer orthogonally and return the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    return layer


def channels_last(module: nn.Module) -> None:
    """Let kernels lie in memory as frames do, their channels last: what oneDNN and cuDNN compute fastest."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's declarations leave it out


def wide_convolution(x: Tensor, conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """Return the convolution of x (N, C, H, W) by `conv` with the kernels `weight`, at strides that divide them.

    As many columns as a kernel moves by are read as one with so many times the channels: with channels last both x and
    the kernels lie in memory like that already. Processors multiply 12 channels about as fast as 3.
    """
    stride, (outputs, _, height, width) = conv.stride[1], weight.shape
    n, channels, rows, columns = x.shape
    used = (columns - width) // stride * stride + width  # columns that any kernel sees
    x = x[..., :used].permute(0, 2, 3, 1).reshape(n, rows, used // stride, stride * channels)
    weight = weight.permute(0, 2, 3, 1).reshape(outputs, height, width // stride, stride * channels)
    return F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), conv.bias, (conv.stride[0], 1))


class VisualEncoder(nn.Module):
    """The convolutional encoder of Mnih et al. 2015 for uint8 frames (C, H, W), then a linear layer to D.

    H and W are at least `SMALLEST_PICTURE`.
    """

    def __init__(self, shape: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        self.conv1 = orthogonal(nn.Conv2d(shape[0], 32, 8, 4))
        self.conv2 = orthogonal(nn.Conv2d(32, 64, 4, 2))
        self.conv3 = orthogonal(nn.Conv2d(64, 64, 3, 1))
        channels_last(self)
        self.sizes = [(shape[1], shape[2])]
        for conv in (self.conv1, self.conv2, self.conv3):
            height, width = ((size - conv.kernel_size[0]) // conv.stride[0] + 1 for size in self.sizes[-1])
            self.sizes.append((height, width))
        self.hidden = orthogonal(nn.Linear(64 * math.prod(self.sizes[-1]), embed_dim))

    def forward(self, frames: Tensor) -> Tensor:
        """Return (N, D) for uint8 frames (N, C, H, W)."""
        device = frames.device.type
        frames = frames.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32)
        # Pixels are 255ths: cheaper to say to the few weights than to the many pixels.
        x = F.relu_(wide_convolution(frames, self.conv1, self.conv1.weight * (1 / 255)))
        x = F.relu_(wide_convolution(x, self.conv2, self.conv2.weight))
        x = F.relu_(self.conv3(x))
        return F.relu(self.hidden(x.flatten(1)))  # (N, 64·h·w), channels first as in the reference


class GridEncoder(nn.Module):
    """Two 3×3 convolutions for frames too small for `VisualEncoder`, such as symbolic grids, and a layer to D."""

    def __init__(self, shape: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        self.conv1 = orthogonal(nn.Conv2d(shape[0], 32, 3, padding=1))
        self.conv2 = orthogonal(nn.Conv2d(32, 64, 3, padding=1))
        channels_last(self)
        self.hidden = orthogonal(nn.Linear(64 * math.prod(shape[1:]), embed_dim))

    def forward(self, frames: Tensor) -> Tensor:
        """Return (N, D) for uint8 frames (N, C, H, W)."""
        # Symbols are small numbers, pixels large ones: the logarithm suits both.
        x = F.relu(self.conv1(torch.log1p(frames.to(torch.float32))))
        x = F.relu(self.conv2(x))
        return F.relu(self.hidden(x.flatten(1)))  # (N, 64·H·W)


class RunningMoments(nn.Module):
    """Brings vectors to mean 0 and variance 1 by what all rollouts so far have shown.

    It changes between updates only, so that sampling and training of an update see the same numbers, and is saved with
    the weights.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (N, n) the vectors (N, n), normalised and clipped."""
        scale = (self.variance + 1e-8).rsqrt()
        return ((vectors - self.mean.float()) * scale.float()).clamp(-FURTHEST, FURTHEST)

    def update(self, moments: Tensor) -> None:
        """Take in more vectors (n,), by their number, sums and sums of squares: `moments` (1 + 2·n,), float64."""
        count, total, squares = moments[0], *moments[1:].chunk(2)
        whole = self.count + count
        mean = (self.count * self.mean + total) / whole
        square = (self.count * (self.variance + self.mean**2) + squares) / whole
        self.variance.copy_((square - mean**2).clamp(min=0))
        self.mean.copy_(mean)
        self.count.copy_(whole)


class ActorCriticModel(nn.Module):
    """Encoder → embedding → core (Transformer-XL, a recurrent cell, or nothing) → policy and value."""

    def __init__(self, config: ModelConfig, task: Task) -> None:
        super().__init__()
        self.task = task
        embed_dim, hidden = config.core.embed_dim, config.hidden_layer_size
        self.encoder: nn.Module
        if task.frame is None:
            hidden_layer = orthogonal(nn.Linear(task.vector, embed_dim))
            self.encoder = nn.Sequential(OrderedDict(hidden=hidden_layer, relu=nn.ReLU()))
        elif min(task.frame[1:]) < SMALLEST_PICTURE:
            self.encoder = GridEncoder(task.frame, embed_dim)
        else:
            self.encoder = VisualEncoder(task.frame, embed_dim)
        self.embedding = orthogonal(nn.Linear(embed_dim, embed_dim))
        # Under the name of its section: so are its parameters called.
        if config.transformer is not None:
            self.transformer = Transformer(config.transformer, task.max_episode_steps)
        elif config.recurrence is not None:
            self.recurrence = Recurrence(config.recurrence)
        else:
            self.memoryless = Memoryless(config.memoryless)
        self.policy_hidden = orthogonal(nn.Linear(self.core.output_dim, hidden))
        self.value_hidden = orthogonal(nn.Linear(self.core.output_dim, hidden))
        outputs = [task.continuous] if task.continuous else task.branches
        self.policy = nn.ModuleList(orthogonal(nn.Linear(hidden, n), math.sqrt(0.01)) for n in outputs)
        self.value = orthogonal(nn.Linear(hidden, 1), config.value_gain)
        self.log_std = nn.Parameter(torch.zeros(task.continuous)) if task.continuous else None
        both = task.frame is not None and task.vector
        self.vector = orthogonal(nn.Linear(task.vector, embed_dim)) if both else None
        normalised = config.normalize_observations and task.vector
        self.moments = RunningMoments(task.vector) if normalised else nn.Identity()

    @property
    def core(self) -> Transformer | Recurrence | Memoryless:
        """What remembers."""
        return next(getattr(self, name) for name in ("transformer", "recurrence", "memoryless") if hasattr(self, name))

    def embed(self, distinct: Tensor) -> Tensor:
        """Embed what observations share: frames (M, C, H, W), or vectors (M, n) where there are no frames.

        Returned is h⁰ (M, D), what the core reads, in float32 whatever the products' precision, as residual connections
        add to it; without its ReLU where `complete` adds a vector.
        """
        embedded = self.embedding(self.encoder(distinct if self.task.frame else self.moments(distinct))).float()
        return embedded if self.vector is not None else F.relu(embedded)

    def complete(self, embedded: Tensor, vectors: Tensor | None, step: Tensor) -> Tensor:
        """Return h⁰ (N, D): `embed`'s with each sample's own vector (N, n) beside frames and episode step (N,)."""
        if self.vector is not None:
            embedded = F.relu(embedded + self.vector(self.moments(vectors)))
        return self.core.place(embedded, step)

    def forward(self, x: Tensor, past: MemoryView | Fragments, mask: Tensor | None = None) -> Output:
        """Return policy and value for x (N, D) of `complete`, whose samples may look at `past`.

        `mask` (N, sum of actions) is False for actions that are not allowed; None if all are.
        """
        output, kept, attention = self.core(x, past)
        return Output(*self.heads(output, mask), kept, output, attention)

    def heads(self, output: Tensor, mask: Tensor | None = None) -> tuple[Categorical | Normal, Tensor]:
        """Return the policy and the value (N,) for outputs (N, output_dim) of the core; `mask` as in `forward`."""
        hidden = F.relu(self.policy_hidden(output))
        logits = [branch(hidden).float() for branch in self.policy]
        if self.log_std is not None:
            policy: Categorical | Normal = Normal(logits[0], self.log_std + 0.0)  # no gradient while sampling
        else:
            if mask is not None:
                allowed = mask.split(list(self.task.branches), dim=1)
                logits = [x.masked_fill(~part, MASKED) for x, part in zip(logits, allowed, strict=True)]
            policy = Categorical([x.log_softmax(dim=1) for x in logits])
        return policy, self.value(F.relu(self.value_hidden(output))).float().squeeze(1)
