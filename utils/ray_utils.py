"""Starting Ray, the nodes of a cluster, and actors in the bundles that `utils/placement.py` chose."""

import contextlib
import logging
import os
import secrets
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from utils.hub import source_of
from utils.logging_utils import get_logger
from utils.machine import available_memory_gib, num_cores
from utils.placement import Demand, Node, Placement, place, placement_problems

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


# Linux' name of the interface of 127.0.0.1.
LOOPBACK = "lo"
# Ray's label on every node, for bundles that shall sit there.
NODE_ID_LABEL = "ray.io/node-id"
# Set for the driver, wanted by its actors: on a running cluster those inherit the environment of `ray start` instead.
FORWARDED_ENV = (
    "PPO_VLA_",
    "MUJOCO_GL",
    "LIBERO_",
    "VLLM_",
    "NCCL_",
    "GLOO_",
    "HF_HUB_OFFLINE",
    "TORCH_NCCL_",
)
# A file system between nodes may show a new file to others only after its cache has expired.
SHARED_FILE_TIMEOUT_S = 40.0


def actor_env(**variables: str) -> dict[str, dict[str, str]]:
    """Runtime environment of an actor: the driver's settings, `variables`, and quiet libraries unless in debug mode."""
    quiet = {} if os.environ.get("PPO_VLA_LOG_LEVEL") == "DEBUG" else QUIET_ENV
    forwarded = {
        name: value for name, value in os.environ.items() if name.startswith(FORWARDED_ENV)
    }
    return {"env_vars": forwarded | quiet | variables}


def require_token() -> None:
    """Let only processes with this process's environment into a Ray cluster that starts here; what is set before wins.

    Ray's servers run any code that they are sent. Without a token in the environment Ray would write one into the home
    directory.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray._raylet.Config.initialize("")  # Ray read the mode when it was imported


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """A Ray cluster that starts in this block listens on 127.0.0.1 only; RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER set before
    wins ("1": all interfaces).

    That variable decides on every system whether Ray takes the host's address, at which it listens on all interfaces,
    although its name speaks of two. An address given to `ray.init` as loopback is replaced by the host's.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"  # for the servers; this process has read it when Ray was imported
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        del os.environ[
            name
        ]  # a later connection to a cluster of several nodes needs the host's address
        ray_constants.ENABLE_RAY_CLUSTER = before


def start_ray(address: str | None, num_gpus: int = 0, num_cpu_slots: int = LOCAL_CPU_SLOTS) -> None:
    """Connect to a running cluster (`address`), or start one on this machine that nobody else reaches or gets into.

    A local cluster gets exactly `num_gpus` GPUs and as many CPU slots as our actors ask for; thread counts are set per
    actor, so slots do not have to be cores. A running cluster may want a token: Ray reads RAY_AUTH_TOKEN_PATH.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address=address, log_to_driver=True)
        return
    require_token()
    with loopback_only():
        ray.init(
            address="local",  # never a cluster that somebody started here, or a trace of one
            num_cpus=max(num_cpu_slots, os.cpu_count() or 1),
            num_gpus=num_gpus,
            include_dashboard=os.environ.get("PPO_VLA_DASHBOARD", "0") == "1",
            log_to_driver=True,
            logging_level=logging.WARNING,  # not that it has started
        )


def local_node(num_gpus: int, demand: Demand) -> Node:
    """The machine that the driver runs on, as `start_ray` presents it to Ray for `demand`."""
    return Node(
        num_gpus if demand.device == "cuda" else 0,
        max(demand.num_cpus, LOCAL_CPU_SLOTS, os.cpu_count() or 1),
        cores=num_cores(),
        memory_gib=available_memory_gib(),
    )


def any_local_node(num_gpus: int) -> Node:
    """The machine that the driver runs on, with slots for any demand: for a run whose demand depends on it."""
    return Node(num_gpus, 10**9, cores=num_cores(), memory_gib=available_memory_gib())


def with_machines(nodes: Sequence[Node]) -> list[Node]:
    """The connected cluster's nodes with the cores and the available memory that each reports itself.

    A node that cannot run this project's code reports nothing; `node_problems` says so later.
    """
    measured = []
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": actor_env()}
        try:
            cores, memory_gib = ray.get(ray.remote(probe_machine).options(**options).remote())
        except (ray.exceptions.RayError, ImportError):
            cores, memory_gib = 0, 0.0
        measured.append(node._replace(cores=cores, memory_gib=memory_gib))
    return measured


def probe_machine() -> tuple[int, float]:
    """Runs on a node: its cores, and its available memory in GiB."""
    return num_cores(), available_memory_gib()


def cluster_nodes(*, free: bool = False) -> list[Node]:
    """The live nodes of the connected cluster, the driver's first: all that they have, or what is `free` now."""
    from ray._private.state import available_resources_per_node

    available = available_resources_per_node() if free else {}
    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    nodes = []
    for node in alive:
        node_id, address = node["NodeID"], node["NodeManagerAddress"]
        resources = available.get(node_id, {}) if free else node["Resources"]
        name = address if addresses.count(address) == 1 else f"{address} ({node_id[:6]})"
        nodes.append(
            Node(int(resources.get("GPU", 0)), int(resources.get("CPU", 0)), name, node_id)
        )
    return sorted(nodes, key=lambda node: (node.node_id != here, node.name))


def place_on_cluster(demand: Demand) -> Placement:
    """Lay `demand` out on what is free now if that is enough, else on what is there in all (`reserve` then waits).

    Raises ValueError if the cluster is too small.
    """
    free = cluster_nodes(free=True)
    if not placement_problems(demand, free):
        return place(demand, free)
    logger.info(
        "what is free of the cluster is too little for this run: it will wait for what others hold"
    )
    return place(demand, cluster_nodes())


def reserve(placement: Placement, timeout_s: float) -> PlacementGroup:
    """Reserve the bundles, all or none, each on its node.

    Raises:
        TimeoutError: not placed within `timeout_s`; names what was asked for and what is free.
    """
    selectors = [{NODE_ID_LABEL: node_id} for node_id in placement.node_ids]
    group = placement_group(
        list(placement.bundles), strategy="PACK", bundle_label_selector=selectors
    )
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        free = [
            f"{node.name}: {node.gpus} GPUs, {node.cpus} CPU slots"
            for node in cluster_nodes(free=True)
        ]
        raise TimeoutError(
            f"not placed within --placement_timeout_s {timeout_s:.0f} ({'; '.join(placement.lines)}): the rest of the "
            f"cluster is in use; free are {'; '.join(free)}"
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
    """Address at which other nodes reach this node's actors, as Ray knows it."""
    return ray.util.get_node_ip_address()


def interface_of(address: str) -> str | None:
    """Name of the network interface with this address; None for loopback and for an address of another machine."""
    for name, addresses in psutil.net_if_addrs().items():
        if not address.startswith("127.") and any(entry.address == address for entry in addresses):
            return name
    return None


def use_node_interface() -> None:
    """Let gloo and NCCL of this process listen where Ray does; GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME set before win.

    Else gloo listens at the address of the host's name, which many systems resolve to loopback: no other node gets
    there. On a Ray that listens on loopback only they do so too. To be called before the first process group is made.
    """
    address = node_address()
    if name := LOOPBACK if address.startswith("127.") else interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def node_problems(
    placement: Placement, shared_dir: str | Path, model_dirs: Iterable[str | Path]
) -> list[str]:
    """What the placement's nodes lack: our code, `shared_dir` as the driver sees it, the `model_dirs` with all files.

    All paths are absolute. Nodes write into `shared_dir` and read what the driver wrote; nothing stays there.
    """
    names = {node.node_id: node.name for node in cluster_nodes()}
    shared, token = Path(shared_dir), uuid.uuid4().hex[:8]
    shared.mkdir(parents=True, exist_ok=True)
    models = {str(folder): _file_sizes(Path(folder)) for folder in model_dirs}
    with _probe_file(shared / f".probe-{token}-driver") as probe:
        calls = {}
        for node_id in dict.fromkeys(placement.node_ids):
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            remote = ray.remote(probe_node).options(
                num_cpus=0, scheduling_strategy=here, runtime_env=actor_env()
            )
            calls[node_id] = remote.remote(
                str(probe), str(shared / f".probe-{token}-{node_id}"), models
            )
        problems = []
        for node_id, call in calls.items():
            written = shared / f".probe-{token}-{node_id}"
            try:
                found = ray.get(call)
            except (ray.exceptions.RayError, ImportError) as error:
                root = Path(__file__).parents[1]
                found = [
                    f"cannot run this project's code, which must be at {root} on every node: {error}"
                ]
            else:
                if not found and not _appears(written):
                    found = [
                        f"--run_root_dir: {shared} is not the driver's folder, what is written there stays there"
                    ]
            written.unlink(missing_ok=True)
            problems += [f"node {names[node_id]}: {problem}" for problem in found]
    return problems


def probe_node(probe: str, answer: str, models: dict[str, dict[str, int]]) -> list[str]:
    """Runs on a node: problems with the driver's file `probe`, with writing `answer`, and with the model folders."""
    problems = []
    for folder, wanted in models.items():
        found = _file_sizes(Path(folder))
        differing = sorted(name for name in wanted if found.get(name) != wanted[name])
        if not found:
            shared = "an HF_HOME" if source_of(folder) else "a folder"
            problems.append(
                f"no model folder {folder}: copy it there, or use {shared} on a file system that all nodes share"
            )
        elif differing:
            problems.append(
                f"{folder} lacks {', '.join(differing)} or has other versions: copy the folder again"
            )
    shared_dir = Path(probe).parent
    hint = "use a --run_root_dir on a file system that all nodes share"
    if not _appears(Path(probe)):
        return [*problems, f"{shared_dir} lacks what the driver wrote there: {hint}"]
    try:
        Path(answer).touch()
    except OSError as error:
        problems.append(f"{shared_dir} cannot be written ({error.strerror}): {hint}")
    return problems


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in `folder`; empty if there is no such folder."""
    return (
        {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        if folder.is_dir()
        else {}
    )


@contextlib.contextmanager
def _probe_file(path: Path) -> Iterator[Path]:
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    """Whether `path` exists, or does so soon; a missing folder is not waited for."""
    deadline = time.monotonic() + SHARED_FILE_TIMEOUT_S
    while not path.exists():
        if not path.parent.is_dir() or time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
