"""PPO with episodic Transformer-XL memory: sample → advantages → epochs of minibatches → log."""

import copy
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auxiliary import Novelty, auxiliary_tasks, exchange_candidates, return_gradient
from buffer import Buffer, Minibatch
from environments.contract import Task
from kernels.allocator import release_memory
from kernels.optimizer import Optimizer
from kernels.threads import divide, use_threads
from memory import policy_step
from model import ActorCriticModel, Prediction, RunningMoments, action_noise
from run.config import Config
from run.distributed import Interrupted
from run.logger import Episodes
from run.start import Options, Run
from utils import EnvironmentFailure, NonFinite, UserError, derived_seed, own_rows, training_seed
from worker import DIGEST_SIZE, Workers

# What PPO reports of a minibatch, in this order; then come the auxiliary tasks, the total loss and gradient norms.
LOSS_PARTS = ("policy", "value", "entropy", "kl", "clip_fraction")


def ppo_loss(
    prediction: Prediction, batch: Minibatch, value_loss_coefficient: float, clip_range: float, beta: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the clipped PPO objective as a loss, and its parts (Schulman et al. 2017, eq. 7 and 9).

    Ratio and clip are taken per action branch, then the mean over branches and samples. The value loss is the larger of
    the clipped and the unclipped squared error, clipped with the policy's range.

    Args:
        prediction: of N samples under the current weights.
        batch: what was done and predicted when they were sampled, and what came of it.
        value_loss_coefficient: weight of the value loss.
        clip_range: ε.
        beta: entropy coefficient.

    Returns:
        The loss, and its parts in the order of `LOSS_PARTS`, detached.
    """
    advantages, returns, old_values = batch.advantages[:, None], batch.returns, batch.values
    log_ratio = prediction.policy.log_prob(batch.actions) - batch.log_probs
    ratio = log_ratio.exp()
    policy = torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()
    value = prediction.value
    clipped_value = old_values + (value - old_values).clamp(-clip_range, clip_range)
    value_error = torch.max((value - returns) ** 2, (clipped_value - returns) ** 2).mean()
    entropy = prediction.policy.entropy().mean()
    loss = -policy + value_loss_coefficient * value_error - beta * entropy
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).mean()  # Schulman 2020, "Approximating KL divergence", k3
        clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
    return loss, [part.detach() for part in (policy, value_error, entropy, kl, clip_fraction)]


class PPOTrainer:
    """Trains one model on one task.

    Args:
        config: of the run.
        task: what the environments are like.
        seed: everything random derives from it.
        options: how the run is carried out.
    """

    def __init__(self, config: Config, task: Task, seed: int, options: Options) -> None:
        self.config, self.task, self.seed, self.options, self.device = config, task, seed, options, options.device
        self.world, self.stop = options.ranks, options.stop
        check_task(config, self.task)
        torch.manual_seed(seed)
        self.model = ActorCriticModel(config, self.task).to(self.device)
        self.tasks = auxiliary_tasks(config, self.model)
        self.auxiliary = nn.ModuleDict(self.tasks).to(self.device)
        self.forward = torch.compile(self.model, dynamic=True) if options.compile else self.model
        self.optimizer = Optimizer({"": self.model, "auxiliary.": self.auxiliary}, config.max_grad_norm)
        self.buffer = Buffer(config, self.model, self.device, self.world)
        self.buffer.timeline.in_place &= not options.compile  # what torch.compile cannot look into
        self.generator = torch.Generator(self.device)
        self.threads = torch.get_num_threads()
        # A whole minibatch fills a GPU, and a compiled model belongs to one thread.
        divisible = self.device.type == "cpu" and not options.compile
        self.parts, self.map_parts = divide(self.buffer.minibatch_size // self.world.size, divisible)
        self.reports = (*LOSS_PARTS, *(name for task in self.tasks.values() for name in task.reports), "total")
        self.compares = any(task.compares for task in self.tasks.values())
        # Observations are embedded for a whole minibatch; all that follows is differentiated in parts.
        front = {*self.model.encoder.parameters(), *self.model.embedding.parameters()}
        self.behind = [parameter for parameter in self.optimizer.parameters if parameter not in front]
        own = self.world.share(config.n_workers)
        overlap = options.overlaps(self.task, config.n_workers)
        episode_seed = partial(training_seed, seed, config.environment)
        groups = 2 if overlap and len(own) > 1 else 1
        self.workers = Workers(
            config.environment,
            self.task,
            len(own),
            episode_seed,
            options.processes,
            groups,
            own.start,
            stop=options.stop,
        )
        self.update = 0
        self.step = np.zeros(len(own), dtype=np.int64)  # episode step of each environment
        self.novelty = Novelty(config.novelty_schedule, len(own))
        self.episodes = Episodes(options.ranks)
        if self.world.size > 1:  # processors differ in what they draw
            weights = {name: weight.cpu() for name, weight in self.model.state_dict().items()}
            self.model.load_state_dict(self.world.from_first(weights))

    @property
    def samples(self) -> int:
        """Environment steps of one update."""
        return self.config.n_workers * self.config.worker_steps

    def train(self, run: Run) -> None:
        """Carry out all updates that are left; `run` keeps what comes of them."""
        with run.open(self.state_dict()):
            try:
                self.start_workers()
                while self.update < self.config.updates:
                    scalars = self.train_update()
                    run.after_update(self.state_dict(), scalars)
            finally:
                self.workers.close()
            run.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that the rest of a run depends on, with the environments of this rank."""
        timeline = self.buffer.timeline
        return {
            "config": self.config.model_dump(),
            "task": asdict(self.task),
            "seed": self.seed,
            "update": self.update,
            "weights": copy.deepcopy(self.model.state_dict()),
            "auxiliary": copy.deepcopy(self.auxiliary.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "episodes": self.episodes.state_dict(),
            "environments": {
                "memory": timeline.items[:, :, : timeline.length].transpose(0, 1).clone(),
                "item_step": timeline.item_step[:, : timeline.length].clone(),
                "step": torch.from_numpy(self.step.copy()),
                "workers": self.workers.state_dict(),
                "seen": [as_tensor(b"".join(seen)) for seen in self.novelty.seen],
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, joined over all ranks."""
        own = self.world.share(self.config.n_workers)
        timeline, environments = self.buffer.timeline, own_rows(state["environments"], own)
        self.model.load_state_dict(state["weights"])
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.episodes.load_state_dict(state["episodes"])
        self.update = state["update"]
        timeline.items[:, :, : timeline.length] = environments["memory"].transpose(0, 1).to(self.device)
        timeline.item_step[:, : timeline.length] = environments["item_step"].to(self.device)
        self.step = environments["step"].numpy().copy()
        self.novelty.seen = [dict.fromkeys(digests_of(seen)) for seen in environments["seen"]]
        self.workers.load_state_dict(environments["workers"])
        self.state_dict()

    def train_update(self) -> dict[str, float]:
        """Carry out one update and return what is logged of it."""
        times = [time.perf_counter()]
        self.sample()
        times.append(time.perf_counter())
        statistics = self.optimise()
        check_finite(self, statistics)
        times.append(time.perf_counter())
        self.update += 1
        self.buffer.timeline.roll(self.config.worker_steps)
        if isinstance(self.model.moments, RunningMoments):
            self._update_moments(self.model.moments)
        self.episodes.collect()
        release_memory()
        return update_scalars(self, statistics, np.diff(times))

    def start_workers(self) -> None:
        """Start the environments, with the running episodes of a resumed run replayed."""
        with self.world.agree_on(EnvironmentFailure):
            fresh = self.workers.start()
        self.step[fresh] = 0
        for index in range(len(self.step)) if self.update == 0 else fresh:
            self.novelty.begin(index, self.workers.episodes[index].digest)

    # -------------------------------------------------------------------------------------------------------- sampling

    def sample(self) -> None:
        """Fill the buffer with one rollout of all environments and estimate its advantages.

        The environments of one group step while the policy looks at the other group.
        """
        config, buffer, groups = self.config, self.buffer, self.workers.groups
        # Where the policy and the environments work at the same time, they share the cores.
        use_threads(len(groups[0]), config.transformer.embed_dim, max(1, self.threads // len(groups)))
        buffer.begin()
        # Noise depends on environment and step only: not on groups, nor on who steps the environment.
        self.generator.manual_seed(derived_seed(self.seed, self.update))
        noise = action_noise(self.task, (buffer.worker_steps, config.n_workers), self.generator)
        own = self.world.share(config.n_workers)
        noise = noise[:, own.start : own.stop]
        with self._precision(), self.model.transformer.constant_weights():
            with self.world.agree_on(Interrupted, EnvironmentFailure):
                for t in range(buffer.worker_steps):
                    for group in groups:
                        if t > 0:
                            self._receive(group, t - 1)
                        self._act(group, t, noise[t, group.start : group.stop])
                for group in groups:
                    self._receive(group, buffer.worker_steps - 1)
            buffer.last_index = buffer.observations.add(self.workers.arrays, slice(0, buffer.n_workers))
            with torch.no_grad():
                next_values = buffer.bootstrap(self.model, self.step)
        gamma, lamda = (config.scheduled(name, self.update) for name in ("gamma", "lamda"))
        buffer.compute_advantages(next_values, gamma, lamda)
        if self.compares:
            buffer.number_frames()
        for task in self.tasks.values():
            task.prepare(buffer)

    def _act(self, group: range, t: int, noise: Tensor) -> None:
        """Let the policy act in the environments of a group by their noise (n, entries), and let them step."""
        self.stop.check()
        buffer, arrays, rows = self.buffer, self.workers.arrays, slice(group.start, group.stop)
        step = self.step[rows].copy()
        prediction, index, mask = policy_step(
            self.model, self.forward, buffer.timeline, buffer.observations, arrays, rows, t, step
        )
        if mask is not None:
            buffer.masks[rows, t] = mask
        actions = prediction.policy.sample(noise)
        self.workers.send(group, actions.cpu().numpy())
        buffer.observation_index[rows, t], buffer.step[rows, t] = index, step
        buffer.actions[rows, t] = actions
        buffer.log_probs[rows, t] = prediction.policy.log_prob(actions)
        buffer.values[rows, t] = prediction.value

    def _receive(self, group: range, t: int) -> None:
        """Wait for the environments of a group and store what came of step t."""
        workers, buffer, rows = self.workers, self.buffer, slice(group.start, group.stop)
        self.episodes.add((t, workers.first + index, report) for index, report in workers.receive(group))
        arrays = workers.arrays
        buffer.rewards[rows, t] = arrays.rewards[rows]
        buffer.terminated[rows, t] = arrays.terminated[rows]
        buffer.truncated[rows, t] = arrays.truncated[rows]
        done = arrays.terminated[rows] | arrays.truncated[rows]
        for index in (group.start + np.flatnonzero(arrays.truncated[rows])).tolist():
            final = buffer.observations.add(arrays, slice(index, index + 1), final=True)
            buffer.final_index[index, t] = int(final[0])
        self.step[rows] = np.where(done, 0, self.step[rows] + 1)
        digests = [workers.episodes[index].digest for index in group]
        buffer.rewards[rows, t] += self.novelty.bonus(group, digests, done, self.update)

    # ---------------------------------------------------------------------------------------------------- optimisation

    def optimise(self) -> Tensor:
        """Train on the rollout; return the statistics (minibatches, names) of all minibatches, still on the device."""
        config = self.config
        self.optimizer.set_learning_rate(config.scheduled("learning_rate", self.update))
        clip_range = config.scheduled("clip_range", self.update)
        beta = config.scheduled("beta", self.update)
        use_threads(self.buffer.minibatch_size, config.transformer.embed_dim, self.threads)
        statistics = []
        for epoch in range(config.epochs):
            for samples in self.buffer.minibatches(np.random.default_rng((self.seed, self.update, epoch))):
                self.stop.check_together()
                statistics.append(self._train_minibatch(samples, clip_range, beta))
        losses, norms = torch.stack(statistics).split((len(self.reports), len(self.optimizer.modules) + 1), dim=1)
        losses = losses.contiguous()
        self.world.add(losses)
        return torch.cat((losses, norms), dim=1)

    def _train_minibatch(self, samples: np.ndarray, clip_range: float, beta: float) -> Tensor:
        """Take one optimiser step; return its losses, of this process's share, and its gradient norms (names,)."""
        minibatch = self.buffer.minibatch(samples)
        for name, task in self.tasks.items():
            minibatch.targets[name] = task.targets(self.buffer, minibatch.samples, minibatch.candidates)
        self.optimizer.clear()
        losses = self._accumulate_gradient(minibatch, len(samples), clip_range, beta)
        self.world.add(self.optimizer.gradient)
        return torch.cat((losses, self.optimizer.step()))

    def _accumulate_gradient(self, minibatch: Minibatch, size: int, clip_range: float, beta: float) -> Tensor:
        """Differentiate this process's share of a minibatch of so many samples; return its losses (names,).

        Observations are embedded for the whole minibatch, which shares them. All that follows is differentiated in
        parts, each by a thread of its own: so the cores wait for each other once and not in every operation. The leaves
        cut the graph at the embedding; its own backward pass takes up where those of all parts have ended.
        """
        with self._precision():
            embedded = self.model.embed(minibatch.observations)
        leaves = [embedded.detach().requires_grad_()]
        if self.compares and self.world.size > 1:
            leaves.append(exchange_candidates(self.world, minibatch, leaves[0]))
        differentiate = partial(self._differentiate, size, leaves, clip_range, beta)
        of_leaves = [torch.zeros_like(leaf) for leaf in leaves]
        losses = torch.zeros(len(self.reports), device=self.device)
        parts = minibatch.split(self.parts) if len(minibatch) else []
        for gradients, reported in self.map_parts(differentiate, parts):
            torch._foreach_add_([parameter.grad for parameter in self.behind], gradients[len(leaves) :])
            of_leaves = [total + gradient for total, gradient in zip(of_leaves, gradients, strict=False)]
            losses = losses + reported
        if len(leaves) > 1:
            return_gradient(self.world, minibatch, *of_leaves)
        embedded.backward(of_leaves[0])
        return losses

    def _differentiate(
        self, size: int, leaves: list[Tensor], clip_range: float, beta: float, part: Minibatch
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what a part of a minibatch contributes to the gradients of the loss and to what is reported.

        Args:
            size: samples of the whole minibatch.
            leaves: (M, D) its distinct observations, embedded; perhaps those of all processes, to tell apart, too.
            clip_range: ε.
            beta: entropy coefficient.
            part: some of its samples.

        Returns:
            The gradients with respect to `leaves` and to the parameters behind them, and the losses (names,).
        """
        config = self.config
        with self._precision():
            x = self.model.complete(F.embedding(part.which, leaves[0]), part.vectors, part.step)
            prediction = self.forward(x, self.buffer.timeline.view(part.windows), part.masks)
            loss, reported = ppo_loss(prediction, part, config.value_loss_coefficient, clip_range, beta)
            for name, task in self.tasks.items():
                auxiliary, parts = task.loss(prediction, part, leaves[-1], part.targets[name])
                loss = loss + getattr(config, f"{name}_coefficient") * auxiliary
                reported += parts
        share = len(part) / size
        gradients = torch.autograd.grad(loss * share, [*leaves, *self.behind])
        return gradients, share * torch.stack([*reported, loss.detach()])

    def _precision(self) -> AbstractContextManager[None]:
        """Compute matrix products as `options.precision` says."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    # ------------------------------------------------------------------------------------------------------ statistics

    def _update_moments(self, running: RunningMoments) -> None:
        """Let the model normalise vectors by what this rollout has shown, too."""
        moments = self.buffer.observations.moments()
        self.world.add(moments)
        running.update(moments)


def check_task(config: Config, task: Task) -> None:
    """Raise UserError where a config does not fit its task."""
    encoding = config.transformer and config.transformer.positional_encoding
    if task.max_episode_steps is None and encoding in ("absolute", "learned"):
        raise UserError(
            f"transformer.positional_encoding: {encoding!r} needs a longest episode, which this task does not have; "
            "allowed are '' and 'relative'"
        )
    if config.normalize_observations and not task.vector:
        raise UserError("normalize_observations: True needs vectors, this task shows frames; allowed is False")


def check_finite(trainer: PPOTrainer, statistics: Tensor) -> None:
    """Raise NonFinite naming the first number of an update that is not finite.

    Args:
        trainer: whose update it was.
        statistics: (minibatches, names) of `PPOTrainer.optimise`.
    """
    found = ""
    if not torch.isfinite(trainer.buffer.values).all():
        found = "sampling: a predicted value"
    elif not torch.isfinite(trainer.buffer.log_probs).all():
        found = "sampling: a log-probability"
    elif not torch.isfinite(trainer.buffer.advantages).all():
        found = "sampling: an advantage"
    elif not torch.isfinite(statistics).all():
        bad = (~torch.isfinite(statistics)).cpu().numpy()
        minibatch = int(bad.any(axis=1).argmax())
        losses = [f"the {name} loss" for name in trainer.reports]
        names = [*losses, *(f"a gradient of {module}" for module in trainer.optimizer.modules), "the gradient norm"]
        name = names[bad[minibatch].argmax()]
        epoch, minibatch = divmod(minibatch, trainer.config.n_mini_batch)
        found = f"epoch {epoch + 1}, minibatch {minibatch + 1}: {name}"
    elif not torch.isfinite(trainer.optimizer.weights).all():
        found = "the last optimiser step: a weight"
    if found:
        raise NonFinite(f"update {trainer.update + 1}, {found} is not finite")


def update_scalars(trainer: PPOTrainer, statistics: Tensor, seconds: np.ndarray) -> dict[str, float]:
    """Return all that is logged of the update that a trainer has just finished.

    Args:
        trainer: whose update it was.
        statistics: (minibatches, names) of `PPOTrainer.optimise`.
        seconds: that sampling and optimisation took.
    """
    buffer, config = trainer.buffer, trainer.config
    names = [f"losses/{name}" for name in trainer.reports]
    names += [f"gradients/{module}" for module in (*trainer.optimizer.modules, "all")]
    scalars = dict(zip(names, statistics.mean(dim=0).tolist(), strict=True))
    for name in ("kl", "clip_fraction"):
        scalars[f"training/{name}"] = scalars.pop(f"losses/{name}")
    if "losses/predictable" in scalars:
        predicted, predictable = scalars.pop("losses/predicted"), scalars.pop("losses/predictable")
        scalars["training/prediction_accuracy"] = predicted / max(predictable, 1e-8)
    scalars["losses/policy"] *= -1  # what is minimised
    values, advantages = trainer.world.join_rows(buffer.values), buffer.all_advantages.view(config.n_workers, -1)
    returns = values + advantages
    scalars["training/value"] = values.mean().item()
    scalars["training/advantage"] = advantages.mean().item()
    variance = returns.var()
    scalars["training/explained_variance"] = (1 - (returns - values).var() / variance.clamp(min=1e-8)).item()
    for name in ("learning_rate", "clip_range", "beta", "novelty", "gamma", "lamda"):
        scalars[f"training/{name}"] = config.scheduled(name, trainer.update - 1)
    scalars["performance/distinct_observations"] = len(buffer.observations)
    for name, duration in zip(("sampling", "optimisation", "update"), (*seconds, seconds.sum()), strict=True):
        scalars[f"performance/{name}_steps_per_second"] = trainer.samples / duration
    return scalars | trainer.episodes.scalars()


def as_tensor(data: bytes | bytearray) -> Tensor:
    """Return a copy of bytes as a tensor: a million of them cost next to nothing in a checkpoint."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def digests_of(stored: Tensor) -> list[bytes]:
    """Return digests as novelty keeps them."""
    data = stored.numpy().tobytes()
    return [data[first : first + DIGEST_SIZE] for first in range(0, len(data), DIGEST_SIZE)]
