"""How fast a file's disk is when it is read as weights are that stay on disk: large reads, several at once, past the
page cache.

Not here: those reads (the core), what follows from the rate (_simulator.py).
Threads: its own, joined before it returns.
"""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["time_reads"]

_SHARE_BYTES = 1 << 20  # of a read, as the core cuts what fills a slot
_LEAST_BYTES = 16 << 20  # less says more of latency than of the rate
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's are
_MIN_THREADS, _MAX_THREADS = 2, 6


def time_reads(path: str | Path, limit_s: float = 0.25) -> tuple[int, float] | None:
    """Bytes read, and the seconds that they took. None where that is not to be known: the file is small or a hole,
    cannot be read, or its file system has no reads past the page cache, which would be timed instead."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
    try:
        status = os.fstat(file)
        n_shares = status.st_size // _SHARE_BYTES
        is_hole = status.st_blocks * _BLOCK_BYTES < status.st_size // 2
        if is_hole or n_shares * _SHARE_BYTES < _LEAST_BYTES:
            return None
        return _time_shares(file, n_shares, limit_s)
    except OSError:
        return None
    finally:
        os.close(file)


def _time_shares(file: int, n_shares: int, limit_s: float) -> tuple[int, float]:
    """From the middle of the file on: its beginning was read when it was opened."""
    n_threads = max(_MIN_THREADS, min(_MAX_THREADS, (os.cpu_count() or 1) // 2))
    first = n_shares // 2
    start = time.perf_counter()

    def read(i_thread: int) -> int:
        n_read = 0
        with mmap.mmap(-1, _SHARE_BYTES) as memory:  # begins on a page
            for i in range(i_thread, n_shares, n_threads):
                if time.perf_counter() - start > limit_s:
                    break
                at = (first + i) % n_shares * _SHARE_BYTES
                n_read += os.preadv(file, [memory], at)
        return n_read

    with ThreadPoolExecutor(n_threads) as pool:
        n_bytes = sum(pool.map(read, range(n_threads)))
    return n_bytes, time.perf_counter() - start
