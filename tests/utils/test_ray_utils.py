"""A run's own Ray: reachable from this machine alone, and only with its token."""

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Starts Ray as a run does, and prints where each of its processes listens, an actor's among them.
LISTENING = """
import psutil, ray
from utils import ray_utils

ray_utils.start_ray(None, num_cpu_slots=4)

@ray.remote
class Actor:
    def interfaces(self):
        import os
        ray_utils.use_node_interface()
        return os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]

actor = Actor.remote()
print("INTERFACES", *ray.get(actor.interfaces.remote()))
this = psutil.Process()
for process in [this, *this.children(recursive=True)]:
    for connection in process.net_connections(kind="inet"):
        if connection.status == "LISTEN":
            print("LISTENS", process.name().replace(" ", "_"), connection.laddr.ip)
"""


def listening(**variables: str) -> tuple[dict[str, set[str]], list[str]]:
    """Process name -> addresses it listens at, and the interfaces of gloo and NCCL."""
    names = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    env = (
        {k: v for k, v in os.environ.items() if k not in names}
        | {"PYTHONPATH": str(ROOT)}
        | variables
    )
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        capture_output=True,
        text=True,
        timeout=550,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    found: dict[str, set[str]] = {}
    for words in lines:
        if words and words[0] == "LISTENS":
            found.setdefault(words[1], set()).add(words[2])
    return found, next(words[1:] for words in lines if words and words[0] == "INTERFACES")


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def test_a_runs_own_ray_listens_on_loopback_only():
    found, interfaces = listening()
    assert {"gcs_server", "raylet"} <= found.keys(), found
    outside = {
        name: addresses for name, addresses in found.items() if not all(map(is_loopback, addresses))
    }
    assert not outside
    assert interfaces == ["lo", "lo"]


def test_ray_listens_elsewhere_when_told_so():
    found, _ = listening(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1")
    assert not is_loopback(next(iter(found["gcs_server"])))
