"""FlashAttention that reads a prompt's keys and values where the layer has just computed them, not from the cache.

Through the pages of the KV cache, FlashAttention 3 took 53 ms for 128 prompts of 290 tokens on a H200 (openvla-7b, 5 %
of a call): it gathers blocks of 32 tokens and cannot use the copy engine. Nothing precedes our prompts (no prefix is
ever shared), so a step of prompts needs no pages. Steps with decoding requests go vLLM's way.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)


class PromptFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Marks the metadata of steps in which every request starts."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """Return vLLM's metadata with `prompts_only`: no request has tokens in the cache."""
        metadata: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        lengths, starts = (
            common_attn_metadata.seq_lens_cpu_upper_bound,
            common_attn_metadata.query_start_loc_cpu,
        )
        # A decode step: do not look further, it may be recorded into a CUDA graph.
        is_prefill = common_attn_metadata.max_query_len > 1 and lengths is not None
        num_reqs = common_attn_metadata.num_reqs
        metadata.prompts_only = is_prefill and torch.equal(
            (starts[1 : num_reqs + 1] - starts[:num_reqs]).int(), lengths[:num_reqs].int()
        )
        return metadata


class PromptFlashAttentionImpl(FlashAttentionImpl):
    """FlashAttention without pages where the metadata says so."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write causal attention of (N, heads, head size) into `output` and return it."""
        if not getattr(attn_metadata, "prompts_only", False):
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        num_tokens = attn_metadata.num_actual_tokens
        flash_attn_varlen_func(
            q=query[:num_tokens],
            k=key[:num_tokens],
            v=value[:num_tokens],
            out=output[:num_tokens],
            cu_seqlens_q=attn_metadata.query_start_loc,
            cu_seqlens_k=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            max_seqlen_k=attn_metadata.max_query_len,
            softmax_scale=self.scale,
            causal=True,
            fa_version=self.vllm_flash_attn_version,
        )
        return output


class PromptFlashAttentionBackend(FlashAttentionBackend):
    """vLLM's FLASH_ATTN with these two classes."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Return the attention itself."""
        return PromptFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Return what prepares a step."""
        return PromptFlashAttentionMetadataBuilder
