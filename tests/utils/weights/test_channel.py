"""The channel between one sender and receivers in processes of their own, and what happens when an end misbehaves."""

import datetime
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import PRELOAD, in_ranks
from utils import fsdp_utils
from utils.weights.buckets import BucketLayout
from utils.weights.channel import (
    ChannelAddress,
    ChannelError,
    ReceivingEnd,
    SendingEnd,
)
from utils.weights.export import WeightExporter
from utils.weights.receiver import engine_info
from utils.weights.sender import WeightSender

CPU = torch.device("cpu")
NUM_ELEMENTS = 700  # larger than a bucket of 512 bytes
# Waited out by no test: how busy the machine is must not matter.
TIMEOUT_S = 500.0
# Where waiting it out is the test. The peers that are to be in time have come before it begins.
SHORT_TIMEOUT_S = 2.0


def make_model(seed: int) -> nn.Module:
    """Tensors that do not fill buckets evenly, one larger than a bucket."""
    torch.manual_seed(seed)
    return nn.ParameterDict(
        {
            "a": torch.randn(7, 3),
            "b": torch.randn(NUM_ELEMENTS),
            "c": torch.randn(5),
            "d": torch.randn(130, 2),
        }
    )


def make_exporter(seed: int = 0, device: torch.device = CPU) -> WeightExporter:
    return WeightExporter(make_model(seed).to(device), torch.bfloat16, bucket_bytes=512)


def expected_weights(seed: int) -> dict[str, torch.Tensor]:
    return {name: p.detach().bfloat16() for name, p in make_model(seed).named_parameters()}


class Store(dict[str, torch.Tensor]):
    """A receiver without vLLM: keeps copies."""

    def load(self, tensors: Any) -> None:
        for name, tensor in tensors:
            self[name] = tensor.clone()


def join(info: dict[str, Any], index: int = 0, device: torch.device = CPU) -> ReceivingEnd:
    """The receiving end that an engine's worker would open."""
    info = engine_info([info], info["address"]["backend"], index)
    (place,) = info["joins"]
    layout = BucketLayout.from_dict(info["layout"])
    return ReceivingEnd(ChannelAddress(**place["address"]), place["rank"], layout, device)


class Peer:
    """A function in a process of its own; `result` waits for what it returns or raises."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_run_peer, args=(child, function, args), daemon=True)
        self.process.start()
        child.close()

    def result(self, timeout_s: float = TIMEOUT_S) -> Any:
        assert self.pipe.poll(timeout_s), "the process hangs"
        kind, value = self.pipe.recv()
        self.process.join(timeout_s)
        if kind == "error":
            raise value
        return value


def _run_peer(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(("value", function(*args)))
    except Exception as error:
        pipe.send(("error", error))


def receive_versions(
    info: dict[str, Any], index: int, versions: list[int], device: torch.device = CPU
) -> list[tuple[Any, dict[str, Any]]]:
    end, results = join(info, index, device), []
    for version in versions:
        store = Store()
        received = end.receive(version, store.load)
        results.append(
            (received, {name: tensor.float().cpu().numpy() for name, tensor in store.items()})
        )
    end.close()
    return results


def check_versions(
    backend: str, receiver_devices: list[torch.device], device: torch.device
) -> None:
    """Send three versions from `device`, the second verified, and compare what every receiver got."""
    exporter = make_exporter(1, device)
    num_receivers = len(receiver_devices)
    sender = WeightSender(exporter, backend, rank=0, num_receivers=num_receivers)
    info = sender.open()
    assert exporter.num_buckets > 3  # buffers are used again
    peers = [
        Peer(receive_versions, info, i, [1, 2, 3], target)
        for i, target in enumerate(receiver_devices)
    ]
    sender.connect()
    for version in (1, 2, 3):
        # The exporter holds the model's own parameters: what an optimizer did is sent.
        for source, new in zip(exporter.sources, make_model(version).parameters(), strict=True):
            source.parameter.data.copy_(new.data)
        report = sender.send(version, verify=version == 2)
        assert (report.num_params, report.version) == (4, version)
        assert report.num_bytes == 2 * sum(p.numel() for p in make_model(0).parameters())
    for peer in peers:
        for version, (received, weights) in enumerate(peer.result(), start=1):
            assert (received.num_params, received.version) == (4, version)
            assert received.num_bytes == report.num_bytes and received.num_verified == (
                4 if version == 2 else 0
            )
            expected = expected_weights(version)
            assert list(weights) == list(expected)
            assert all(
                (weights[name] == tensor.float().numpy()).all() for name, tensor in expected.items()
            )
    sender.close()


@pytest.mark.parametrize(("backend", "num_receivers"), [("gloo", 2), ("ipc", 1)])
def test_every_receiver_gets_every_version_bit_for_bit(backend: str, num_receivers: int) -> None:
    check_versions(backend, [CPU] * num_receivers, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "num_gpus"), [("ipc", 1), ("nccl", 2)])
def test_every_version_between_gpus_bit_for_bit(backend: str, num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(
            f"{backend} needs {num_gpus} GPUs, this machine has {torch.cuda.device_count()}"
        )
    check_versions(backend, [torch.device("cuda", num_gpus - 1)], torch.device("cuda", 0))


def receive_until_error(
    info: dict[str, Any],
    version: int,
    refusal: str | None = None,
    index: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> tuple[str, int, float]:
    """The error's text, how many tensors were loaded before it, and the seconds it took.

    `timeout_s` counts once all have joined.
    """
    end, store = join(info, index), Store()
    end.timeout = datetime.timedelta(seconds=timeout_s)
    start = time.monotonic()
    with pytest.raises(ChannelError) as error:
        end.receive(version, store.load, refusal)
    return str(error.value), len(store), time.monotonic() - start


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_corrupted_bucket_is_found_and_named_on_both_sides(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = WeightSender(make_exporter(), backend, rank=0, timeout_s=TIMEOUT_S)
    peer = Peer(receive_until_error, sender.open(), 1)
    sender.connect()
    transport = sender._end.transport
    give = transport.give

    def corrupting_give(index: int) -> None:
        if index == 1:
            transport.buffers[1][5] ^= 1
        give(index)

    monkeypatch.setattr(transport, "give", corrupting_give)
    with pytest.raises(
        ChannelError, match="refused by receiver 1: checksums differ for 1 tensors: b"
    ):
        sender.send(1, verify=True)
    text, num_loaded, _ = peer.result()
    assert "receiver 1 of 1: checksums differ for 1 tensors: b" in text and num_loaded == 4


def test_refusal_and_other_version_reach_the_sender_before_a_tensor() -> None:
    for version, refusal, expected in [
        (1, "1 missing: e", "1 missing: e"),
        (7, None, "version 1 is sent, 7 was"),
    ]:
        sender = WeightSender(make_exporter(), "gloo", rank=0, timeout_s=TIMEOUT_S)
        peer = Peer(receive_until_error, sender.open(), version, refusal)
        sender.connect()
        with pytest.raises(
            ChannelError,
            match=f"starting the update to version 1: refused by receiver 1: {expected}",
        ):
            sender.send(1)
        text, num_loaded, _ = peer.result()
        assert expected in text and num_loaded == 0


def refuse_once_then_receive(info: dict[str, Any]) -> int:
    end, store = join(info), Store()
    with pytest.raises(ChannelError, match="not now"):
        end.receive(1, store.load, "not now")
    return end.receive(2, store.load).num_params


def test_channel_goes_on_after_a_refusal() -> None:
    sender = WeightSender(make_exporter(), "gloo", rank=0, timeout_s=TIMEOUT_S)
    peer = Peer(refuse_once_then_receive, sender.open())
    sender.connect()
    with pytest.raises(ChannelError, match="not now"):
        sender.send(1)
    assert sender.send(2).version == 2
    assert peer.result() == 4


def fail_in_the_middle(info: dict[str, Any]) -> int:
    end, store = join(info), Store()

    def load(tensors: Any) -> None:
        store[next(tensors)[0]] = torch.zeros(1)
        next(tensors)
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        end.receive(1, load)
    return end.receive(2, store.load).num_params


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_failure_while_loading_is_told_and_the_channel_goes_on(backend: str) -> None:
    sender = WeightSender(make_exporter(), backend, rank=0, timeout_s=TIMEOUT_S)
    peer = Peer(fail_in_the_middle, sender.open())
    sender.connect()
    with pytest.raises(
        ChannelError, match=r"receiver 1: loading failed after 1 of 4 tensors.*no room"
    ):
        sender.send(1)
    assert sender.send(2).version == 2
    assert peer.result() == 4


def send_until_bucket(pipe: Any, backend: str, last_bucket: int) -> None:
    """A sender that dies after `last_bucket` buckets."""
    sender = WeightSender(make_exporter(), backend, rank=0, timeout_s=TIMEOUT_S)
    pipe.send(sender.open())
    sender.connect()
    transport, give = sender._end.transport, sender._end.transport.give

    def give_or_die(index: int) -> None:
        if index == last_bucket:
            os._exit(1)
        give(index)

    transport.give = give_or_die
    sender.send(1)


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_sender_that_dies_is_an_error_within_the_timeout(backend: str) -> None:
    context = multiprocessing.get_context("forkserver")
    pipe, child = context.Pipe()
    process = context.Process(target=send_until_bucket, args=(child, backend, 2), daemon=True)
    process.start()
    text, num_loaded, seconds = receive_until_error(pipe.recv(), 1)
    assert "the sender" in text and "bucket" in text and num_loaded < 4
    assert seconds < TIMEOUT_S / 2  # noticed, not waited out
    process.join()


def die_after_joining(info: dict[str, Any], index: int = 0) -> None:
    join(info, index)
    os._exit(1)


def test_receiver_that_dies_or_never_comes_is_named() -> None:
    sender = WeightSender(
        make_exporter(), "gloo", rank=0, num_receivers=2, timeout_s=SHORT_TIMEOUT_S
    )
    info = sender.open()
    # Receiver 1 finds the sender there, and the sender later finds that receiver 1 has come.
    sender._end.store.set("joined/0", "1")
    peer = Peer(receive_until_join_fails, info)
    assert "receiver 1 of 2: receiver 2 did not join within 2 s" in peer.result()
    with pytest.raises(ChannelError, match="the sender of 2: receiver 2 did not join within 2 s"):
        sender.connect()
    with pytest.raises(ChannelError, match="not open"):
        sender.send(1)
    sender = WeightSender(make_exporter(), "gloo", rank=0, timeout_s=TIMEOUT_S)
    dying = Peer(die_after_joining, sender.open())
    sender.connect()
    dying.process.join()
    with pytest.raises(ChannelError, match="starting the update to version 1"):
        sender.send(1)


def receive_until_join_fails(info: dict[str, Any]) -> str:
    with pytest.raises(ChannelError) as error:
        join(info)
    return str(error.value)


def test_sender_that_does_not_send_is_an_error_within_the_timeout() -> None:
    sender = WeightSender(make_exporter(), "gloo", rank=0, timeout_s=TIMEOUT_S)
    peer = Peer(receive_until_error, sender.open(), 1, None, 0, SHORT_TIMEOUT_S)
    sender.connect()
    text, _, seconds = peer.result()
    assert "no answer from the sender" in text and seconds < TIMEOUT_S / 2


def test_wrong_layouts_of_channels_are_refused() -> None:
    layout = make_exporter().layout
    with pytest.raises(ValueError, match="'mail': use one of gloo, nccl, ipc"):
        SendingEnd("mail", 1, layout, CPU)
    with pytest.raises(ValueError, match="nccl cannot carry tensors on cpu"):
        SendingEnd("nccl", 1, layout, CPU)
    with pytest.raises(ValueError, match="one receiver, not 2"):
        SendingEnd("ipc", 2, layout, CPU)


def test_engines_join_the_channels_of_their_layout() -> None:
    infos = [{"address": {"port": port}, "layout": {}} for port in range(4)]
    places = [engine_info(infos, "ipc", engine, 2)["joins"] for engine in range(2)]
    assert [[(p["address"]["port"], p["rank"]) for p in joins] for joins in places] == [
        [(0, 1), (1, 1)],
        [(2, 1), (3, 1)],
    ]
    places = [engine_info([infos[0], None], "nccl", engine, 2)["joins"] for engine in range(2)]
    assert [[(p["address"]["port"], p["rank"]) for p in joins] for joins in places] == [
        [(0, 1), (0, 2)],
        [(0, 3), (0, 4)],
    ]


def when_open(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` with the channel info that a trainer rank writes to `path`."""
    while not path.exists():
        time.sleep(0.05)
    return function(json.loads(path.read_text()), *args)


def be_refused(info: dict[str, Any], version: int, told: Path) -> Any:
    """Receive until an error, and say so."""
    error = receive_until_error(info, version)
    told.touch()
    return error


def two_trainers(rank: int, backend: str, folder: Path) -> None:
    """Send once, then again to a receiver that expects another version."""
    sharded = fsdp_utils.shard_model(make_model(5))
    sender = WeightSender(
        WeightExporter(sharded, torch.bfloat16, 512), backend, rank=rank, timeout_s=TIMEOUT_S
    )
    for round_ in ("first", "second"):
        info = sender.open()
        if info:
            (folder / "partial").with_suffix(f".{rank}").write_text(json.dumps(info))
            (folder / f"partial.{rank}").rename(folder / f"{round_}{rank}")
        sender.connect()
        if round_ == "first":
            assert sender.send(4, verify=True).num_params == 4
            continue
        # A refusal at one rank is an error on every rank, and nobody is left in a collective.
        reason = "version 5 is sent, 9 was" if rank == 0 else "failed on another trainer rank"
        with pytest.raises(ChannelError, match=reason):
            sender.send(5)
    deadline = time.monotonic() + TIMEOUT_S
    while (
        not (folder / "told").exists() and time.monotonic() < deadline
    ):  # with the sender its answer would be gone
        time.sleep(0.05)
    sender.close()


@pytest.mark.parametrize(("backend", "num_senders"), [("gloo", 1), ("ipc", 2)])
def test_two_trainer_ranks_send_their_shards(
    backend: str, num_senders: int, tmp_path: Path
) -> None:
    """To one receiver from rank 0 (gloo), or each rank to its own (ipc)."""
    senders = range(num_senders)
    receiving = [
        Peer(when_open, tmp_path / f"first{rank}", receive_versions, 0, [4]) for rank in senders
    ]
    # Rank 1's receiver would take version 5; it waits for a sender that does not begin.
    refused = Peer(when_open, tmp_path / "second0", be_refused, 9, tmp_path / "told")
    waiting = [
        Peer(when_open, tmp_path / f"second{rank}", receive_until_error, 5) for rank in senders[1:]
    ]
    in_ranks(2, two_trainers, backend, tmp_path)
    for peer in receiving:
        ((received, weights),) = peer.result()
        assert received.num_verified == 4
        assert all(
            (weights[name] == t.float().numpy()).all() for name, t in expected_weights(5).items()
        )
    assert "version 5 is sent, 9 was" in refused.result()[0]
    assert all("the sender" in peer.result()[0] for peer in waiting)


@pytest.mark.parametrize("dying", [0, 1])
def test_receiver_that_dies_is_noticed_by_all_without_waiting(dying: int) -> None:
    sender = WeightSender(make_exporter(), "gloo", rank=0, num_receivers=2, timeout_s=TIMEOUT_S)
    info = sender.open()
    dead, survivor = (
        Peer(die_after_joining, info, dying),
        Peer(receive_until_error, info, 1, None, 1 - dying),
    )
    sender.connect()
    dead.process.join()
    start = time.monotonic()
    with pytest.raises(ChannelError, match="starting the update to version 1"):
        sender.send(1)
    assert time.monotonic() - start < TIMEOUT_S / 4
    text, num_loaded, seconds = survivor.result()
    assert num_loaded == 0 and seconds < TIMEOUT_S / 2, text
