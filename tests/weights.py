"""Send given tensors to an engine through real weight channels, as the trainers do."""

from collections.abc import Sequence
from typing import Any

import ray
import torch
from torch import Tensor

from utils.weights.buckets import BucketLayout
from utils.weights.channel import ChannelError, SendingEnd
from utils.weights.receiver import engine_info


def send_to_engine(
    engine: Any,
    weights: Sequence[tuple[str, Tensor]],
    version: int,
    *,
    backend: str = "gloo",
    num_workers: int = 1,
    bucket_bytes: int = 100_000,
    num_sent: int | None = None,
) -> Any:
    """Bring `weights` to the engine actor as `version` and return its report.

    Args:
        engine: a Ray actor of `ActionEngine`.
        weights: (checkpoint name, tensor) of one dtype.
        version: of the policy.
        backend: gloo, or ipc with the engine's worker w on GPU w of this process.
        num_workers: tensor-parallel size of the engine.
        bucket_bytes: size of a bucket.
        num_sent: leave the channel after so many buckets; None: send all.

    Raises what the engine raises.
    """
    tensors = dict(weights)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in weights]
    layout = BucketLayout.plan(shapes, weights[0][1].dtype, bucket_bytes)
    if backend == "ipc":
        devices = [torch.device("cuda", worker) for worker in range(num_workers)]
        ends = [SendingEnd(backend, 1, layout, device) for device in devices]
    else:
        ends = [SendingEnd(backend, num_workers, layout, torch.device("cpu"))]
    infos: list[dict[str, Any] | None] = [
        {"address": end.address.to_dict(), "layout": layout.to_dict()} for end in ends
    ]
    joining = engine.init_weight_transfer.remote(
        backend, engine_info(infos, backend, 0, num_workers)
    )
    try:
        for end in ends:
            end.join()
        ray.get(joining)
        receiving = engine.receive_weights.remote(version)
        try:
            _send(ends, layout, tensors, version, num_sent)
        except ChannelError:
            ray.get(receiving)  # raises the engine's own reason
            raise
        for end in ends if num_sent is not None else []:
            end.close()
        return ray.get(receiving)
    finally:
        for end in ends:
            end.close()


def _send(
    ends: Sequence[SendingEnd],
    layout: BucketLayout,
    tensors: dict[str, Tensor],
    version: int,
    num_sent: int | None,
) -> None:
    for end in ends:
        end.begin(version, verify=False)
    for index in range(len(layout.buckets))[:num_sent]:
        for end in ends:
            buffer = end.transport.take(index)
            for name, view in layout.views(index, buffer):
                view.copy_(tensors[name])
            end.transport.give(index)
    if num_sent is None:
        for end in ends:
            end.end(version, None)
