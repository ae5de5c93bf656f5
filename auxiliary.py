"""What is learned beside PPO: reconstruction, recall and prediction, each with its head, targets and loss; and novelty.

None of it is needed to play a trained model. A task has a loss that is added to PPO's with a coefficient of the config.
"""

import math
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buffer import Buffer, Minibatch
from kernels.frames import FrameCrossEntropy, channels_last, upsample
from kernels.products import Linear
from model import ActorCriticModel, Prediction, VisualEncoder, orthogonal
from run.distributed import Ranks
from utils import UserError, polynomial_decay

if TYPE_CHECKING:
    from run.config import Config, Schedule


# What a task's loss needs of each sample, by name: a tensor (N, …) each.
Targets = dict[str, Tensor]
# A loss, and what is reported of it, in the order of `reports`.
Loss = tuple[Tensor, list[Tensor]]


class AuxiliaryTask(nn.Module):
    """Base of what is learned beside PPO.

    Attributes:
        reports: the names of what `loss` reports.
        compares: whether it compares a sample with all distinct frames of its minibatch.
    """

    reports: tuple[str, ...]
    compares = False

    def prepare(self, buffer: Buffer) -> None:
        """Derive what the targets need of a whole rollout."""

    def targets(self, buffer: Buffer, samples: np.ndarray, candidates: np.ndarray | None) -> Targets:
        """Return what `loss` needs of `samples` (N,), a tensor (N, …) each.

        Args:
            buffer: the rollout.
            samples: of this process.
            candidates: (M,) numbers of the distinct frames of the whole minibatch.
        """
        return {}

    def loss(self, prediction: Prediction, part: Minibatch, embedded: Tensor, targets: Targets) -> Loss:
        """Return the loss of n samples and what is reported of it.

        Args:
            prediction: of the samples under the current weights.
            part: the samples.
            embedded: (M, D) the distinct observations of the whole minibatch, embedded.
            targets: of `targets`, for these samples.
        """
        raise NotImplementedError


class Reconstruction(AuxiliaryTask):
    """Reconstructs the frame from the transformer's output, by the encoder upside down (Pleines et al. 2025).

    Args:
        model: whose encoder's sizes are to be reached.
    """

    reports = ("reconstruction",)

    def __init__(self, model: ActorCriticModel) -> None:
        super().__init__()
        encoder = model.encoder
        if not isinstance(encoder, VisualEncoder):
            raise UserError("reconstruction_coefficient: needs frames of at least 36×36; allowed here is 0")
        self.sizes = encoder.sizes
        self.hidden = orthogonal(Linear(encoder.hidden.out_features, encoder.hidden.in_features), math.sqrt(2))
        self.deconv3 = orthogonal(nn.ConvTranspose2d(64, 64, 3, 1), math.sqrt(2))
        self.deconv2 = orthogonal(nn.ConvTranspose2d(64, 32, 4, 2), math.sqrt(2))
        self.deconv1 = orthogonal(nn.ConvTranspose2d(32, encoder.conv1.in_channels, 8, 4), math.sqrt(2))
        channels_last(self)

    def forward(self, output: Tensor) -> Tensor:
        """Return the logits of the frame's pixels (N, C, H, W) for transformer outputs (N, D)."""
        x = F.relu(self.hidden(output)).view(-1, 64, *self.sizes[3])
        x = F.relu(self.deconv3(x))
        x = F.relu(upsample(x, self.deconv2, self.sizes[1]))
        return upsample(x, self.deconv1, self.sizes[0])

    def loss(self, prediction: Prediction, part: Minibatch, embedded: Tensor, targets: Targets) -> Loss:
        """Return the mean binary cross-entropy of all pixels; see `AuxiliaryTask.loss`."""
        loss = FrameCrossEntropy.apply(self(prediction.output), part.observations, part.which)
        return loss, [loss.detach()]


class Recall(AuxiliaryTask):
    """Says which frames the running episode has shown so far, from the transformer's output.

    It teaches attention to keep what was seen, and gives the encoder a reason to tell frames apart whose difference
    matters only later: memory is detached, so no gradient of the policy reaches their encoding.

    Args:
        embed_dim: D.
    """

    reports, compares = ("recall",), True

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.query = Linear(embed_dim, embed_dim)
        self.prior = Linear(embed_dim, 1)
        self.seen = np.zeros((0, 0, 0), dtype=bool)

    def forward(self, output: Tensor, frames: Tensor) -> Tensor:
        """Return logits (N, M) for transformer outputs (N, D) and embedded frames (M, D)."""
        return F.linear(self.query(output), frames) / math.sqrt(frames.shape[1]) + self.prior(frames).T

    def prepare(self, buffer: Buffer) -> None:
        """Fill `seen`: which distinct frames the running episode has shown in front of each step of this rollout."""
        frames, (workers, steps) = buffer.frame_number[buffer.frame_index()], buffer.step.shape
        self.seen = np.zeros((workers, steps, buffer.frame_count), dtype=bool)
        running, everyone = np.zeros((workers, buffer.frame_count), dtype=bool), np.arange(workers)
        for t in range(steps):
            running[buffer.step[:, t] == 0] = False
            self.seen[:, t] = running
            running[everyone, frames[:, t]] = True

    def targets(self, buffer: Buffer, samples: np.ndarray, candidates: np.ndarray | None) -> Targets:
        """Return what `samples` (N,) should recall of their minibatch's M distinct frames.

        Returns:
            Whether the episode has `shown` the frame (N, M), and whether that is `known` (N, 1): the whole episode lies
            in this rollout and in the memory window.
        """
        worker, t = np.divmod(samples, buffer.worker_steps)
        known = buffer.step[worker, t] <= np.minimum(t, buffer.timeline.length)
        shown = self.seen[worker, t][:, candidates]
        to_device = buffer.timeline.to_device
        return {"shown": to_device(shown), "known": to_device(known)[:, None]}

    def loss(self, prediction: Prediction, part: Minibatch, embedded: Tensor, targets: Targets) -> Loss:
        """Return the mean binary cross-entropy, where the unknown counts as zero; see `AuxiliaryTask.loss`."""
        shown = targets["shown"].float()
        logits = self(prediction.output, embedded[: part.distinct])
        known = targets["known"].float().expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits, shown, known)
        return loss, [loss.detach()]


class NextObservation(AuxiliaryTask):
    """Predicts the next observation from the transformer's output and the action taken.

    Frames are told apart from all others of the minibatch, contrastively (van den Oord et al. 2018; with actions Guo et
    al. 2018, CPC|A): the distinct ones are embedded anyway. Vectors are regressed. It takes exactly what has to be
    remembered, and reaches what memory, which is detached, cannot teach the encoder.

        logits(n, m) = (W o_n ⊙ (1 + E[a_n])) · e_m / √D + prior(e_m)

    Args:
        model: whose task it is.
        embed_dim: D.
    """

    def __init__(self, model: ActorCriticModel, embed_dim: int) -> None:
        super().__init__()
        task, self.normalised = model.task, model.moments.forward  # the method: the module is the model's
        self.frames, self.vectors = task.frame is not None, task.vector > 0
        self.compares = self.frames
        self.reports = ("prediction", *(("predicted", "predictable") if self.frames else ()))
        self.query = Linear(embed_dim, embed_dim)
        # No bias: without any action, E[a] would be zero and the output alone would predict.
        sizes = [task.continuous] if task.continuous else task.branches
        self.actions = nn.ModuleList(nn.Linear(n, embed_dim, bias=False) for n in sizes)
        for weight in self.actions.parameters():
            nn.init.zeros_(weight)
        self.continuous = task.continuous > 0
        self.prior = Linear(embed_dim, 1) if self.frames else None
        self.regression = Linear(embed_dim, task.vector) if self.vectors else None
        self.following = np.zeros((0, 0), dtype=np.int64)

    def forward(self, output: Tensor, actions: Tensor) -> Tensor:
        """Return W o ⊙ (1 + E[a]) (N, D) for transformer outputs (N, D) and what was done (N, entries)."""
        if self.continuous:
            change = self.actions[0](actions)
        else:
            pairs = zip(self.actions.parameters(), actions.T, strict=True)
            change = reduce(torch.add, [F.embedding(action, weight.T) for weight, action in pairs])
        return self.query(output) * (1 + change)

    def prepare(self, buffer: Buffer) -> None:
        """Fill `following` (W, T): the observation behind each step, −1 where the episode ended there."""
        following = np.concatenate((buffer.observation_index[:, 1:], buffer.last_index[:, None]), axis=1)
        self.following = np.where(buffer.terminated | buffer.truncated, -1, following)

    def targets(self, buffer: Buffer, samples: np.ndarray, candidates: np.ndarray | None) -> Targets:
        """Return what came behind `samples` (N,).

        Returns:
            `frame` (N,): which of the minibatch's distinct frames, −1 where the episode ended or no sample saw it;
            `vector` (N, n), normalised as the model sees it, and whether the episode went on (N, 1) as `known`.
        """
        following, to_device = self.following.flat[samples], buffer.timeline.to_device
        targets = {}
        if self.frames:
            frames = np.where(following < 0, -1, buffer.frame_number[buffer.observations.frame_index(following)])
            place = np.searchsorted(candidates, frames).clip(max=len(candidates) - 1)
            targets["frame"] = to_device(np.where(candidates[place] == frames, place, -1))
        if self.vectors:
            targets["vector"] = self.normalised(buffer.observations.vectors_of(following.clip(min=0)))
            targets["known"] = to_device(following >= 0)[:, None]
        return targets

    def loss(self, prediction: Prediction, part: Minibatch, embedded: Tensor, targets: Targets) -> Loss:
        """Return cross-entropy and squared error per sample; see `AuxiliaryTask.loss`.

        Reported are the loss, and of frames the shares of samples that were predicted and that could be.
        """
        question, count = self(prediction.output, part.actions), len(part)
        loss, reported = question.new_zeros(()), []
        if self.frames:
            frames, target = embedded[: part.distinct], targets["frame"]
            logits = F.linear(question, frames) / math.sqrt(frames.shape[1]) + self.prior(frames).T
            loss = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum") / count
            reported = [(logits.detach().argmax(dim=1) == target).float().mean(), (target >= 0).float().mean()]
        if self.vectors:
            error = (self.regression(question).float() - targets["vector"]) ** 2
            loss = loss + (error.mean(dim=1, keepdim=True) * targets["known"]).sum() / count
        return loss, [loss.detach(), *reported]


def auxiliary_tasks(config: "Config", model: ActorCriticModel) -> dict[str, AuxiliaryTask]:
    """Return the tasks whose coefficient, `<name>_coefficient` of the config, is above 0, by name.

    Raises:
        UserError: if a task does not suit what is observed.
    """
    embed_dim = config.transformer.embed_dim
    tasks: dict[str, AuxiliaryTask] = {}
    for name in ("reconstruction", "recall"):
        coefficient = getattr(config, f"{name}_coefficient")
        if coefficient > 0 and model.task.frame is None:
            raise UserError(f"{name}_coefficient: {coefficient} needs frames, this task shows vectors; allowed is 0")
    if config.reconstruction_coefficient > 0:
        tasks["reconstruction"] = Reconstruction(model)
    if config.recall_coefficient > 0:
        tasks["recall"] = Recall(embed_dim)
    if config.prediction_coefficient > 0:
        tasks["prediction"] = NextObservation(model, embed_dim)
    return tasks


def exchange_candidates(world: Ranks, minibatch: Minibatch, embedded: Tensor) -> Tensor:
    """Return all distinct frames of a minibatch (M, D), embedded: each by the first process that has it.

    Args:
        world: all processes.
        minibatch: this process's share.
        embedded: (≥ m, D) its own distinct observations.
    """
    candidates = embedded.new_zeros(minibatch.distinct, embedded.shape[1], dtype=torch.float32)
    candidates[minibatch.own] = embedded.detach()[minibatch.rows].float()
    world.add(candidates)
    return candidates.requires_grad_()


def return_gradient(world: Ranks, minibatch: Minibatch, of_embedded: Tensor, of_candidates: Tensor) -> None:
    """Add to the gradient of what this process embedded what all processes did with it as candidates (M, D)."""
    world.add(of_candidates)
    of_embedded[minibatch.rows] += of_candidates[minibatch.own].to(of_embedded.dtype)


class Novelty:
    """An episodic bonus: paid for each observation that the running episode has not shown yet.

    Args:
        schedule: of the bonus.
        n_workers: number of environments.
    """

    def __init__(self, schedule: "Schedule", n_workers: int) -> None:
        self.schedule = schedule
        # Observations of the running episodes, in the order in which they were first shown.
        self.seen: list[dict[bytes, None]] = [{} for _ in range(n_workers)]

    def begin(self, index: int, digest: bytes) -> None:
        """Begin the episode of an environment with its first observation."""
        self.seen[index] = {digest: None}

    def bonus(self, group: range, digests: list[bytes], ended: np.ndarray, update: int) -> np.ndarray:
        """Return the bonus (n,) of what a group of n environments shows.

        Args:
            group: of environments.
            digests: of their current observations.
            ended: (n,) whether an episode ended, so that the observation is the next one's first.
            update: number of finished updates.
        """
        bonus, paid = polynomial_decay(self.schedule, update), np.zeros(len(group), dtype=np.float32)
        if bonus == 0 and self.schedule.final == 0:  # for good: it need not know what was shown
            return paid
        for place, (index, digest) in enumerate(zip(group, digests, strict=True)):
            seen = self.seen[index]
            if ended[place]:
                seen.clear()
            elif digest not in seen:
                paid[place] = bonus
            seen[digest] = None
        return paid
