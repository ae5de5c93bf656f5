"""The distinct frames of a rollout: environments show the same ones over and over."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.transfer import to_device

# How many frames are encoded at once, which bounds the memory that it takes.
ENCODED_AT_ONCE = 512


class FrameStore:
    """The distinct uint8 frames (C, H, W) of a rollout, each stored, sent to the device and encoded once."""

    def __init__(self, shape: tuple[int, ...], embed_dim: int, device: torch.device) -> None:
        channels, height, width = shape
        self.frames = torch.empty(0, height, width, channels, dtype=torch.uint8, device=device)
        self.features = torch.empty(0, embed_dim, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget all frames."""
        self.known: dict[bytes, int] = {}
        self.encoded = 0

    def __len__(self) -> int:
        return len(self.known)

    def add(self, frames: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Store the frames (n, H, W, C) whose digests (n, 16) are new; return the index (n,) of all."""
        count, keys = len(self.known), [digest.tobytes() for digest in digests]
        index = np.array([self.known.setdefault(key, len(self.known)) for key in keys], dtype=np.int64)
        added = len(self.known) - count
        if added:
            _, first = np.unique(index, return_index=True)  # of frames that are new twice, the first
            self._reserve(count + added)
            # A copy: the workers will write over theirs.
            self.frames[count : count + added] = to_device(frames[first[-added:]], self.frames.device)
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
        for first in range(self.encoded, len(self.known), ENCODED_AT_ONCE):
            new = slice(first, min(first + ENCODED_AT_ONCE, len(self.known)))
            self.features[new] = encode(self.frames[new].permute(0, 3, 1, 2))
        self.encoded = len(self.known)
        return self.features[to_device(index, self.features.device)]

    def gather(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the distinct frames (M, C, H, W) among `index` (N,), and which of them each sample saw (N,)."""
        distinct, inverse = np.unique(index, return_inverse=True)
        device = self.frames.device
        frames = self.frames.index_select(0, to_device(distinct, device)).permute(0, 3, 1, 2)
        return frames, to_device(inverse, device)
