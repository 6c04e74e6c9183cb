"""Wait until a Ray cluster has its nodes: `python -m utils.wait_for_nodes ADDRESS NUM_NODES TIMEOUT_S`.

Exit code 0 once they have joined, 2 with a message when they have not in time.
"""

import sys
import time

import ray

from utils.logging_utils import get_logger
from utils.ray_utils import cluster_nodes, start_ray

logger = get_logger(__name__)


def main(address: str, num_nodes: int, timeout_s: float) -> int:
    """Connect, wait, and say who is there; returns the exit code."""
    start_ray(address)
    deadline = time.monotonic() + timeout_s
    while len(nodes := cluster_nodes()) < num_nodes and time.monotonic() < deadline:
        time.sleep(0.5)
    ray.shutdown()
    present = "; ".join(f"{node.name}: {node.gpus} GPUs, {node.cpus} CPU slots" for node in nodes)
    if len(nodes) < num_nodes:
        logger.error(
            f"{len(nodes)} of {num_nodes} nodes joined {address} within {timeout_s:.0f} s ({present})"
        )
        return 2
    logger.info(f"{len(nodes)} nodes: {present}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
