"""How many threads compute: waking the others up and waiting for each other costs more than small products take."""

import torch

# Multiply-adds of a typical product, N·D², from which on a second thread pays.
PARALLEL_WORTH = 2**21


def use_threads(rows: int, width: int, most: int) -> None:
    """Compute with `most` threads if that pays for products of (rows, width) and (width, width), else with one."""
    torch.set_num_threads(most if rows * width**2 >= PARALLEL_WORTH else 1)
