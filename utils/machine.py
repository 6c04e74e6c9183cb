"""Cores and memory that this process may use: of the machine, less what a container's cgroups (v1 or v2) allow."""

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def num_cores(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Cores that this process may keep busy, at least 1: its CPU affinity, and the CPU time that its cgroups grant."""
    limits = [float(len(os.sched_getaffinity(0)))]
    for folder in _cgroup_folders("cpu", proc, cgroups):
        quota, period = _words(folder / "cpu.max", 2)
        if quota is None:
            (quota,), (period,) = (
                _words(folder / f"cpu.cfs_{name}_us", 1) for name in ("quota", "period")
            )
        if quota is not None and period and quota > 0:  # v1 says -1 and v2 "max" for no limit
            limits.append(quota / period)
    return max(1, int(min(limits)))


def available_memory_gib(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float:
    """GiB that can still be taken: what the machine has free or in caches, or less if a cgroup has less left."""
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    left = [float(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    for folder in _cgroup_folders("memory", proc, cgroups):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            (limit,), (usage,) = _words(folder / limit_name, 1), _words(folder / usage_name, 1)
            if limit is not None and usage is not None:
                left.append(limit - usage + _reclaimable(folder / "memory.stat", cache_name))
    return max(0.0, min(left)) / 2**30


def _cgroup_folders(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Folders of this process's cgroup for the controller and of all above it, in both versions' places."""
    file = proc / "self" / "cgroup"
    for line in file.read_text().splitlines() if file.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        own = root / path.lstrip("/")
        # In a container the path may be the host's, and the container's own group is mounted as the root.
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _words(file: Path, count: int) -> list[float | None]:
    """Numbers in a file of one line; None for words ("max"), and where there is no such file."""
    try:
        words = file.read_text().split()
    except OSError:
        words = []
    numbers: list[float | None] = [
        float(word) if word.lstrip("-").isdecimal() else None for word in words[:count]
    ]
    return numbers + [None] * (count - len(numbers))


def _reclaimable(file: Path, name: str) -> float:
    """Bytes of file caches that count as used but make room for others."""
    try:
        entries = dict(line.split() for line in file.read_text().splitlines())
    except OSError:
        return 0.0
    return float(entries.get(name, 0))
