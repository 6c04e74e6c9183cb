"""The trainers' side of a weight sync: every rank fills buckets, the sending ranks pass them to the engines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.weights.buckets import checksums
from utils.weights.channel import DEFAULT_TIMEOUT_S, ChannelError, SendingEnd
from utils.weights.export import WeightExporter


@dataclass(frozen=True)
class SendReport:
    """What one update sent: tensors, their bytes in the engines' dtype, and the version."""

    num_params: int
    num_bytes: int
    version: int


class WeightSender:
    """One trainer rank's part in syncs. Every method is called on every rank, at the same time.

    nccl and gloo: rank 0 sends to `num_receivers` workers (engines x tensor-parallel size). ipc: every rank sends to
    the one worker on its own GPU, and `num_receivers` is 1. `host`: the address under which engines reach this process.
    `rank`: this process among the trainers.
    """

    def __init__(
        self,
        exporter: WeightExporter,
        backend: str,
        *,
        rank: int,
        num_receivers: int = 1,
        host: str = "127.0.0.1",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.exporter, self.backend = exporter, backend
        self._options: dict[str, Any] = {"host": host, "timeout_s": timeout_s}
        self._num_receivers = num_receivers
        self._is_sending = backend == "ipc" or rank == 0
        self._end: SendingEnd | None = None

    def open(self) -> dict[str, Any] | None:
        """Start listening and return this channel's info for `engine_info`; None on ranks that do not send."""
        self.close()
        if not self._is_sending:
            return None
        exporter = self.exporter
        self._end = SendingEnd(
            self.backend, self._num_receivers, exporter.layout, exporter.device, **self._options
        )
        return {"address": self._end.address.to_dict(), "layout": exporter.layout.to_dict()}

    def connect(self) -> None:
        """Wait for the receivers. Raises ChannelError on every rank when one is missing."""
        failure = None
        if self._end is not None:
            failure = _failure(self._end.join)
        self._raise_on_all(failure, "connecting to the engines")

    def send(self, version: int, *, verify: bool = False) -> SendReport:
        """Send all weights as `version`; a collective. Returns when every engine has loaded them.

        With `verify` each tensor's checksum is compared. Raises ChannelError on every rank when an engine refuses, has
        other bits or does not answer within the time-out.
        """
        end = self._end
        failure = _failure(lambda: end.begin(version, verify)) if end is not None else None
        self._raise_on_all(failure, f"starting the update to version {version}")
        try:
            failure = self._send_buckets(version, verify)
        except BaseException:
            self.close()  # the engines hear of it at once
            raise
        self._raise_on_all(failure, f"sending version {version}")
        layout = self.exporter.layout
        return SendReport(len(layout.manifest), layout.payload_bytes, version)

    def _send_buckets(self, version: int, verify: bool) -> ChannelError | None:
        """Fill and send every bucket; returns what the channel failed with."""
        end, exporter = self._end, self.exporter
        failure: ChannelError | None = None
        sums: list[Tensor] = []
        for index in range(exporter.num_buckets):
            # After a failure this rank goes on with the collectives: the others are in them.
            if end is None or failure is not None:
                exporter.fill(index, None)
                continue
            try:
                buffer = end.transport.take(index)
                exporter.fill(index, buffer)
                if verify:
                    sums.append(
                        checksums(tensor for _, tensor in exporter.layout.views(index, buffer))
                    )
                end.transport.give(index)
            except ChannelError as error:
                failure = error
        if end is not None and failure is None:
            failure = _failure(lambda: end.end(version, torch.cat(sums) if verify else None))
        return failure

    def close(self) -> None:
        """Leave the channel; the engines' next operation on it fails."""
        if self._end is not None:
            self._end.close()
        self._end = None

    def _raise_on_all(self, failure: ChannelError | None, what: str) -> None:
        if self.exporter.all_agree(failure is None):
            return
        if failure is None:
            self.close()  # this rank's engine, ipc, would wait for what does not come
            raise ChannelError(f"{what} failed on another trainer rank")
        raise failure


def _failure(action: Callable[[], object]) -> ChannelError | None:
    try:
        action()
    except ChannelError as error:
        return error
    return None
