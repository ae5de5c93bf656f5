"""Temporary."""
import torch.distributed.nn
from torch import Tensor
from run.world import World, Interrupted, Lost  # noqa


class Ranks(World):
    def sum_with_gradient(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else torch.distributed.nn.functional.all_reduce(tensor)
