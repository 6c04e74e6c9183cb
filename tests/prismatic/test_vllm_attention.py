"""Which steps read their keys without pages, and that those get causal attention; the kernel itself needs a GPU."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int], scale: float
) -> torch.Tensor:
    """Causal attention of each sequence by itself; (N, heads, size)."""
    parts = []
    for first, end in zip(starts, starts[1:], strict=False):
        one = [tensor[first:end].transpose(0, 1) for tensor in (q, k, v)]
        parts.append(
            F.scaled_dot_product_attention(*one, is_causal=True, scale=scale).transpose(0, 1)
        )
    return torch.cat(parts)


def fake_kernel(
    q: Any, k: Any, v: Any, out: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **options: Any
) -> None:
    """Stand for FlashAttention, which is not built for CPUs."""
    assert cu_seqlens_k is cu_seqlens_q and options["causal"] and "block_table" not in options
    out.copy_(reference(q, k, v, cu_seqlens_q.tolist(), options["softmax_scale"]))


def run_in_child() -> tuple[list[bool], float, str]:
    """Marks of three steps, the largest error of a prompt step, and who was asked in a decode step."""
    from vllm.v1.attention.backends import fa_utils, flash_attn

    fa_utils.flash_attn_varlen_func = fake_kernel
    from prismatic.extern.vllm import attention

    flash_attn.FlashAttentionMetadataBuilder.build = lambda *args, **kwargs: SimpleNamespace()
    flash_attn.FlashAttentionImpl.forward = lambda *args, **kwargs: "vLLM"
    builder = object.__new__(attention.PromptFlashAttentionMetadataBuilder)
    marks = []
    # Three prompts; one of them with a decoding request; decoding requests only. Lengths are padded, as in the runner.
    for starts, lengths, longest in (
        ([0, 5, 9, 16], [5, 4, 7, 0], 7),
        ([0, 5, 6, 13], [5, 300, 7, 0], 7),
        ([0, 1, 2, 3], [300, 301, 302, 0], 1),
    ):
        common = SimpleNamespace(
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
            max_query_len=longest,
            num_reqs=3,
        )
        marks.append(bool(builder.build(0, common).prompts_only))
    implementation = object.__new__(attention.PromptFlashAttentionImpl)
    implementation.scale, implementation.vllm_flash_attn_version = 0.3, 3
    starts = [0, 5, 9, 16]
    step = SimpleNamespace(
        prompts_only=True,
        num_actual_tokens=16,
        query_start_loc=torch.tensor(starts),
        max_query_len=7,
    )
    q, k, v = torch.randn(3, 20, 2, 8)  # four padded tokens
    output = torch.zeros(20, 2, 8)
    implementation.forward(None, q, k, v, None, step, output)
    error = (output[:16] - reference(q, k, v, starts, 0.3)).abs().max().item() + output[
        16:
    ].abs().max().item()
    other = implementation.forward(None, q, k, v, None, SimpleNamespace(prompts_only=False), output)
    return marks, error, other


def test_only_steps_of_prompts_leave_the_pages() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        marks, error, other = pool.submit(run_in_child).result(timeout=500)
    assert marks == [True, False, False]
    assert error < 1e-6 and other == "vLLM"
