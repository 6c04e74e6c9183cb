"""Processes of a run's environments, and runs whose environments do not fit into memory, before anything starts."""

import pytest

import ppo_vllm_ray_fsdp_vla as driver
import run_libero_eval_vllm as evaluation
from ppo.env_sizes import env_memory_problems
from ppo.envs.base import TaskSuite
from ppo.envs.sizing import EnvSizes, MemoryCost
from utils.placement import Node, placement_problems

# 2 GiB a process with one environment and its two simulators, 2.5 with two.
COST = MemoryCost(1.75, 0.25, 0.0, 12, 3, 3)
HEAVY = TaskSuite(
    "heavy", ("lift", "drop"), 50, 20, lambda *a, **k: None, memory_cost=lambda options: COST
)


def node(gpus=2, cores=32, memory_gib=1000.0, name="a", cpus=10**6):
    return Node(gpus, cpus, name, f"id-{name}", cores, memory_gib)


def args_for(num_envs, **changes):
    return driver.Args(
        task_suite_name=f"{__name__}:HEAVY", local_rollout_batch_size=num_envs, num_steps=8,
        local_mini_batch_size=8, total_episodes=10**6, **changes,
    )  # fmt: skip


def planned(args, *nodes):
    """Processes of each engine, more options of its environments, problems of memory."""
    plan = driver.make_plan(args, has_gpus=True, nodes=nodes)
    assert placement_problems(plan.demand, nodes) == []
    problems = env_memory_problems(args, plan.demand, nodes)
    return plan.demand.num_env_processes, plan.env_options, problems


def test_engines_share_the_cores_of_their_node():
    assert planned(args_for(96), node()) == (32, {}, [])
    assert planned(args_for(96, vllm_num_engines=2), node(gpus=3)) == (16, {}, [])
    two = {"colocate": True, "vllm_num_engines": 2, "actor_num_gpus_per_node": "[2]"}
    assert planned(args_for(96, **two), node()) == (16, {}, [])
    assert planned(args_for(96, vllm_num_engines=2, actor_num_gpus_per_node="[1,1]"),
                   node(cores=24), node(cores=32, name="b")) == (24, {}, [])  # fmt: skip


def test_the_default_never_asks_for_more_slots_than_a_cluster_has():
    # 10 slots: a trainer, an engine and eight environment processes.
    assert planned(args_for(96), node(cores=32, cpus=10))[0] == 8


def test_without_knowledge_of_the_nodes_every_environment_has_its_process():
    plan = driver.make_plan(args_for(96), has_gpus=True)
    assert plan.demand.num_env_processes == 96 and plan.env_options == {}


def test_memory_decides_before_cores_do():
    processes, options, problems = planned(args_for(32), node(memory_gib=80.0))
    assert 1 < processes < 32 and (options, problems) == ({}, [])


def test_a_number_of_processes_that_is_given_wins_or_is_refused_by_name():
    given = args_for(96, num_env_processes=96)
    processes, options, problems = planned(given, node(memory_gib=250.0))
    # 192 GiB at the start; at 200, a share of 0.8, there is no room for many simulators of further episodes.
    assert (processes, options, problems) == (96, {"max_simulators": 2}, [])
    processes, _, (problem,) = planned(given, node(memory_gib=150.0))
    assert processes == 96
    assert problem == (
        "--local_rollout_batch_size 96: 96 environments of heavy in 96 processes need at least 192.0 GiB of main "
        "memory, available are 150.0 GiB on a: use --num_env_processes 68"
    )
    # 40 processes of one environment and 28 of two: 40 x 2 + 28 x 2.5 = 150; one more would be 151.5.
    assert planned(args_for(96, num_env_processes=68), node(memory_gib=150.0))[2] == []
    assert planned(args_for(96, num_env_processes=69), node(memory_gib=150.0))[2] != []


def test_environments_that_no_number_of_processes_fits_are_refused_with_a_number_that_fits():
    # In one process n environments need 1.5 + 0.5 n GiB: 8 of them 5.5. Three ranks share them evenly.
    args = args_for(48, actor_num_gpus_per_node="[3]", vllm_num_engines=2)
    _, _, (problem,) = planned(args, node(gpus=8, memory_gib=11.0))
    assert problem == (
        "--local_rollout_batch_size 48: 48 environments of heavy in 1 processes need at least 25.5 GiB of main memory, "
        "available are 5.5 GiB on a, a share of 2 engines: use --local_rollout_batch_size 6"
    )
    assert (
        "free memory, or use a larger machine" in planned(args_for(8), node(memory_gib=1.0))[2][0]
    )


def test_tabletop_needs_no_plan():
    args = driver.Args(local_rollout_batch_size=32, total_episodes=10**6)
    plan = driver.make_plan(args, has_gpus=False, nodes=[node(gpus=0, cores=64, memory_gib=0.1)])
    assert plan.demand.num_env_processes == 2 and plan.env_options == {}
    assert env_memory_problems(args, plan.demand, [node(gpus=0, memory_gib=0.1)]) == []


@pytest.mark.libero
def test_libero_on_a_node_with_two_gpus_shares_processes(monkeypatch):
    # 96 environments on 32 cores and 220 GiB, a process each, took 209 GiB.
    monkeypatch.setenv("MUJOCO_GL", "egl")
    args = driver.Args(
        task_suite_name="libero_spatial", local_rollout_batch_size=48, vllm_num_engines=2, colocate=True,
        actor_num_gpus_per_node="[2]", total_episodes=10**6,
    )  # fmt: skip
    assert planned(args, node(memory_gib=220.0)) == (16, {}, [])


# ---- evaluation ----


def evaluated(cores, memory_gib, **changes):
    args = evaluation.Args("model", task_suite_name=f"{__name__}:HEAVY", **changes)  # type: ignore[arg-type]
    return (
        evaluation.choose_env_sizes(args, HEAVY, cores, memory_gib),
        evaluation.memory_problems(args, HEAVY, cores, memory_gib),
    )


def test_an_evaluation_has_two_environments_a_core_and_a_process_for_each_core():
    assert evaluated(8, 1000.0, num_trials_per_task=20) == ((16, EnvSizes(8)), [])
    assert evaluated(8, 1000.0, num_trials_per_task=3) == ((6, EnvSizes(6)), [])
    assert evaluated(8, 1000.0, num_trials_per_task=20, num_envs=4, num_processes=9)[0] == (
        4,
        EnvSizes(4),
    )


def test_an_evaluation_that_does_not_fit_is_refused_before_it_starts():
    _, problems = evaluated(8, 10.0, num_envs=16, num_processes=16, num_trials_per_task=20)
    assert problems == [
        "--num_envs 16: 16 environments of heavy in 16 processes need at least 32.0 GiB of main memory, available are "
        "10.0 GiB: use --num_processes 1"
    ]
