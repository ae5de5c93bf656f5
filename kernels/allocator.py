"""Memory that the process keeps, and what PyTorch reads from the environment when it is loaded."""

import ctypes
import mmap
import os
import platform

# All are read when PyTorch is loaded, so this module has to be imported first.
# Large blocks of memory in huge pages: without them the kernel's page faults take as long as the convolutions.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# How long PyTorch's threads spin for work before they sleep. By default it is so long that a second process on the same
# cores makes products of small matrices ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN keeps a kernel for every shape, 1,024 of them unless told otherwise: a run's memory would grow for hours.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

# Of glibc's malloc.h
M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1
HUGE_PAGE = 2**21
HEAP = 2**32  # bytes


def keep_memory() -> None:
    """Let this process keep the memory that it frees, in huge pages, where the C library is glibc.

    It would map every large tensor anew and unmap it after its last use. The page faults of a minibatch can take as
    long as its arithmetic, most of all on virtual machines. All threads share the one heap.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc, pointer = ctypes.CDLL(None), ctypes.c_void_p
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = pointer, [ctypes.c_size_t], [pointer]
    libc.madvise.argtypes = [pointer, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.free(libc.malloc(HEAP))  # addresses only: memory is taken at first use
    with open("/proc/self/maps") as maps:
        heaps = [line.split("-", 1) for line in maps if line.rstrip().endswith("[heap]")]
    for start, rest in heaps:
        first = -(-int(start, 16) // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(first, (int(rest.split()[0], 16) - first) // HUGE_PAGE * HUGE_PAGE, mmap.MADV_HUGEPAGE)


def release_memory() -> None:
    """Give the system back what is free, where the C library is glibc: gaps between blocks do not add up."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
