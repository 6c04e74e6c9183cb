"""The driver on a running Ray cluster of two nodes: two raylets with addresses of their own on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.test_driver import ROOT, command_line, metrics_by_step, small_args
from utils import ray_utils
from utils.machine import num_cores
from utils.placement import Demand, place

SECOND_ADDRESS = "127.0.0.2"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two Ray nodes of 8 CPU slots; the second has 4 GPUs that only the scheduler believes in."""
    ray_utils.require_token()
    started = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "num_gpus": 0, "include_dashboard": False},
    )
    started.add_node(num_cpus=8, num_gpus=4, node_ip_address=SECOND_ADDRESS)
    yield started
    started.shutdown()


@pytest.fixture
def connected(cluster: Cluster) -> Iterator[None]:
    """This process as a driver of the cluster."""
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


def run_on(cluster: Cluster, cwd: Path, **changes) -> tuple[int, str]:
    """Exit code and output of the driver, started in another folder than Ray's processes."""
    words = command_line(small_args(ray_address=cluster.address, **changes))
    words[1] = str(ROOT / words[1])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=1100, env=env)
    return done.returncode, done.stdout + done.stderr


def test_nodes_of_a_cluster_and_bundles_pinned_to_them(cluster, connected):
    here, other = ray_utils.cluster_nodes()
    for node in ray_utils.with_machines([here, other]):  # both are this machine
        assert node.cores == num_cores() and node.memory_gib > 0
    assert (here.gpus, here.cpus, other.gpus, other.cpus, other.name) == (
        0,
        8,
        4,
        8,
        SECOND_ADDRESS,
    )
    demand = Demand((1, 1), 2, num_env_processes=2, device="cpu")
    placement = ray_utils.place_on_cluster(demand)
    group = ray_utils.reserve(placement, 400)
    table = ray.util.placement_group_table(group)["bundles_to_node_id"]
    assert [table[i] for i in range(4)] == [
        here.node_id,
        other.node_id,
        here.node_id,
        other.node_id,
    ]

    # what is left is 4 slots a node: the next run is laid out on them, and one that needs more has to wait
    deadline = time.monotonic() + 400
    while [node.cpus for node in ray_utils.cluster_nodes(free=True)] != [
        4,
        4,
    ] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [node.cpus for node in ray_utils.cluster_nodes(free=True)] == [4, 4]
    assert (
        ray_utils.place_on_cluster(Demand((1,), 1, num_env_processes=3, device="cpu")).num_nodes
        == 2
    )
    with pytest.raises(
        TimeoutError,
        match=f"(?s)trainers 0-5.*in use; free are .*{SECOND_ADDRESS}: 4 GPUs, 4 CPU slots",
    ):
        ray_utils.reserve(ray_utils.place_on_cluster(Demand((6,), 1, device="cpu")), 1)
    ray.util.remove_placement_group(group)


def test_what_a_node_lacks_is_found_before_actors_start(connected, tiny_model_dir, tmp_path):
    nodes = ray_utils.cluster_nodes()
    placement = place(Demand((1, 1), 1, device="cpu"), nodes)
    assert ray_utils.node_problems(placement, tmp_path / "runs", [tiny_model_dir]) == []
    assert list((tmp_path / "runs").iterdir()) == [], "the probes' files are removed"

    # a folder without permission or code cannot be had on one machine: the nodes' side is asked directly
    models = {
        str(tiny_model_dir): {"config.json": 1, "gone.safetensors": 5},
        "/nowhere": {"config.json": 1},
    }
    differing, missing, unshared = ray_utils.probe_node(
        "/not/shared/probe", "/not/shared/answer", models
    )
    assert "lacks config.json, gone.safetensors or has other versions" in differing
    assert missing.startswith("no model folder /nowhere: copy it there")
    assert unshared.startswith(
        "/not/shared lacks what the driver wrote there: use a --run_root_dir"
    )


def test_gloo_and_nccl_listen_where_ray_does(monkeypatch):
    address = ray.util.get_node_ip_address()
    name = ray_utils.interface_of(address)
    assert address.startswith("127.") is (name is None)
    assert ray_utils.interface_of("127.0.0.1") is ray_utils.interface_of("192.0.2.250") is None
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    ray_utils.use_node_interface()
    assert (
        os.environ.get("GLOO_SOCKET_IFNAME") == (name or "lo")
        and os.environ["NCCL_SOCKET_IFNAME"] == "ib7"
    )
    os.environ.pop("GLOO_SOCKET_IFNAME", None)


def test_a_layout_that_does_not_fit_is_refused_and_not_waited_for(
    cluster, tiny_model_dir, tmp_path
):
    code, output = run_on(
        cluster, tmp_path, vla_path=tiny_model_dir, run_root_dir=tmp_path / "runs",
        device="cuda", actor_num_gpus_per_node="[2,2]", placement_timeout_s=1e6,
    )  # fmt: skip
    assert code == 2, output[-3000:]
    assert (
        '"[2,2]" needs 2 nodes with 2 GPUs each, the cluster\'s nodes have [0, 4]: use --colocate'
        in output
    )
    assert "Traceback" not in output and not (tmp_path / "runs" / "run").exists()


def test_trainers_and_engine_on_two_nodes_train_together(cluster, tiny_model_dir, tmp_path):
    (tmp_path / "model").symlink_to(tiny_model_dir)
    code, output = run_on(
        cluster, tmp_path, vla_path=Path("model"), run_root_dir=Path("runs"), actor_num_gpus_per_node="[1,1]",
        use_lora=True, lora_rank=4, total_episodes=2 * 64, value_init_steps=0,
    )  # fmt: skip
    assert code == 0, output[-8000:]
    steps = metrics_by_step(tmp_path / "runs" / "run")
    assert sorted(steps) == [1, 2]
    for step in steps.values():
        assert step["train/engine_logprob_max_diff"] < 1e-4, (
            "engine and trainers are not the same policy"
        )
    assert (
        steps[2]["train/first_minibatch_ratio_max_abs_dev"]
        < 1e-5
        < steps[2]["train/ratio_max_abs_dev"]
    )
    assert (tmp_path / "runs" / "run" / "adapter_model.safetensors").exists()
    assert f"node {SECOND_ADDRESS}: trainer 1" in output

    # what Ray itself says about who sat where
    ray.init(address=cluster.address, log_to_driver=False)
    addresses = {node.node_id: node.name for node in ray_utils.cluster_nodes()}
    actors = [a for a in ray._private.state.actors().values() if a["StartTime"]]
    ray.shutdown()
    sat = {(a["ActorClassName"], addresses[a["Address"]["NodeID"]]) for a in actors}
    assert len({address for name, address in sat if name == "PolicyTrainer"}) == 2
    assert sum(a["ActorClassName"] == "RolloutWorker" for a in actors) == 1


def test_local_node_offers_the_slots_that_the_run_asks_for():
    demand = Demand((1,), 2, num_env_processes=100)
    node = ray_utils.local_node(3, demand)
    assert (node.gpus, node.cpus) == (3, max(203, os.cpu_count() or 1))
    assert node.cores == num_cores() and node.memory_gib > 0
    assert ray_utils.local_node(3, Demand((1,), 1, device="cpu")).gpus == 0


def test_a_cluster_lets_nobody_in_without_its_token(cluster):
    probe = f"import ray; ray.init(address={cluster.address!r}); print('in')"
    for mode, expected in (("token", "in"), ("disabled", "")):
        env = {**os.environ, "RAY_AUTH_MODE": mode, "RAY_NUM_REDIS_GET_RETRIES": "2"}
        done = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, timeout=500, env=env
        )
        assert done.stdout.strip().endswith(expected) and (done.returncode == 0) is bool(
            expected
        ), done.stderr[-2000:]


@pytest.mark.slow
def test_the_launch_script_starts_two_nodes_trains_and_leaves_nothing_running(
    tiny_model_dir, tmp_path
):
    # a stand-in for ssh runs the command here, as a node with the address that was given as the host
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/bash\nNODE_IP=$3 exec bash -c "$4"\n')
    ssh.chmod(0o755)
    head = f"{ray.util.get_node_ip_address()}:{ray_utils.free_port()}"
    words = command_line(
        small_args(tiny_model_dir, tmp_path, actor_num_gpus_per_node="[1,1]", use_lora=True, lora_rank=4,
                   total_episodes=64, value_init_steps=0)
    )[2:]  # fmt: skip
    env = {
        **os.environ,
        "PATH": f"{ssh.parent}:{os.environ['PATH']}",
        "RAY_NUM_CPUS": "8",
        "CUDA_VISIBLE_DEVICES": "",
    }
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    env.pop("RAY_AUTH_TOKEN", None)
    done = subprocess.run(
        ["bash", "scripts/launch_multinode.sh", "ssh", head, SECOND_ADDRESS, "--", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=400, env=env,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    assert (
        f"node {SECOND_ADDRESS}: trainer 1" in output
        and "the head has gone: the run is over" in output
    )
    assert metrics_by_step(tmp_path / "run").keys() == {1}
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    listening = subprocess.run(
        ["pgrep", "-f", f"gcs-address={head}"], capture_output=True, text=True
    ).stdout
    assert not listening, "a raylet of this cluster is still there"
