"""What is learned beside PPO: reconstruction, recall and prediction, each with its head, targets and loss; and novelty.

None of it is needed to play a trained model. A task has a loss that is added to PPO's with a coefficient of the config.
"""

import math
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buffer import Buffer, Minibatch
from environments.section import Schedule
from kernels.transfer import to_device
from memory import ObservationStore
from model import ActorCriticModel, Output, VisualEncoder, channels_last, orthogonal
from run.config import Config
from run.distributed import Ranks
from utils import UserError, polynomial_decay
from worker import DIGEST_SIZE

# A loss, and what is reported of it, in the order of `reports`.
Loss = tuple[Tensor, list[Tensor]]


class AuxiliaryTask(nn.Module):
    """Base of what is learned beside PPO."""

    reports: tuple[str, ...]  # the names of what `loss` reports
    compares = False  # whether it compares a sample with all distinct frames of its minibatch
    needs_frames = False  # whether vectors are not enough for it

    def prepare(self, buffer: Buffer) -> None:
        """Derive what the targets need of a whole rollout."""

    def loss(self, output: Output, batch: Minibatch, candidates: Tensor) -> Loss:
        """Return this rank's share of the loss, and of what is reported, for the model's output of a minibatch.

        `candidates` (M', D) are its distinct frames, embedded.
        """
        raise NotImplementedError


class Reconstruction(AuxiliaryTask):
    """Reconstructs the frame from the core's output, by the encoder upside down (Pleines et al. 2025)."""

    reports, needs_frames = ("reconstruction",), True

    def __init__(self, model: ActorCriticModel) -> None:
        super().__init__()
        encoder = model.encoder
        if not isinstance(encoder, VisualEncoder):
            raise UserError("reconstruction_coefficient: needs frames of at least 36×36; allowed here is 0")
        self.sizes = encoder.sizes
        self.hidden = orthogonal(nn.Linear(model.core.output_dim, encoder.hidden.in_features))
        self.deconv3 = orthogonal(nn.ConvTranspose2d(64, 64, 3, 1))
        self.deconv2 = orthogonal(nn.ConvTranspose2d(64, 32, 4, 2))
        self.deconv1 = orthogonal(nn.ConvTranspose2d(32, encoder.conv1.in_channels, 8, 4))
        channels_last(self)

    def forward(self, output: Tensor) -> Tensor:
        """Return the logits of the frame's pixels (N, C, H, W) for transformer outputs (N, D)."""
        x = F.relu(self.hidden(output)).view(-1, 64, *self.sizes[3])
        x = F.relu(self.deconv3(x))
        x = F.relu(self.deconv2(x, output_size=self.sizes[1]))
        return self.deconv1(x, output_size=self.sizes[0])

    def loss(self, output: Output, batch: Minibatch, candidates: Tensor) -> Loss:
        """Return the mean binary cross-entropy of all pixels; see `AuxiliaryTask.loss`."""
        frames = batch.observations[batch.which].float() / 255
        loss = batch.mean(F.binary_cross_entropy_with_logits(self(output.output).float(), frames, reduction="none"))
        return loss, [loss.detach()]


class Recall(AuxiliaryTask):
    """Says which frames the running episode has shown so far, from the core's output.

    It teaches attention to keep what was seen, and gives the encoder a reason to tell frames apart whose difference
    matters only later: memory is detached, so no gradient of the policy reaches their encoding.
    """

    reports, compares, needs_frames = ("recall",), True, True

    def __init__(self, model: ActorCriticModel) -> None:
        super().__init__()
        embed_dim, self.memory_length = model.embedding.out_features, model.core.memory_length
        self.query = nn.Linear(model.core.output_dim, embed_dim)
        self.prior = nn.Linear(embed_dim, 1)
        # Of a rollout: which of its frames an episode had shown before a step (W, T, M), whether that is known (W, T)
        self.seen, self.known = np.zeros((0, 0, 0), bool), np.zeros((0, 0), bool)

    def forward(self, output: Tensor, frames: Tensor) -> Tensor:
        """Return logits (N, M) for transformer outputs (N, D) and embedded frames (M, D)."""
        return F.linear(self.query(output), frames) / math.sqrt(frames.shape[1]) + self.prior(frames).T

    def prepare(self, buffer: Buffer) -> None:
        """Fill `seen` and `known`."""
        frames, (workers, steps) = buffer.frame_number[buffer.frame_index()], buffer.step.shape
        self.known = buffer.step <= np.minimum(np.arange(steps), self.memory_length)
        self.seen = np.zeros((workers, steps, buffer.frame_count), dtype=bool)
        running, everyone = np.zeros((workers, buffer.frame_count), dtype=bool), np.arange(workers)
        for t in range(steps):
            running[buffer.step[:, t] == 0] = False
            self.seen[:, t] = running
            running[everyone, frames[:, t]] = True

    def targets(self, batch: Minibatch) -> tuple[Tensor, Tensor]:
        """Return whether a sample's episode has shown each distinct frame (N, M'), and whether that is known (N, 1).

        It is known where the whole episode lies in this rollout and in the memory window.
        """
        worker, t = np.divmod(batch.samples, self.seen.shape[1])
        shown = self.seen[worker, t][:, batch.candidates]
        device = batch.which.device
        return to_device(shown, device), to_device(self.known[worker, t], device)[:, None]

    def loss(self, output: Output, batch: Minibatch, candidates: Tensor) -> Loss:
        """Return the mean binary cross-entropy, where the unknown counts as zero; see `AuxiliaryTask.loss`."""
        logits = self(output.output, candidates)
        shown, known = self.targets(batch)
        weight = known.float().expand_as(logits)
        loss = batch.mean(F.binary_cross_entropy_with_logits(logits, shown.float(), weight, reduction="none"))
        return loss, [loss.detach()]


class NextObservation(AuxiliaryTask):
    """Predicts the next observation from the core's output and the action taken.

    Frames are told apart from all others of the minibatch, contrastively (van den Oord et al. 2018; with actions Guo et
    al. 2018, CPC|A): the distinct ones are embedded anyway. Vectors are regressed. It takes exactly what has to be
    remembered, and reaches what memory, which is detached, cannot teach the encoder.

        logits(n, m) = (W o_n ⊙ (1 + E[a_n])) · e_m / √D + prior(e_m)
    """

    def __init__(self, model: ActorCriticModel) -> None:
        super().__init__()
        task, embed_dim = model.task, model.embedding.out_features
        self.task, self.compares = task, task.frame is not None
        self.normalised = model.moments.forward  # the method: the module is the model's
        self.reports = ("prediction", "predicted", "predictable") if self.compares else ("prediction",)
        self.query = nn.Linear(model.core.output_dim, embed_dim)
        # No bias: without any action, E[a] would be zero and the output alone would predict.
        sizes = [task.continuous] if task.continuous else task.branches
        self.actions = nn.ModuleList(nn.Linear(n, embed_dim, bias=False) for n in sizes)
        for weight in self.actions.parameters():
            nn.init.zeros_(weight)
        self.prior = nn.Linear(embed_dim, 1) if self.compares else None
        self.regression = nn.Linear(embed_dim, task.vector) if task.vector else None
        self.following = self.frame = np.zeros(0, dtype=np.int64)
        self.observations: ObservationStore | None = None

    def forward(self, output: Tensor, actions: Tensor) -> Tensor:
        """Return W o ⊙ (1 + E[a]) (N, D) for transformer outputs (N, D) and what was done (N, entries)."""
        if self.task.continuous:
            change = self.actions[0](actions)
        else:
            pairs = zip(self.actions.parameters(), actions.T, strict=True)
            change = reduce(torch.add, [F.embedding(action, weight.T) for weight, action in pairs])
        return self.query(output) * (1 + change)

    def prepare(self, buffer: Buffer) -> None:
        """Fill `following` and `frame` (W·T,): the observation after each step and its frame; −1 after the last."""
        following = np.concatenate((buffer.observation_index[:, 1:], buffer.last_index[:, None]), axis=1)
        self.following = np.where(buffer.terminated | buffer.truncated, -1, following).flatten()
        self.observations = buffer.observations
        if self.compares:
            frame = buffer.frame_number[buffer.observations.frame_index(self.following)]
            self.frame = np.where(self.following < 0, -1, frame)

    def loss(self, output: Output, batch: Minibatch, candidates: Tensor) -> Loss:
        """Return cross-entropy and squared error per sample; see `AuxiliaryTask.loss`.

        Reported are the loss, and of frames the shares of samples that were predicted and that could be.
        """
        question, device = self(output.output, batch.actions), batch.which.device
        loss, reported = question.new_zeros(()), []
        if self.prior is not None:
            # Which of the candidates came next, −1 where the episode ended or no sample saw it
            frame = self.frame[batch.samples]
            place = np.searchsorted(batch.candidates, frame).clip(max=len(batch.candidates) - 1)
            target = to_device(np.where(batch.candidates[place] == frame, place, -1), device)
            logits = F.linear(question, candidates) / math.sqrt(candidates.shape[1]) + self.prior(candidates).T
            loss = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum") / batch.size
            predicted = logits.detach().argmax(dim=1) == target
            reported = [batch.mean(predicted.float()), batch.mean((target >= 0).float())]
        if self.regression is not None:
            following = self.following[batch.samples]
            vector = self.normalised(self.observations.vectors_of(following.clip(min=0)))
            error = (self.regression(question).float() - vector) ** 2
            loss = loss + batch.mean(error * to_device(following >= 0, device)[:, None])
        return loss, [loss.detach(), *reported]


def auxiliary_tasks(config: Config, model: ActorCriticModel) -> dict[str, AuxiliaryTask]:
    """Return the tasks with `<name>_coefficient` above 0, by name; UserError if one does not suit what is observed."""
    tasks: dict[str, AuxiliaryTask] = {}
    kinds = {"reconstruction": Reconstruction, "recall": Recall, "prediction": NextObservation}
    for name, kind in kinds.items():
        if getattr(config, f"{name}_coefficient") > 0:
            if kind.needs_frames and model.task.frame is None:
                raise UserError(f"{name}_coefficient: needs frames, but this task shows vectors; allowed is 0")
            tasks[name] = kind(model)
    return tasks


def embedded_candidates(ranks: Ranks, batch: Minibatch, embedded: Tensor) -> Tensor:
    """Return all distinct frames of a minibatch (M', D), embedded: each by the first rank that has it.

    The gradients of all ranks come together there. `embedded` (M, D) are this rank's own distinct observations.
    """
    candidates = embedded.new_zeros(len(batch.candidates), embedded.shape[1])
    return ranks.sum_with_gradient(candidates.index_copy(0, batch.own, embedded[batch.rows]))


class Novelty:
    """An episodic bonus: paid for each observation that the running episode has not shown yet."""

    def __init__(self, schedule: Schedule, n_workers: int) -> None:
        self.schedule = schedule
        # Observations of the running episodes, in the order in which they were first shown.
        self.seen: list[dict[bytes, None]] = [{} for _ in range(n_workers)]

    def begin(self, index: int, digest: bytes) -> None:
        """Begin the episode of an environment with its first observation."""
        self.seen[index] = {digest: None}

    def bonus(self, group: range, digests: list[bytes], ended: np.ndarray, update: int) -> np.ndarray:
        """Return the bonus (n,) of a group of n environments for what they show, by its digests.

        `ended` (n,) says whether an episode ended, so that the observation is the next one's first.
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

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the digests that each environment's running episode has shown, as bytes."""
        return {"seen": [torch.from_numpy(np.frombuffer(b"".join(seen), np.uint8).copy()) for seen in self.seen]}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Continue from what `state_dict` returned."""
        self.seen = [dict.fromkeys(map(bytes, seen.numpy().reshape(-1, DIGEST_SIZE))) for seen in state["seen"]]
