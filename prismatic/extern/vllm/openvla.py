"""OpenVLA for vLLM: one class for the 7B and for tiny models, images in as uint8.

The ViTs and the projector are the Hugging Face ones (replicated on every tensor-parallel rank); the Llama is vLLM's.
Parameter names are the checkpoint's. Shapes: B images, H W pixels, P patches, D hidden, N tokens.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.multimodal import BaseDummyOptions
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    TimingContext,
)
from vllm.sequence import IntermediateTensors

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import (
    PrismaticProjector,
    PrismaticVisionBackbone,
    create_featurizer,
)
from prismatic.extern.vllm.inputs import IMAGE, PIXELS, ROW, action_request
from prismatic.extern.vllm.vision import MAX_GRAPH_IMAGES, GraphedEncoder
from prismatic.model_files import read_json_object


def count_patches(config: OpenVLAConfig) -> int:
    """Image tokens of one image, asked of the first ViT itself (built without memory)."""
    with torch.device("meta"):
        return create_featurizer(config, 0).patch_embed.num_patches


def read_pixel_statistics(model_dir: str | Path) -> tuple[Tensor, Tensor]:
    """Means and standard deviations (num_vits, 3) of `preprocessor_config.json`, for pixels scaled to [0, 1]."""
    settings = read_json_object(Path(model_dir) / "preprocessor_config.json")
    # openvla-7b was trained with its `tvf_normalize_params` (the means and stds rounded to bfloat16), not with `means`.
    rows = settings.get("tvf_normalize_params")
    means = [row["mean"] for row in rows] if rows else settings["means"]
    stds = [row["std"] for row in rows] if rows else settings["stds"]
    # On CPU by name: the model loader's device context would put them elsewhere.
    cpu = torch.device("cpu")
    return torch.tensor(means, dtype=torch.float32, device=cpu), torch.tensor(
        stds, dtype=torch.float32, device=cpu
    )


def compile_blocks(backbone: PrismaticVisionBackbone) -> None:
    """Compile the ViTs' blocks in place, for any batch: all blocks of a ViT share one graph, compiled in seconds.

    The weights are arguments of the graph, so that updates and sleeping do not concern it.
    """
    for featurizer in backbone.featurizers:
        for block in featurizer.blocks:
            block.compile(dynamic=True)


class OpenVLAProcessingInfo(BaseProcessingInfo):
    """Sizes that vLLM needs to plan: one image a prompt, always the same number of tokens."""

    def get_hf_config(self) -> OpenVLAConfig:
        """Return the model's configuration."""
        return self.ctx.get_hf_config(OpenVLAConfig)

    @cached_property
    def num_patches(self) -> int:
        """Image tokens of one image."""
        return count_patches(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """One image."""
        return {IMAGE: 1}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the number of patches."""
        return {IMAGE: self.num_patches}


class OpenVLADummyInputsBuilder(BaseDummyInputsBuilder[OpenVLAProcessingInfo]):
    """The input vLLM measures memory with: a token prompt (there is no tokenizer) and a black image."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Nothing: see `get_dummy_processor_inputs`."""
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, BaseDummyOptions]
    ) -> MultiModalDataDict:
        """Return black images of the model's size."""
        size = self.info.get_hf_config().image_sizes[0]
        return {IMAGE: [np.zeros((size, size, 3), np.uint8)] * mm_counts.get(IMAGE, 0)}

    def get_dummy_processor_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, BaseDummyOptions]
    ) -> ProcessorInputs:
        """Return the images with a prompt of one token."""
        data = self.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        return ProcessorInputs(
            prompt=[0], mm_data_items=self.info.parse_mm_data(data, validate=False)
        )


class OpenVLAMultiModalProcessor(BaseMultiModalProcessor[OpenVLAProcessingInfo]):
    """Requests given as `{"prompt_token_ids": ..., "multi_modal_data": {"image": uint8 array}}`.

    The engine of this project builds its requests itself (`action_request`); this serves profiling and plain vLLM use.
    """

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Return the engine input. Raises ValueError for text, no image, or an image of another size."""
        config = self.info.get_hf_config()
        if isinstance(inputs.prompt, str):
            raise ValueError(
                "the prompt is text: OpenVLA takes prompt_token_ids (PrismaticProcessor.prompt_ids)"
            )
        image = inputs.mm_data_items.get_items(IMAGE, ImageProcessorItems).get(0)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        if tuple(pixels.shape) != (config.image_sizes[0], config.image_sizes[0], 3):
            raise ValueError(
                f"the image has shape {tuple(pixels.shape)}: resize it to {config.image_sizes[0]} first"
            )
        return action_request(
            list(inputs.prompt),
            pixels,
            inputs.get_mm_hashes(self.info.model_id)[IMAGE][0],
            num_patches=self.info.num_patches,
            placeholder_id=config.pad_token_id,
        )

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Any:
        raise NotImplementedError("`apply` does the whole work")

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        raise NotImplementedError("`apply` does the whole work")


@MULTIMODAL_REGISTRY.register_processor(
    OpenVLAMultiModalProcessor, info=OpenVLAProcessingInfo, dummy_inputs=OpenVLADummyInputsBuilder
)
class OpenVLAForActionPrediction(nn.Module, SupportsMultiModal):
    """OpenVLA with vLLM's Llama. Sequence: [BOS] [P projected patches] [rest of the prompt] [action tokens]."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """No text stands for the image: its place is fixed."""
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = cast(OpenVLAConfig, vllm_config.model_config.hf_config)
        means, stds = read_pixel_statistics(vllm_config.model_config.model)
        # Plain attributes: as buffers they would look to vLLM's weight reload like weights that never came.
        self._pixel_scale, self._pixel_shift = 1.0 / (255.0 * stds), -means / stds
        with self._mark_tower_model(vllm_config, IMAGE):  # type: ignore[operator]
            self.vision_backbone = PrismaticVisionBackbone(config)
            self.projector = PrismaticProjector(
                bool(config.use_fused_vision_backbone),
                self.vision_backbone.embed_dim,
                config.text_config.hidden_size,
            )
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model: Any = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        self._vision_is_compiled = vllm_config.compilation_config.compile_mm_encoder
        if self._vision_is_compiled:
            compile_blocks(self.vision_backbone)
        self._graphed = (
            GraphedEncoder(self._encode)
            if self._vision_is_compiled and torch.cuda.is_available()
            else None
        )
        self._encoded: Any = ()
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.pad_token_id])  # type: ignore[operator]
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def normalize_pixels(self, pixels_BHWC: Tensor) -> Tensor:
        """Return (B, 3 * num_vits, H, W) in the ViTs' dtype from uint8, normalised once for each ViT, in float32."""
        if self._pixel_scale.device != pixels_BHWC.device:
            self._pixel_scale = self._pixel_scale.to(pixels_BHWC.device)
            self._pixel_shift = self._pixel_shift.to(pixels_BHWC.device)
        pixels = pixels_BHWC.permute(0, 3, 1, 2).float().unsqueeze(1)
        normalized = (
            pixels * self._pixel_scale[..., None, None] + self._pixel_shift[..., None, None]
        )
        return normalized.flatten(1, 2).to(
            self.vision_backbone.featurizer.patch_embed.proj.weight.dtype
        )

    @torch.inference_mode()
    def encode_images(self, pixels_BHWC: Tensor) -> None:
        """Start encoding (B, H, W, 3) uint8 images of the CPU; requests then name their row (`action_request`).

        On a GPU this only queues the work: it runs while requests are made and scheduled.
        """
        device = next(self.projector.parameters()).device
        parts = []
        for pixels in pixels_BHWC.split(MAX_GRAPH_IMAGES):
            if device.type == "cuda":
                pixels = pixels.pin_memory().to(device, non_blocking=True)
            parts.append(self._graphed(pixels) if self._graphed else self._encode(pixels))
        self._encoded = parts[0] if len(parts) == 1 else torch.cat(parts)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Return (B, P, D) of `rows` (B, 1) of the last `encode_images`, or of `pixels` (B, H, W, 3) uint8."""
        rows, pixels_BHWC = kwargs.get(ROW), kwargs.get(PIXELS)
        if isinstance(rows, Tensor):
            return [self._encoded[row] for row in rows.flatten().tolist()]
        return self._encode(pixels_BHWC) if isinstance(pixels_BHWC, Tensor) else []

    def _encode(self, pixels_BHWC: Tensor) -> Tensor:
        # A batch of one would be compiled for itself, in the middle of a run: it is encoded twice instead.
        num_images = len(pixels_BHWC)
        if self._vision_is_compiled and num_images == 1:
            pixels_BHWC = pixels_BHWC.expand(2, -1, -1, -1)
        return self.projector(self.vision_backbone(self.normalize_pixels(pixels_BHWC))[:num_images])

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Return the hidden states (N, D) of the scheduled tokens."""
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return float32 logits (N, vocabulary): the trainer's for the action tokens, minus infinity for all others.

        As the trainer computes them, from the head's action rows in float32: in bfloat16 a logit of 8 is rounded to
        0.03, and every log-prob with it. Tensor parallelism splits the head's rows; each rank adds those it has.
        """
        config, head = self.config, self.language_model.lm_head
        first, end = config.first_action_token_id, config.action_vocab_size
        first_row, end_row = (
            head.shard_indices.org_vocab_start_index,
            head.shard_indices.org_vocab_end_index,
        )
        own = range(max(first, first_row), min(end, end_row))
        hidden_ND = hidden_states.float()
        logits = hidden_ND.new_full((len(hidden_ND), config.text_config.vocab_size), -torch.inf)
        actions = hidden_ND.new_zeros((len(hidden_ND), end - first))
        if own:
            rows = head.weight[own.start - first_row : own.stop - first_row]
            actions[:, own.start - first : own.stop - first] = F.linear(hidden_ND, rows.float())
        logits[:, first:end] = tensor_model_parallel_all_reduce(actions)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load (a part of) a checkpoint by its own names."""
        return AutoWeightsLoader(self).load_weights(weights)
