"""A plain textbook formulation of PPO with episodic memory: the oracle of the tests.

Pure functions, independent of the product code and written to be obviously correct, never to be fast: every sample
has its own memory window, whose items are projected to keys and values explicitly. `parameters` maps the canonical
names of the parity fixtures to tensors, `config` holds the fixtures' settings. Everything is computed in the
parameters' dtype.

Sizes in comments: N samples, S memory slots, D embed_dim, H heads, W workers, T steps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Parameters = dict[str, Tensor]
Config = dict[str, Any]


class Step(NamedTuple):
    """What the model computes for N samples."""

    log_softmaxes: list[Tensor]  # one (N, number of actions) per action branch
    value: Tensor  # (N,)
    memory: Tensor  # (N, blocks, D), the items that these steps write
    output: Tensor  # (N, D), the output of the last block


class Windows(NamedTuple):
    """The memory windows of N samples, oldest item first, valid items before empty slots."""

    items: Tensor  # (N, S, blocks, D), zero in empty slots
    mask: Tensor  # (N, S), true where a slot holds an item
    positions: Tensor  # (N, S), episode step at which the item was written, zero in empty slots
    steps: Tensor  # (N,), episode step of the sample itself


# ---------------------------------------------------------------------------------------------------------- model


def linear(parameters: Parameters, name: str, inputs: Tensor) -> Tensor:
    """Applies the linear layer `name`; its bias is optional."""
    return functional.linear(inputs, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def layer_norm(parameters: Parameters, name: str, inputs: Tensor) -> Tensor:
    """Normalises the last dimension, then applies the affine parameters of `name`."""
    return functional.layer_norm(
        inputs, inputs.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"], eps=1e-5
    )


def encode(parameters: Parameters, config: Config, observations: Tensor) -> Tensor:
    """Encodes uint8 frames (N, 3, height, width) or vectors (N, n) and embeds them: h0 (N, D)."""
    features = observations.to(parameters["hidden.weight"].dtype)
    if config["visual"]:
        features = features / 255
        for name, stride in (("conv1", 4), ("conv2", 2), ("conv3", 1)):
            weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
            features = torch.relu(functional.conv2d(features, weight, bias, stride=stride))
        features = features.flatten(start_dim=1)  # (N, channels, rows, columns) -> (N, channels * rows * columns)
    features = torch.relu(linear(parameters, "hidden", features))
    return torch.relu(linear(parameters, "embedding", features))


def sinusoid(angles_at: Tensor, dimension: int) -> Tensor:
    """Maps positions (...) to [sin(position * w_i), cos(position * w_i)] (..., dimension), w_i = 10000^(-2i/D)."""
    frequencies = 10000.0 ** (-2 * torch.arange(dimension // 2, dtype=torch.float64) / dimension)  # (D / 2,)
    angles = angles_at.to(torch.float64).unsqueeze(-1) * frequencies  # (..., 1) * (D / 2,) -> (..., D / 2)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)  # (..., D)


def position_of(parameters: Parameters, config: Config, steps: Tensor) -> Tensor:
    """The encoding (..., D) of episode steps (...)."""
    if config["positional_encoding"] == "relative":
        return sinusoid(steps, config["embed_dim"])  # distances need no longest episode, neither do steps
    if config["positional_encoding"] == "absolute":
        remaining = config["max_episode_steps"] - 1 - steps
        return sinusoid(remaining, config["embed_dim"])
    return parameters["position"][steps]  # (T, D)[(...)] -> (..., D)


def add_positions(parameters: Parameters, config: Config, items: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Adds the encoding of their episode steps to the items (N, S, D) of one block, where the config asks for it."""
    if config["positional_encoding"] in ("", "relative"):
        return items
    positions = positions.masked_fill(~mask, 0)  # whatever an empty slot says, it must not index out of range
    return items + position_of(parameters, config, positions).to(items.dtype)


def add_own_position(parameters: Parameters, config: Config, embedded: Tensor, steps: Tensor) -> Tensor:
    """Adds the encoding of the samples' own episode steps (N,) to h0 (N, D), where the config asks for it."""
    if not config.get("query_position", False):
        return embedded
    if config["positional_encoding"] != "relative":
        # What a time limit leaves after the last step stands where that step stood.
        steps = steps.clamp(max=config["max_episode_steps"] - 1)
    return embedded + position_of(parameters, config, steps).to(embedded.dtype)


def relative_scores(parameters: Parameters, name: str, config: Config, query: Tensor, distances: Tensor) -> Tensor:
    """Dai et al. (2019), terms (b) and (d): (q_h + v_h) . (W_R r_distance)_h, unscaled, as (N, H, S)."""
    heads, head_dim = query.shape[1:]
    encoding = sinusoid(distances, config["embed_dim"]).to(query.dtype)  # (N, S, D)
    projected = linear(parameters, f"{name}.relative", encoding)
    projected = projected.reshape(*distances.shape, heads, head_dim)  # (N, S, D) -> (N, S, H, head_dim)
    return torch.einsum("nhd,nshd->nhs", query + parameters[f"{name}.position_bias"], projected)


def attend(
    parameters: Parameters, name: str, config: Config, query: Tensor, items: Tensor, mask: Tensor, distances: Tensor
) -> Tensor:
    """Multi-head attention from one query (N, D) to its own items (N, S, D): result (N, D)."""
    samples, slots, dimension = items.shape
    heads = config["num_heads"]
    head_dim = dimension // heads
    queries = linear(parameters, f"{name}.query", query).reshape(samples, heads, head_dim)  # (N, D) -> (N, H, head_dim)
    keys = linear(parameters, f"{name}.key", items).reshape(samples, slots, heads, head_dim)  # -> (N, S, H, head_dim)
    values = linear(parameters, f"{name}.value", items).reshape(samples, slots, heads, head_dim)  # the same
    if config["positional_encoding"] == "relative":
        scores = torch.einsum("nhd,nshd->nhs", queries + parameters[f"{name}.content_bias"], keys)
        scores = scores + relative_scores(parameters, name, config, queries, distances)
    else:
        scores = torch.einsum("nhd,nshd->nhs", queries, keys)
    scores = scores / dimension**0.5  # by sqrt(embed_dim), not sqrt(head_dim)
    valid = mask.unsqueeze(1)  # (N, S) -> (N, 1, S)
    # The lowest finite score, not -inf: a sample without any item gets weights, not NaN, and the product clears them.
    weights = torch.softmax(scores.masked_fill(~valid, torch.finfo(scores.dtype).min), dim=-1) * valid
    context = torch.einsum("nhs,nshd->nhd", weights, values).reshape(samples, dimension)  # (N, H, head_dim) -> (N, D)
    return linear(parameters, f"{name}.out", context)


def gate(parameters: Parameters, name: str, x: Tensor, y: Tensor) -> Tensor:
    """The gated recurrent unit of GTrXL, in place of the residual connection x + y."""
    reset = torch.sigmoid(linear(parameters, f"{name}.Wr", y) + linear(parameters, f"{name}.Ur", x))
    update = torch.sigmoid(
        linear(parameters, f"{name}.Wz", y) + linear(parameters, f"{name}.Uz", x) - parameters[f"{name}.bg"]
    )
    candidate = torch.tanh(linear(parameters, f"{name}.Wg", y) + linear(parameters, f"{name}.Ug", reset * x))
    return (1 - update) * x + update * candidate


def residual(parameters: Parameters, name: str, config: Config, x: Tensor, y: Tensor) -> Tensor:
    """Joins a sublayer's output y to its input x: the gate `name` in GTrXL, else the sum."""
    return gate(parameters, name, x, y) if config["gtrxl"] else x + y


def block(
    parameters: Parameters, name: str, config: Config, hidden: Tensor, items: Tensor, mask: Tensor, distances: Tensor
) -> Tensor:
    """One transformer block on queries (N, D) and items with positions (N, S, D): output (N, D)."""
    pre, post = config["layer_norm"] == "pre", config["layer_norm"] == "post"
    query = layer_norm(parameters, f"{name}.norm1", hidden) if pre else hidden
    items = layer_norm(parameters, f"{name}.norm_kv", items) if pre else items
    attention = attend(parameters, f"{name}.attention", config, query, items, mask, distances)
    hidden = residual(parameters, f"{name}.gate1", config, hidden, attention)
    hidden = layer_norm(parameters, f"{name}.norm1", hidden) if post else hidden
    inputs = layer_norm(parameters, f"{name}.norm2", hidden) if pre else hidden
    forwarded = torch.relu(linear(parameters, f"{name}.feed_forward", inputs))
    hidden = residual(parameters, f"{name}.gate2", config, hidden, forwarded)
    return layer_norm(parameters, f"{name}.norm2", hidden) if post else hidden


def forward(parameters: Parameters, config: Config, embedded: Tensor, windows: Windows) -> Step:
    """The transformer and the heads, from h0 (N, D), without position, and each sample's memory.

    A sample without items attends to nothing: its context is zero.
    """
    remembered, mask, positions, steps = windows
    distances = steps.unsqueeze(1) - positions  # (N, 1) - (N, S) -> (N, S)
    hidden, memory = add_own_position(parameters, config, embedded, steps), []
    for index in range(config["num_blocks"]):
        memory.append(hidden)
        items = add_positions(parameters, config, remembered[:, :, index], mask, positions)  # (N, S, D)
        hidden = block(parameters, f"block{index}", config, hidden, items, mask, distances)
    return Step(
        *heads(parameters, config, hidden),
        memory=torch.stack(memory, dim=1),  # blocks times (N, D) -> (N, blocks, D)
        output=hidden,
    )


def heads(parameters: Parameters, config: Config, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
    """The log-probabilities (N, number of actions) of each action branch, and the values (N,)."""
    policy = torch.relu(linear(parameters, "policy_hidden", hidden))
    logits = [linear(parameters, f"policy_branch{index}", policy) for index in range(len(config["branches"]))]
    value = linear(parameters, "value", torch.relu(linear(parameters, "value_hidden", hidden)))  # (N, 1)
    return [torch.log_softmax(branch, dim=-1) for branch in logits], value.squeeze(1)  # (N, 1) -> (N,)


def gru_cell(parameters: Parameters, layer: int, inputs: Tensor, state: Tensor) -> Tensor:
    """The state (N, H) of a layer of Cho et al. (2014), with a bias in the product that the reset gate scales."""
    of_input = functional.linear(inputs, parameters[f"cell.weight_ih_l{layer}"], parameters[f"cell.bias_ih_l{layer}"])
    of_state = functional.linear(state, parameters[f"cell.weight_hh_l{layer}"], parameters[f"cell.bias_hh_l{layer}"])
    (reset, update, new), (old_reset, old_update, old_new) = of_input.chunk(3, dim=1), of_state.chunk(3, dim=1)
    keep = torch.sigmoid(update + old_update)
    candidate = torch.tanh(new + torch.sigmoid(reset + old_reset) * old_new)
    return keep * state + (1 - keep) * candidate


def lstm_cell(parameters: Parameters, layer: int, inputs: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden and the cell state (N, H) of a layer of Hochreiter & Schmidhuber (1997), with forget gates."""
    of_input = functional.linear(inputs, parameters[f"cell.weight_ih_l{layer}"], parameters[f"cell.bias_ih_l{layer}"])
    of_state = functional.linear(state, parameters[f"cell.weight_hh_l{layer}"], parameters[f"cell.bias_hh_l{layer}"])
    entering, forgotten, candidate, shown = (of_input + of_state).chunk(4, dim=1)
    cell = torch.sigmoid(forgotten) * cell + torch.sigmoid(entering) * torch.tanh(candidate)
    return torch.sigmoid(shown) * torch.tanh(cell), cell


def recur(parameters: Parameters, config: Config, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of a recurrent cell, or of none: outputs (N, H) of inputs (N, D), and the state after it.

    The state (N, states, H) has the hidden states of all layers and then, of an LSTM, their cell states.
    """
    kind, layers = config["layer_type"], config["num_layers"]
    states, hidden = list(state.unbind(dim=1)), inputs
    for layer in range(layers):
        if kind == "gru":
            hidden = states[layer] = gru_cell(parameters, layer, hidden, states[layer])
        else:
            hidden, states[layers + layer] = lstm_cell(parameters, layer, hidden, states[layer], states[layers + layer])
            states[layer] = hidden
    return hidden, torch.stack(states, dim=1) if states else state


# ----------------------------------------------------------------------------------------------------------- loss


def loss(
    config: Config,
    log_softmaxes: Sequence[Tensor],
    value: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    old_values: Tensor,
) -> dict[str, Tensor]:
    """The PPO loss of one minibatch and its terms, all scalars; `loss` is what is minimised.

    value, advantages (not normalised) and old_values are (N,), actions and old_log_probs (N, branches).
    As in the fixtures, `policy_loss` is the clipped objective itself, which is maximised.
    """
    clip = config["clip_range"]
    chosen = [branch.gather(1, actions[:, [index]]) for index, branch in enumerate(log_softmaxes)]  # each (N, 1)
    log_ratio = torch.cat(chosen, dim=1) - old_log_probs  # (N, branches)
    ratio = log_ratio.exp()
    scale = max(advantages.std() + 1e-8, config.get("advantage_floor", 0))  # of this minibatch, N - 1 under the std
    normalised = (advantages - advantages.mean()) / scale
    normalised = normalised.unsqueeze(1)  # (N,) -> (N, 1), the same for every branch
    policy_loss = torch.minimum(ratio * normalised, ratio.clamp(1 - clip, 1 + clip) * normalised).mean()

    returns = old_values + advantages
    clipped_value = old_values + (value - old_values).clamp(-clip, clip)
    value_loss = torch.maximum((value - returns) ** 2, (clipped_value - returns) ** 2).mean()

    entropies = [-(branch.exp() * branch).sum(dim=1) for branch in log_softmaxes]  # each (N,)
    entropy = torch.stack(entropies, dim=1).sum(dim=1).mean()  # (N, branches) -> (N,) -> ()
    return {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "loss": -policy_loss + config["value_loss_coefficient"] * value_loss - config["beta"] * entropy,
        "approx_kl": ((ratio - 1) - log_ratio).mean(),
        "clip_fraction": ((ratio - 1).abs() > clip).to(ratio.dtype).mean(),
    }


# ----------------------------------------------------------------------------------------------------- prediction


def question(parameters: Parameters, continuous: bool, output: Tensor, actions: Tensor) -> Tensor:
    """W o * (1 + E[a]) (N, D) of outputs (N, D) and actions (N, branches), or (N, entries) of continuous ones.

    `actions.J.weight` (D, number of actions) holds a column per action of branch J; the branches' columns are summed.
    """
    if continuous:
        change = actions.to(output.dtype) @ parameters["actions.0.weight"].T
    else:
        change = torch.zeros_like(output)
        for branch in range(actions.shape[1]):
            change = change + parameters[f"actions.{branch}.weight"].T[actions[:, branch]]  # (n, D)[(N,)] -> (N, D)
    return linear(parameters, "query", output) * (1 + change)


def frame_prediction(
    parameters: Parameters, questions: Tensor, candidates: Tensor, frames: Sequence[bytes], following: Sequence
) -> tuple[Tensor, int, int]:
    """Cross-entropy of telling the next frame among a minibatch's distinct ones, how many are told, how many could be.

    questions (N, D); candidates (M, D), the distinct frames embedded; frames[m] is the m-th frame itself, following[n]
    the one after sample n, None where the episode ended there. A frame that is not among the distinct ones is left out
    as well. The sum is divided by all N.
    """
    total, told, possible = torch.zeros((), dtype=questions.dtype), 0, 0
    for sample, frame in enumerate(following):
        if frame is None or frame not in frames:
            continue
        logits = []
        for candidate in candidates:
            agreement = (questions[sample] * candidate).sum() / len(candidate) ** 0.5
            logits.append(agreement + linear(parameters, "prior", candidate)[0])
        log_probs = torch.log_softmax(torch.stack(logits), dim=0)
        total = total - log_probs[frames.index(frame)]
        told += int(log_probs.argmax() == frames.index(frame))
        possible += 1
    return total / len(questions), told, possible


def vector_prediction(parameters: Parameters, questions: Tensor, following: Sequence) -> Tensor:
    """Mean squared error of the next vector (n,), None where the episode ended: the sum divided by all N samples."""
    total = torch.zeros((), dtype=questions.dtype)
    for sample, vector in enumerate(following):
        if vector is not None:
            total = total + ((linear(parameters, "regression", questions[sample]) - vector) ** 2).mean()
    return total / len(questions)


def normalise(vectors: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Vectors (N, n) brought to mean 0 and variance 1, at most 10 standard deviations away."""
    return ((vectors - mean) / (variance + 1e-8) ** 0.5).clamp(-10, 10)


# ----------------------------------------------------------------------------------------------------- advantages


def gae_truncation(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    values: Tensor,
    final_values: Tensor,
    last_value: Tensor,
    gamma: float,
    lamda: float,
) -> Tensor:
    """Generalised advantage estimation, (W, T), with terminated and truncated episodes told apart.

    final_values (W, T) is read only where an episode is truncated: the value of its final observation, which is
    bootstrapped. A terminated step (even if also truncated) bootstraps nothing. Both end the trace.
    """
    advantages = torch.zeros_like(values)
    workers, length = rewards.shape
    for worker in range(workers):
        next_value, next_advantage = last_value[worker], torch.zeros_like(last_value[worker])
        for step in reversed(range(length)):
            if terminated[worker, step]:
                next_value, next_advantage = torch.zeros_like(next_value), torch.zeros_like(next_advantage)
            elif truncated[worker, step]:
                next_value, next_advantage = final_values[worker, step], torch.zeros_like(next_advantage)
            delta = rewards[worker, step] + gamma * next_value - values[worker, step]
            advantages[worker, step] = delta + gamma * lamda * next_advantage
            next_value, next_advantage = values[worker, step], advantages[worker, step]
    return advantages


# --------------------------------------------------------------------------------------------------------- memory


def number_episodes(episode_starts: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Numbers a worker's steps: the episode of each and the step within it. The first step starts an episode."""
    episodes: list[int] = []
    steps: list[int] = []
    for index, starts in enumerate(episode_starts):
        new = index == 0 or bool(starts)
        episodes.append((episodes[-1] + 1 if episodes else 0) if new else episodes[-1])
        steps.append(0 if new else steps[-1] + 1)
    return episodes, steps


def window_from_history(
    items: Tensor, episode_starts: Sequence[bool], memory_length: int, index: int, final: bool = False
) -> Windows:
    """The window, S = memory_length slots, of step `index` of one worker's whole history: N = 1.

    items (steps, blocks, D) are all that the worker ever wrote, episode_starts[i] says whether step i is the first of
    an episode. It may be one longer than items: its last index is then the step that is about to be taken (bootstrap
    value). With `final`, it is instead the window of the observation that followed the step in the same episode, which
    is not in the history if the episode was truncated there.
    """
    episodes, steps = number_episodes(episode_starts)
    windows = torch.zeros(1, memory_length, *items.shape[1:], dtype=items.dtype)
    mask = torch.zeros(1, memory_length, dtype=torch.bool)
    positions = torch.zeros(1, memory_length, dtype=torch.int64)
    now = index + 1 if final else index
    own = [i for i in range(max(0, now - memory_length), now) if episodes[i] == episodes[index]]  # of its episode
    for slot, source in enumerate(own):
        windows[0, slot] = items[source]
        mask[0, slot] = True
        positions[0, slot] = steps[source]
    return Windows(windows, mask, positions, torch.tensor([steps[index] + final]))
