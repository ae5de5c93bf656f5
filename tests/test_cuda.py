"""On a GPU everything is as on the CPU, and nothing waits for it inside the minibatch loop. Skipped without one."""

from pathlib import Path

import canonical
import numpy as np
import pytest
import test_parity
import torch
from run.lifecycle import state_of
from run.options import Options
from test_ranks import Ranks, small, write

from run.checkpoint import load
from run.config import check_config
from trainer import PPOTrainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
ROOT = Path(__file__).parent.parent
CONFIGS = {
    "vector": small("poc_memory_env", normalize_observations=True, prediction_coefficient=0.1),
    "visual": small("minigrid", reconstruction_coefficient=0.1),
    "grid": small("mortar_mayhem_grid", prediction_coefficient=0.1, recall_coefficient=0.2),
    "learned": small("mystery_path_grid"),
}
CONFIGS["learned"]["transformer"]["positional_encoding"] = "learned"
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def train(tmp_path):
    """Return a function that makes a trainer with its environments started; all are closed behind the test."""
    trainers = []

    def make(name: str, device: str, checkpoint: dict | None = None, **options) -> PPOTrainer:
        config = check_config(CONFIGS[name], name)
        chosen = Options(torch.device(device), folder=tmp_path, **options)
        trainer = PPOTrainer(config, "run", 5, chosen, checkpoint)
        trainers.append(trainer)
        trainer.start_workers()
        return trainer

    yield make
    for trainer in trainers:
        trainer.workers.close()


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
def test_ratios_are_one_before_the_first_step(train, name):
    """What is recomputed for a minibatch is what was predicted while sampling."""
    trainer = train(name, "cuda")
    trainer.train_update()
    trainer.sample()
    samples = np.arange(trainer.samples)
    batch = trainer.buffer.minibatch(samples)
    with torch.no_grad():
        embedded = trainer.model.embed(batch.observations)
        x = trainer.model.complete(embedded[batch.which], batch.vectors, batch.step)
        prediction = trainer.model(x, trainer.buffer.timeline.view(batch.windows), batch.masks)
    ratio = (prediction.policy.log_prob(batch.actions) - batch.log_probs).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)
    torch.testing.assert_close(prediction.value, batch.values, rtol=1e-4, atol=1e-4)


@every_config
def test_losses_and_gradients_are_those_of_the_cpu(train, name):
    """From the same weights and the same rollout, which the CPU has played."""
    found = []
    checkpoint = state_of(train(name, "cpu"))
    for device in ("cpu", "cuda"):
        trainer = train(name, device, checkpoint)
        trainer.optimizer.max_grad_norm = np.inf
        if found:  # the same actions: a rounding difference must not decide on another one
            actions = iter(found[0][2])
            send = trainer.workers.send
            trainer.workers.send = lambda group, _, send=send, actions=actions: send(group, next(actions))
        done, true = [], trainer.workers.send
        trainer.workers.send = lambda group, chosen, done=done, true=true: (
            done.append(chosen.copy()),
            true(group, chosen),
        )
        trainer.sample()
        if found:
            trainer.buffer.actions.copy_(found[0][3])
            trainer.buffer.log_probs.copy_(found[0][4])
        statistics = trainer._train_minibatch(np.arange(0, trainer.samples, 2), 0.1, 0.001)
        rest = (done, trainer.buffer.actions.clone(), trainer.buffer.log_probs.clone())
        found.append((statistics.cpu(), trainer.optimizer.gradient.cpu(), *rest))
    (losses, gradient, *_), (other_losses, other_gradient, *_) = found
    torch.testing.assert_close(other_losses, losses, rtol=1e-3, atol=1e-4)
    assert canonical.excess(other_gradient, gradient, 1e-3, 1e-6) <= 1


@every_config
def test_nothing_waits_inside_the_minibatch_loop(train, name):
    """The host runs ahead: behind what it copies, it asks the GPU for nothing."""
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
@pytest.mark.parametrize("name", ("vector", "grid"))
def test_updates_are_finite(train, name, options):
    trainer = train(name, "cuda", **options)
    for _ in range(2):
        scalars = trainer.train_update()
    assert np.isfinite([*scalars.values()]).all()
    assert trainer.model.policy_hidden.weight.is_cuda and trainer.buffer.timeline.items.is_cuda


def test_a_run_goes_on(train):
    """With the weights of one that was not interrupted, but for rounding, which a GPU does not repeat."""
    whole = train("grid", "cuda")
    whole.train_update()
    checkpoint = state_of(whole)
    whole.train_update()
    resumed = train("grid", "cuda", checkpoint)
    assert torch.equal(
        resumed.buffer.timeline.items[:, :, : whole.buffer.timeline.length].cpu(), checkpoint["memory"].cpu()
    )
    resumed.train_update()
    assert resumed.finished == whole.finished
    assert (resumed.optimizer.weights - whole.optimizer.weights).abs().max() < 1e-3


def test_two_processes_share_a_gpu(tmp_path):
    """By Gloo; they train as one does."""
    config = write(tmp_path, CONFIGS["grid"] | {"updates": 2})
    command = [str(ROOT / "train.py"), config, "--seed=5", "--device=cuda", "--processes=1"]
    text = []
    for count in (1, 2):
        ranks = Ranks(tmp_path, [[*command, f"--run-id=run{count}"]] * count, CUDA_VISIBLE_DEVICES="0")
        assert ranks.finish(300) == [0] * count, ranks.text()
        text.append(ranks.text())
    one, two = (load(tmp_path / "models" / f"run{count}.nn", "model")["weights"] for count in (1, 2))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3
    rewards = [
        [line.split(" steps/s")[0].rsplit(" ", 1)[0] for line in said.splitlines() if "update" in line] for said in text
    ]
    assert rewards[0][1:] == rewards[1][1:]
