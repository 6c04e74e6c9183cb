"""Starting Ray and placing actors: one placement group for trainers, one for rollout workers."""

import os
import socket
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from utils.logging_utils import get_logger

logger = get_logger(__name__)

# A laptop has two cores and six processes of ours, most of them waiting: Ray counts these as slots, not as cores.
LOCAL_CPU_SLOTS = 64

# Chatter of libraries that says nothing about the run; PPO_VLA_LOG_LEVEL=DEBUG lets it through.
QUIET_ENV = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def actor_env(**variables: str) -> dict[str, dict[str, str]]:
    """Runtime environment of an actor: `variables`, and quiet libraries unless everything is to be shown."""
    quiet = {} if os.environ.get("PPO_VLA_LOG_LEVEL") == "DEBUG" else QUIET_ENV
    return {"env_vars": quiet | variables}


def start_ray(address: str | None, num_gpus: int, num_cpu_slots: int = LOCAL_CPU_SLOTS) -> None:
    """Connect to a running cluster (`address`), or start one on this machine bound to the loopback interface.

    A local cluster gets exactly `num_gpus` GPUs and as many CPU slots as our actors ask for; thread counts are set per
    actor, so slots do not have to be cores.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address=address, log_to_driver=True)
        return
    ray.init(
        num_cpus=max(num_cpu_slots, os.cpu_count() or 1),
        num_gpus=num_gpus,
        include_dashboard=os.environ.get("PPO_VLA_DASHBOARD", "0") == "1",
        log_to_driver=True,
        _node_ip_address="127.0.0.1",
    )


def check_cluster(num_gpus: int, layout: str) -> None:
    """Raise ValueError if the cluster has fewer GPUs than `layout` (for the message) needs."""
    available = int(ray.cluster_resources().get("GPU", 0))
    if available < num_gpus:
        raise ValueError(f"needs {num_gpus} GPUs ({layout}), the cluster has {available}")


def create_placement_group(bundles: Sequence[dict[str, float]], strategy: str, timeout_s: float) -> PlacementGroup:
    """Reserve `bundles` and wait until they are placed.

    Raises:
        TimeoutError: not placed within `timeout_s`; names what was asked for and what the cluster has.
    """
    group = placement_group(list(bundles), strategy=strategy)
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        raise TimeoutError(
            f"placement group {list(bundles)} ({strategy}) was not placed within {timeout_s:.0f} s; the cluster has "
            f"{ray.cluster_resources()}, free {ray.available_resources()}"
        ) from None
    return group


def in_bundle(group: PlacementGroup, index: int) -> PlacementGroupSchedulingStrategy:
    """Scheduling strategy that puts an actor into bundle `index` of `group`."""
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def node_address() -> str:
    """Address at which this node's actors reach each other (loopback on a one-machine cluster)."""
    return ray.util.get_node_ip_address()


def wait_all(refs: Sequence[Any], what: str) -> list[Any]:
    """`ray.get` that fails as soon as any of the calls fails, and says what was being done.

    Raises:
        RuntimeError: from the first failure, with the actor's traceback in its cause.
    """
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        try:
            ray.get(done[0])
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"failed while {what}: {error}") from error
    return ray.get(list(refs))
