"""Images and prompts as OpenVLA wants them; `preprocessor_config.json` field for field as in openvla/openvla-7b."""

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from prismatic.extern.hf.folder_checks import (
    PREPROCESSOR_NAME,
    TOKENIZER_CONFIG_NAME,
    check_preprocessor,
    check_tokenizer_files,
    read_config,
)
from prismatic.model_files import checksum_problems, raise_file_problems, reading
from prismatic.regular_files import folder_problems

PROMPT_TEMPLATE = "In: What action should the robot take to {instruction}?\nOut:"
EMPTY_PIECE = "▁"
RESIZE_STRATEGIES = ("resize-naive", "letterbox", "resize-crop")
# torchvision's and PIL's numbers for the interpolations of timm's data configuration.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


class PrismaticImageProcessor(BaseImageProcessor):
    """Resize uint8 images to the model's size and normalise them once for each ViT.

    The arguments are openvla-7b's. The `tvf_*` lists, one entry for each ViT, are derived from the others unless a
    file gives them; then the file's values count (openvla-7b's `tvf_normalize_params` are its means and stds rounded to
    bfloat16, and it was trained with those). Raises ValueError for an unknown `image_resize_strategy`.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: list[list[int]] | None = None,
        interpolations: list[str] | None = None,
        means: list[list[float]] | None = None,
        stds: list[list[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if image_resize_strategy not in RESIZE_STRATEGIES:
            raise ValueError(
                f"image_resize_strategy is {image_resize_strategy!r}: it must be one of {RESIZE_STRATEGIES}"
            )
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = (
            [[3, 224, 224]] if input_sizes is None else [list(size) for size in input_sizes]
        )
        self.interpolations = (
            ["bicubic"] * len(self.input_sizes) if interpolations is None else list(interpolations)
        )
        self.means = [[0.5, 0.5, 0.5]] if means is None else [list(mean) for mean in means]
        self.stds = [[0.5, 0.5, 0.5]] if stds is None else [list(std) for std in stds]
        letterbox = image_resize_strategy == "letterbox"
        self.tvf_do_letterbox = letterbox
        self.tvf_letterbox_fill = (
            [int(255 * value) for value in self.means[-1]] if letterbox else None
        )
        self.tvf_resize_params = [
            self._resize_params(index) for index in range(len(self.input_sizes))
        ]
        self.tvf_crop_params = [{"output_size": size[1:]} for size in self.input_sizes]
        self.tvf_normalize_params = [
            {"inplace": False, "mean": mean, "std": std}
            for mean, std in zip(self.means, self.stds, strict=True)
        ]
        super().__init__(**kwargs)

    def _resize_params(self, index: int) -> dict[str, Any]:
        # A list stretches the whole image to that size. A single number is the length of the shorter
        # side, and the centre is cropped afterwards. `letterbox` is of the second kind, as in OpenVLA,
        # because its padding can leave one side a pixel longer than the other.
        size: Any = self.input_sizes[index][1:]
        letterbox = self.image_resize_strategy == "letterbox" and size[0] == size[1]
        if self.image_resize_strategy == "resize-crop" or letterbox:
            size = min(size)
        interpolation = INTERPOLATIONS[self.interpolations[index]]
        return {"antialias": True, "interpolation": interpolation, "max_size": None, "size": size}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that `normalize` expects and `resize` gives."""
        return self.input_sizes[0][1], self.input_sizes[0][2]

    def normalize(  # type: ignore[override]
        self, images_BHWC: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return (B, 3 x number of ViTs, H, W): `(image / 255 - mean) / std` for each ViT, on the images' device.

        `images_BHWC` is uint8 of the model's size. The arithmetic is float32, the result `dtype`.
        Raises ValueError for another type or size.
        """
        if images_BHWC.dtype != torch.uint8 or tuple(images_BHWC.shape[1:]) != (
            *self.image_size,
            3,
        ):
            raise ValueError(
                f"images are {images_BHWC.dtype} {tuple(images_BHWC.shape)}: they must be uint8 (B, "
                f"{self.image_size[0]}, {self.image_size[1]}, 3); call resize first"
            )
        scale, shift = self._affine(images_BHWC.device)
        pixels = images_BHWC.permute(0, 3, 1, 2).repeat(1, len(self.tvf_normalize_params), 1, 1)
        return torch.addcmul(shift, pixels.float(), scale).to(dtype)

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return 1 / (255 std) and -mean / std of all channels, (1, C, 1, 1) float32, computed in float64."""
        means = np.concatenate([params["mean"] for params in self.tvf_normalize_params])
        stds = np.concatenate([params["std"] for params in self.tvf_normalize_params])
        return _affine_tensors(tuple(means.tolist()), tuple(stds.tolist()), device)

    def resize(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """Return the image (H, W, 3) uint8 at the model's size by the checkpoint's strategy (PIL, antialiased).

        All ViTs see the same resized image: openvla-7b's two have the same size and interpolation.
        """
        pil = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
        height, width = self.image_size
        if pil.size == (width, height):
            return np.array(pil)
        if self.tvf_do_letterbox:
            pil = self._letterbox(pil)
        size, resample = (
            self.tvf_resize_params[0]["size"],
            self.tvf_resize_params[0]["interpolation"],
        )
        if isinstance(size, int):
            short = min(pil.size)
            pil = pil.resize((size * pil.width // short, size * pil.height // short), resample)
            left, top = round((pil.width - width) / 2), round((pil.height - height) / 2)
            return np.array(pil.crop((left, top, left + width, top + height)))
        return np.array(pil.resize((size[1], size[0]), resample))

    def _letterbox(self, pil: Image.Image) -> Image.Image:
        """Pad the shorter side with the fill colour, equally on both ends.

        As in OpenVLA, each end gets half the difference of the sides, rounded down: where the
        difference is odd, the result is one pixel short of a square.
        """
        side = max(pil.size)
        left, top = (side - pil.width) // 2, (side - pil.height) // 2
        padded_size = (pil.width + 2 * left, pil.height + 2 * top)
        padded = Image.new("RGB", padded_size, tuple(self.tvf_letterbox_fill or (0, 0, 0)))
        padded.paste(pil, (left, top))
        return padded

    def preprocess(self, images: Any, return_tensors: Any = "pt", **_: Any) -> BatchFeature:
        """Return `pixel_values` (B, C, H, W) float32 of one image or a list, PIL or (H, W, 3) uint8 arrays."""
        image_list = images if isinstance(images, list | tuple) else [images]
        stacked = torch.from_numpy(np.stack([self.resize(image) for image in image_list]))
        return BatchFeature({"pixel_values": self.normalize(stacked)}, tensor_type=return_tensors)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Return `preprocess(images)`."""
        return self.preprocess(images, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the file's fields; transformers 5 would leave out what is None and `processor_class`."""
        names = {
            "image_processor_type": type(self).__name__,
            "processor_class": "PrismaticProcessor",
        }
        return {**copy.deepcopy(self.__dict__), **names}


@lru_cache(maxsize=16)
def _affine_tensors(
    means: tuple[float, ...], stds: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64)
    scale, shift = 1.0 / (255.0 * std), -mean / std
    return tuple(value.float().view(1, -1, 1, 1).to(device) for value in (scale, shift))  # type: ignore[return-value]


class PrismaticProcessor(ProcessorMixin):
    """The image processor and the tokenizer of one model folder, and OpenVLA's prompt."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: PrismaticImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.bos_token_id: Any = tokenizer.bos_token_id
        self.pad_token_id: Any = tokenizer.pad_token_id
        self.empty_piece_token_id: Any = tokenizer.convert_tokens_to_ids(EMPTY_PIECE)
        if None in (self.bos_token_id, self.pad_token_id) or self.empty_piece_token_id in (
            None,
            tokenizer.unk_token_id,
        ):
            raise ValueError(
                f"the tokenizer needs BOS, PAD and the empty piece {EMPTY_PIECE!r}: {tokenizer!r}"
            )
        self._prompt_ids: dict[str, list[int]] = {}

    def prompt_ids(self, instruction: str) -> list[int]:
        """Return BOS, OpenVLA's prompt with the lower-cased instruction, and the empty piece if not already last.

        Cached by instruction: environments ask for the same few every step.
        """
        if instruction not in self._prompt_ids:
            prompt = PROMPT_TEMPLATE.format(instruction=instruction.lower())
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            tail = [] if ids[-1] == self.empty_piece_token_id else [self.empty_piece_token_id]
            self._prompt_ids[instruction] = [self.bos_token_id, *ids, *tail]
        return list(self._prompt_ids[instruction])

    def collate_prompts(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids (B, L) padded on the right to the longest, and the mask (B, L) int64, 1 on real tokens."""
        length = max(map(len, prompts))
        ids = [prompt + [self.pad_token_id] * (length - len(prompt)) for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts]
        return torch.tensor(ids), torch.tensor(mask)

    def __call__(self, text: Any = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        """Return `input_ids`, `attention_mask` and `pixel_values` of full prompts, as OpenVLA's own processor does.

        Here `text` is the whole prompt, tokenised as it stands: the empty piece is `predict_action`'s to add.
        """
        kwargs = {"return_tensors": "pt", "padding": True, **kwargs}
        encoded = self.tokenizer([text] if isinstance(text, str) else list(text), **kwargs)
        pixels = self.image_processor(images, return_tensors=kwargs["return_tensors"])
        return BatchFeature({**encoded, "pixel_values": pixels["pixel_values"]})

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `preprocessor_config.json` and the tokenizer's files, which every OpenVLA code reads.

        transformers 5 would put the image processor into `processor_config.json`, which older code does not know.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not supported: save to a folder and upload that")
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        config_path = Path(save_directory) / "tokenizer_config.json"
        fields = json.loads(config_path.read_text())
        # How it was loaded here is nobody else's business.
        fields = {
            name: value
            for name, value in fields.items()
            if name not in ("is_local", "local_files_only")
        }
        if fields.get("tokenizer_class") == "TokenizersBackend":
            # The name before transformers 5, which 5 knows too.
            fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def load_processor(model_dir: str | Path) -> PrismaticProcessor:
    """Load the image processor and the tokenizer of a model folder, from disk only and without its code.

    The folder is untrusted: see `folder_checks`. Raises ValueError naming the file that is damaged, OSError if one is
    missing.
    """
    raise_file_problems(folder_problems(model_dir))
    config = read_config(model_dir)
    raise_file_problems(
        checksum_problems(model_dir, lambda name: name.endswith((".json", ".model")))
    )
    check_tokenizer_files(model_dir)
    check_preprocessor(model_dir, reserved=lambda name: hasattr(PrismaticImageProcessor, name))
    folder, options = str(model_dir), {"local_files_only": True, "trust_remote_code": False}
    with reading(Path(model_dir) / "tokenizer.json", "the tokenizer"):
        # Without the configuration transformers reads it as one of no type, and warns of that.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, padding_side="right", **options
        )
    with reading(Path(model_dir) / PREPROCESSOR_NAME, "the image processor"):
        image_processor = PrismaticImageProcessor.from_pretrained(folder, local_files_only=True)
        processor = PrismaticProcessor(image_processor, tokenizer)
    with reading(Path(model_dir) / TOKENIZER_CONFIG_NAME, "a prompt with this tokenizer"):
        processor.prompt_ids("push the red block")
    largest, vocab_size = max(tokenizer.get_vocab().values()), config.text_config.vocab_size
    if largest >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has token {largest}, the model only {vocab_size} tokens"
        )
    return processor
