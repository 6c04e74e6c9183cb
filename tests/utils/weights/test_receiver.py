"""What the engine's side checks of a weight update without vLLM: names, shapes, counts, and what the workers say."""

from typing import Any

import pytest
import torch

from utils.weights.buckets import BucketLayout
from utils.weights.channel import ChannelError
from utils.weights.receiver import (
    WeightReceiver,
    WeightUpdateError,
    manifest_problems,
)

SHAPES = {"a.weight": (2, 3), "b.weight": (4,)}


def test_manifest_must_be_exact() -> None:
    assert manifest_problems(SHAPES, list(SHAPES.items())) == []
    assert manifest_problems(SHAPES, [("a.weight", (2, 3))]) == ["1 missing: b.weight"]
    assert manifest_problems(SHAPES, [*SHAPES.items(), ("c", (1,))]) == ["1 unexpected: c"]
    assert manifest_problems(SHAPES, [*SHAPES.items(), ("b.weight", (4,))]) == [
        "1 sent more than once: b.weight"
    ]
    assert manifest_problems(SHAPES, {"a.weight": (3, 2), "b.weight": (4,)}.items()) == [
        "1 wrong shape: a.weight is (3, 2), not (2, 3)"
    ]
    many = manifest_problems({f"p{i}": (1,) for i in range(10)}, [])
    assert many == ["10 missing: p0, p1, p2, p3 and 6 more"]


class RecordingLLM:
    """Stands for vLLM's LLM: it notes which calls of the transfer interface came, and what the workers report."""

    def __init__(self, reports: list[dict[str, int]] | None = None) -> None:
        self.calls: list[str] = []
        self.infos: list[dict[str, Any]] = []
        self.reports = reports or []
        self.problems: list[str | None] = []
        self.llm_engine = self

    def __getattr__(self, name: str):
        return lambda *args: self.calls.append(name)

    def update_weights(self, request: dict[str, Any]) -> None:
        self.calls.append("update_weights")
        self.infos.append(request["update_info"])

    def collective_rpc(self, function: Any) -> list[Any]:
        return self.problems if function.__name__ == "_problem_of" else self.reports


CACHES = ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]
REPORT = {"num_params": 2, "num_bytes": 20, "version": 3, "num_verified": 2}


def channel_receiver(llm: RecordingLLM, shapes: dict[str, tuple[int, ...]]) -> WeightReceiver:
    """A receiver that expects SHAPES, joined to a channel that brings `shapes`."""
    receiver = WeightReceiver(llm, {**SHAPES, "rotary_emb.inv_freq": (2,)}, "gloo")
    receiver.init(
        "gloo",
        {"layout": BucketLayout.plan(shapes.items(), torch.bfloat16, 100).to_dict(), "joins": []},
    )
    assert llm.calls == ["init_weight_transfer_engine"]
    return receiver


def test_channel_is_refused_with_the_reason_for_the_trainer() -> None:
    llm = RecordingLLM()
    receiver = channel_receiver(llm, {"a.weight": (3, 2), "c": (1,)})
    llm.problems = ["refused by receiver 1"]
    with pytest.raises(
        WeightUpdateError, match="nothing was overwritten.*missing: b.weight; .*a.weight is .3, 2."
    ):
        receiver.receive(3)
    assert llm.infos[0]["version"] == 3 and "missing: b.weight" in llm.infos[0]["refusal"]
    assert receiver.version == 0 and "version 3 failed" in str(receiver.problem)


def test_workers_must_report_the_same_complete_version() -> None:
    llm = RecordingLLM([REPORT, REPORT])
    receiver = channel_receiver(llm, SHAPES)
    report = receiver.receive(3)
    assert (report.num_params, report.num_bytes, report.version, report.num_verified) == (
        2,
        20,
        3,
        2,
    )
    assert llm.infos == [{"version": 3, "refusal": None}] and llm.calls[-3:] == CACHES
    assert receiver.problem is None and receiver.version == 3
    for wrong in ({"num_params": 1}, {"version": 2}, {"num_verified": 0}):
        llm.reports = [REPORT, REPORT | wrong]
        with pytest.raises(WeightUpdateError, match="workers disagree"):
            receiver.receive(3)
        assert receiver.problem is not None
    llm.reports = [REPORT | {"num_params": 1}] * 2
    with pytest.raises(WeightUpdateError, match="workers disagree"):
        receiver.receive(3)


def test_broken_channel_is_a_failed_update() -> None:
    llm = RecordingLLM([REPORT, REPORT])
    receiver = channel_receiver(llm, SHAPES)
    llm.problems = [None, "no answer from the sender"]
    with pytest.raises(WeightUpdateError, match="version 3 failed: no answer from the sender"):
        receiver.receive(3)
    assert "no answer" in str(receiver.problem) and receiver.version == 0
    llm.problems = [None, None]
    assert receiver.receive(3).version == 3 and receiver.problem is None


def test_channel_that_is_not_joined_is_an_error() -> None:
    llm = RecordingLLM()
    llm.problems = ["the sender did not join", "the sender did not join"]
    with pytest.raises(ChannelError, match="^the sender did not join$"):
        channel_receiver(llm, SHAPES)


def test_receiving_needs_a_channel() -> None:
    with pytest.raises(ValueError, match="init_weight_transfer"):
        WeightReceiver(RecordingLLM(), SHAPES, "nccl").receive(1)
