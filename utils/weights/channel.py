"""A channel that carries weight buckets from one trainer rank to the workers of engines. Torch only.

It is independent of the default process groups on both sides: a TCPStore of the sender, a gloo group for headers and
agreements, and one way for the bytes:

    gloo  broadcast between CPUs
    nccl  broadcast between GPUs, all different
    ipc   one receiver on the sender's own GPU (CUDA IPC); without GPUs, shared memory of one machine

Two buffers on the sender: bucket i + 1 is gathered while bucket i travels. An update is: header, agreement that
everybody is ready, buckets, agreement that everybody got them. Nobody waits longer than the time-out for a peer, and a
refusal reaches everybody with its reason. After a ChannelError the channel may be out of step: open another one.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.weights.buckets import BucketLayout, checksums
from utils.weights.transports import SENDER, Broadcast, SharedBuffers, Transport

BACKENDS = ("gloo", "nccl", "ipc")
DEFAULT_TIMEOUT_S = 300.0
NUM_NAMES_SHOWN = 4
# Interval at which the host looks whether the device is done.
POLL_S = 5e-5


class ChannelError(RuntimeError):
    """The peers did not all come, did not agree, or went away; names the operation and the peer."""


@dataclass(frozen=True)
class ChannelAddress:
    """Where a sender listens, how its bytes travel and for how many receivers (ranks 1 to num_receivers)."""

    backend: str
    host: str
    port: int
    num_receivers: int
    timeout_s: float = DEFAULT_TIMEOUT_S

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for an RPC."""
        return asdict(self)


class ChannelEnd:
    """One end of a channel: the store, the control group and the agreements. Use SendingEnd or ReceivingEnd."""

    def __init__(
        self, address: ChannelAddress, rank: int, layout: BucketLayout, device: torch.device
    ) -> None:
        if address.backend not in BACKENDS:
            raise ValueError(
                f"channel backend {address.backend!r}: use one of {', '.join(BACKENDS)}"
            )
        if (address.backend == "nccl") != (device.type == "cuda") and address.backend != "ipc":
            raise ValueError(f"channel backend {address.backend} cannot carry tensors on {device}")
        if address.backend == "ipc" and address.num_receivers != 1:
            raise ValueError(
                f"an ipc channel has one receiver, not {address.num_receivers}: open one for each GPU"
            )
        self.address, self.rank, self.layout, self.device = address, rank, layout, device
        self.size = address.num_receivers + 1
        self.timeout = timedelta(seconds=address.timeout_s)
        self.name = _peer_name(rank)
        self._num_agreements = 0
        self.store: Any = None
        self._control: Any = None
        self._transport: Transport | None = None

    @property
    def is_open(self) -> bool:
        """Whether all ends have joined and none has failed."""
        return self._transport is not None

    @property
    def transport(self) -> Transport:
        """The opened transport. Raises ChannelError before `join` and after a failure."""
        if self._transport is None:
            raise ChannelError(f"{self._where}: it is not open")
        return self._transport

    @property
    def _where(self) -> str:
        address = self.address
        return f"weight channel {address.backend} {address.host}:{address.port}, {self.name} of {self.size - 1}"

    def _join(self) -> None:
        """Wait for every end, then build the groups. Raises ChannelError naming those who did not come."""
        self.attempt("telling the others of it", lambda: self.store.set(f"joined/{self.rank}", "1"))
        missing = self._absent("joined", wait=True)
        if missing:
            raise ChannelError(
                f"{self._where}: {missing} did not join within {self.address.timeout_s:.0f} s"
            )
        self._control = self.attempt("connecting the control group", self._gloo_group)
        self._transport = self.attempt("connecting", self._build_transport)
        self.agree("opening the channel", None)

    def _gloo_group(self) -> Any:
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # The interface that leads to the sender: the machine's name may resolve to another.
        options._devices = [
            dist.ProcessGroupGloo.create_device(hostname=_address_towards(self.address.host))
        ]
        options._timeout = self.timeout
        return dist.ProcessGroupGloo(
            dist.PrefixStore("control", self.store), self.rank, self.size, options
        )

    def _build_transport(self) -> Transport:
        if self.address.backend == "ipc":
            return SharedBuffers(self)
        group, is_nccl = self._control, self.address.backend == "nccl"
        if is_nccl:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = 2 * self.timeout  # ours comes first: NCCL's ends the process
            group = dist.ProcessGroupNCCL(
                dist.PrefixStore("bytes", self.store), self.rank, self.size, options
            )
            group.eager_connect_single_device(self.device)
        return Broadcast(self, group, is_nccl=is_nccl)

    def agree(self, what: str, problem: str | None) -> None:
        """Return when every end has come here without a problem.

        Raises ChannelError with the problems of all, or naming the ends that did not come in time or went away.
        """
        topic = f"agreement/{self._num_agreements}"
        self._num_agreements += 1
        fine = torch.tensor([int(problem is None)])
        options: Any = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp.MIN, self.timeout

        def vote() -> None:
            self.store.set(f"{topic}/{self.rank}", problem or "")
            self._control.allreduce([fine], options).wait(self.timeout)

        self.attempt(what, vote, topic)
        if not fine.item():
            texts = self.attempt(
                what, lambda: [self.store.get(f"{topic}/{r}").decode() for r in range(self.size)]
            )
            refusals = [f"{_peer_name(rank)}: {text}" for rank, text in enumerate(texts) if text]
            raise ChannelError(f"{self._where}, {what}: refused by {'; '.join(refusals)}")

    def broadcast(self, what: str, tensor: Tensor) -> Tensor:
        """Bring the sender's CPU `tensor` to every receiver, in place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = SENDER, self.timeout
        self.attempt(what, lambda: self._control.broadcast([tensor], options).wait(self.timeout))
        return tensor

    def start_signal(self, what: str, value: int) -> Callable[[], None]:
        """Send `value` to the single peer of an ipc channel; the result waits until the peer has taken it."""
        number = torch.tensor([value])
        # A tag for each direction: both may be under way at once.
        work = self.attempt(what, lambda: self._control.send([number], 1 - self.rank, self.rank))

        def wait() -> None:
            self.attempt(what, lambda: (work.wait(self.timeout), number))

        return wait

    def await_signal(self, what: str, value: int) -> None:
        """Wait until the single peer has sent `value`."""
        number, peer = torch.tensor([-1]), 1 - self.rank
        self.attempt(what, lambda: self._control.recv([number], peer, peer).wait(self.timeout))
        if number.item() != value:
            raise ChannelError(
                f"{self._where}, {what}: {_peer_name(peer)} is at {number.item()}, not at {value}"
            )

    def wait_for_device(self, what: str) -> None:
        """Wait until the current stream is done, no longer than the time-out. Raises ChannelError."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        deadline = time.monotonic() + self.address.timeout_s
        while not event.query():
            if time.monotonic() > deadline:
                self.close()
                raise ChannelError(
                    f"{self._where}, {what}: the GPU was not done within {self.address.timeout_s:.0f} s"
                )
            time.sleep(POLL_S)

    def attempt(self, what: str, action: Callable[[], Any], topic: str | None = None) -> Any:
        """Run `action`; torch's errors become ChannelErrors with the operation and the absent peers, and it closes."""
        try:
            return action()
        except RuntimeError as error:
            if isinstance(error, ChannelError):
                raise
            absent = self._absent(topic) if topic else ""
            if not absent and self.rank != SENDER:
                absent = _peer_name(SENDER)
            self.close()
            detail = f"no answer from {absent} ({error})" if absent else str(error)
            raise ChannelError(f"{self._where}, {what}: {detail}") from error

    def _absent(self, topic: str, *, wait: bool = False) -> str:
        """The ends that have not written under `topic`, as text."""
        keys = [f"{topic}/{rank}" for rank in range(self.size)]
        try:
            if wait:
                self.store.wait(keys, self.timeout)
                return ""
            return ", ".join(
                _peer_name(r) for r, key in enumerate(keys) if not self.store.check([key])
            )
        except RuntimeError:
            return self._absent(topic) if wait else _peer_name(SENDER)

    def close(self) -> None:
        """Leave the channel; the other ends' next operation fails. May be repeated."""
        if self._transport is not None:
            self._transport.close()
        self._transport = self._control = None


class SendingEnd(ChannelEnd):
    """The trainer's end. `address` is known at once; `join` waits for the receivers."""

    def __init__(
        self,
        backend: str,
        num_receivers: int,
        layout: BucketLayout,
        device: torch.device,
        *,
        host: str = "127.0.0.1",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        store = dist.TCPStore(
            host, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
        super().__init__(
            ChannelAddress(backend, host, store.port, num_receivers, timeout_s),
            SENDER,
            layout,
            device,
        )
        self.store = store

    def join(self) -> None:
        """Wait for all receivers. Raises ChannelError naming those who did not come in time."""
        self._join()

    def begin(self, version: int, verify: bool) -> None:
        """Announce an update. Raises ChannelError when a receiver refuses it; the channel stays open then."""
        _ = self.transport
        what = f"starting the update to version {version}"
        self.broadcast(what, torch.tensor([version, int(verify)]))
        self.agree(what, None)

    def end(self, version: int, sums: Tensor | None) -> None:
        """Wait until every receiver has everything; `sums` (num_tensors, 2) are the checksums, when verifying.

        Raises ChannelError with the reasons of those who do not.
        """
        what = f"finishing the update to version {version}"
        self.transport.finish(len(self.layout.buckets))
        if sums is not None:
            self.broadcast(what, sums.cpu())
        self.agree(what, None)


@dataclass(frozen=True)
class Received:
    """What one update brought to one receiver: tensors, their bytes, the version, tensors checked by checksum."""

    num_params: int
    num_bytes: int
    version: int
    num_verified: int


class ReceivingEnd(ChannelEnd):
    """An engine worker's end: rank 1 to num_receivers. Joining is done by the constructor."""

    def __init__(
        self, address: ChannelAddress, rank: int, layout: BucketLayout, device: torch.device
    ) -> None:
        super().__init__(address, rank, layout, device)
        self.store = self.attempt("reaching the sender", self._connect)
        self._join()

    def _connect(self) -> Any:
        return dist.TCPStore(
            self.address.host, self.address.port, is_master=False, timeout=self.timeout
        )

    def receive(
        self,
        version: int,
        load: Callable[[Iterator[tuple[str, Tensor]]], object],
        refusal: str | None = None,
    ) -> Received:
        """Take part in the update to `version`: `load` consumes the named tensors, one after the other.

        Each tensor is valid until `load` asks for the next. `refusal`: why this end does not want the update; it then
        reaches the sender before a tensor is sent, and nothing is loaded here.

        Raises ChannelError: other version, refused by somebody, a peer that went away, tensors whose checksums differ;
        and whatever `load` raises, after the others have been told.
        """
        transport = self.transport
        what = f"starting the update to version {version}"
        sent_version, verify = self.broadcast(what, torch.tensor([0, 0])).tolist()
        if sent_version != version and refusal is None:
            refusal = f"version {sent_version} is sent, {version} was expected"
        self.agree(what, refusal)
        stream = _Stream(self, transport, bool(verify))
        failure: Exception | None = None
        try:
            load(iter(stream))
        except ChannelError:
            raise
        except Exception as error:  # told to the others below, then raised again
            failure = error
        problem = self._end(version, stream, failure)
        if failure is not None:
            raise failure
        if problem is not None:
            raise ChannelError(f"{self._where}: {problem}")
        return Received(
            stream.num_loaded,
            self.layout.payload_bytes,
            version,
            stream.num_loaded if verify else 0,
        )

    def _end(self, version: int, stream: "_Stream", failure: Exception | None) -> str | None:
        """Take what is left, compare, and tell the others; returns this end's own problem."""
        what = f"finishing the update to version {version}"
        num_loaded, num_params = stream.num_loaded, len(self.layout.manifest)
        stream.drain()
        self.transport.finish(len(self.layout.buckets))
        problem = None
        if failure is not None:
            problem = f"loading failed after {num_loaded} of {num_params} tensors ({failure!r})"
        elif num_loaded != num_params:
            problem = f"only {num_loaded} of {num_params} tensors were loaded"
        if stream.sums is not None:
            expected = self.broadcast(what, torch.zeros(num_params, 2, dtype=torch.int64))
            problem = problem or self._checksum_problem(expected, torch.cat(stream.sums).cpu())
        try:
            self.agree(what, problem)
        except ChannelError:
            if problem is None:
                raise
        return problem

    def _checksum_problem(self, expected: Tensor, actual: Tensor) -> str | None:
        wrong = (expected != actual).any(dim=1).tolist()
        names = [
            name
            for (name, _), is_wrong in zip(self.layout.manifest, wrong, strict=True)
            if is_wrong
        ]
        if not names:
            return None
        more = f" and {len(names) - NUM_NAMES_SHOWN} more" if len(names) > NUM_NAMES_SHOWN else ""
        return (
            f"checksums differ for {len(names)} tensors: {', '.join(names[:NUM_NAMES_SHOWN])}{more}"
        )


class _Stream:
    """The tensors of one update, in order; counts what was consumed and sums up the bits when verifying."""

    def __init__(self, end: ChannelEnd, transport: Transport, verify: bool) -> None:
        self.end, self.transport = end, transport
        self.num_loaded = 0
        self.sums: list[Tensor] | None = [] if verify else None
        self._next_bucket = 0
        self._holds_bucket = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while self._next_bucket < len(self.end.layout.buckets):
            views = self._take()
            for name, tensor in views:
                yield name, tensor
                self.num_loaded += 1
            self._give()

    def drain(self) -> None:
        """Take the buckets that `load` left, so that the sender is not blocked."""
        if self._holds_bucket:
            self._give()
        while self._next_bucket < len(self.end.layout.buckets):
            self._take()
            self._give()

    def _take(self) -> Sequence[tuple[str, Tensor]]:
        index = self._next_bucket
        views = self.end.layout.views(index, self.transport.take(index))
        self._holds_bucket = True
        if self.sums is not None:
            self.sums.append(checksums(tensor for _, tensor in views))
        return views

    def _give(self) -> None:
        self.transport.give(self._next_bucket)
        self._next_bucket += 1
        self._holds_bucket = False


def _peer_name(rank: int) -> str:
    return "the sender" if rank == SENDER else f"receiver {rank}"


def _address_towards(host: str) -> str:
    """Address of this machine's interface that reaches `host` (a datagram socket sends nothing to find out)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname(host), 9))
        return str(probe.getsockname()[0])
