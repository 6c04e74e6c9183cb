"""Padded sizes of the recorded image encoder; the recordings themselves are tested on a GPU (test_vllm_gpu.py)."""

from prismatic.extern.vllm.vision import MAX_GRAPH_IMAGES, padded_size


def test_sizes_hold_every_batch_and_are_few() -> None:
    sizes = [padded_size(number) for number in range(1, MAX_GRAPH_IMAGES + 1)]
    assert all(size >= number for number, size in enumerate(sizes, start=1))
    assert all(size - number < 8 for number, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [2, 4, *range(8, MAX_GRAPH_IMAGES + 1, 8)]
