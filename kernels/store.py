"""The distinct frames of a rollout: environments show the same ones over and over."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.transfer import to_device

# A minibatch of many distinct frames is filled up to a multiple: oneDNN takes five times as long for the gradient of a
# layer's weights where it cannot divide the rows evenly.
MANY_FRAMES, FRAMES_MULTIPLE = 512, 16


class FrameStore:
    """The distinct uint8 frames of a rollout, with their features under the weights that sample it.

    Grid worlds show the same frames over and over. Each is stored, sent to the device and encoded once.

    Args:
        shape: (C, H, W) of a frame.
        embed_dim: D.
        device: where it lives.
    """

    def __init__(self, shape: tuple[int, ...], embed_dim: int, device: torch.device) -> None:
        channels, height, width = shape
        self.frames = torch.empty(0, height, width, channels, dtype=torch.uint8, device=device)
        self.features = torch.empty(0, embed_dim, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new rollout starts, under new weights."""
        self.known: dict[bytes, int] = {}
        self.encoded = 0

    def __len__(self) -> int:
        return len(self.known)

    def add(self, frames: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Store the frames (n, H, W, C) whose digests (n, 16) are new; return the index (n,) of all."""
        count = len(self.known)
        keys = [digest.tobytes() for digest in digests]
        index = np.array([self.known.setdefault(key, len(self.known)) for key in keys], dtype=np.int64)
        added = len(self.known) - count
        if added:
            _, first = np.unique(index, return_index=True)  # of frames that are new twice, the first
            new = torch.from_numpy(frames[first[-added:]])  # a copy: the workers will write over theirs
            self._reserve(count + added)
            on_gpu = self.frames.is_cuda
            self.frames[count : count + added].copy_(new.pin_memory() if on_gpu else new, non_blocking=on_gpu)
        return index

    def _reserve(self, count: int) -> None:
        """Make room for `count` frames, at least twice as many as before."""
        capacity = self.frames.shape[0]
        if count > capacity:
            capacity = max(count, 2 * capacity, 256)
            for name in ("frames", "features"):
                old = getattr(self, name)
                new = old.new_empty(capacity, *old.shape[1:])
                new[: len(old)] = old
                setattr(self, name, new)

    def embed(self, encode: Callable[[Tensor], Tensor], index: np.ndarray) -> Tensor:
        """Return (n, D) embedded frames under constant weights; only those not encoded with them yet are."""
        for first in range(self.encoded, len(self.known), MANY_FRAMES):
            new = slice(first, min(first + MANY_FRAMES, len(self.known)))
            self.features[new] = encode(self.frames[new].permute(0, 3, 1, 2))
        self.encoded = len(self.known)
        return self.features[to_device(index, self.features.device)]

    def gather(self, index: np.ndarray) -> tuple[Tensor, int, Tensor]:
        """Return the distinct frames (M, C, H, W) among `index` (N,), M, and the place (N,) of each sample among them.

        Many frames are filled up with copies of the last one to a multiple of `FRAMES_MULTIPLE`.
        """
        distinct, inverse = np.unique(index, return_inverse=True)
        count = len(distinct)
        if len(distinct) > MANY_FRAMES:
            distinct = np.pad(distinct, (0, -len(distinct) % FRAMES_MULTIPLE), mode="edge")
        device = self.frames.device
        frames = self.frames.index_select(0, to_device(distinct, device)).permute(0, 3, 1, 2)
        return frames, count, to_device(inverse, device)
