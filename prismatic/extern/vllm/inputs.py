"""What one OpenVLA request looks like to vLLM: [BOS] [image patches] [rest of the prompt].

Built here directly, without tokenizer, PIL or hashing: for a 56-pixel image vLLM's own rendering takes longer than the
vision backbone. The engine encodes all images of a call at once, before its requests, which name rows of the result.
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
ROW = "row"
_PIXELS_FIELD = MultiModalBatchedField()
# Read by Python code: on the GPU that would be a synchronisation.
_ROW_FIELD = MultiModalBatchedField(keep_on_cpu=True)


def action_request(
    prompt_ids: list[int],
    image: torch.Tensor | int,
    image_key: str,
    *,
    num_patches: int,
    placeholder_id: int,
) -> MultiModalInput:
    """Return the engine input for one prompt and one image.

    `prompt_ids` start with BOS and hold no image tokens; `image` is (H, W, 3) uint8 of the model's size, normalised on
    its device, or a row of the images given to `encode_images`.
    `image_key` names the image in vLLM's encoder cache: two different images must never share it.
    """
    if isinstance(image, int):
        item = MultiModalKwargsItem(
            {ROW: MultiModalFieldElem(data=torch.tensor([image]), field=_ROW_FIELD)}
        )
    else:
        item = MultiModalKwargsItem({PIXELS: MultiModalFieldElem(data=image, field=_PIXELS_FIELD)})
    return mm_input(
        prompt_token_ids=[prompt_ids[0], *[placeholder_id] * num_patches, *prompt_ids[1:]],
        mm_kwargs=MultiModalKwargsItems({IMAGE: [item]}),
        mm_hashes={IMAGE: [image_key]},
        mm_placeholders={IMAGE: [PlaceholderRange(offset=1, length=num_patches)]},
    )
