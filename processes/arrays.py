"""What environments and those who act in them tell each other, in shared memory."""

from typing import Any

import numpy as np
import xxhash

from environments.contract import Task

DIGEST_SIZE = 16

# A frame, a vector, or both by these names.
Observation = np.ndarray | dict[str, np.ndarray]


class SharedArrays:
    """What a group of environments and the trainer tell each other, in anonymous shared memory.

    The memory has no name: it disappears with the last process that maps it, however that process ends. What a task
    does not have is None. Digests, 128 bits wide, are of whole observations; frames beside vectors have their own.

    Args:
        n_workers: number of environments.
        task: gives the shapes.
        context: multiprocessing context.
    """

    frames: np.ndarray | None
    vectors: np.ndarray | None
    final_frames: np.ndarray | None
    final_vectors: np.ndarray | None
    digests: np.ndarray
    final_digests: np.ndarray
    frame_digests: np.ndarray
    final_frame_digests: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    actions: np.ndarray
    masks: np.ndarray | None

    def __init__(self, n_workers: int, task: Task, context: Any) -> None:
        digest = (n_workers, DIGEST_SIZE), np.uint8
        self.layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "digests": digest,
            "final_digests": digest,
            "rewards": ((n_workers,), np.float64),
            "terminated": ((n_workers,), np.bool_),
            "truncated": ((n_workers,), np.bool_),
            "actions": ((n_workers, task.action_size), np.float32 if task.continuous else np.int64),
        }
        if task.frame is not None:  # channels last in memory, as convolutions want them and most environments make them
            frame = (n_workers, *task.frame[1:], task.frame[0]), np.uint8
            self.layout |= {"frames": frame, "final_frames": frame}
        if task.vector:
            vector = (n_workers, task.vector), np.float32
            self.layout |= {"vectors": vector, "final_vectors": vector}
        if task.frame is not None and task.vector:
            self.layout |= {"frame_digests": digest, "final_frame_digests": digest}
        if task.masked:
            self.layout["masks"] = (n_workers, sum(task.branches)), np.bool_
        self.memory = {
            name: context.RawArray("b", int(np.prod(shape)) * np.dtype(dtype).itemsize)
            for name, (shape, dtype) in self.layout.items()
        }
        self.view()

    def view(self) -> None:
        """Make each array an attribute."""
        self.frames = self.vectors = self.final_frames = self.final_vectors = self.masks = None
        for name, (shape, dtype) in self.layout.items():
            setattr(self, name, np.frombuffer(self.memory[name], dtype).reshape(shape))
        if "frame_digests" not in self.layout:
            self.frame_digests, self.final_frame_digests = self.digests, self.final_digests

    def __getstate__(self) -> dict:
        return {"layout": self.layout, "memory": self.memory}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.view()

    def show(self, index: int, observation: Observation, mask: np.ndarray | None = None, final: bool = False) -> None:
        """Write what environment `index` shows, its digest, and which actions are allowed (sum of actions,)."""
        frames, vectors = (self.final_frames, self.final_vectors) if final else (self.frames, self.vectors)
        digests, own = (self.final_digests, self.final_frame_digests) if final else (self.digests, self.frame_digests)
        if both := isinstance(observation, dict):
            frame, vector = observation["frame"], observation["vector"]
        else:
            frame = vector = observation
        if frames is not None:
            frames[index] = frame.transpose(1, 2, 0)
            own[index] = np.frombuffer(xxhash.xxh3_128_digest(frames[index]), np.uint8)
        if vectors is not None:
            vectors[index] = vector
            content = vectors[index].tobytes() + (own[index].tobytes() if both else b"")
            digests[index] = np.frombuffer(xxhash.xxh3_128_digest(content), np.uint8)
        if self.masks is not None:
            self.masks[index] = True if mask is None else mask

    def copy_to_final(self, index: int) -> None:
        """Take what environment `index` shows now for what it showed at the end of its episode."""
        for name in ("frames", "vectors", "digests", "frame_digests"):
            if getattr(self, name) is not None:
                getattr(self, f"final_{name}")[index] = getattr(self, name)[index]
