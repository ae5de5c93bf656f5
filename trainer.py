"""PPO with episodic Transformer-XL memory: sample → advantages → epochs of minibatches → log → checkpoint."""

import copy
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from buffer import Buffer, Minibatch
from run.checkpoint import list_checkpoints, provenance, save_checkpoint, save_model
from run.logger import Logger
from kernels.frames import FrameCrossEntropy
from memory import policy_step
from model import ActorCriticModel, Prediction
from kernels.allocator import release_memory
from kernels.optimizer import Optimizer
from utils import Task, UserError, inspect_environment, polynomial_decay, reason_of, training_seed
from worker import EnvironmentFailure, Episode, Workers

# Multiply-adds of a typical product, N·D², from which on a second thread pays.
PARALLEL_WORTH = 2**21
# So many environments with frames take turns in two halves on the CPU, too: half a batch costs the policy more than
# half, which has to be less than what the other half of the environments takes.
OVERLAP_WORTH = 32
# Samples of a minibatch that a thread differentiates by itself, and the fewest for which a second one pays.
PART_ROWS, FEWEST_ROWS = 512, 256
# Episode statistics are means over this many of the latest episodes.
EPISODES_KEPT = 100


# What a minibatch reports, in this order, followed by the total loss and the gradient norms.
LOSS_PARTS = ("policy", "value", "entropy", "kl", "clip_fraction", "reconstruction", "recall")


class Interrupted(Exception):
    """Somebody asked the run to stop."""


class Unwritable(Exception):
    """The disk is full or gone."""


class NonFinite(Exception):
    """A loss, a gradient or a prediction is not a number."""


@dataclass
class Options:
    """How a run is carried out; nothing in here changes what is learned but for rounding and the draw of actions.

    Attributes:
        device: where the model and the buffer live.
        processes: how many processes step the environments.
        overlap: whether half of the environments step while the policy looks at the other half; by default where a GPU
            computes, or from `OVERLAP_WORTH` environments with frames on.
        precision: "float32", or "bf16" for matrix products in bfloat16.
        compile: whether to compile the model with torch.compile.
        folder: where the folders models, checkpoints and summaries lie.
    """

    device: torch.device
    processes: int = 1
    overlap: bool | None = None
    precision: str = "float32"
    compile: bool = False
    folder: Path = Path(".")


def ppo_loss(
    prediction: Prediction, batch: Minibatch, value_loss_coefficient: float, clip_range: float, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped PPO objective as a loss, and its parts (Schulman et al. 2017, eq. 7 and 9).

    Ratio and clip are taken per action branch, then the mean over branches and samples. The value loss is the larger of
    the clipped and the unclipped squared error, clipped with the policy's range.

    Args:
        prediction: of N samples under the current weights.
        batch: what was done and predicted when they were sampled, and what came of it.
        value_loss_coefficient: weight of the value loss.
        clip_range: ε.
        beta: entropy coefficient.
    """
    advantages, returns, old_values = batch.advantages[:, None], batch.returns, batch.values
    log_ratio = prediction.log_prob(batch.actions) - batch.log_probs
    ratio = log_ratio.exp()
    policy = torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()
    value = prediction.value
    clipped_value = old_values + (value - old_values).clamp(-clip_range, clip_range)
    value_error = torch.max((value - returns) ** 2, (clipped_value - returns) ** 2).mean()
    entropy = prediction.entropy().mean()
    loss = -policy + value_loss_coefficient * value_error - beta * entropy
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).mean()  # Schulman 2020, "Approximating KL divergence", k3
        clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
    parts = {"policy": policy, "value": value_error, "entropy": entropy, "kl": kl, "clip_fraction": clip_fraction}
    return loss, {name: part.detach() for name, part in parts.items()}


class PPOTrainer:
    """Trains one model on one task.

    Args:
        config: a checked config.
        run_id: names the folders and the model.
        seed: everything random derives from it.
        options: how the run is carried out.
        checkpoint: the state to continue from, or None for a new run.
    """

    def __init__(self, config: dict, run_id: str, seed: int, options: Options, checkpoint: dict | None = None) -> None:
        self.config, self.seed, self.options, self.device = config, seed, options, options.device
        self.checkpoints = options.folder / "checkpoints" / run_id
        self.model_path = options.folder / "models" / f"{run_id}.nn"
        self.task = inspect_environment(config["environment"])
        check_task(config, self.task)
        torch.manual_seed(seed)
        self.model = ActorCriticModel(config, *vars(self.task).values()).to(self.device)
        self.forward = torch.compile(self.model, dynamic=True) if options.compile else self.model
        self.optimizer = Optimizer(self.model, config["max_grad_norm"])
        self.buffer = Buffer(config, self.model, self.task, self.device)
        self.buffer.timeline.in_place &= not options.compile  # what torch.compile cannot look into
        self.generator = torch.Generator(self.device)
        self.threads = torch.get_num_threads()
        # A whole minibatch fills a GPU, and a compiled model belongs to one thread.
        divided = self.device.type == "cpu" and not options.compile
        size = self.buffer.minibatch_size
        self.parts = max(1, size // PART_ROWS, min(2, size // FEWEST_ROWS)) if divided else 1
        lanes = min(self.parts, self.threads)
        pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(self.threads // lanes,))
        # Both keep the order of the parts, so that sums do not depend on which thread is the fastest.
        self.map_parts = map if self.parts == 1 else pool.map
        front = {*self.model.encoder.parameters(), *self.model.embedding.parameters()}
        self.behind = [parameter for parameter in self.model.parameters() if parameter not in front]
        n_workers = config["n_workers"]
        overlap = options.overlap
        if overlap is None:
            overlap = self.device.type == "cuda" or (self.task.visual and n_workers >= OVERLAP_WORTH)
        self.workers = Workers(
            config["environment"],
            self.task,
            n_workers,
            partial(training_seed, seed, config["environment"]),
            options.processes,
            groups=2 if overlap and n_workers > 1 else 1,
        )
        self.update = 0
        self.step = np.zeros(n_workers, dtype=np.int64)  # episode step of each environment
        self.seen: list[set[bytes]] = [set() for _ in range(n_workers)]  # observations of the running episodes
        self.finished: list[dict[str, float]] = []  # what the latest episodes reported
        self.stopping = False
        self.run = {"run_id": run_id, "seed": seed} | provenance(self.device)
        if checkpoint is not None:
            try:
                self._restore(checkpoint)
                self.state()
            except Exception as error:  # the file is ours by its marks, but holds something else
                found = f"the checkpoint holds no run of this config ({reason_of(error)})"
                raise UserError(f"{self.checkpoints}: {found}") from error
        self.boundary = self.state()

    @property
    def samples(self) -> int:
        """Environment steps of one update."""
        return self.config["n_workers"] * self.config["worker_steps"]

    # --------------------------------------------------------------------------------------------------- the algorithm

    def train(self) -> None:
        """Carry out all updates that are left and write the model.

        Raises:
            Interrupted: after SIGINT or SIGTERM, when the state behind the last update is saved.
            EnvironmentFailure: if an environment fails, when that state is saved too.
            NonFinite: if a number went wrong; the checkpoints stay as they are.
        """
        logger = Logger(self.options.folder / "summaries", self.config, self.run, self.update * self.samples)
        try:
            with self._signals():
                self.start_workers()
                while self.update < self.config["updates"]:
                    scalars = self.train_update()
                    logger.log(self.update, self.update * self.samples, scalars)
                    self._at_intervals(logger)
                save_checkpoint(self.checkpoints, self.update, self.boundary)
                self.save_model(self.model_path)
            logger.close()
        except (Interrupted, EnvironmentFailure, UserError):
            self._try_checkpoint()
            raise
        except OSError as error:
            raise Unwritable(f"update {self.update}: cannot write any more: {error.strerror}") from error
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
        self._check_finite(statistics)
        times.append(time.perf_counter())
        self.update += 1
        self.buffer.timeline.roll(self.config["worker_steps"])
        self.boundary = None  # freed before its successor is made: the two are as large as six models
        self.boundary = self.state()
        release_memory()
        return self._scalars(statistics, np.diff(times))

    def sample(self) -> None:
        """Fill the buffer with one rollout of all environments and estimate its advantages.

        The environments of one group step while the policy looks at the other group.
        """
        buffer, groups = self.buffer, self.workers.groups
        # Where the policy and the environments work at the same time, they share the cores.
        self._use_threads(len(groups[0]), max(1, self.threads // len(groups)))
        buffer.begin()
        self.generator.manual_seed(derived_seed(self.seed, self.update))
        with self._precision(), self.model.transformer.constant_weights():
            for t in range(buffer.worker_steps):
                for group in groups:
                    if t > 0:
                        self._receive(group, t - 1)
                    self._act(group, t)
            for group in groups:
                self._receive(group, buffer.worker_steps - 1)
            arrays = self.workers.arrays
            last_index = buffer.observations.add(arrays.observations, arrays.digests)
            with torch.no_grad():
                next_values = buffer.bootstrap(self.model, last_index, self.step)
        buffer.compute_advantages(next_values)
        if self.model.recall is not None:
            buffer.note_seen()

    def _act(self, group: range, t: int) -> None:
        """Let the policy act in the environments of a group, and let them step."""
        self._check_stop()
        buffer, rows = self.buffer, slice(group.start, group.stop)
        step = self.step[rows].copy()
        prediction, index = policy_step(
            self.forward, buffer.timeline, buffer.observations, self.workers.arrays, rows, t, step
        )
        actions = prediction.sample(self.generator)
        self.workers.send(group, actions.cpu().numpy())
        buffer.observation_index[rows, t], buffer.step[rows, t] = index, step
        buffer.actions[rows, t] = actions
        buffer.log_probs[rows, t] = prediction.log_prob(actions)
        buffer.values[rows, t] = prediction.value

    def _receive(self, group: range, t: int) -> None:
        """Wait for the environments of a group and store what came of step t."""
        self.finished += [info for _, info in self.workers.receive(group)]
        del self.finished[:-EPISODES_KEPT]
        buffer, arrays, rows = self.buffer, self.workers.arrays, slice(group.start, group.stop)
        buffer.rewards[rows, t] = arrays.rewards[rows]
        buffer.terminated[rows, t] = arrays.terminated[rows]
        buffer.truncated[rows, t] = arrays.truncated[rows]
        done = arrays.terminated[rows] | arrays.truncated[rows]
        for index in group.start + np.flatnonzero(arrays.truncated[rows]):
            final = arrays.final_observations[index : index + 1], arrays.final_digests[index : index + 1]
            buffer.final_index[int(index), t] = int(buffer.observations.add(*final)[0])
        self.step[rows] = np.where(done, 0, self.step[rows] + 1)
        self._reward_novelty(group, t, done)

    def _reward_novelty(self, group: range, t: int, done: np.ndarray) -> None:
        """Add the novelty bonus to the rewards of observations that are new in their episode."""
        bonus = polynomial_decay(self.config["novelty_schedule"], self.update)
        if bonus == 0:
            return
        for index, ended in zip(group, done, strict=True):
            digest, seen = self.workers.episodes[index].digest, self.seen[index]
            if ended:
                seen.clear()
            elif digest not in seen:
                self.buffer.rewards[index, t] += bonus
            seen.add(digest)

    def optimise(self) -> Tensor:
        """Train on the rollout; return the statistics (minibatches, names) of all minibatches, still on the device."""
        schedules = [self.config[f"{name}_schedule"] for name in ("learning_rate", "clip_range", "beta")]
        learning_rate, clip_range, beta = (polynomial_decay(schedule, self.update) for schedule in schedules)
        self.optimizer.set_learning_rate(learning_rate)
        self._use_threads(self.buffer.minibatch_size, self.threads)
        statistics = []
        for epoch in range(self.config["epochs"]):
            for samples in self.buffer.minibatches(np.random.default_rng((self.seed, self.update, epoch))):
                self._check_stop()
                statistics.append(self._train_minibatch(samples, clip_range, beta))
        return torch.stack(statistics)

    def _train_minibatch(self, samples: np.ndarray, clip_range: float, beta: float) -> Tensor:
        """Take one optimiser step; return its losses and gradient norms (names,).

        Observations are embedded for the whole minibatch, which shares them. All that follows is differentiated in
        parts, each by a thread of its own: so the cores wait for each other once and not in every operation.
        """
        minibatch = self.buffer.minibatch(samples, self.config["normalize_advantages"])
        with self._precision():
            embedded = self.model.embed(minibatch.observations)
        leaf = embedded.detach().requires_grad_()
        self.optimizer.clear()
        differentiate = partial(self._differentiate, len(samples), leaf, clip_range, beta)
        of_embedded, statistics = 0, 0
        for (gradient, *gradients), losses in self.map_parts(differentiate, minibatch.split(self.parts)):
            torch._foreach_add_([parameter.grad for parameter in self.behind], gradients)
            of_embedded, statistics = of_embedded + gradient, statistics + losses
        embedded.backward(of_embedded)
        return torch.cat((statistics, self.optimizer.step()))

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
        config, model = self.config, self.model
        with self._precision():
            prediction = self.forward(F.embedding(part.which, embedded), self.buffer.timeline.view(part.groups))
            loss, reported = ppo_loss(prediction, part, config["value_loss_coefficient"], clip_range, beta)
            reported["reconstruction"] = reported["recall"] = torch.zeros_like(loss)
            if model.decoder is not None:
                logits = model.decoder(prediction.output)
                reconstruction = FrameCrossEntropy.apply(logits, part.observations, part.which)
                reported["reconstruction"] = reconstruction.detach()
                loss = loss + config["reconstruction_coefficient"] * reconstruction
            if model.recall is not None:
                shown = part.shown.float()
                logits = model.recall(prediction.output, embedded[: shown.shape[1]])
                known = part.known.float().expand_as(logits)
                recall = F.binary_cross_entropy_with_logits(logits, shown, known)
                reported["recall"] = recall.detach()
                loss = loss + config["recall_coefficient"] * recall
        share = len(part) / samples
        gradients = torch.autograd.grad(loss * share, [embedded, *self.behind])
        return gradients, share * torch.stack([*(reported[name] for name in LOSS_PARTS), loss.detach()])

    def _use_threads(self, rows: int, most: int) -> None:
        """Compute with `most` threads if that pays for so many rows, else with one: waiting for each other costs."""
        pays = rows * self.model.transformer.embed_dim**2 >= PARALLEL_WORTH
        torch.set_num_threads(most if pays else 1)

    # --------------------------------------------------------------------------------------- statistics and safeguards

    def _scalars(self, statistics: Tensor, seconds: np.ndarray) -> dict[str, float]:
        """Return all that is logged of an update by its TensorBoard tag.

        Args:
            statistics: (minibatches, names) of `optimise`.
            seconds: that sampling and optimisation took.
        """
        buffer, config = self.buffer, self.config
        names = [f"losses/{name}" for name in (*LOSS_PARTS, "total")]
        names += [f"gradients/{module}" for module in (*self.optimizer.modules, "all")]
        scalars = dict(zip(names, statistics.mean(dim=0).tolist(), strict=True))
        for name in ("kl", "clip_fraction"):
            scalars[f"training/{name}"] = scalars.pop(f"losses/{name}")
        scalars["losses/policy"] *= -1  # what is minimised
        returns, values = buffer.values + buffer.advantages, buffer.values
        scalars["training/value"] = values.mean().item()
        scalars["training/advantage"] = buffer.advantages.mean().item()
        variance = returns.var()
        scalars["training/explained_variance"] = (1 - (returns - values).var() / variance.clamp(min=1e-8)).item()
        for name in ("learning_rate", "clip_range", "beta", "novelty"):
            scalars[f"training/{name}"] = polynomial_decay(config[f"{name}_schedule"], self.update - 1)
        scalars["performance/distinct_observations"] = len(buffer.observations)
        for name, duration in zip(("sampling", "optimisation", "update"), (*seconds, seconds.sum()), strict=True):
            scalars[f"performance/{name}_steps_per_second"] = self.samples / duration
        for name in {name: None for info in self.finished for name in info}:
            reported = [info[name] for info in self.finished if name in info]
            scalars[f"episode/{name}_mean"] = float(np.mean(reported))
            if name in ("reward", "length"):
                scalars[f"episode/{name}_std"] = float(np.std(reported))
        return scalars

    def _check_finite(self, statistics: Tensor) -> None:
        """Raise NonFinite naming the first number of the update that is not finite."""
        found = ""
        if not torch.isfinite(self.buffer.values).all():
            found = "sampling: a predicted value"
        elif not torch.isfinite(self.buffer.log_probs).all():
            found = "sampling: a log-probability"
        elif not torch.isfinite(self.buffer.advantages).all():
            found = "sampling: an advantage"
        elif not torch.isfinite(statistics).all():
            bad = (~torch.isfinite(statistics)).cpu().numpy()
            minibatch = int(bad.any(axis=1).argmax())
            losses = [f"the {name} loss" for name in (*LOSS_PARTS, "total")]
            names = [*losses, *(f"a gradient of {module}" for module in self.optimizer.modules), "the gradient norm"]
            name = names[bad[minibatch].argmax()]
            epoch, minibatch = divmod(minibatch, self.config["n_mini_batch"])
            found = f"epoch {epoch + 1}, minibatch {minibatch + 1}: {name}"
        elif not torch.isfinite(self.optimizer.weights).all():
            found = "the last optimiser step: a weight"
        if found:
            saved = list_checkpoints(self.checkpoints)
            last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been written"
            raise NonFinite(f"update {self.update + 1}, {found} is not finite; {last}")

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute matrix products as `options.precision` says."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request to stop; a second SIGINT stops at once."""

        def request(number: int, frame: object) -> None:
            if self.stopping and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopping = True

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _check_stop(self) -> None:
        if self.stopping:
            raise Interrupted

    # -------------------------------------------------------------------------------------------- starting and stopping

    def start_workers(self) -> None:
        """Start the environments, with the running episodes of a resumed run replayed."""
        fresh = self.workers.start()
        for index in fresh:
            self.step[index] = 0
            self.seen[index].clear()
        for index in range(len(self.seen)) if self.update == 0 else fresh:
            self.seen[index].add(self.workers.episodes[index].digest)
        if fresh:
            print(f"environments {sorted(fresh)} are not deterministic and began fresh episodes", file=sys.stderr)

    def state(self) -> dict:
        """Return a copy of all that the rest of the run depends on, as tensors and plain data."""
        timeline = self.buffer.timeline
        # Digests as text: an empty `bytes` is nothing that weights_only=True reads.
        episodes = [
            {"number": episode.number, "actions": list(episode.actions), "digest": episode.digest.hex()}
            for episode in self.workers.episodes
        ]
        return {
            "config": self.config,
            "seed": self.seed,
            "run": self.run,
            "update": self.update,
            "weights": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "memory": timeline.items[:, :, : timeline.length].clone(),
            "item_step": timeline.item_step[:, : timeline.length].clone(),
            "step": self.step.tolist(),
            "episodes": episodes,
            "seen": [sorted(seen) for seen in self.seen],
            "finished": list(self.finished),
        }

    def _restore(self, state: dict) -> None:
        """Continue from what `state` returned."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        timeline = self.buffer.timeline
        timeline.items[:, :, : timeline.length] = state["memory"].to(self.device)
        timeline.item_step[:, : timeline.length] = state["item_step"].to(self.device)
        self.update, self.finished, self.run = state["update"], state["finished"], state["run"]
        # These become a path and lines; a file must not choose where else to write.
        if not {str} >= {type(self.run[key]) for key in ("run_id", "device", "commit")} or not re.fullmatch(
            r"[\w.-]*\w/[\d-]+", self.run.get("summaries", "x/0")
        ):
            raise ValueError("its description is none")
        self.step = np.array(state["step"], dtype=np.int64)
        self.seen = [set(seen) for seen in state["seen"]]
        self.workers.episodes = [
            Episode(episode["number"], list(episode["actions"]), bytes.fromhex(episode["digest"]))
            for episode in state["episodes"]
        ]

    def _try_checkpoint(self) -> None:
        """Write the state behind the last update; a failure is reported, and the older checkpoints stay intact."""
        try:
            save_checkpoint(self.checkpoints, self.boundary["update"], self.boundary)
        except OSError as error:
            print(f"{self.checkpoints}: the checkpoint could not be written: {error.strerror}", file=sys.stderr)

    def _at_intervals(self, logger: Logger) -> None:
        """Do what is due every so many updates."""
        config = self.config
        if config["model_interval"] and self.update % config["model_interval"] == 0:
            self.save_model(self.checkpoints / f"model-{self.update * self.samples:012d}.nn")
        if config["histogram_interval"] and self.update % config["histogram_interval"] == 0:
            logger.histograms(self.update * self.samples, self.model)
        if config["video_interval"] and self.update % config["video_interval"] == 0:
            logger.video(self.update * self.samples, self.model, config, self.task)
        if self.update % config["checkpoint_interval"] == 0:  # last: a resumed run repeats nothing in front of it
            logger.flush()
            self._try_checkpoint()

    def save_model(self, path: Path) -> None:
        """Write the model as it is now."""
        progress = {"updates": self.update, "steps": self.update * self.samples}
        save_model(path, self.model, self.config, self.task, self.run | progress)


def derived_seed(*numbers: int) -> int:
    """Return a seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def check_task(config: dict, task: Task) -> None:
    """Raise UserError where a config does not fit its task."""
    encoding = config["transformer"]["positional_encoding"]
    if task.max_episode_steps is None and encoding in ("absolute", "learned"):
        raise UserError(
            f"transformer.positional_encoding: {encoding!r} needs a longest episode, which this task does not have; "
            "allowed are '' and 'relative'"
        )
    for name in ("reconstruction_coefficient", "recall_coefficient"):
        if config[name] > 0 and not task.visual:
            raise UserError(f"{name}: {config[name]} needs frames, this task shows vectors; allowed is 0")
