"""Cores and memory as container runtimes limit them: trees of files as the kernel's cgroups have them."""

import os

from utils import machine

GIB = 2**30
UNLIMITED_V1 = "9223372036854771712"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def make_machine(tmp_path, cgroup_line, available_gib=100):
    """Folders for /proc and /sys/fs/cgroup of a machine with so much available memory."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo=f"MemTotal: 1 kB\nMemFree: 5 kB\nMemAvailable: {available_gib * 2**20} kB")
    write(proc / "self", cgroup=cgroup_line)
    cgroups.mkdir()
    return proc, cgroups


def test_without_limits_it_is_the_machine(tmp_path):
    proc, cgroups = make_machine(tmp_path, "0::/user.slice")
    write(cgroups / "user.slice", memory__max="max", memory__current=5 * GIB, cpu__max="max 100000")
    assert machine.available_memory_gib(proc, cgroups) == 100
    assert machine.num_cores(proc, cgroups) == len(os.sched_getaffinity(0))


def test_the_smallest_group_above_a_process_decides_version_2(tmp_path):
    proc, cgroups = make_machine(tmp_path, "0::/pod/container")
    write(cgroups / "pod", memory__max=20 * GIB, memory__current=15 * GIB)
    write(
        cgroups / "pod/container", memory__max=64 * GIB, memory__current=10 * GIB, cpu__max="150000 100000",
        memory__stat=f"anon 5\ninactive_file {GIB}",
    )  # fmt: skip
    write(cgroups / "pod/other", memory__max=GIB, memory__current=GIB)
    assert machine.available_memory_gib(proc, cgroups) == 5
    assert machine.num_cores(proc, cgroups) == 1  # of 1.5 cores a process more would wait


def test_caches_of_a_group_make_room(tmp_path):
    proc, cgroups = make_machine(tmp_path, "0::/")
    stat = f"anon 5\ninactive_file {3 * GIB}\nactive_file {GIB}"
    write(cgroups, memory__max=8 * GIB, memory__current=7 * GIB, memory__stat=stat)
    assert machine.available_memory_gib(proc, cgroups) == 4


def test_version_1_has_a_tree_for_each_controller(tmp_path):
    proc, cgroups = make_machine(tmp_path, "4:memory:/docker/c\n2:cpu,cpuacct:/docker/c\n0::/")
    write(
        cgroups / "memory/docker/c", memory__limit_in_bytes=6 * GIB, memory__usage_in_bytes=4 * GIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {GIB}",
    )  # fmt: skip
    write(cgroups / "memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=GIB)
    write(cgroups / "cpu/docker/c", **{"cpu__cfs_quota_us": 100000, "cpu__cfs_period_us": 100000})
    write(cgroups / "cpu", **{"cpu__cfs_quota_us": -1, "cpu__cfs_period_us": 100000})
    assert machine.available_memory_gib(proc, cgroups) == 3
    assert machine.num_cores(proc, cgroups) == 1


def test_in_a_container_whose_path_is_the_hosts_its_own_group_is_the_root(tmp_path):
    proc, cgroups = make_machine(tmp_path, "4:memory:/docker/0123abc\n0::/kubepods/pod1")
    write(cgroups / "memory", memory__limit_in_bytes=9 * GIB, memory__usage_in_bytes=2 * GIB)
    assert machine.available_memory_gib(proc, cgroups) == 7
    write(cgroups, memory__max=8 * GIB, memory__current=2 * GIB)
    assert machine.available_memory_gib(proc, cgroups) == 6


def test_this_machine_has_cores_and_memory():
    assert 1 <= machine.num_cores() <= (os.cpu_count() or 1)
    total_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    assert 0 < machine.available_memory_gib() < total_gib
