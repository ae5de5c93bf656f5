"""A recurrent cell, or nothing, in the place of the transformer: what its memory is compared with.

Both are cores as `transformer.Transformer` is one: they take the embedded observations and what is known of the past,
and return an output, what memory is to keep, and attention, which they do not have.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from environments.section import Declared, Whole


class RecurrenceConfig(Declared):
    """The shape of a recurrent cell."""

    layer_type: Literal["gru", "lstm"] = Field(description="Which cell.")
    embed_dim: Whole = Field(384, ge=1, le=2**14, description="Width of the embedded observation, the cell's input.")
    hidden_state_size: Whole = Field(384, ge=1, le=2**14, description="Width of the cell's state and of its output.")
    num_layers: Whole = Field(1, ge=1, le=100, description="How many cells follow each other.")


class MemorylessConfig(Declared):
    """No memory: the policy sees the current observation only."""

    embed_dim: Whole = Field(384, ge=1, le=2**14, description="Width of the embedded observation.")


@dataclass
class Fragments:
    """The past of N steps: stretches that each lie within one episode, and the state before the first step of each."""

    state: Tensor  # (F, width) of each fragment, the longest fragment first
    order: Tensor  # (N,) int64 the steps as in a `PackedSequence`: first steps of all fragments, then second ones, …
    sizes: Tensor  # (longest,) int64 on the CPU, how many fragments have a first, a second, … step


class Core(nn.Module):
    """What comes between the embedded observation and the heads, where that is no transformer."""

    memory_length = math.inf  # how many steps it can look back

    def constant_weights(self) -> AbstractContextManager[None]:
        """Nothing is derived from the weights; see `Transformer.constant_weights`."""
        return nullcontext()

    def place(self, embedded: Tensor, step: Tensor) -> Tensor:
        """Return the embedded observations (N, D) as they are: a state tells the time."""
        return embedded


class Recurrence(Core):
    """A GRU or LSTM of one or more layers."""

    def __init__(self, config: RecurrenceConfig) -> None:
        super().__init__()
        kind = nn.GRU if config.layer_type == "gru" else nn.LSTM
        self.cell = kind(config.embed_dim, config.hidden_state_size, config.num_layers)
        for name, parameter in self.cell.named_parameters():
            nn.init.orthogonal_(parameter) if "weight" in name else nn.init.zeros_(parameter)
        self.output_dim = config.hidden_state_size
        self.states = 1 if config.layer_type == "gru" else 2  # an LSTM has a hidden and a cell state
        self.state_size = self.states * config.num_layers * config.hidden_state_size

    def forward(self, x: Tensor, past: Fragments) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Unroll the cell over fragments of embedded observations x (N, D), with gradients inside each.

        Returns:
            output (N, hidden_state_size), the state after each fragment (F, state_size), detached, and no attention.
        """
        if not x.shape[0]:  # a rank's share of a minibatch may be empty
            return x.new_zeros(0, self.output_dim), past.state, []
        state = past.state.unflatten(1, (-1, self.output_dim)).transpose(0, 1)  # (states·layers, F, H)
        single = len(past.sizes) == 1  # a step of each fragment: there is nothing to pack, which ONNX does not know
        with torch.autocast(x.device.type, enabled=False):  # as precise while sampling as while training
            steps = x.float()[None] if single else PackedSequence(x.float()[past.order], past.sizes)
            if self.states == 1:
                output, after = self.cell(steps, state.contiguous())
            else:
                output, both = self.cell(steps, tuple(part.contiguous() for part in state.chunk(2)))
                after = torch.cat(both)  # (2·layers, F, H)
        kept = after.detach().transpose(0, 1).flatten(1)
        if single:
            return output[0], kept, []
        place = torch.empty_like(past.order).scatter_(0, past.order, torch.arange(len(x), device=x.device))
        return output.data[place], kept, []


class Memoryless(Core):
    """Nothing between the embedded observation and the heads."""

    state_size = 0

    def __init__(self, config: MemorylessConfig) -> None:
        super().__init__()
        self.output_dim = config.embed_dim

    def forward(self, x: Tensor, past: Fragments) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return x (N, D), nothing to keep (F, 0), and no attention."""
        return x, past.state, []
