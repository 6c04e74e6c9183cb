"""What a test leaves in /dev/shm, which is the machine's: the files of other tests come and go there meanwhile."""

import os
import time


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def left_in_shared_memory(before: set[str], wait_s: float = 900.0) -> set[str]:
    """Files that are there now, were not `before` and stay; those of a test that runs beside this one go with it."""
    left, deadline = shared_memory() - before, time.monotonic() + wait_s
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left &= shared_memory()
    return left
