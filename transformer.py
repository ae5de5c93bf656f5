"""Transformer-XL as episodic memory: attention from one query per step to the detached items of earlier steps.

The mathematics is that of Dai et al. 2019 (Transformer-XL) and Parisotto et al. 2020 (GTrXL). Its order is not: instead
of projecting every memory item to keys and values, the projections move to the query's side of the products,

    q·(W_k m) = (W_kᵀ q)·m            Σ aᵢ (W_v mᵢ) = W_v (Σ aᵢ mᵢ)

which costs 2·D² + 2·heads·L·D instead of 2·L·D² multiply-adds per query, and needs no gradient with respect to memory.
`tests/textbook.py` holds the plain formulation, `tests/test_exactness.py` that both agree in outputs and gradients.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from environments.section import Declared, Flag, Number, Whole
from kernels.attention import Attend, columns_of

# Score of what a query must not look at; finite, so that a row without any column to look at stays finite too.
MASKED = -1e30
# What `Attend` takes of a block's columns of memory: items and rows of those that are constant, and those that are not.
Columns = tuple[Tensor | None, Tensor | None, Tensor | None]


class TransformerConfig(Declared):
    """The shape of the transformer and of its memory."""

    num_blocks: Whole = Field(3, ge=1, le=100, description="How many blocks follow each other.")
    embed_dim: Whole = Field(384, ge=2, le=2**14, description="Width of the blocks: even, divisible by `num_heads`.")
    num_heads: Whole = Field(4, ge=1, le=2**14, description="Attention heads.")
    memory_length: Whole = Field(
        ge=1, le=10**5, description="How many past steps a block attends to; may exceed the longest episode."
    )
    positional_encoding: Literal["", "absolute", "learned", "relative"] = Field(
        description="What tells the steps in memory apart; tasks without a step limit need `relative` or none."
    )
    query_position: Flag = Field(
        False,
        description="The current step's own position is added to the embedded observation; not without positions.",
    )
    layer_norm: Literal["", "pre", "post"] = Field(
        "pre", description="Where layers are normalised: nowhere, before or after attention and projection."
    )
    gtrxl: Flag = Field(False, description="GRU-type gates (Parisotto et al. 2020) in place of the residual additions.")
    gtrxl_bias: Number = Field(
        0.0, ge=-100, le=100, description="Where the gates' bias starts; above 0 they start closer to the identity."
    )


@dataclass
class MemoryView:
    """What N queries may look at: each at some of the columns of memory that its group shares.

    Queries come in groups of Q, since the windows of nearby steps overlap. A group's K columns are K' stored ones,
    which are constant, and in a segment the Q that its own queries write, which have a gradient. Column c lies
    distance − c steps before a query, which sees it if that is from 1 to `valid`. Places that no query takes see
    nothing. All but `items` and `nonempty` are int64.
    """

    # (blocks, groups, K', D) stored items; or (blocks, columns, D), of which `rows` says the ones that count
    items: Tensor
    distance: Tensor  # (groups, Q) steps from the group's first column to each query
    valid: Tensor  # (groups, Q) how many steps back each query may look
    nonempty: Tensor  # (N, 1) float, 0 where a query sees nothing, else 1
    rows: Tensor | None = None  # (groups, K') which columns of `items` are each group's; None where `items` is by group
    own: int = 0  # Q if queries see what earlier ones of their group write, else 0
    step: Tensor | None = None  # (N,) episode step of each query, where `own` is not 0
    item_step: Tensor | None = None  # (groups, K') episode step of each column; for the learned encoding only
    source: Tensor | None = None  # (groups·Q,) which query each place holds; None where all are taken, in order
    slot: Tensor | None = None  # (N,) the place of each query; None where all are taken, in order

    @property
    def columns(self) -> int:
        """Return K."""
        return (self.items.shape[2] if self.rows is None else self.rows.shape[1]) + self.own

    def back(self) -> Tensor:
        """Return (groups, Q, K): how many steps before each query a column lies."""
        return self.distance[..., None] - torch.arange(self.columns, device=self.distance.device)

    def bias(self, num_heads: int) -> Tensor:
        """Return (groups, Q·heads, K): MASKED for what a query must not look at, else 0."""
        back = self.back()
        unseen = (back < 1) | (back > self.valid[..., None])
        return (unseen * MASKED).repeat_interleave(num_heads, dim=1)

    def to_places(self, queries: Tensor) -> Tensor:
        """Return (groups, Q·heads, width): what belongs to the queries (N, heads, width), in their places."""
        (groups, per_group), (_, num_heads, width) = self.distance.shape, queries.shape
        if self.source is not None:
            queries = F.embedding(self.source, queries.flatten(1))  # (groups·Q, heads·width)
        return queries.reshape(groups, per_group * num_heads, width)

    def to_queries(self, places: Tensor, num_heads: int) -> Tensor:
        """Return (N, heads, width): what belongs to the queries, from their places (groups, Q·heads, width)."""
        queries = places.reshape(self.distance.numel(), num_heads * places.shape[2])  # (groups·Q, heads·width)
        queries = queries if self.slot is None else F.embedding(self.slot, queries)
        return queries.view(queries.shape[0], num_heads, places.shape[2])

    def by_column(self, by_distance: Tensor) -> Tensor:
        """Return (groups, Q·heads, K) of each column, from (N, heads, L+1) of each distance, the largest first."""
        num_heads, longest = by_distance.shape[1], by_distance.shape[2] - 1
        rows = rearrange(self.to_places(by_distance), "g (q h) l -> g q h l", h=num_heads)
        place = (longest - self.back()).clamp(0, longest)  # what lies further away, nobody sees
        return rows.gather(3, place[:, :, None].expand(-1, -1, num_heads, -1)).flatten(1, 2)


def sinusoid(angle_steps: Tensor, embed_dim: int) -> Tensor:
    """Return (N, embed_dim) sines then cosines of `angle_steps`·10000^(−2i/D) (Vaswani et al. 2017, section 3.5)."""
    exponents = torch.arange(0, embed_dim, 2, dtype=torch.float32, device=angle_steps.device) / embed_dim
    frequencies = 10000.0**-exponents
    angles = angle_steps.float()[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Folded(NamedTuple):
    """What attention derives from its weights alone; h heads of width c."""

    key: Tensor  # (h, c, D), takes a head's query to the space of the items; scores are scaled with it
    value: Tensor  # (h, c, D), takes a head's mean of items to its values
    shift: Tensor | None  # (D,) added to those
    table: Tensor | None  # (h, c, L+1), scaled W_R r of each distance, the largest first; for the relative encoding

    def cast(self) -> "Folded":
        """Return these weights in the products' type, as autocast would cast them each time."""
        device = self.key.device.type
        if not torch.is_autocast_enabled(device):
            return self
        return Folded(*(part if part is None else part.to(torch.get_autocast_dtype(device)) for part in self))


def by_head(x: Tensor, weights: Tensor) -> Tensor:
    """Return (N, h, E): each head's rows of x (N, h, C) times its own matrix of `weights` (h, C, E)."""
    # Contiguous, since for the gradient oneDNN would copy the transpose of what is not, ten times as slowly.
    return torch.bmm(x.transpose(0, 1).contiguous(), weights).transpose(0, 1)


class Attention(nn.Module):
    """Multi-head attention of one query per sample to detached memory items.

    Scores are divided by sqrt(embed_dim), not sqrt(head_dim): kept from the reference, because the published curves
    were made with it. Where memory is empty the context is zero, so that only the output bias remains.

    With `relative`, scores depend on the distance between query and item as in Dai et al. 2019, section 3.3.
    """

    def __init__(self, embed_dim: int, num_heads: int, memory_length: int, relative: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        self.value = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.relative = nn.Linear(embed_dim, embed_dim, bias=False) if relative else None
        self.folded: Folded | None = None  # kept while the weights do not change
        if relative:
            self.content_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))
            self.position_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))
            distances = torch.arange(memory_length, -1, -1)
            self.register_buffer("distances", sinusoid(distances, embed_dim), persistent=False)

    def forward(
        self, x: Tensor, columns: Columns, memory: MemoryView, bias: Tensor, norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor]:
        """Attend from x (N, D) to the items; return (N, D) and the weights (groups, Q·heads, K), without a gradient.

        Args:
            x: normalised already where the block does so.
            columns: of `Transformer.columns`, normalised without affine where `norm` is given.
            memory: which of them each query may look at.
            bias: (groups, Q·heads, K) of `memory.bias`.
            norm: the affine part of norm_kv, or None. It folds in exactly: its bias shifts all scores of a query alike
                and cancels in the softmax, and Σ aᵢ = 1 carries it through to the values.
        """
        folded = self.folded or self.fold(norm)
        query = self.query(x).view(x.shape[0], self.num_heads, self.head_dim)  # (N, heads, C)
        content = query if self.relative is None else query + self.content_bias
        questions = memory.to_places(by_head(content, folded.key))  # (groups, Q·heads, D)
        if self.relative is not None:
            by_distance = by_head(query + self.position_bias, folded.table)  # (N, heads, L+1)
            bias = bias + memory.by_column(by_distance)
        mixture, weights = Attend.apply(questions, bias, *columns)
        context = memory.to_queries(mixture, self.num_heads)  # (N, heads, D)
        values = by_head(context, folded.value.mT).flatten(1)  # (N, D)
        values = values if folded.shift is None else values + folded.shift
        return self.out(values * memory.nonempty), weights

    def fold(self, norm: nn.LayerNorm | None) -> Folded:
        """Return what `forward` derives from the weights, with the affine part of `norm` where it is given."""
        scale = 1 / math.sqrt(self.key.in_features)
        key, value, shift, table = self.key.weight * scale, self.value.weight, None, None
        if norm is not None:
            key, value, shift = key * norm.weight, value * norm.weight, F.linear(norm.bias, value)
        key, value = (weight.unflatten(0, (self.num_heads, -1)) for weight in (key, value))  # (heads, C, D)
        if self.relative is not None:
            table = rearrange(self.relative(self.distances) * scale, "l (h c) -> h c l", h=self.num_heads)
        return Folded(key, value, shift, table)


class Gate(nn.Module):
    """GRU-type gating that takes the place of a residual connection (Parisotto et al. 2020, section 3.2).

    r = σ(Wr y + Ur x)   z = σ(Wz y + Uz x − bg)   ĥ = tanh(Wg y + Ug (r⊙x))   (1−z)⊙x + z⊙ĥ
    """

    def __init__(self, embed_dim: int, bias: float) -> None:
        super().__init__()
        self.from_update = nn.Linear(embed_dim, 3 * embed_dim, bias=False)  # Wr, Wz, Wg
        self.from_state = nn.Linear(embed_dim, 2 * embed_dim, bias=False)  # Ur, Uz
        self.candidate = nn.Linear(embed_dim, embed_dim, bias=False)  # Ug
        self.bg = nn.Parameter(torch.full((embed_dim,), float(bias)))
        for layer in (self.from_update, self.from_state, self.candidate):
            for matrix in layer.weight.data.split(embed_dim):
                nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return (N, D): the state x (N, D) updated by the layer's output y (N, D)."""
        x = x.float()  # bf16 products leave a float32 state
        y_reset, y_update, y_new = self.from_update(y).float().chunk(3, dim=1)
        x_reset, x_update = self.from_state(x).chunk(2, dim=1)
        reset, update = torch.sigmoid(y_reset + x_reset), torch.sigmoid(y_update + x_update - self.bg)
        return torch.lerp(x, torch.tanh(y_new + self.candidate(reset * x)), update)


class Block(nn.Module):
    """One layer: attention to memory, then a feed-forward layer, each with a residual connection or a gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        embed_dim, self.layer_norm = config.embed_dim, config.layer_norm
        relative = config.positional_encoding == "relative"
        self.attention = Attention(embed_dim, config.num_heads, config.memory_length, relative)
        self.feed_forward = nn.Linear(embed_dim, embed_dim)
        normed = self.layer_norm != ""
        self.norm1 = nn.LayerNorm(embed_dim) if normed else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dim) if normed else nn.Identity()
        self.norm_kv = nn.LayerNorm(embed_dim) if self.layer_norm == "pre" else None
        self.gate1 = Gate(embed_dim, config.gtrxl_bias) if config.gtrxl else torch.add
        self.gate2 = Gate(embed_dim, config.gtrxl_bias) if config.gtrxl else torch.add

    def forward(self, x: Tensor, columns: Columns, memory: MemoryView, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output (N, D) and its attention weights; arguments as in `Attention.forward`."""
        pre, post = self.layer_norm == "pre", self.layer_norm == "post"
        attended, weights = self.attention(self.norm1(x) if pre else x, columns, memory, bias, self.norm_kv)
        x = self.gate1(x, attended)
        x = self.norm1(x) if post else x
        x = self.gate2(x, F.relu(self.feed_forward(self.norm2(x) if pre else x)))
        return self.norm2(x) if post else x, weights


class Transformer(nn.Module):
    """A stack of blocks over one shared layout of memory.

    The absolute and the learned encoding need `max_episode_steps`, T, which is None for endless tasks.
    """

    def __init__(self, config: TransformerConfig, max_episode_steps: int | None) -> None:
        super().__init__()
        self.embed_dim = self.output_dim = config.embed_dim
        self.num_heads, self.memory_length = config.num_heads, config.memory_length
        self.encoding, self.pre_norm = config.positional_encoding, config.layer_norm == "pre"
        self.query_position = config.query_position
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        if self.encoding == "absolute":
            steps = torch.arange(max_episode_steps - 1, -1, -1)
            self.register_buffer("position", sinusoid(steps, self.embed_dim), persistent=False)  # (T, D)
        if self.encoding == "learned":
            self.position = nn.Parameter(torch.randn(max_episode_steps, self.embed_dim))

    @contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Derive from the weights only once what attention needs of them: in here they must not change."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]  # says to mypy what they are
        for block in blocks:
            with torch.no_grad():
                block.attention.folded = block.attention.fold(block.norm_kv).cast()
        try:
            yield
        finally:
            for block in blocks:
                block.attention.folded = None

    def place(self, embedded: Tensor, step: Tensor) -> Tensor:
        """Return (N, D): embedded observations (N, D), with the position of their episode step (N,) if so configured.

        Where only memory items carry positions, as in the reference, a query has to infer its own step. With the
        relative encoding neither knows its step, only the distance between them is told.
        """
        if not self.query_position:
            return embedded
        if self.encoding == "relative":
            return embedded + sinusoid(step, self.embed_dim)
        # What a time limit leaves after the last step stands where that step stood.
        return embedded + F.embedding(step.clamp(max=len(self.position) - 1), self.position)

    def to_items(self, inputs: Tensor, step: Tensor) -> Tensor:
        """Return what memory stores (…, N, D) of what one or all blocks received (…, N, D) at episode steps (N,).

        The absolute position is added, and "pre" blocks normalise it: both stay as they are. A learned position changes
        with every optimiser step and is added when the item is read.
        """
        if self.encoding == "learned":
            return inputs
        if self.encoding == "absolute":
            inputs = inputs + self.position[step]
        return F.layer_norm(inputs, (self.embed_dim,)) if self.pre_norm else inputs

    def read(self, items: Tensor, step: Tensor | None) -> Tensor:
        """Return stored items (…, D), written at episode steps (…), as attention reads them."""
        if self.encoding != "learned":
            return items
        items = items + self.position[step]
        return F.layer_norm(items, (self.embed_dim,)) if self.pre_norm else items

    def columns(self, memory: MemoryView, block: int, x: Tensor) -> Columns:
        """Return the columns of memory for a block: those stored, and in a segment those that x (N, D) writes."""
        items, rows, written = memory.items[block], memory.rows, None
        if memory.own:
            written = self.read(self.to_items(x, memory.step), memory.step).view(-1, memory.own, self.embed_dim)
        if self.encoding == "learned":  # positions have a gradient, and so have all columns
            stored = self.read(columns_of(items, rows, None), memory.item_step)
            return None, None, stored if written is None else torch.cat((stored, written), dim=1)
        return items, rows, written

    def forward(self, x: Tensor, memory: MemoryView) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run all blocks on embedded observations (N, D).

        Returns:
            output (N, D), what memory is to keep of each step (blocks, N, D), detached, and the attention weights of
            each block.
        """
        bias, kept, weights = memory.bias(self.num_heads), [], []
        for index, block in enumerate(self.blocks):
            kept.append(x.detach())
            x, attended = block(x, self.columns(memory, index, x), memory, bias)
            weights.append(attended)
        return x, torch.stack(kept), weights
