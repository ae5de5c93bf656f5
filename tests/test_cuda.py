"""On a GPU everything is as on the CPU, and nothing waits for it inside the minibatch loop. Skipped without one."""

import canonical
import numpy as np
import pytest
import test_parity
import torch
from test_faults import write_config
from test_memories import AUXILIARY, recomputed
from test_ranks import Launch, small

from run.checkpoint import load
from run.config import check_config
from run.start import Options
from tests.walk import CORES, walk
from trainer import PPOTrainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
ABSOLUTE = {"positional_encoding": "absolute", "query_position": True}
LEARNED = {"prediction_coefficient": 0.1, "recall_coefficient": 0.2}
CONFIGS = {
    "grid": small({"type": "MortarMayhem-Grid"}, transformer=ABSOLUTE, **LEARNED),
    "vectors": walk("vectors", "continuous", transformer={"positional_encoding": "learned"}, segment_length=4),
    **{
        memory: walk("both", "branches", {"scale": 8}, segment_length=4, kl_limit=1e-3, **AUXILIARY, **CORES[memory])
        for memory in ("relative", "gated", "gru", "lstm", "none")
    },
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def train(started):
    """Return a function that makes a trainer with its environments started; all are closed after the test."""

    def make(name: str, device: str, state: dict | None = None, **options) -> PPOTrainer:
        return started(check_config(CONFIGS[name], name), Options(torch.device(device), **options), state)

    return make


@pytest.fixture(autouse=True)
def full_precision():
    """TensorFloat-32 would round to three digits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("path", test_parity.fixtures(estimations=False))
def test_parity_with_the_reference(path, monkeypatch):
    """Outputs, losses and gradients of the reference implementation, computed on the GPU."""
    monkeypatch.setattr(test_parity.torch, "from_numpy", lambda array: torch.tensor(array, device="cuda"))
    build = canonical.build
    monkeypatch.setattr(canonical, "build", lambda *arguments: build(*arguments).cuda())
    arange = torch.arange
    monkeypatch.setattr(test_parity.torch, "arange", lambda *a, **k: arange(*a, **{"device": "cuda"} | k))
    computed = test_parity.Computed(path)
    test_parity.test_outputs(computed)
    test_parity.test_losses(computed)
    test_parity.test_gradients(computed)


@every_config
def test_before_the_first_step(train, name):
    """What is recomputed for a minibatch is what was sampled, and so is what acts again."""
    trainer = train(name, "cuda")
    trainer.train_update()
    trainer.sample()
    batch, output, _ = recomputed(trainer, np.arange(trainer.config.samples))
    torch.testing.assert_close(output.policy.log_prob(batch.actions), batch.log_probs, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.value, batch.values, rtol=1e-4, atol=1e-4)
    assert trainer.acting_kl() < 1e-6


@every_config
def test_losses_and_gradients_are_those_of_the_cpu(train, monkeypatch, name):
    """From the same weights and the same rollout, which the CPU has played, by halves that take turns, too."""
    monkeypatch.setattr(Options, "overlaps", lambda *_: True)
    state, done, found = train(name, "cpu").state_dict(), [], []
    samples = np.arange(0, CONFIGS[name]["worker_steps"] * 2)
    for device in ("cpu", "cuda"):
        trainer = train(name, device, state)
        trainer.optimizer.max_grad_norm = np.inf
        send, actions = trainer.workers.send, iter(list(done))

        def same(group: range, chosen: np.ndarray, send=send, actions=actions, first=device == "cpu") -> None:
            """A rounding difference must not decide on another action."""
            done.append(chosen.copy())
            send(group, chosen if first else next(actions))

        trainer.workers.send = same
        trainer.sample()
        if found:
            trainer.buffer.actions.copy_(found[0][2])
            trainer.buffer.log_probs.copy_(found[0][3])
        rest = (trainer.buffer.actions.clone(), trainer.buffer.log_probs.clone())
        statistics = trainer._train_minibatch(samples)
        found.append((statistics.cpu(), trainer.optimizer.gradient.cpu(), *rest))
    (losses, gradient, *_), (other_losses, other_gradient, *_) = found
    torch.testing.assert_close(other_losses, losses, rtol=1e-3, atol=1e-4)
    assert canonical.excess(other_gradient, gradient, 1e-3, 1e-6) <= 1


@every_config
def test_nothing_waits_inside_the_minibatch_loop(train, name):
    """The host runs ahead: after it has copied something, it asks the GPU for nothing."""
    trainer = train(name, "cuda")
    trainer.train_update()  # warm: kernels are chosen, memory is there
    trainer.sample()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = trainer.optimise()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(statistics).all()


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"compile": True}], ids=("float32", "bf16", "compile"))
@pytest.mark.parametrize("name", ("vectors", "grid", "relative", "gru"))
def test_updates_are_finite(train, name, options):
    trainer = train(name, "cuda", **options)
    for _ in range(2):
        scalars = trainer.train_update()
    assert np.isfinite([*scalars.values()]).all()
    assert trainer.model.policy_hidden.weight.is_cuda and trainer.optimizer.weights.is_cuda


@pytest.mark.parametrize("name", ("grid", "lstm"))
def test_a_run_goes_on(train, name):
    """With the weights of one that was not interrupted, but for rounding, which a GPU does not repeat."""
    whole = train(name, "cuda")
    whole.train_update()
    state = whole.state_dict()
    whole.train_update()
    resumed = train(name, "cuda", state)
    resumed.train_update()
    assert resumed.update == whole.update
    assert (resumed.optimizer.weights - whole.optimizer.weights).abs().max() < 1e-3


def test_two_processes_share_a_gpu(tmp_path, monkeypatch):
    """By Gloo; they train as one does."""
    write_config(tmp_path, CONFIGS["grid"] | {"updates": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    command = ("train.py", "--config=run.yaml", "--seed=5", "--device=cuda", "--processes=1")
    for count in (1, 2):
        launch = Launch(tmp_path, count, *command, f"--run-id=run{count}")
        assert launch.finish() == [0] * count, launch.lines()
    one, two = (load(tmp_path / "models" / f"run{count}.nn", "model")["weights"] for count in (1, 2))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3
