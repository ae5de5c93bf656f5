"""How a run is carried out, as the command line says."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard.summary import Summary

from environments.contract import Task
from model import ActorCriticModel
from run.config import Config
from run.distributed import Ranks

# So many environments with frames take turns in two halves on the CPU, too: half a batch costs the policy more than
# half, which has to be less than what the other half of the environments takes.
OVERLAP_WORTH = 32
PRECISIONS = ("float32", "bf16")


@dataclass
class Options:
    """How a run is carried out; nothing in here changes what is learned but for rounding.

    Attributes:
        device: where the model and the buffer live.
        processes: how many processes step the environments.
        overlap: whether half of the environments step while the policy looks at the other half; by default where a GPU
            computes, or from `OVERLAP_WORTH` environments with frames on.
        precision: one of `PRECISIONS`, the second of which is for matrix products; None is that of the run that goes
            on, or the first.
        compile: whether to compile the model with torch.compile.
        folder: where the folders models, checkpoints and summaries lie.
        world: all processes that train together.
        film: returns an episode as an animated picture for TensorBoard, where videos are wanted.
    """

    device: torch.device
    processes: int = 1
    overlap: bool | None = None
    precision: str | None = None
    compile: bool = False
    folder: Path = Path(".")
    world: Ranks = Ranks()
    film: Callable[[ActorCriticModel, Config, Task, str], Summary] | None = None

    def overlaps(self, task: Task, n_workers: int) -> bool:
        """Return whether half of a run's environments step while the policy looks at the other half."""
        if self.overlap is not None:
            return self.overlap
        return self.device.type == "cuda" or (task.frame is not None and n_workers >= OVERLAP_WORTH)

    def notices(self) -> list[str]:
        """Return what a user should know before the run starts."""
        if self.precision == "bf16" and emulates_bf16(self.device):
            return [f"--precision=bf16: this {self.device.type} has no instructions for it and emulates them, several "
                    "times slower than float32"]  # fmt: skip
        return []


def emulates_bf16(device: torch.device) -> bool:
    """Return whether a device lacks instructions for bf16 products: x86 before AVX512_BF16, GPUs before Ampere."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return not any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
