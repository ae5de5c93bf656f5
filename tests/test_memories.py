"""Memory is a choice: every core against a plain loop, in whole training runs, and the trust region of what acts."""

import numpy as np
import pytest
import textbook
import torch
from canonical import TOLERANCE, assert_close
from test_exactness import checked_rollouts, joined, unsettle
from test_faults import same
from torch import Tensor
from torch.nn import functional

from buffer import Minibatch
from model import Output
from run.config import check_config
from run.start import Options
from tests.walk import CORES, constant, walk
from trainer import MOST_HALVINGS, PPOTrainer

CPU = torch.device("cpu")
AUXILIARY = {f"{task}_coefficient": 0.1 for task in ("prediction", "recall", "reconstruction")}
every_memory = pytest.mark.parametrize("memory", ("relative", "gated", "gru", "lstm", "none"))


# ------------------------------------------------------------------------------------------- against a loop over steps


class Unrolled:
    """The states of every environment before each of its steps and after the last, by a plain loop over steps."""

    def __init__(self, config: dict, n_workers: int) -> None:
        self.config = config
        states = (2 if config["layer_type"] == "lstm" else 1) * config["num_layers"]
        self.states = torch.zeros(n_workers, 1, states, config["hidden_state_size"], dtype=torch.float64)
        self.starts = torch.zeros(n_workers, 0, dtype=torch.bool)

    def step(self, parameters: dict, observations: Tensor, starts: Tensor, state: Tensor) -> textbook.Step:
        """Returns one step of N environments; an episode begins with a state of zeros."""
        embedded = textbook.encode(parameters, self.config, observations)
        output, state = textbook.recur(parameters, self.config, embedded, state * ~starts[:, None, None])
        return textbook.Step(*textbook.heads(parameters, self.config, output), state, output)

    @torch.no_grad()
    def take(self, parameters: dict, observations: Tensor, starts: np.ndarray) -> textbook.Step:
        """Takes one step in every environment and remembers the state after it."""
        taken = self.step(parameters, observations, torch.from_numpy(starts), self.states[:, -1])
        self.states = torch.cat((self.states, taken.memory[:, None]), dim=1)
        self.starts = torch.cat((self.starts, torch.from_numpy(starts)[:, None]), dim=1)
        return taken

    def again(self, parameters: dict, observations: Tensor, worker: np.ndarray, index: np.ndarray) -> textbook.Step:
        """Returns the steps of segments, worker and index (G, S), from the stored states on, with their gradients."""
        state, taken = self.states[worker[:, 0], index[:, 0]], []
        for place, now in enumerate(index.T):
            shown = observations.unflatten(0, index.shape)[:, place]
            taken.append(self.step(parameters, shown, self.starts[worker[:, 0], now], state))
            state = taken[-1].memory
        return joined(taken)


@pytest.mark.parametrize(("kind", "layers"), [("gru", 1), ("gru", 2), ("lstm", 1), ("lstm", 2), ("", 0)])
def test_cells_are_a_loop_over_steps(kind, layers):
    """Sampling, and outputs and gradients in segments of one step, of a few, and of the whole rollout; acting again."""
    changes = {"layer_type": kind, "num_layers": layers, "hidden_state_size": 7}
    rollouts = checked_rollouts(changes, (1, 3, 12), 3, ends=0.15, history=Unrolled)
    assert (rollouts.step[:, 1:] == 0).any() and (rollouts.step[:, 0] > 0).any()
    states = rollouts.history.states[:, -13:].flatten(2).float()
    torch.testing.assert_close(rollouts.memory.states, states, rtol=0, atol=TOLERANCE)
    unsettle(rollouts.model, 99)
    whole = np.arange(rollouts.step.size)
    with torch.no_grad():
        expected = rollouts.train(whole, 12).output
        embedded = rollouts.model.embed(rollouts.observations.flatten(0, 1))
        assert_close(rollouts.memory.replay(slice(1, 3), embedded[12:], rollouts.step[1:]), expected[12:])
        assert (rollouts.train(whole).output - expected).abs().max() > 1e-2 or not kind


# ------------------------------------------------------------------------------------------------- whole training runs


@pytest.fixture
def make(started):
    """Return a function that makes a trainer with its environments started; all are closed after the test."""

    def make(memory: str, state: dict | None = None, arguments: dict | None = None, **changes) -> PPOTrainer:
        options = Options(CPU, precision=changes.pop("precision", "float32"), compile=changes.pop("compile", False))
        arguments = {"scale": 8} | (arguments or {})
        settings = {"segment_length": 4} | AUXILIARY | CORES[memory] | changes
        return started(check_config(walk("both", "branches", arguments, **settings), "test"), options, state)

    return make


def recomputed(trainer: PPOTrainer, samples: np.ndarray) -> tuple[Minibatch, Output, Tensor]:
    """Return a minibatch, what training computes for it, and KL(sampled ‖ recomputed) of its samples."""
    with trainer._precision():
        batch = trainer.buffer.minibatch(samples)
        x = functional.embedding(batch.which, trainer.model.embed(batch.observations))
        output = trainer.forward(trainer.model.complete(x, batch.vectors, batch.step), batch.past, batch.masks)
    return batch, output, output.policy.kl(trainer.buffer.policies.flatten(0, 1)[samples])


@every_memory
def test_before_the_first_step(make, memory):
    """What training computes is what was sampled, in segments of any length; and so is what acts again."""
    for precision, tolerance, acting in (("float32", TOLERANCE, 1e-7), ("bf16", 0.02, 1e-6)):
        trainer = make(memory, precision=precision)
        trainer.train_update()
        trainer.sample()
        for length in (1, 4, 16):
            trainer.buffer.segment_length, divergence = length, []
            for samples in trainer.buffer.minibatches(np.random.default_rng(0)):
                batch, output, kl = recomputed(trainer, samples)
                divergence.append(kl.mean())
                assert_close(output.policy.log_prob(batch.actions), batch.log_probs, length, tolerance)
                assert_close(output.value, batch.values, length, tolerance)
            assert torch.stack(divergence).mean() < 1e-6, length
        assert abs(trainer.acting_kl()) < acting


@every_memory
def test_what_follows_a_cut(make, memory):
    """Its value is what the agent would have seen, had the episode or the rollout gone on."""
    trainer, uncut = make(memory), make(memory, arguments={"longest": 24})
    for one in (trainer, uncut):
        one.sample()
    with torch.no_grad():
        following = trainer.buffer.bootstrap(trainer.model, trainer.step)
    buffer, compared = trainer.buffer, 0
    for w in range(buffer.n_workers):
        t = int((buffer.terminated | buffer.truncated)[w].argmax())
        if buffer.truncated[w, t]:
            assert_close(following[w, t], uncut.buffer.values[w, t + 1])
            compared += 1
    assert compared
    buffer.memory.roll(buffer.worker_steps)
    trainer.sample()
    assert_close(following[:, -1], buffer.values[:, 0])


@every_memory
def test_resumed_to_the_bit(make, memory):
    """A run that goes on from a state, with everything in it, makes the same update as one that was not interrupted."""
    changes = {"kl_limit": 0.01, "novelty_schedule": {"initial": 0.1, "final": 0.0, "max_decay_steps": 9}}
    whole = make(memory, **changes)
    for _ in range(2):
        whole.train_update()
    resumed = make(memory, state=whole.state_dict(), **changes)
    scalars = [
        {tag: value for tag, value in trainer.train_update().items() if not tag.startswith("performance/")}
        for trainer in (whole, resumed)
    ]
    assert scalars[0] == scalars[1]
    assert same(whole.state_dict(), resumed.state_dict())


# ---------------------------------------------------------------------------------- the trust region of what acts next


def blind(trainer: PPOTrainer, entry: int) -> None:
    """Let an entry of the embedded observation be 1, and let nothing read it but the values of attention, by a lot."""
    model, (block,) = trainer.model, trainer.model.transformer.blocks
    with torch.no_grad():
        for layer in (model.embedding, model.vector):
            layer.weight[entry], layer.bias[entry] = 0, layer is model.vector
        for layer in (block.attention.query, block.attention.key, block.feed_forward):
            layer.weight[:, entry] = 0
        for layer in (model.policy_hidden, model.value_hidden):
            layer.weight[:, entry] = 0
        block.attention.value.weight[:, entry] = 3
        for branch in model.policy:
            branch.weight.mul_(50)


@pytest.mark.parametrize("limit", (0.0, 0.01, 1e-12))
def test_a_step_that_moves_only_memory_is_caught(make, limit):
    """The ratio does not see it, since stored memory is what it was; the line search goes back until it is small."""
    trainer = make("relative", transformer={"num_blocks": 1, "layer_norm": ""}, segment_length=1, kl_limit=limit)
    blind(trainer, entry := 5)
    trainer.sample()
    before = trainer.optimizer.weights.clone()
    with torch.no_grad():
        trainer.model.embedding.bias[entry] += 2
    after = trainer.optimizer.weights.clone()
    assert recomputed(trainer, np.arange(trainer.config.samples))[2].mean() < 1e-4
    assert (far := trainer.acting_kl()) > 0.1
    limited = trainer.limit_acting_kl(before)
    if limit == 0:
        assert limited == {} and torch.equal(trainer.optimizer.weights, after)
        return
    halvings = limited["training/halvings"]
    if limit < 1e-9:  # rounding alone is more: the step is taken back
        assert halvings == MOST_HALVINGS and torch.equal(trainer.optimizer.weights, before)
        return
    assert 0 < halvings < MOST_HALVINGS and limited["training/acting_kl"] <= limit < far
    assert torch.equal(trainer.optimizer.weights, before + (after - before) * 0.5**halvings)
    assert trainer.acting_kl() == limited["training/acting_kl"]
    trainer.optimizer.weights.copy_(before + (after - before) * 0.5 ** (halvings - 1))
    assert trainer.acting_kl() > limit


@pytest.mark.parametrize("memory", ("relative", "lstm", "none"))
def test_updates_stay_within_the_limit(make, memory):
    """With a learning rate that is far too high steps are halved until they are short enough, and that is logged."""
    trainer = make(memory, learning_rate_schedule=constant(0.02), kl_limit=5e-5)
    scalars = [trainer.train_update() for _ in range(2)]
    assert all(0 < update["training/acting_kl"] <= 5e-5 for update in scalars)
    assert sum(update["training/halvings"] for update in scalars) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "length"), (("relative", 1), ("relative", 4), ("gru", 4)))
def test_compiled_runs_are_the_same(make, memory, length):
    """Two updates with a compiled model give the numbers of two without, but for rounding."""
    found = []
    for compiled in (False, True):
        trainer = make(memory, segment_length=length, compile=compiled)
        scalars = [trainer.train_update() for _ in range(2)][-1]
        found.append([value for tag, value in scalars.items() if tag.startswith(("losses/", "gradients/"))])
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-3, atol=1e-4)
