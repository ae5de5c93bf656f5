"""How many threads compute: waking the others up and waiting for each other costs more than small products take."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Multiply-adds of a typical product, N·D², from which on a second thread pays.
PARALLEL_WORTH = 2**21
# Samples of a minibatch that a thread differentiates by itself, and the fewest for which a second one pays.
PART_ROWS, FEWEST_ROWS = 512, 256


def use_threads(rows: int, width: int, most: int) -> None:
    """Compute with `most` threads if that pays for products of (rows, width) and (width, width), else with one."""
    torch.set_num_threads(most if rows * width**2 >= PARALLEL_WORTH else 1)


def divide(rows: int, divisible: bool) -> tuple[int, Callable]:
    """Decide how many parts a minibatch of so many rows is differentiated in, each by a thread of its own.

    Args:
        rows: of the minibatch.
        divisible: whether it may be divided at all.

    Returns:
        The number of parts, and a `map` over them. It keeps their order, so that sums do not depend on which thread is
        the fastest.
    """
    parts = max(1, rows // PART_ROWS, min(2, rows // FEWEST_ROWS)) if divisible else 1
    if parts == 1:
        return 1, map
    threads = torch.get_num_threads()
    lanes = min(parts, threads)
    pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(threads // lanes,))
    return parts, pool.map
