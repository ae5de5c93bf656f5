"""PPO with episodic memory: sample → advantages → epochs of minibatches → log."""

import copy
import time
from contextlib import AbstractContextManager, closing
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auxiliary import Novelty, auxiliary_tasks, embedded_candidates
from buffer import Buffer, Minibatch
from environments.contract import Task
from kernels.allocator import release_memory
from kernels.optimizer import Optimizer
from kernels.threads import use_threads
from memory import policy_step
from model import ActorCriticModel, Output, RunningMoments, action_noise
from run.config import Config
from run.distributed import Interrupted
from run.logger import Episodes
from run.start import Options, Run
from utils import EnvironmentFailure, NonFinite, UserError, derived_seed, own_rows, training_seed
from worker import Workers

# What PPO reports of a minibatch, in this order; then come the auxiliary tasks, the total loss and gradient norms.
LOSS_PARTS = ("policy", "value", "entropy", "kl", "clip_fraction")
# How often the way from the old weights to the new ones is halved; the last time, the update is taken back.
MOST_HALVINGS = 8
# So many samples at once act again with the new weights, which bounds the memory that it takes.
REPLAYED_AT_ONCE = 2048


def ppo_loss(
    output: Output, batch: Minibatch, value_loss_coefficient: float, clip_range: float, beta: float
) -> tuple[Tensor, list[Tensor]]:
    """Return this rank's share of the clipped PPO objective as a loss, and of its `LOSS_PARTS`, detached.

    It is Schulman et al. 2017, eq. 7 and 9, where clip_range is ε and beta the entropy's coefficient. Ratio and clip
    are taken per action branch, then the mean over branches and samples. The value loss is the larger of the clipped
    and the unclipped squared error, clipped with the policy's range.
    """
    advantages, returns, old_values = batch.advantages[:, None], batch.returns, batch.values
    log_ratio = output.policy.log_prob(batch.actions) - batch.log_probs
    ratio = log_ratio.exp()
    policy = batch.mean(torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages))
    value = output.value
    clipped_value = old_values + (value - old_values).clamp(-clip_range, clip_range)
    value_error = batch.mean(torch.max((value - returns) ** 2, (clipped_value - returns) ** 2))
    entropy = batch.mean(output.policy.entropy())
    kl = batch.mean(ratio - 1 - log_ratio)  # Schulman 2020, "Approximating KL divergence", k3
    clip_fraction = batch.mean(((ratio - 1).abs() > clip_range).float())
    loss = -policy + value_loss_coefficient * value_error - beta * entropy
    return loss, [part.detach() for part in (policy, value_error, entropy, kl, clip_fraction)]


class PPOTrainer:
    """Trains one model on one task; everything random derives from the seed."""

    def __init__(self, config: Config, task: Task, seed: int, options: Options) -> None:
        check_task(config, task)
        self.config, self.task, self.seed, self.options = config, task, seed, options
        self.device, self.ranks = options.device, options.ranks
        torch.manual_seed(seed)
        self.model = ActorCriticModel(config, task).to(self.device)
        self.tasks = auxiliary_tasks(config, self.model)
        self.auxiliary = nn.ModuleDict(self.tasks).to(self.device)
        for module in (self.model, self.auxiliary):  # processors differ in what they draw
            module.load_state_dict(self.ranks.from_first({n: w.cpu() for n, w in module.state_dict().items()}))
        self.forward = torch.compile(self.model, dynamic=True) if options.compile else self.model
        self.optimizer = Optimizer({"": self.model, "auxiliary.": self.auxiliary}, config.max_grad_norm, config.amsgrad)
        self.dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32  # of matrix products
        self.buffer = Buffer(config, self.model, self.device, self.ranks, self.dtype)
        self.generator = torch.Generator(self.device)
        self.threads = torch.get_num_threads()
        losses = (*LOSS_PARTS, *(name for task in self.tasks.values() for name in task.reports), "total")
        self.tags = [f"losses/{name}" for name in losses]
        self.tags += [f"gradients/{module}" for module in (*self.optimizer.modules, "all")]
        self.compares = any(task.compares for task in self.tasks.values())
        own = self.ranks.share(config.n_workers)
        groups = 2 if options.overlaps(task, config.n_workers) and len(own) > 1 else 1
        episode_seed = partial(training_seed, seed, config.environment)
        self.workers = Workers(
            config.environment, task, len(own), episode_seed, options.processes, groups, own.start,
            stop=lambda: options.stop.asked,
        )  # fmt: skip
        self.step = np.zeros(len(own), dtype=np.int64)  # episode step of each environment
        self.novelty = Novelty(config.novelty_schedule, len(own))
        self.episodes = Episodes(self.ranks)
        self.update = 0  # finished updates

    def train(self, run: Run) -> None:
        """Carry out all updates that are left; `run` logs them, keeps their states and says when to stop."""
        with run.open(self.state_dict()), closing(self.workers):
            self.start_workers()
            while self.update < self.config.updates:
                scalars = self.train_update()
                run.after_update(self.state_dict(), scalars)
            run.finish()

    def train_update(self) -> dict[str, float]:
        """Carry out one update and return what is logged of it, by TensorBoard tag."""
        times = [time.perf_counter()]
        self.sample()
        times.append(time.perf_counter())
        before = self.optimizer.weights.clone()
        statistics = self.optimise()
        self.check_finite(statistics)
        limited = self.limit_acting_kl(before)
        times.append(time.perf_counter())
        self.update += 1
        self.buffer.memory.roll(self.config.worker_steps)
        if isinstance(self.model.moments, RunningMoments):
            moments = self.buffer.observations.moments()
            self.ranks.add(moments)
            self.model.moments.update(moments)
        episodes = self.episodes.collect()
        release_memory()
        return self._scalars(statistics, np.diff(times)) | limited | episodes

    def start_workers(self) -> None:
        """Start the environments, with the running episodes of a resumed run replayed."""
        with self.ranks.agree_on(EnvironmentFailure):
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
        use_threads(len(groups[0]), config.core.embed_dim, max(1, self.threads // len(groups)))
        buffer.begin()
        # Noise depends on environment and step only: not on groups, nor on who steps the environment.
        self.generator.manual_seed(derived_seed(self.seed, self.update))
        noise = action_noise(self.task, (buffer.worker_steps, config.n_workers), self.generator)
        noise = noise[:, self.workers.first : self.workers.first + buffer.n_workers]
        with self._precision(), self.model.core.constant_weights():
            with self.ranks.agree_on(Interrupted, EnvironmentFailure):
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
        buffer.compute_advantages(next_values, self.scheduled("gamma"), self.scheduled("lamda"))
        if self.compares:
            buffer.number_frames()
        for task in self.tasks.values():
            task.prepare(buffer)

    def _act(self, group: range, t: int, noise: Tensor) -> None:
        """Let the policy act in the environments of a group by their noise (n, entries), and let them step."""
        if self.options.stop.asked:
            raise Interrupted
        buffer, arrays, rows = self.buffer, self.workers.arrays, slice(group.start, group.stop)
        step = self.step[rows].copy()
        output, index, mask = policy_step(
            self.model, self.forward, buffer.memory, buffer.observations, arrays, rows, t, step
        )
        if mask is not None:
            buffer.masks[rows, t] = mask
        actions = output.policy.sample(noise)
        self.workers.send(group, actions.cpu().numpy())
        buffer.observation_index[rows, t], buffer.step[rows, t] = index, step
        buffer.actions[rows, t] = actions
        buffer.log_probs[rows, t] = output.policy.log_prob(actions)
        buffer.policies[rows, t] = output.policy.parameters()
        buffer.values[rows, t] = output.value

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
            final = buffer.observations.add(workers.final, slice(index, index + 1))
            buffer.final_index[index, t] = int(final[0])
        self.step[rows] = np.where(done, 0, self.step[rows] + 1)
        digests = [workers.episodes[index].digest for index in group]
        buffer.rewards[rows, t] += self.novelty.bonus(group, digests, done, self.update)

    # ---------------------------------------------------------------------------------------------------- optimisation

    def optimise(self) -> Tensor:
        """Train on the rollout; return the statistics (minibatches, names) of all minibatches, still on the device."""
        self.optimizer.set_learning_rate(self.scheduled("learning_rate"))
        use_threads(self.buffer.minibatch_size, self.config.core.embed_dim, self.threads)
        statistics = []
        for epoch in range(self.config.epochs):
            for samples in self.buffer.minibatches(np.random.default_rng((self.seed, self.update, epoch))):
                if self.ranks.any(self.options.stop.asked):
                    raise Interrupted
                statistics.append(self._train_minibatch(samples))
        losses, norms = torch.stack(statistics).tensor_split([-len(self.optimizer.modules) - 1], dim=1)
        losses = losses.contiguous()
        self.ranks.add(losses)
        return torch.cat((losses, norms), dim=1)

    def _train_minibatch(self, samples: np.ndarray) -> Tensor:
        """Take one optimiser step; return this rank's share of the losses, and the gradient norms (names,)."""
        batch = self.buffer.minibatch(samples)
        self.optimizer.clear()
        with self._precision():
            loss, reported = self._loss(batch)
        loss.backward()
        self.ranks.add(self.optimizer.gradient)
        return torch.cat((torch.stack([*reported, loss.detach()]), self.optimizer.step()))

    def _loss(self, batch: Minibatch) -> tuple[Tensor, list[Tensor]]:
        """Return this rank's share of the loss of a minibatch, and of what is reported of it."""
        config = self.config
        embedded = self.model.embed(batch.observations)
        x = self.model.complete(F.embedding(batch.which, embedded), batch.vectors, batch.step)
        output = self.forward(x, batch.past, batch.masks)
        clip_range, beta = self.scheduled("clip_range"), self.scheduled("beta")
        loss, reported = ppo_loss(output, batch, config.value_loss_coefficient, clip_range, beta)
        candidates = embedded_candidates(self.ranks, batch, embedded) if batch.candidates is not None else embedded
        for name, task in self.tasks.items():
            auxiliary, parts = task.loss(output, batch, candidates)
            loss = loss + getattr(config, f"{name}_coefficient") * auxiliary
            reported += parts
        return loss, reported

    # ---------------------------------------------------------------------------------------------------- trust region

    def limit_acting_kl(self, before: Tensor) -> dict[str, float]:
        """Go back halfway from the new weights to those before, until the policy that acts is close to the one before.

        PPO's ratio takes memory as it was stored, so it does not see what new weights do to memory itself. The policy
        that acts next has the memory that they write: of that one, KL(old ‖ new) is limited by a line search
        (docs/trust_region.md; Schulman et al. 2015, appendix C, has one for the policy that the loss sees). Returned is
        what is logged: the KL and how often the way was halved.
        """
        if self.config.kl_limit == 0:
            return {}
        weights, step = self.optimizer.weights, self.optimizer.weights - before
        kl, halvings = self.acting_kl(), 0
        # Not a number counts as too far.
        while not kl <= self.config.kl_limit and halvings < MOST_HALVINGS:
            halvings += 1
            weights.copy_(before + step * (0.5**halvings if halvings < MOST_HALVINGS else 0))
            kl = self.acting_kl()
        return {"training/acting_kl": kl, "training/halvings": halvings}

    @torch.no_grad()
    def acting_kl(self) -> float:
        """Return the root mean square over the rollout of KL(old ‖ new), with the memory that these weights write.

        A mean hides a few states in which the policy is another one; in the square they count.
        """
        buffer, total = self.buffer, torch.zeros((), device=self.device)
        at_once = max(1, REPLAYED_AT_ONCE // buffer.worker_steps)
        buffer.observations.forget_features()
        with self._precision(), self.model.core.constant_weights():
            for first in range(0, buffer.n_workers, at_once):
                rows = slice(first, min(first + at_once, buffer.n_workers))
                index, step = buffer.observation_index[rows].flatten(), buffer.step[rows]
                x = buffer.observations.embed(self.model, index, step.flatten())
                masks = None if buffer.masks is None else buffer.masks[rows].flatten(0, 1)
                policy, _ = self.model.heads(buffer.memory.replay(rows, x, step), masks)
                total += policy.kl(buffer.policies[rows].flatten(0, 1)).square().sum()
        self.ranks.add(total)
        return (total.item() / self.config.samples) ** 0.5

    # ---------------------------------------------------------------------------------------------- numbers and state

    def scheduled(self, name: str) -> float:
        """Return what a value with a schedule is in this update."""
        return self.config.scheduled(name, self.update)

    def _precision(self) -> AbstractContextManager[None]:
        """Compute matrix products as `options.precision` says."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def check_finite(self, statistics: Tensor) -> None:
        """Raise NonFinite naming the first number of an update that is not finite, of its `optimise` or before."""
        update = f"update {self.update + 1}"
        for name in ("values", "log_probs", "advantages"):
            if not torch.isfinite(getattr(self.buffer, name)).all():
                raise NonFinite(f"{update}, sampling: not all {name} are finite")
        for row, column in (~torch.isfinite(statistics)).nonzero().tolist():
            epoch, minibatch = divmod(row, self.config.n_mini_batch)
            where = f"epoch {epoch + 1}, minibatch {minibatch + 1}"
            raise NonFinite(f"{update}, {where}: {self.tags[column]} is not finite")
        if not torch.isfinite(self.optimizer.weights).all():
            raise NonFinite(f"{update}, last optimiser step: a weight is not finite")

    def _scalars(self, statistics: Tensor, seconds: np.ndarray) -> dict[str, float]:
        """Return what is logged of the update just finished, by tag, from what `optimise` returned and seconds (2,)."""
        buffer, config = self.buffer, self.config
        scalars = dict(zip(self.tags, statistics.mean(dim=0).tolist(), strict=True))
        for name in ("kl", "clip_fraction"):
            scalars[f"training/{name}"] = scalars.pop(f"losses/{name}")
        if "losses/predictable" in scalars:
            predicted, predictable = scalars.pop("losses/predicted"), scalars.pop("losses/predictable")
            scalars["training/prediction_accuracy"] = predicted / max(predictable, 1e-8)
        scalars["losses/policy"] *= -1  # what is minimised
        values, advantages = self.ranks.join_rows(buffer.values), buffer.all_advantages.view(config.n_workers, -1)
        returns = values + advantages
        scalars["training/value"], scalars["training/advantage"] = values.mean().item(), advantages.mean().item()
        unexplained = advantages.var() / returns.var().clamp(min=1e-8)
        scalars["training/explained_variance"] = 1 - unexplained.item()
        for name in ("learning_rate", "clip_range", "beta", "novelty", "gamma", "lamda"):
            scalars[f"training/{name}"] = config.scheduled(name, self.update - 1)
        scalars["performance/distinct_observations"] = len(buffer.observations)
        for name, duration in zip(("sampling", "optimisation", "update"), (*seconds, seconds.sum()), strict=True):
            scalars[f"performance/{name}_steps_per_second"] = config.samples / duration
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that the rest of the run depends on; under `environments` that of this rank's own."""
        return {
            "config": self.config.model_dump(),
            "task": asdict(self.task),
            "seed": self.seed,
            "update": self.update,
            "weights": cloned(self.model.state_dict()),
            "auxiliary": cloned(self.auxiliary.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "episodes": copy.deepcopy(self.episodes.latest),
            "environments": {
                "memory": self.buffer.memory.state_dict(),
                "workers": self.workers.state_dict(),
                "novelty": self.novelty.state_dict(),
                "step": torch.from_numpy(self.step.copy()),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, with the environments of all ranks in it."""
        self.model.load_state_dict(state["weights"])
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.episodes.latest = copy.deepcopy(state["episodes"])
        own = own_rows(state["environments"], self.ranks.share(self.config.n_workers))
        self.buffer.memory.load_state_dict(own["memory"])
        self.workers.load_state_dict(own["workers"])
        self.novelty.load_state_dict(own["novelty"])
        self.step, self.update = own["step"].numpy().copy(), state["update"]


def cloned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of weights, each with a storage of its own: in the model they are views of one tensor."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


def check_task(config: Config, task: Task) -> None:
    """Raise UserError where a config does not fit its task."""
    encoding = config.transformer.positional_encoding if config.transformer else ""
    if task.max_episode_steps is None and encoding in ("absolute", "learned"):
        raise UserError(
            f"transformer.positional_encoding: {encoding!r} needs a longest episode, which this task does not have; "
            "allowed are '' and 'relative'"
        )
    if config.normalize_observations and not task.vector:
        raise UserError("normalize_observations: True needs vectors, but this task shows frames; allowed is False")
