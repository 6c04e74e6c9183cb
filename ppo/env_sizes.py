"""Processes of a run's environments, and whether the nodes have memory for them, before anything starts."""

from collections.abc import Sequence
from typing import Any

from ppo.arguments import world_flags
from ppo.envs.base import TaskSuite, get_suite, split_options
from ppo.envs.sizing import EnvSizes, MemoryShortage, choose_sizes, memory_shortage
from utils.placement import Demand, Node, engine_share


def plan_env_sizes(args: Any, demand: Demand, nodes: Sequence[Node]) -> EnvSizes:
    """Sizes for each engine of a run: by the engine's share of its node, where it is smallest.

    `args` is the driver's Args; its num_env_processes wins. Where nothing is known about the nodes, every environment
    of a suite with large simulators gets its own process.
    """
    suite, num_envs = get_suite(args.task_suite_name), args.local_rollout_batch_size
    share = engine_share(demand, nodes)
    cores, memory_gib = (share.cores, share.memory_gib) if share else (num_envs, float("inf"))
    num_tasks = len(args.task_ids) or suite.num_tasks
    cost = suite.memory_cost(split_options(suite, **world_flags(args))[0])
    return choose_sizes(num_envs, num_tasks, cores, memory_gib, cost, args.num_env_processes)


def env_memory_problems(args: Any, demand: Demand, nodes: Sequence[Node]) -> list[str]:
    """The problem of environments that cannot all start in their engine's share of a node's memory, if it is one."""
    suite, num_envs = get_suite(args.task_suite_name), args.local_rollout_batch_size
    share = engine_share(demand, nodes)
    if share is None:
        return []
    cost = suite.memory_cost(split_options(suite, **world_flags(args))[0])
    num_tasks = len(args.task_ids) or suite.num_tasks
    shortage = memory_shortage(
        num_envs, demand.num_env_processes, num_tasks, share.memory_gib, cost
    )
    if shortage is None:
        return []
    where = "" if share.num_engines == 1 else f", a share of {share.num_engines} engines"
    available = f"{share.memory_gib:.1f} GiB on {share.node_name}{where}"
    flags = ("--local_rollout_batch_size", "--num_env_processes")
    return [
        shortage_message(
            suite,
            num_envs,
            demand.num_env_processes,
            shortage,
            available,
            flags,
            demand.num_trainers,
        )
    ]


def shortage_message(
    suite: TaskSuite,
    num_envs: int,
    num_processes: int,
    shortage: MemoryShortage,
    available: str,
    flags: tuple[str, str],
    divisor: int = 1,
) -> str:
    """What is missing and what to use instead; `flags` set the numbers of environments and of processes.

    `divisor`: the number of environments must be a multiple of it.
    """
    fixes = [] if shortage.num_processes is None else [f"{flags[1]} {shortage.num_processes}"]
    num_fitting = shortage.num_envs // divisor * divisor
    if not fixes and num_fitting:
        fixes.append(f"{flags[0]} {num_fitting}")
    fix = f"use {' or '.join(fixes)}" if fixes else "free memory, or use a larger machine"
    return (
        f"{flags[0]} {num_envs}: {num_envs} environments of {suite.name} in {num_processes} processes need at least "
        f"{shortage.needed_gib:.1f} GiB of main memory, available are {available}: {fix}"
    )
