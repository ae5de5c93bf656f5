"""A recurrent cell, or nothing, in the place of the transformer: what a comparison of memories compares it with."""

from typing import Literal

from pydantic import Field

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
