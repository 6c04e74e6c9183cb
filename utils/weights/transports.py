"""The ways that a channel's bytes travel: by broadcast (gloo, NCCL), or through memory that both ends map."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from utils.weights.buckets import BucketLayout
from utils.weights.sharing import open_shared_buffers, share_buffers

NUM_BUFFERS = 2
SENDER = 0


class End(Protocol):
    """What a transport uses of its end of the channel; see `utils.weights.channel.ChannelEnd`."""

    rank: int
    layout: BucketLayout
    device: torch.device
    timeout: timedelta
    store: Any

    def attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """Run `action`, turn its errors into ChannelErrors."""

    def start_signal(self, what: str, value: int) -> Callable[[], None]:
        """Send `value` to the peer; the result waits until it is taken."""

    def await_signal(self, what: str, value: int) -> None:
        """Wait until the peer has sent `value`."""

    def wait_for_device(self, what: str) -> None:
        """Wait until the current stream is done."""


class Transport(Protocol):
    """How buckets' bytes travel. Buckets come in order; a buffer is the caller's between the two calls for it."""

    def take(self, index: int) -> Tensor:
        """Sender: a free buffer to write bucket `index` into. Receiver: the buffer that holds it."""

    def give(self, index: int) -> None:
        """Sender: bucket `index` is written (on the current stream). Receiver: it is read."""

    def finish(self, num_buckets: int) -> None:
        """Wait until all buckets have arrived."""

    def close(self) -> None:
        """Let go of buffers and connections."""


class Broadcast:
    """Buckets by broadcast from the sender: gloo waits on the host, NCCL makes the current stream wait."""

    def __init__(self, end: End, group: Any, *, is_nccl: bool) -> None:
        self.end, self.group, self.is_nccl = end, group, is_nccl
        size = end.layout.buffer_bytes
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device=end.device) for _ in range(NUM_BUFFERS)
        ]
        self.works: dict[int, Any] = {}

    def take(self, index: int) -> Tensor:
        """Sender: wait for the broadcast that last used the buffer. Receiver: for this one, the next being posted."""
        if self.end.rank == SENDER:
            self._wait(index - NUM_BUFFERS)
        else:
            if index == 0:
                self._post(0)
            # Its buffer was read by bucket index - 1, whose copies the current stream has in front of it.
            if index + 1 < len(self.end.layout.buckets):
                self._post(index + 1)
            self._wait(index)
        return self.buffers[index % NUM_BUFFERS]

    def give(self, index: int) -> None:
        """Sender: start the broadcast. Receiver: nothing to do."""
        if self.end.rank == SENDER:
            self._post(index)

    def finish(self, num_buckets: int) -> None:
        """Wait for the last broadcasts, and for the device."""
        for index in sorted(self.works):
            self._wait(index)
        self.end.wait_for_device(f"broadcasting {num_buckets} buckets")

    def close(self) -> None:
        """End the NCCL group, whatever it is doing; let go of the gloo group, whose connections live as long as it."""
        if self.is_nccl:
            self.group.abort()
        self.group = None  # this object may live on, in an error's traceback
        self.works.clear()
        self.buffers.clear()

    def _post(self, index: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = SENDER, self.end.timeout
        # Else NCCL runs on the current stream, and nothing overlaps.
        options.asyncOp = True
        flat = self.buffers[index % NUM_BUFFERS][: self.end.layout.bucket_bytes(index)]
        self.works[index] = self.end.attempt(
            f"broadcasting bucket {index}", lambda: self.group.broadcast([flat], options)
        )

    def _wait(self, index: int) -> None:
        work = self.works.pop(index, None)
        if work is not None:
            self.end.attempt(f"broadcasting bucket {index}", work.wait)


class SharedBuffers:
    """Buckets in memory that both ends map: the sender says which is ready, the receiver which is read."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.num_read = 0
        # A signal is a rendezvous: waiting for it at once would stop both ends in their own.
        self._wait_for_signal: Callable[[], None] | None = None
        if end.rank == SENDER:
            self.buffers, handles = share_buffers(end.layout.buffer_bytes, NUM_BUFFERS, end.device)
            end.store.set("buffers", json.dumps(handles))
        else:
            self.buffers = open_shared_buffers(json.loads(end.store.get("buffers")), end.device)

    def take(self, index: int) -> Tensor:
        """Sender: wait until the receiver has read what the buffer held. Receiver: until bucket `index` is ready."""
        if self.end.rank == SENDER:
            self._wait_until_read(index - NUM_BUFFERS)
        else:
            self.end.await_signal(f"waiting for bucket {index}", index)
        return self.buffers[index % NUM_BUFFERS]

    def give(self, index: int) -> None:
        """Say that bucket `index` is ready (sender) or read (receiver): the device is done before the other hears."""
        what = f"handing over bucket {index}"
        self.end.wait_for_device(what)
        self._settle()
        self._wait_for_signal = self.end.start_signal(what, index)

    def finish(self, num_buckets: int) -> None:
        """Wait until everything is read."""
        if self.end.rank == SENDER:
            self._wait_until_read(num_buckets - 1)
            self.num_read = 0
        self._settle()

    def close(self) -> None:
        """Let go of the memory."""
        self.buffers, self._wait_for_signal = [], None

    def _settle(self) -> None:
        if self._wait_for_signal is not None:
            self._wait_for_signal()
        self._wait_for_signal = None

    def _wait_until_read(self, index: int) -> None:
        while self.num_read <= index:
            self.end.await_signal(f"waiting until bucket {self.num_read} is read", self.num_read)
            self.num_read += 1
