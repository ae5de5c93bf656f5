"""PPO with episodic Transformer-XL memory: sample → advantages → epochs of minibatches → log."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard.summary import Summary

from auxiliary import Novelty, auxiliary_tasks
from buffer import Buffer, Minibatch
from environments.numbers import count_missing_success, episode_scalars
from kernels.allocator import release_memory
from kernels.optimizer import Optimizer
from memory import policy_step, to_device
from model import ActorCriticModel, Prediction, action_noise
from run.checkpoint import provenance
from run.config import Config
from run.lifecycle import Keeper, StopRequest, check_finite, check_task
from run.logger import Logger
from run.world import World
from utils import Task, derived_seed, inspect_environment, polynomial_decay, training_seed
from worker import Workers

# Multiply-adds of a typical product, N·D², from which on a second thread pays.
PARALLEL_WORTH = 2**21
# So many environments with frames take turns in two halves on the CPU, too: half a batch costs the policy more than
# half, which has to be less than what the other half of the environments takes.
OVERLAP_WORTH = 32
# Samples of a minibatch that a thread differentiates by itself, and the fewest for which a second one pays.
PART_ROWS, FEWEST_ROWS = 512, 256
# Episode statistics are means over this many of the latest episodes.
EPISODES_KEPT = 100
# What PPO reports of a minibatch, in this order; then come the auxiliary tasks, the total loss and gradient norms.
LOSS_PARTS = ("policy", "value", "entropy", "kl", "clip_fraction")


@dataclass
class Options:
    """How a run is carried out; nothing in here changes what is learned but for rounding.

    Attributes:
        device: where the model and the buffer live.
        processes: how many processes step the environments.
        overlap: whether half of the environments step while the policy looks at the other half; by default where a GPU
            computes, or from `OVERLAP_WORTH` environments with frames on.
        precision: "float32", or "bf16" for matrix products in bfloat16.
        compile: whether to compile the model with torch.compile.
        folder: where the folders models, checkpoints and summaries lie.
        world: all processes that train together.
        film: returns an episode as an animated picture for TensorBoard, where videos are wanted.
    """

    device: torch.device
    processes: int = 1
    overlap: bool | None = None
    precision: str = "float32"
    compile: bool = False
    folder: Path = Path(".")
    world: World = World()
    film: Callable[[ActorCriticModel, Config, Task, str], Summary] | None = None


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
        self.world, self.stop = options.world, StopRequest()
        self.task, self.notices = inspect_environment(config.environment)
        check_task(config, self.task)
        torch.manual_seed(seed)
        self.model = ActorCriticModel(config, self.task).to(self.device)
        self.auxiliary = auxiliary_tasks(config, self.model).to(self.device)
        self.forward = torch.compile(self.model, dynamic=True) if options.compile else self.model
        self.optimizer = Optimizer({"": self.model, "auxiliary.": self.auxiliary}, config.max_grad_norm)
        self.buffer = Buffer(config, self.model, self.device, self.world)
        self.buffer.timeline.in_place &= not options.compile  # what torch.compile cannot look into
        self.generator = torch.Generator(self.device)
        self._divide_among_threads()
        self.reports = (*LOSS_PARTS, *(name for task in self.auxiliary.values() for name in task.reports), "total")
        front = {*self.model.encoder.parameters(), *self.model.embedding.parameters()}
        self.behind = [parameter for parameter in self.optimizer.parameters if parameter not in front]
        own, overlap = self.world.share(config.n_workers), options.overlap
        if overlap is None:
            many_frames = self.task.frame is not None and config.n_workers >= OVERLAP_WORTH
            overlap = self.device.type == "cuda" or many_frames
        episode_seed = partial(training_seed, seed, config.environment)
        groups = 2 if overlap and len(own) > 1 else 1
        self.workers = Workers(
            config.environment, self.task, len(own), episode_seed, options.processes, groups, first=own.start
        )
        self.update = 0
        self.step = np.zeros(len(own), dtype=np.int64)  # episode step of each environment
        self.novelty = Novelty(config.novelty_schedule, len(own))
        self.ended: list[tuple[int, int, dict[str, float]]] = []  # (t, environment, report) of this update's episodes
        self.finished: list[dict[str, float]] = []  # what the latest episodes reported
        self.run = {"run_id": run_id, "seed": seed} | provenance(self.device)
        self.keeper = Keeper(self, options.folder, checkpoint)

    def _divide_among_threads(self) -> None:
        """Decide how many parts a minibatch is differentiated in, each by a thread of its own."""
        self.threads = torch.get_num_threads()
        # A whole minibatch fills a GPU, and a compiled model belongs to one thread.
        divided = self.device.type == "cpu" and not self.options.compile
        size = self.buffer.minibatch_size // self.world.size
        self.parts = max(1, size // PART_ROWS, min(2, size // FEWEST_ROWS)) if divided else 1
        lanes = min(self.parts, self.threads)
        pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(self.threads // lanes,))
        # Both keep the order of the parts, so that sums do not depend on which thread is the fastest.
        self.map_parts = map if self.parts == 1 else pool.map

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
        logger = Logger(self.options.folder / "summaries", self.config, self.run, self.update * self.samples)
        with self.keeper.nothing_lost(), self.stop.on_signals():
            try:
                self.start_workers()
                while self.update < self.config.updates:
                    scalars = self.train_update()
                    logger.log(self.update, self.update * self.samples, scalars)
                    self.keeper.at_intervals(logger)
                self.keeper.finish()
                logger.close()
            finally:
                self.workers.close()
                with suppress(OSError):
                    logger.close()

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
        if self.config.normalize_observations:
            self._update_moments()
        self._collect_reports()
        self.keeper.remember()
        release_memory()
        return self._scalars(statistics, np.diff(times))

    def start_workers(self) -> None:
        """Start the environments, with the running episodes of a resumed run replayed."""
        fresh = self.workers.start()
        self.step[fresh] = 0
        for index in range(len(self.step)) if self.update == 0 else fresh:
            self.novelty.begin(index, self.workers.episodes[index].digest)

    # -------------------------------------------------------------------------------------------------------- sampling

    def sample(self) -> None:
        """Fill the buffer with one rollout of all environments and estimate its advantages.

        The environments of one group step while the policy looks at the other group.
        """
        buffer, groups = self.buffer, self.workers.groups
        # Where the policy and the environments work at the same time, they share the cores.
        self._use_threads(len(groups[0]), max(1, self.threads // len(groups)))
        buffer.begin()
        # Noise depends on environment and step only: not on groups, nor on who steps the environment.
        self.generator.manual_seed(derived_seed(self.seed, self.update))
        noise = action_noise(self.task, (buffer.worker_steps, self.config.n_workers), self.generator)
        own = self.world.share(self.config.n_workers)
        noise = noise[:, own.start : own.stop]
        with self._precision(), self.model.transformer.constant_weights():
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
        buffer.compute_advantages(next_values)
        for task in self.auxiliary.values():
            task.prepare(buffer)

    def _act(self, group: range, t: int, noise: Tensor) -> None:
        """Let the policy act in the environments of a group by their noise (n, entries), and let them step."""
        self.stop.check()
        buffer, arrays, rows = self.buffer, self.workers.arrays, slice(group.start, group.stop)
        step = self.step[rows].copy()
        prediction, index = policy_step(
            self.model, self.forward, buffer.timeline, buffer.observations, arrays, rows, t, step
        )
        if buffer.masks is not None and arrays.masks is not None:
            buffer.masks[rows, t] = to_device(arrays.masks[rows].copy(), self.device)
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
        self.optimizer.set_learning_rate(polynomial_decay(config.learning_rate_schedule, self.update))
        clip_range = polynomial_decay(config.clip_range_schedule, self.update)
        beta = polynomial_decay(config.beta_schedule, self.update)
        self._use_threads(self.buffer.minibatch_size, self.threads)
        statistics = []
        for epoch in range(config.epochs):
            for samples in self.buffer.minibatches(np.random.default_rng((self.seed, self.update, epoch))):
                self.stop.check()
                statistics.append(self._train_minibatch(samples, clip_range, beta))
        losses, norms = torch.stack(statistics).split((len(self.reports), len(self.optimizer.modules) + 1), dim=1)
        losses = losses.contiguous()
        self.world.add(losses)
        return torch.cat((losses, norms), dim=1)

    def _train_minibatch(self, samples: np.ndarray, clip_range: float, beta: float) -> Tensor:
        """Take one optimiser step; return its losses, of this process's share, and its gradient norms (names,)."""
        minibatch = self.buffer.minibatch(samples)
        for name, task in self.auxiliary.items():
            minibatch.targets[name] = task.targets(self.buffer, minibatch.samples)
        self.optimizer.clear()
        losses = torch.zeros(len(self.reports), device=self.device)
        if len(minibatch):
            losses = self._accumulate_gradient(minibatch, len(samples), clip_range, beta)
        self.world.add(self.optimizer.gradient)
        return torch.cat((losses, self.optimizer.step()))

    def _accumulate_gradient(self, minibatch: Minibatch, samples: int, clip_range: float, beta: float) -> Tensor:
        """Differentiate this process's share of a minibatch of so many samples; return its losses (names,).

        Observations are embedded for the whole minibatch, which shares them. All that follows is differentiated in
        parts, each by a thread of its own: so the cores wait for each other once and not in every operation.
        """
        with self._precision():
            embedded = self.model.embed(minibatch.observations)
        leaf = embedded.detach().requires_grad_()
        differentiate = partial(self._differentiate, samples, leaf, clip_range, beta)
        of_embedded, losses = torch.zeros(()), torch.zeros(())
        for (gradient, *gradients), reported in self.map_parts(differentiate, minibatch.split(self.parts)):
            torch._foreach_add_([parameter.grad for parameter in self.behind], gradients)
            of_embedded, losses = of_embedded + gradient, losses + reported
        embedded.backward(of_embedded)
        return losses

    def _differentiate(
        self, samples: int, embedded: Tensor, clip_range: float, beta: float, part: Minibatch
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what a part of a minibatch contributes to the gradients of the loss and to what is reported.

        Args:
            samples: of the whole minibatch.
            embedded: (M, D) its distinct observations, embedded.
            clip_range: ε.
            beta: entropy coefficient.
            part: some of its samples.

        Returns:
            The gradients with respect to `embedded` and to the parameters behind it, and the losses (names,).
        """
        config = self.config
        with self._precision():
            x = self.model.complete(F.embedding(part.which, embedded), part.vectors, part.step)
            prediction = self.forward(x, self.buffer.timeline.view(part.groups), part.masks)
            loss, reported = ppo_loss(prediction, part, config.value_loss_coefficient, clip_range, beta)
            for name, task in self.auxiliary.items():
                auxiliary, own = task.loss(prediction, part, embedded, part.targets[name])
                loss = loss + getattr(config, f"{name}_coefficient") * auxiliary
                reported += own
        share = len(part) / samples
        gradients = torch.autograd.grad(loss * share, [embedded, *self.behind])
        return gradients, share * torch.stack([*reported, loss.detach()])

    def _use_threads(self, rows: int, most: int) -> None:
        """Compute with `most` threads if that pays for so many rows, else with one: waiting for each other costs."""
        pays = rows * self.config.transformer.embed_dim**2 >= PARALLEL_WORTH
        torch.set_num_threads(most if pays else 1)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute matrix products as `options.precision` says."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            yield

    # ------------------------------------------------------------------------------------------------------ statistics

    def _update_moments(self) -> None:
        """Let the model normalise vectors by what this rollout has shown, too."""
        moments = self.buffer.observations.moments()
        self.world.add(moments)
        self.model.moments.update(moments)

    def _collect_reports(self) -> None:
        """Add what all processes' episodes reported during this update, in the order in which they ended."""
        ended = [report for reports in self.world.gather(self.ended) for report in reports]
        self.finished += [report for _, _, report in sorted(ended, key=lambda report: report[:2])]
        count_missing_success(self.finished)
        self.ended.clear()
        del self.finished[:-EPISODES_KEPT]

    def _scalars(self, statistics: Tensor, seconds: np.ndarray) -> dict[str, float]:
        """Return all that is logged of an update by its TensorBoard tag.

        Args:
            statistics: (minibatches, names) of `optimise`.
            seconds: that sampling and optimisation took.
        """
        buffer, config = self.buffer, self.config
        names = [f"losses/{name}" for name in self.reports]
        names += [f"gradients/{module}" for module in (*self.optimizer.modules, "all")]
        scalars = dict(zip(names, statistics.mean(dim=0).tolist(), strict=True))
        for name in ("kl", "clip_fraction"):
            scalars[f"training/{name}"] = scalars.pop(f"losses/{name}")
        if "losses/predictable" in scalars:
            predicted, predictable = scalars.pop("losses/predicted"), scalars.pop("losses/predictable")
            scalars["training/prediction_accuracy"] = predicted / max(predictable, 1e-8)
        scalars["losses/policy"] *= -1  # what is minimised
        values, advantages = self.world.join_rows(buffer.values), buffer.all_advantages.view(config.n_workers, -1)
        returns = values + advantages
        scalars["training/value"] = values.mean().item()
        scalars["training/advantage"] = advantages.mean().item()
        variance = returns.var()
        scalars["training/explained_variance"] = (1 - (returns - values).var() / variance.clamp(min=1e-8)).item()
        for name in ("learning_rate", "clip_range", "beta", "novelty"):
            scalars[f"training/{name}"] = polynomial_decay(getattr(config, f"{name}_schedule"), self.update - 1)
        scalars["performance/distinct_observations"] = len(buffer.observations)
        for name, duration in zip(("sampling", "optimisation", "update"), (*seconds, seconds.sum()), strict=True):
            scalars[f"performance/{name}_steps_per_second"] = self.samples / duration
        return scalars | episode_scalars(self.finished)
