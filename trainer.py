"""PPO with episodic Transformer-XL memory: sample → advantages → epochs of minibatches → log."""

import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auxiliary import Novelty, auxiliary_tasks, exchange_candidates, return_gradient
from buffer import Buffer, Minibatch
from kernels.allocator import release_memory
from kernels.optimizer import Optimizer
from kernels.threads import divide, use_threads
from memory import policy_step
from model import ActorCriticModel, Prediction, RunningMoments, action_noise
from run.checkpoint import provenance
from run.config import Config
from run.distributed import Interrupted
from run.lifecycle import Keeper, StopRequest, check_finite, check_task
from run.options import PRECISIONS, Options
from run.report import collect_episodes, update_scalars
from utils import EnvironmentFailure, derived_seed, training_seed
from worker import Workers, inspect_environment

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
        run_id: names the folders and the model.
        seed: everything random derives from it.
        options: how the run is carried out.
        checkpoint: the state to continue from, or None for a new run.
    """

    def __init__(
        self, config: Config, run_id: str, seed: int, options: Options, checkpoint: dict | None = None
    ) -> None:
        self.config, self.seed, self.options, self.device = config, seed, options, options.device
        self.world, self.stop = options.world, StopRequest(options.world)
        self.task, self.notices = inspect_environment(config.environment)
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
            config.environment, self.task, len(own), episode_seed, options.processes, groups, first=own.start,
            stop=lambda: self.stop.asked or self.world.stopping,
        )  # fmt: skip
        self.update = 0
        self.step = np.zeros(len(own), dtype=np.int64)  # episode step of each environment
        self.novelty = Novelty(config.novelty_schedule, len(own))
        self.ended: list[tuple[int, int, dict[str, float]]] = []  # (t, environment, report) of this update's episodes
        self.finished: list[dict[str, float]] = []  # what the latest episodes reported
        self.run: dict[str, Any] = {"run_id": run_id, "seed": seed, "precision": PRECISIONS[0]}
        self.run |= provenance(self.device)
        self.keeper = Keeper(self, options.folder, checkpoint)
        options.precision = options.precision or self.run["precision"]
        self.run["precision"] = options.precision

    @property
    def samples(self) -> int:
        """Environment steps of one update."""
        return self.config.n_workers * self.config.worker_steps

    def train(self) -> None:
        """Carry out all updates that are left and write the model.

        Raises:
            Interrupted: after SIGINT or SIGTERM, when the state behind the last update is saved.
            EnvironmentFailure: if an environment fails, when that state is saved too.
            NonFinite: if a number went wrong; the checkpoints stay as they are.
            Unwritable: if the disk is full or gone.
        """
        with self.stop.on_signals(), self.keeper.nothing_lost(), self.keeper.log() as logger:
            try:
                self.start_workers()
                while self.update < self.config.updates:
                    self.keeper.at_intervals(logger, self.train_update())
                self.keeper.finish(logger)
            finally:
                self.workers.close()

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
        collect_episodes(self)
        self.keeper.remember()
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
        self.ended += [(t, workers.first + index, report) for index, report in workers.receive(group)]
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
