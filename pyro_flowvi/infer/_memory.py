"""What the C library does with memory that is freed."""

import torch

__all__ = ["hold_freed_memory"]

NEARLY_ITS_LIMIT = 2**25 - 2**14


def hold_freed_memory() -> None:
    """Has the process keep up to 64 MiB that it frees, which the next step asks for again.

    glibc hands large blocks back to the system, which has to clear them anew at the next step, unless one as
    large has been freed before (mallopt(3), M_MMAP_THRESHOLD, up to 32 MiB).  Nothing is written to the one
    that is freed here.  Other libraries do not mind.
    """
    torch.empty(NEARLY_ITS_LIMIT, dtype=torch.uint8, device="cpu")
