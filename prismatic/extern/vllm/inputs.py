"""What one OpenVLA request looks like to vLLM: [BOS] [image patches] [rest of the prompt].

Built here directly, without tokenizer, PIL or hashing: for a 56-pixel image vLLM's own rendering takes longer than the
vision backbone. The image travels as uint8 and is normalised on the model's device.
"""

import torch
from vllm.inputs import MultiModalInput, mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

IMAGE = "image"
PIXELS = "pixels"
_FIELD = MultiModalBatchedField()


def action_request(
    prompt_ids: list[int], image_HWC: torch.Tensor, image_key: str, *, num_patches: int, placeholder_id: int
) -> MultiModalInput:
    """Return the engine input for one prompt and one image.

    `prompt_ids` start with BOS and hold no image tokens; `image_HWC` is (H, W, 3) uint8 of the model's size.
    `image_key` names the image in vLLM's encoder cache: two different images must never share it.
    """
    item = MultiModalKwargsItem({PIXELS: MultiModalFieldElem(data=image_HWC, field=_FIELD)})
    return mm_input(
        prompt_token_ids=[prompt_ids[0], *[placeholder_id] * num_patches, *prompt_ids[1:]],
        mm_kwargs=MultiModalKwargsItems({IMAGE: [item]}),
        mm_hashes={IMAGE: [image_key]},
        mm_placeholders={IMAGE: [PlaceholderRange(offset=1, length=num_patches)]},
    )
