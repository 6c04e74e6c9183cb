"""Buckets straight from FSDP shards against the whole tensors, gathered and merged one by one, bit for bit."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tests.distributed import in_ranks
from utils import fsdp_utils, peft_utils
from utils.weights.buckets import ALIGNMENT, BucketLayout, checksums
from utils.weights.export import WeightExporter

TINY_BUCKET, HUGE_BUCKET = 1, 1 << 30


class Uneven(nn.Module):
    """Rows that two or three ranks cannot share evenly, a single row, and a linear layer for an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.one_row = nn.Parameter(torch.randn(1, 6))
        self.vector = nn.Parameter(torch.randn(7))
        self.linear = nn.Linear(12, 5)
        self.cube = nn.Parameter(torch.randn(3, 2, 2))


def reference(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Each tensor gathered and merged on its own, as `iterate_merged_parameters` does it, cast once."""
    return {name: t.clone().to(dtype) for name, t in fsdp_utils.iterate_merged_parameters(model)}


def exported(exporter: WeightExporter) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in exporter.buckets() for name, tensor in bucket}


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds: a shard, or all of a frozen parameter that a single rank keeps outside FSDP."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], merged: set[str]
) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        # A merged row's sum over the rank runs in another order when rows are split; one rounding of it may differ.
        tolerance = 2 * torch.finfo(tensor.dtype).eps if name in merged else 0
        torch.testing.assert_close(actual[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def exports_equal_reference(rank: int, model_dir: str, use_lora: bool, dtype: torch.dtype) -> None:
    from prismatic.extern.hf.modeling_prismatic import load_model

    torch.manual_seed(1)
    model, merged = load_model(model_dir), set()
    if use_lora:
        peft_utils.add_lora(model, rank=4, alpha=8)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
                merged.add(fsdp_utils.checkpoint_name(name.replace("lora_B.default.", "")))
    sharded = fsdp_utils.shard_model(model, min_unit_params=1)
    before = {n: local_part(p).clone() for n, p in sharded.named_parameters()}
    expected = reference(sharded, dtype)
    assert merged <= set(expected) and bool(merged) == use_lora
    for bucket_bytes in (TINY_BUCKET, 50_000, HUGE_BUCKET):
        exporter = WeightExporter(sharded, dtype, bucket_bytes)
        assert_same(exported(exporter), expected, merged)
        assert exporter.manifest == [(name, tuple(t.shape)) for name, t in expected.items()]
    assert exporter.num_buckets == 1
    assert all(torch.equal(before[n], local_part(p)) for n, p in sharded.named_parameters())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("use_lora", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_exported_buckets_equal_the_tensors_gathered_one_by_one(
    tiny_model_dir, world_size, use_lora, dtype
):
    in_ranks(world_size, exports_equal_reference, str(tiny_model_dir), use_lora, dtype)


def uneven_shards(rank: int) -> None:
    torch.manual_seed(0)
    model = Uneven()
    wrapper = peft_utils.add_lora(model, rank=3, alpha=6)
    nn.init.normal_(model.linear.lora_B["default"].weight)
    sharded = fsdp_utils.shard_model(model)
    assert sharded.one_row.to_local().shape[0] == (rank == 0)  # the other ranks hold nothing of it
    whole = reference(sharded, torch.float32)
    for bucket_bytes in (TINY_BUCKET, 2 * ALIGNMENT, HUGE_BUCKET):
        exporter = WeightExporter(sharded, torch.float32, bucket_bytes)
        assert_same(exported(exporter), whole, {"linear.weight"})
    # Only one rank keeps the buckets, the others just take part.
    buffer = exporter.new_buffer() if rank == 0 else None
    exporter.fill(0, buffer)
    if buffer is not None:
        assert_same(dict(exporter.layout.views(0, buffer)), whole, {"linear.weight"})
    # Both checks notice an adapter that is left out or switched off.
    wrapper.base_model.model.linear.scaling["default"] *= 2
    assert not torch.allclose(
        exported(exporter)["linear.weight"], whole["linear.weight"], atol=1e-3
    )


def test_uneven_and_empty_shards():
    in_ranks(3, uneven_shards)


def master_weights_are_exported(rank: int, model_dir: str) -> None:
    """After a forward pass without resharding the modules hold gathered bfloat16 copies."""
    from prismatic.extern.hf.modeling_prismatic import load_model

    sharded = fsdp_utils.shard_model(
        load_model(model_dir),
        param_dtype=torch.bfloat16,
        reshard_after_forward=False,
        min_unit_params=1,
    )
    expected = reference(sharded, torch.float32)
    exporter = WeightExporter(sharded, torch.float32)
    mask = torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad():
        ids = torch.full((2, 4), 5)
        sharded.forward_actions(
            ids, mask, torch.full((2, 7), 30), pixel_values=torch.zeros(2, 6, 28, 28).bfloat16()
        )
    assert any(p.dtype == torch.bfloat16 for p in sharded.parameters())
    assert_same(exported(exporter), expected, set())


def test_gathered_low_precision_copies_are_not_exported(tiny_model_dir):
    in_ranks(2, master_weights_are_exported, str(tiny_model_dir))


def ignored_parameters(rank: int, ignores_base: bool) -> None:
    """Layers of which FSDP holds only one part: the adapter, or the frozen weight."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Uneven()
    peft_utils.add_lora(model, rank=3, alpha=6)
    nn.init.normal_(model.linear.lora_B["default"].weight)
    whole = reference(model, torch.float32)
    ignored = {p for n, p in model.named_parameters() if ("lora" in n) != ignores_base}
    fully_shard(model, mesh=fsdp_utils.data_mesh(torch.device("cpu")), ignored_params=ignored)
    assert_same(
        exported(WeightExporter(model, torch.float32, TINY_BUCKET)), whole, {"linear.weight"}
    )


@pytest.mark.parametrize("ignores_base", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_adapter_and_weight_may_be_sharded_differently(world_size, ignores_base):
    in_ranks(world_size, ignored_parameters, ignores_base)


def column_shards(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(
        model,
        mesh=fsdp_utils.data_mesh(torch.device("cpu")),
        shard_placement_fn=lambda p: Shard(p.ndim - 1),
    )
    with pytest.raises(ValueError, match="only .Shard.dim=0.,. is exported"):
        WeightExporter(model, torch.float32)
    assert dist.get_world_size() == 2


def test_other_placements_are_refused():
    in_ranks(2, column_shards)


def test_plain_model_needs_no_process_group():
    model = nn.Linear(3, 2)
    exporter = WeightExporter(model, torch.bfloat16)
    assert_same(exported(exporter), reference(model, torch.bfloat16), set())
    assert exporter.all_agree(True) and not exporter.all_agree(False)


def test_layout_fills_buckets_in_order_and_aligns():
    shapes = [(str(i), (n,)) for i, n in enumerate([10, 10, 10, 1000, 1])]
    layout = BucketLayout.plan(shapes, torch.float32, 2 * ALIGNMENT)
    assert [[e.name for e in b] for b in layout.buckets] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert layout.buckets[0][1].offset == ALIGNMENT
    assert layout.buffer_bytes == 4000 and layout.payload_bytes == 4 * 1031
    assert BucketLayout.from_dict(layout.to_dict()) == layout
    flat = torch.zeros(layout.buffer_bytes, dtype=torch.uint8)
    layout.views(0, flat)[1][1].fill_(1.0)
    assert (
        flat.view(torch.float32)[ALIGNMENT // 4 :][:10].sum()
        == 10.0
        == flat.view(torch.float32).sum()
    )


def test_checksums_see_values_and_places(monkeypatch):
    tensors = [torch.randn(1000), torch.randn(37, 11).bfloat16(), torch.zeros(0)]
    sums = checksums(tensors)
    words = tensors[0].view(torch.int32).tolist()
    expected = [sum(words), sum(word * place for place, word in enumerate(words, start=1))]
    assert sums[0].tolist() == [(value + 2**63) % 2**64 - 2**63 for value in expected]
    assert sums[2].tolist() == [0, 0]
    monkeypatch.setattr("utils.weights.buckets.CHECKSUM_CHUNK", 64)
    assert torch.equal(checksums(tensors), sums)  # the same in pieces
    exchanged = tensors[0].clone()
    exchanged[[3, 4]] = tensors[0][[4, 3]]
    (row,) = checksums([exchanged])
    assert row[0] == sums[0, 0] and row[1] != sums[0, 1]
