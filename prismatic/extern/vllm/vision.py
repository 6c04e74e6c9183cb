"""Recorded encoding of images on a GPU: one CUDA graph for each padded batch size.

Launched kernel by kernel, openvla-7b's two ViTs keep a core busy for 20 to 40 ms (measured beside a H200), longer than
the GPU needs for 16 images. A graph is recorded when its size first comes. It reads the weights where they lie, so
updates in place and sleeping concern it as little as they concern vLLM's own graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_GRAPH_IMAGES = 64
NUM_WARMUPS = 2


def padded_size(num_images: int) -> int:
    """Images of the graph that `num_images` (at most MAX_GRAPH_IMAGES) go through: 2, 4, 8, 16, 24, ..."""
    # Not 1: a compiled block would be compiled once more for it.
    return next((size for size in (2, 4, 8) if size >= num_images), -(-num_images // 8) * 8)


@dataclass
class _Recording:
    graph: Any
    pixels: Tensor
    embeddings: Tensor


class GraphedEncoder:
    """Calls `encode`, (B, H, W, 3) uint8 -> (B, P, D), through graphs; results are copies of their own."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self._encode = encode
        self._recordings: dict[int, _Recording] = {}
        self._pool: Any = None

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Return the embeddings of at most MAX_GRAPH_IMAGES images on the GPU."""
        num_images = len(pixels_BHWC)
        size = padded_size(num_images)
        if size not in self._recordings:
            self._recordings[size] = self._record(
                pixels_BHWC.new_zeros((size, *pixels_BHWC.shape[1:]))
            )
        recording = self._recordings[size]
        recording.pixels[:num_images].copy_(pixels_BHWC)
        recording.graph.replay()
        return recording.embeddings[:num_images].clone()

    def _record(self, pixels: Tensor) -> _Recording:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARMUPS):
                self._encode(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (Ray, NCCL's watchdog) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            embeddings = self._encode(pixels)
        return _Recording(graph, pixels, embeddings)
