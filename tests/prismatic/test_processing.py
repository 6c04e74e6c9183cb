"""Images, prompts and the tiny tokenizer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TVF

from prismatic.extern.hf.processing_prismatic import (
    EMPTY_PIECE,
    PrismaticImageProcessor,
    PrismaticProcessor,
    load_processor,
)
from prismatic.extern.hf.tiny_prismatic import (
    TinyVLAConfig,
    build_tiny_tokenizer,
    sincos_position_2d,
    validate_tiny,
)

FUSED = {
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 56, 56]] * 2,
    "interpolations": ["bicubic"] * 2,
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
}


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> PrismaticProcessor:
    return load_processor(tiny_model_dir)


def random_image(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def test_normalize_equals_torchvision_dinov2_first() -> None:
    images = random_image(3, 56, 56, 3)
    pixels = PrismaticImageProcessor(**FUSED).normalize(torch.from_numpy(images))
    assert pixels.shape == (3, 6, 56, 56)
    for row, image in enumerate(images):
        tensor = TVF.to_tensor(image)
        for index, (mean, std) in enumerate(zip(FUSED["means"], FUSED["stds"], strict=True)):
            expected = TVF.normalize(tensor, mean, std)
            torch.testing.assert_close(
                pixels[row, 3 * index : 3 * index + 3], expected, rtol=1e-5, atol=1e-5
            )


def test_normalize_uses_the_files_rounded_statistics_where_it_has_them() -> None:
    # openvla-7b's file: its tvf_normalize_params are the means rounded to bfloat16, and the model saw those.
    rounded = [
        {
            "inplace": False,
            "mean": [0.484375, 0.455078125, 0.40625],
            "std": [0.228515625, 0.2236328125, 0.224609375],
        },
        {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ]
    image_processor = PrismaticImageProcessor(**FUSED, tvf_normalize_params=rounded)
    white = torch.full((1, 56, 56, 3), 255, dtype=torch.uint8)
    pixels = image_processor.normalize(white, torch.float64)
    assert pixels.dtype == torch.float64
    torch.testing.assert_close(
        pixels[0, 0, 0, 0].item(), (1 - 0.484375) / 0.228515625, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(pixels[0, 4, 5, 5].item(), 1.0)


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 56, 56, 3), torch.zeros(1, 28, 56, 3, dtype=torch.uint8)]
)
def test_normalize_refuses_other_types_and_sizes(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(B, 56, 56, 3\)"):
        PrismaticImageProcessor(**FUSED).normalize(bad)


def test_resize_equals_torchvisions_on_pil_for_each_strategy() -> None:
    image = random_image(90, 120, 3)
    pil = Image.fromarray(image)
    bicubic = TVF.InterpolationMode.BICUBIC
    naive = PrismaticImageProcessor(**FUSED).resize(image)
    assert np.array_equal(naive, np.array(TVF.resize(pil, [56, 56], bicubic)))
    crop = PrismaticImageProcessor(**{**FUSED, "image_resize_strategy": "resize-crop"}).resize(
        image
    )
    assert np.array_equal(crop, np.array(TVF.center_crop(TVF.resize(pil, 56, bicubic), [56, 56])))
    letterbox = PrismaticImageProcessor(**{**FUSED, "image_resize_strategy": "letterbox"}).resize(
        pil
    )
    padded = TVF.pad(pil, [0, 15, 0, 15], fill=127)
    assert np.array_equal(letterbox, np.array(TVF.resize(padded, [56, 56], bicubic)))


@pytest.mark.parametrize(
    ("width", "height"), [(320, 240), (240, 320), (321, 240), (240, 321), (322, 241), (57, 56)]
)
def test_letterbox_pads_both_ends_equally_as_openvla_does(width: int, height: int) -> None:
    """OpenVLA's arithmetic on torchvision: half the difference at each end, shorter side to 56, centre crop."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)
    image_processor = PrismaticImageProcessor(**{**FUSED, "image_resize_strategy": "letterbox"})
    longer = max(width, height)
    left, top = int((longer - width) / 2), int((longer - height) / 2)
    padded = TVF.pad(Image.fromarray(image), [left, top, left, top], fill=(127, 127, 127))
    assert padded.width == padded.height or (longer - min(width, height)) % 2
    resized = TVF.resize(padded, 56, TVF.InterpolationMode.BICUBIC, antialias=True)
    expected = np.array(TVF.center_crop(resized, [56, 56]))
    assert np.array_equal(image_processor.resize(image), expected)


@pytest.mark.parametrize(
    ("strategy", "size"), [("letterbox", 56), ("resize-crop", 56), ("resize-naive", [56, 56])]
)
def test_the_resize_parameters_are_those_of_openvlas_processor(strategy: str, size: object) -> None:
    """What OpenVLA's own processor derives and saves: a number is the shorter side, a list the whole image."""
    image_processor = PrismaticImageProcessor(**{**FUSED, "image_resize_strategy": strategy})
    assert [p["size"] for p in image_processor.to_dict()["tvf_resize_params"]] == [size, size]


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = random_image(56, 56, 3)
    assert np.array_equal(PrismaticImageProcessor(**FUSED).resize(image), image)


def test_an_unknown_resize_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="'stretch'.*resize-naive"):
        PrismaticImageProcessor(**{**FUSED, "image_resize_strategy": "stretch"})


def test_prompt_is_bos_two_template_tokens_words_and_the_empty_piece(
    processor: PrismaticProcessor,
) -> None:
    tokens = processor.tokenizer.convert_ids_to_tokens(
        processor.prompt_ids("Pick up the RED block")
    )
    head, tail = "In: What action should the robot take to ", "?\nOut:"
    assert tokens == ["<s>", head, "▁pick", "▁up", "▁the", "▁red", "▁block", tail, "▁"]


def test_every_instruction_of_the_tabletop_is_one_token_a_word(
    processor: PrismaticProcessor,
) -> None:
    from ppo.envs.tabletop import SUITE

    for instruction in SUITE.instructions:
        assert len(processor.prompt_ids(instruction)) == len(instruction.split()) + 4, instruction


def test_the_empty_piece_is_not_appended_twice(
    processor: PrismaticProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "prismatic.extern.hf.processing_prismatic.PROMPT_TEMPLATE", "{instruction} "
    )
    ids = processor.prompt_ids("open the drawer, template changed")
    assert ids[-1] == processor.empty_piece_token_id and ids[-2] != processor.empty_piece_token_id


def test_prompt_ids_are_the_callers_to_change(processor: PrismaticProcessor) -> None:
    processor.prompt_ids("open the drawer").append(5)
    assert processor.prompt_ids("open the drawer")[-1] == processor.empty_piece_token_id


def test_unknown_words_are_spelled_in_bytes_and_decode_again(processor: PrismaticProcessor) -> None:
    text = "push the xylophön, now"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer.decode(ids) == text
    assert processor.prompt_ids("push the xyz") != processor.prompt_ids("push the xyy")


def test_tokenizer_layout_is_llamas() -> None:
    tokenizer = build_tiny_tokenizer(("zyzzyva",))
    vocab = tokenizer.get_vocab()
    assert [vocab[token] for token in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")] == [
        0,
        1,
        2,
        3,
        258,
    ]
    size = vocab["<PAD>"]
    assert [vocab["<action_0>"], vocab["<action_255>"], len(tokenizer)] == [
        size - 256,
        size - 1,
        size + 1,
    ]
    assert size % 64 == 0 and sorted(vocab.values()) == list(range(size + 1))
    assert EMPTY_PIECE in vocab and EMPTY_PIECE + "zyzzyva" in vocab


def test_collate_pads_on_the_right(processor: PrismaticProcessor) -> None:
    ids, mask = processor.collate_prompts([[1, 5, 6], [1, 7]])
    assert ids.tolist() == [[1, 5, 6], [1, 7, processor.pad_token_id]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]] and ids.dtype == mask.dtype == torch.int64


def test_call_gives_what_openvlas_processor_gives(processor: PrismaticProcessor) -> None:
    images = [Image.fromarray(random_image(40, 30, 3)), random_image(28, 28, 3)]
    prompts = ["In: What action should the robot take to lift it?\nOut:", "lift it"]
    inputs = processor(prompts, images)
    assert inputs["pixel_values"].shape == (2, 6, 28, 28)
    assert inputs["input_ids"][0].tolist() == processor.prompt_ids("lift it")[:-1]
    assert inputs["attention_mask"].sum(1).tolist() == [5, 3]
    resized = torch.from_numpy(processor.image_processor.resize(images[0]))[None]
    torch.testing.assert_close(
        inputs["pixel_values"][:1], processor.image_processor.normalize(resized)
    )


def test_a_tokenizer_without_the_empty_piece_is_refused(processor: PrismaticProcessor) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "<pad>": 2}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )
    with pytest.raises(ValueError, match="empty piece"):
        PrismaticProcessor(processor.image_processor, bare)


def test_tokenizer_round_trips_through_auto_tokenizer_in_a_fresh_process(
    tiny_model_dir: Path,
) -> None:
    text = "In: What action should the robot take to pick up the ball?\nOut:"
    load = f"AutoTokenizer.from_pretrained({str(tiny_model_dir)!r})"
    code = f"from transformers import AutoTokenizer; print({load}({text!r}).input_ids)"
    # A dead proxy and the offline switch: whatever wants the network fails.
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PATH": "/usr/bin:/bin",
    }
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    expected = load_processor(tiny_model_dir).prompt_ids("pick up the ball")[:-1]
    assert output.stdout.strip().splitlines()[-1] == str(expected)


def test_position_embedding_tells_rows_from_columns() -> None:
    grid, dim = 4, 16
    embedding = sincos_position_2d(grid, dim)[0].reshape(grid, grid, dim)
    half = dim // 2
    assert torch.equal(
        embedding[2, 0, :half], embedding[2, 3, :half]
    )  # y does not depend on the column
    assert torch.equal(embedding[0, 3, half:], embedding[2, 3, half:])
    torch.testing.assert_close(embedding[3, 1, 0], torch.tensor(3.0).sin())
    torch.testing.assert_close(
        embedding[3, 1, half + 1], torch.tensor(1 / 10).sin()
    )  # second of four frequencies
    flat = embedding.reshape(-1, dim)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 0.1


def test_sizes_that_cannot_work_are_all_named() -> None:
    bad = TinyVLAConfig(image_size=60, patch_size=14, vision_dim=97, llm_dim=190, vision_depth=1)
    with pytest.raises(
        ValueError, match="(?s)image_size 60.*vision_dim 97.*llm_dim 190.*vision_depth is 1"
    ):
        validate_tiny(bad)
