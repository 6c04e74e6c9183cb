"""OpenVLA as a transformers model: timm ViTs, an MLP projector and a Llama, in openvla-7b's parameter names.

Shapes: B batch, L prompt tokens, A action tokens (7), V action vocabulary (256), P patches, S sequence, D hidden.

Sequence: `[BOS] [P projected patches] [rest of the prompt] [action tokens] [padding]`, causal attention over all of it.
Prompts are padded on the right, so a causal mask alone already keeps every real token from seeing the padding: no
padding mask is ever built and SDPA takes its fast causal path. What stands at padded positions is never read.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerScale as TimmLayerScale
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging as transformers_logging

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.folder_checks import check_model_files
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.finite_weights import check_finite
from prismatic.model_files import SHOWN_BYTES, weight_bytes
from prismatic.vla.action_normalization import load_norm_stats, unnormalize_action
from prismatic.vla.action_tokenizer import ActionTokenizer

IGNORE_INDEX = -100


class ActionOutput(NamedTuple):
    """What `forward_actions` returns; a tuple so that FSDP finds the tensors in it.

    `logits_BAV`: float32, for each action token over the 256 action ids in ascending order, no temperature; None
    without action ids. `prompt_hidden_BD`: final-norm hidden state at each row's last real prompt token.
    """

    logits_BAV: Tensor | None
    prompt_hidden_BD: Tensor


@dataclass
class PrismaticCausalLMOutput(ModelOutput):
    """Output of `forward`. `loss` is None without labels; `label_ids` are the targets of `logits_at="labels"` (N,)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    label_ids: Tensor | None = None


class LayerScale(nn.Module):
    """timm's LayerScale with the parameter called `scale_factor`, as OpenVLA checkpoints call it."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(gamma.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` scaled channel by channel."""
        return x * self.scale_factor


def create_featurizer(config: OpenVLAConfig, index: int) -> Any:
    """Create the `index`-th ViT of `config` with random weights, all of timm's parameters and `scale_factor` names."""
    kwargs: dict[str, Any] = dict(
        (config.timm_model_kwargs or [{}] * len(config.timm_model_ids))[index]
    )
    if config.timm_override_act_layers[index] is not None:
        kwargs["act_layer"] = config.timm_override_act_layers[index]
    name, size = config.timm_model_ids[index], config.image_sizes[index]
    featurizer = timm.create_model(name, pretrained=False, num_classes=0, img_size=size, **kwargs)
    for module in list(featurizer.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, TimmLayerScale):
                setattr(module, child_name, LayerScale(child.gamma))
    return featurizer


class PrismaticVisionBackbone(nn.Module):
    """One ViT or two side by side: the patch tokens of the second-to-last block, channels concatenated, DINOv2 first.

    The last block, the final norm and SigLIP's attention pool are never computed; their weights exist because the
    checkpoints have them.
    """

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.use_fused_vision_backbone = config.use_fused_vision_backbone
        self.featurizer: Any = create_featurizer(config, 0)
        if self.use_fused_vision_backbone:
            self.fused_featurizer: Any = create_featurizer(config, 1)
        self.embed_dim = sum(featurizer.embed_dim for featurizer in self.featurizers)
        num_patches = {featurizer.patch_embed.num_patches for featurizer in self.featurizers}
        if len(num_patches) != 1:
            raise ValueError(
                f"the two ViTs give {sorted(num_patches)} patches: image and patch sizes must match"
            )
        self.num_patches = num_patches.pop()
        self._checkpointing = False

    @property
    def featurizers(self) -> list[Any]:
        """The ViTs in the order of their channels."""
        return (
            [self.featurizer, self.fused_featurizer]
            if self.use_fused_vision_backbone
            else [self.featurizer]
        )

    # transformers switches checkpointing by setting this attribute on every module that has it.
    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each ViT block is recomputed in the backward pass."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._checkpointing = enable
        for featurizer in self.featurizers:
            featurizer.set_grad_checkpointing(enable)

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Return (B, P, vision_dim) from normalised pixels, three channels for each ViT."""
        pixels = pixel_values_BCHW.split(3, dim=1)
        features = [
            _penultimate_patches(vit, vit_pixels)
            for vit, vit_pixels in zip(self.featurizers, pixels, strict=True)
        ]
        return torch.cat(features, dim=-1)


def _penultimate_patches(featurizer: Any, pixels_B3HW: Tensor) -> Tensor:
    """Patch tokens of block `len(blocks) - 2`, prefix tokens dropped, no final norm."""
    index = len(featurizer.blocks) - 2
    return featurizer.forward_intermediates(
        pixels_B3HW, [index], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
    )[0]


class PrismaticProjector(nn.Module):
    """The MLP between vision and language: three layers for a fused backbone (the first widens by four), else two."""

    def __init__(self, fused: bool, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        dims = (
            [vision_dim, 4 * vision_dim, llm_dim, llm_dim]
            if fused
            else [vision_dim, llm_dim, llm_dim]
        )
        self.fc1 = nn.Linear(dims[0], dims[1])
        self.fc2 = nn.Linear(dims[1], dims[2])
        if fused:
            self.fc3 = nn.Linear(dims[2], dims[3])

    def forward(self, features_BPD: Tensor) -> Tensor:
        """Return (B, P, llm_dim)."""
        projected = self.fc2(F.gelu(self.fc1(features_BPD)))
        return self.fc3(F.gelu(projected)) if hasattr(self, "fc3") else projected


class OpenVLAForActionPrediction(PreTrainedModel):
    """An OpenVLA policy. Loads and saves folders in openvla/openvla-7b's format without remote code."""

    config: OpenVLAConfig
    config_class = OpenVLAConfig
    norm_stats: dict[str, Any]
    vision_backbone: PrismaticVisionBackbone
    language_model: LlamaForCausalLM
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.vision_backbone = PrismaticVisionBackbone(config)
        self.projector = PrismaticProjector(
            bool(config.use_fused_vision_backbone),
            self.vision_backbone.embed_dim,
            config.text_config.hidden_size,
        )
        self.language_model = LlamaForCausalLM(config.text_config)
        self.norm_stats = config.norm_stats or {}
        self.action_tokenizer = ActionTokenizer.from_config(config)
        # timm has initialised the ViTs and torch the projector; transformers must not do it again with its own rule.
        for module in (*self.vision_backbone.modules(), *self.projector.modules()):
            module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass.

        peft reads this name. The property of transformers warns in some versions.
        """
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def recompute_activations(self) -> None:
        """Keep only the inputs of the blocks for the backward pass: less memory, a third more time.

        transformers has renamed its method; the old name warns where the new one exists.
        """
        enable = getattr(self, "activation_checkpointing_enable", None)
        (enable or self.gradient_checkpointing_enable)()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Return the ViTs' features (B, P, vision_dim) of normalised pixels (B, 6, H, W), before the projector.

        They depend on nothing that trains when the vision backbone is frozen, so they can be computed once a PPO step.
        """
        return self._encode(pixel_values)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        # Not through `encode_vision`: FSDP registers that as a forward of its own, which must not run inside another.
        return self.vision_backbone(
            pixel_values.to(self.vision_backbone.featurizer.patch_embed.proj.weight.dtype)
        )

    def forward_actions(
        self,
        prompt_ids_BL: Tensor,
        prompt_mask_BL: Tensor,
        action_ids_BA: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
    ) -> ActionOutput:
        """Score given action tokens and return the state at the end of each prompt: the PPO forward.

        Prompts are right-padded (`prompt_mask_BL` is 1 on real tokens); the actions follow each prompt's last real
        token, and the last action token is not fed, as nothing reads what follows it. The image comes as
        `pixel_values` (B, 6, H, W) or as `vision_features` (B, P, vision_dim) from `encode_vision`.
        """
        features_BPD = self._vision_features(pixel_values, vision_features)
        lengths_B = prompt_mask_BL.sum(dim=1)
        ids, num_read = prompt_ids_BL, 1
        if action_ids_BA is not None:
            ids, num_read = (
                _append_tokens(prompt_ids_BL, lengths_B, action_ids_BA[:, :-1]),
                action_ids_BA.shape[1],
            )
        hidden_BSD = self._hidden_states(self._embed(ids, features_BPD))
        hidden_BAD = _read_from(hidden_BSD, lengths_B + (features_BPD.shape[1] - 1), num_read)
        hidden_BAD = self.language_model.model.norm(hidden_BAD)
        logits = None if action_ids_BA is None else self._action_logits(hidden_BAD)
        return ActionOutput(logits, hidden_BAD[:, 0])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        vision_features: Tensor | None = None,
        logits_at: str = "all",
    ) -> PrismaticCausalLMOutput:
        """Run the policy as a language model, for supervised fine-tuning.

        `input_ids`, `attention_mask`, `labels` (B, L): text only, right-padded; labels are -100 where nothing is
        learnt. `loss` is the mean float32 cross-entropy over the labelled tokens of the whole vocabulary.
        `logits_at="all"` gives logits (B, L + P, vocabulary), aligned with the sequence (patches from position 1 on);
        `"labels"` computes only those that a label reads: (N, vocabulary), with their targets in `label_ids` (N,).

        Raises ValueError when padding is on the left or `logits_at` is unknown.
        """
        if logits_at not in ("all", "labels") or (logits_at == "labels" and labels is None):
            raise ValueError(
                f"logits_at is {logits_at!r}: it must be 'all', or 'labels' with labels given"
            )
        if attention_mask is not None:
            _check_right_padded(attention_mask)
        features_BPD = self._vision_features(pixel_values, vision_features)
        hidden_BSD = self.language_model.model.norm(
            self._hidden_states(self._embed(input_ids, features_BPD))
        )
        lm_head = self.language_model.lm_head
        if labels is None:
            return PrismaticCausalLMOutput(logits=lm_head(hidden_BSD))
        targets_BL = labels[:, 1:]
        supervised_BL = targets_BL != IGNORE_INDEX
        num_patches = features_BPD.shape[1]
        # The text token at index j >= 1 stands at position P + j and is predicted from the position before.
        predicting = slice(num_patches, num_patches + targets_BL.shape[1])
        label_ids = targets_BL[supervised_BL]
        if logits_at == "labels":
            logits = at_labels = lm_head(hidden_BSD[:, predicting][supervised_BL])
        else:
            logits = lm_head(hidden_BSD)
            at_labels = logits[:, predicting][supervised_BL]
        return PrismaticCausalLMOutput(
            F.cross_entropy(at_labels.float(), label_ids), logits, label_ids
        )

    @torch.inference_mode()
    def generate_actions(
        self,
        prompt_ids_BL: Tensor,
        prompt_mask_BL: Tensor,
        *,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        num_tokens: int = 7,
    ) -> Tensor:
        """Return greedy action tokens (B, `num_tokens`), each the best of the action ids, with a KV cache.

        Prompts are right-padded. A padded row leaves unused slots in the cache between its prompt and its actions;
        they are masked, and positions continue at the row's own length.
        """
        features_BPD = self._vision_features(pixel_values, vision_features)
        lengths_B = prompt_mask_BL.sum(dim=1) + features_BPD.shape[1]
        decoder = self.language_model.model
        output = decoder(inputs_embeds=self._embed(prompt_ids_BL, features_BPD), use_cache=True)
        hidden_B1D = _read_from(output.last_hidden_state, lengths_B - 1, 1)
        cache_mask = None
        if not bool(prompt_mask_BL.all()):
            slots = torch.arange(output.last_hidden_state.shape[1], device=lengths_B.device)
            cache_mask = (slots < lengths_B[:, None]).long()
        tokens: list[Tensor] = []
        for step in range(num_tokens):
            tokens.append(
                self._action_logits(hidden_B1D).argmax(-1) + self.config.first_action_token_id
            )
            if step == num_tokens - 1:
                break
            if cache_mask is not None:
                cache_mask = F.pad(cache_mask, (0, 1), value=1)
            output = decoder(
                input_ids=tokens[-1],
                attention_mask=cache_mask,
                position_ids=lengths_B[:, None] + step,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            hidden_B1D = output.last_hidden_state
        return torch.cat(tokens, dim=1)

    def predict_action(
        self,
        images: Any = None,
        instructions: str | list[str] | None = None,
        unnorm_key: str | None = None,
        *,
        processor: PrismaticProcessor | None = None,
        **inputs: Any,
    ) -> np.ndarray:
        """Return un-normalised actions, greedy over the action tokens: (7,) for one instruction, else (B, 7).

        Either `images` (one or a list: PIL or (H, W, 3) uint8) and `instructions` with a `processor`, or, as other
        OpenVLA code calls it, the tensors `input_ids`, `attention_mask` and `pixel_values`. The gripper is the model's
        (1 = open); `to_env_action` makes it LIBERO's.

        Raises ValueError when the inputs are incomplete or the checkpoint lacks `unnorm_key`.
        """
        stats = self._action_stats(unnorm_key)
        single = isinstance(instructions, str)
        if processor is not None and instructions is not None:
            instruction_list = (
                [instructions] if isinstance(instructions, str) else list(instructions)
            )
            image_list = [images] if single else list(images)
            ids, mask = processor.collate_prompts(
                [processor.prompt_ids(text) for text in instruction_list]
            )
            pixel_values = processor.image_processor(image_list).pixel_values
        else:
            missing = {"input_ids", "pixel_values"} - set(inputs)
            if missing:
                raise ValueError(
                    f"predict_action lacks {sorted(missing)}: give them, or images, instructions, processor"
                )
            ids, pixel_values = inputs["input_ids"], inputs["pixel_values"]
            mask = inputs.get("attention_mask", torch.ones_like(ids))
            ids, mask = _append_empty_piece(ids, mask, self.config)
            single = ids.shape[0] == 1
        _check_right_padded(mask)
        ids, mask, pixel_values = (tensor.to(self.device) for tensor in (ids, mask, pixel_values))
        tokens = self.generate_actions(
            ids, mask, pixel_values=pixel_values, num_tokens=len(stats["q01"])
        )
        actions = unnormalize_action(self.action_tokenizer.decode(tokens.cpu().numpy()), stats)
        return actions[0] if single else actions

    def _action_stats(self, unnorm_key: str | None) -> dict[str, Any]:
        """Return the statistics to un-normalise with; the key may be left out when there is only one."""
        if unnorm_key is None and len(self.norm_stats) == 1:
            unnorm_key = next(iter(self.norm_stats))
        if unnorm_key not in self.norm_stats:
            raise ValueError(
                f"unnorm_key {unnorm_key!r} is not in the checkpoint's norm_stats: it has {sorted(self.norm_stats)}"
            )
        return self.norm_stats[unnorm_key]["action"]

    def _vision_features(
        self, pixel_values: Tensor | None, vision_features: Tensor | None
    ) -> Tensor:
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("give either pixel_values or vision_features, and not both")
        return self._encode(pixel_values) if pixel_values is not None else vision_features  # type: ignore[return-value]

    def _embed(self, ids_BS: Tensor, features_BPD: Tensor) -> Tensor:
        """Embed the text and put the projected patches after BOS: (B, S + P, D)."""
        text_BSD = self.language_model.model.embed_tokens(ids_BS)
        patches_BPD = self.projector(features_BPD.to(text_BSD.dtype))
        return torch.cat([text_BSD[:, :1], patches_BPD, text_BSD[:, 1:]], dim=1)

    def _hidden_states(self, embeddings_BSD: Tensor) -> Tensor:
        """Hidden states of every position before the final norm; causal attention from position 0, nothing cached.

        Runs the layers itself: `LlamaModel.forward` would look for packed sequences in the positions, which waits for
        the GPU in every pass. Without a mask only these attention implementations are causal.
        """
        decoder = self.language_model.model
        if decoder.config._attn_implementation not in (
            "sdpa",
            "flash_attention_2",
            "flash_attention_3",
        ):
            raise ValueError(
                f"attn_implementation {decoder.config._attn_implementation!r} needs a mask that is not built here: "
                "use sdpa or flash_attention_2"
            )
        position_ids = torch.arange(embeddings_BSD.shape[1], device=embeddings_BSD.device)[None]
        position_embeddings = decoder.rotary_emb(embeddings_BSD, position_ids=position_ids)
        hidden_BSD = embeddings_BSD
        for layer in decoder.layers:
            hidden_BSD = layer(
                hidden_BSD,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
            )
        return hidden_BSD

    def _action_logits(self, hidden_BAD: Tensor) -> Tensor:
        """Logits of the action tokens only, float32: `lm_head`'s rows of those ids, with its LoRA if it has one."""
        rows = slice(self.config.first_action_token_id, self.config.action_vocab_size)
        lm_head = self.language_model.lm_head
        base = getattr(lm_head, "base_layer", lm_head)
        # A head that is sharded by itself has no plain weight here, and wrappers other than plain LoRA (DoRA, a module
        # to save) change more than a sum: both go through their own forward, at the price of the whole vocabulary.
        if (
            type(lm_head) is not nn.Linear
            and not _is_plain_lora(lm_head)
            or isinstance(base.weight, DTensor)
        ):
            return lm_head(hidden_BAD)[..., rows].float()
        logits = F.linear(hidden_BAD.float(), base.weight[rows].float())
        if base is lm_head or lm_head.disable_adapters or lm_head.merged:
            return logits
        for name in lm_head.active_adapters:
            if name in lm_head.lora_A:
                # The adapter may be float32 on a bfloat16 model.
                adapter_input = hidden_BAD.to(lm_head.lora_A[name].weight.dtype)
                low_rank = lm_head.lora_A[name](lm_head.lora_dropout[name](adapter_input))
                delta = F.linear(low_rank.float(), lm_head.lora_B[name].weight[rows].float())
                logits = logits + delta * lm_head.scaling[name]
        return logits


def _is_plain_lora(module: nn.Module) -> bool:
    """Whether `module` is peft's LoRA on a linear layer and nothing else. By attributes, so peft need not be there."""
    lora_b: Any = getattr(module, "lora_B", None)
    if lora_b is None or not isinstance(getattr(module, "base_layer", None), nn.Linear):
        return False
    return not getattr(module, "lora_variant", None) and all(
        layer.bias is None for layer in lora_b.values()
    )


def _append_tokens(ids_BL: Tensor, lengths_B: Tensor, tail_BA: Tensor) -> Tensor:
    """Return (B, L + A) ids with each row's tail right after its `lengths_B` real tokens; the padding moves to the end.

    Works on ids and without a look at the lengths' values, so it costs no synchronisation with the device.
    """
    num_prompt, num_tail = ids_BL.shape[1], tail_BA.shape[1]
    position = torch.arange(num_prompt + num_tail, device=ids_BL.device)
    in_tail = position - lengths_B[:, None]
    source = torch.where(
        in_tail < 0, position, (num_prompt + in_tail).clamp(max=num_prompt + num_tail - 1)
    )
    return torch.cat([ids_BL, tail_BA], dim=1).gather(1, source)


def _append_empty_piece(
    ids_BL: Tensor, mask_BL: Tensor, config: OpenVLAConfig
) -> tuple[Tensor, Tensor]:
    """Append the empty-piece token to every row that does not end with it."""
    lengths_B = mask_BL.sum(dim=1)
    ends_B = ids_BL.gather(1, lengths_B[:, None] - 1)[:, 0] == config.empty_piece_token_id
    lengths_B = lengths_B - ends_B.long()
    ids = _append_tokens(
        ids_BL, lengths_B, torch.full_like(ids_BL[:, :1], config.empty_piece_token_id)
    )
    mask = (torch.arange(ids.shape[1], device=ids.device) <= lengths_B[:, None]).long()
    return ids, mask


def _read_from(hidden_BSD: Tensor, first_B: Tensor, num: int) -> Tensor:
    """Return `hidden[b, first_b : first_b + num]` for every row: (B, num, D)."""
    position_BA = first_B[:, None] + torch.arange(num, device=first_B.device)
    return hidden_BSD.gather(1, position_BA[..., None].expand(-1, -1, hidden_BSD.shape[-1]))


def _check_right_padded(mask_BL: Tensor) -> None:
    """Raise ValueError for padding before a real token. Only looks on a CPU: a look at a GPU tensor would stall it."""
    if mask_BL.device.type == "cpu" and bool((mask_BL[:, 1:] > mask_BL[:, :-1]).any()):
        raise ValueError(
            "the prompts are padded on the left: set the tokenizer's padding_side to 'right'"
        )


def register_openvla() -> None:
    """Register the classes with transformers' Auto classes, so that `model_type: openvla` loads without remote code."""
    AutoConfig.register("openvla", OpenVLAConfig, exist_ok=True)
    AutoImageProcessor.register(
        OpenVLAConfig, slow_image_processor_class=PrismaticImageProcessor, exist_ok=True
    )
    AutoProcessor.register(OpenVLAConfig, PrismaticProcessor, exist_ok=True)
    AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)


def parameter_shapes(config: OpenVLAConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model that `config` describes; takes no memory."""
    with torch.device("meta"):
        return {
            name: tuple(p.shape)
            for name, p in OpenVLAForActionPrediction(config).state_dict().items()
        }


@contextlib.contextmanager
def bars_for(num_bytes: int) -> Iterator[None]:
    """Let transformers draw its progress bars in the block only if that reads or writes SHOWN_BYTES or more."""
    if num_bytes >= SHOWN_BYTES or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def load_model(
    model_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> OpenVLAForActionPrediction:
    """Load a model folder in openvla-7b's format; `norm_stats` are overridden by its `dataset_statistics.json`.

    `kwargs` go to `from_pretrained` (`attn_implementation="flash_attention_2"`, ...). Returned in evaluation mode.
    Tensors go to `device` one by one, cast there: no copy of the model is made in CPU memory.
    The folder is untrusted: raises what `check_model_files` does, before anything large is read, and ValueError naming
    file and tensor if a weight is NaN or infinite.
    """
    register_openvla()
    check_model_files(model_dir, parameter_shapes)
    options = {
        "dtype": dtype,
        "output_loading_info": True,
        "local_files_only": True,
        "use_safetensors": True,
        **kwargs,
    }
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    with bars_for(weight_bytes(model_dir)):
        loaded: Any = OpenVLAForActionPrediction.from_pretrained(str(model_dir), **options)
    model, info = loaded
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    check_finite(model_dir, model.named_parameters())
    model.norm_stats = load_norm_stats(model_dir)
    return model.to(device).eval()
