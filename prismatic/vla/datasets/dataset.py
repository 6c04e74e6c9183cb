"""The iterable PyTorch dataset for supervised fine-tuning, and its collator.

B batch, L prompt tokens, A action tokens (7), H W image.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets.augmentation import augment, draw_params
from prismatic.vla.datasets.mixtures import check_mixture, dataset_dir, resolve_mixture
from prismatic.vla.datasets.sources import (
    DatasetSpec,
    MemorySource,
    Reading,
    StreamSource,
    decoded_gib,
)
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.datasets.transforms import get_transform

logger = logging.getLogger("ppo_vla.data")

IGNORE_INDEX = -100
_AUGMENTATION = 502


def load_specs(
    data_root_dir: str | Path, dataset_name: str, *, num_threads: int = 1
) -> list[DatasetSpec]:
    """Resolve a mixture, check its directories and read (or compute) its statistics.

    Raises ValueError with all problems at once.
    """
    problems = check_mixture(data_root_dir, dataset_name)
    if problems:
        raise ValueError("\n".join(problems))
    specs = []
    for name, weight in resolve_mixture(dataset_name):
        path, transform = dataset_dir(data_root_dir, name), get_transform(name)
        statistics = dataset_statistics(path, transform, num_threads=num_threads)
        specs.append(DatasetSpec(name, path, weight, transform, statistics))
    return specs


class RLDSDataset(IterableDataset[dict[str, Any]]):
    """Transitions of an RLDS mixture as training samples.

    A sample: `image` (H, W, 3) uint8 at the model's size, `prompt_ids` (L,) int64, `action_ids` (7,) int64, `action`
    (7,) float32 normalised, `dataset_name`. For training it never ends and each transition comes in a fresh order
    every epoch; otherwise it yields everything once, in stored order, and does not augment. Iterating anew starts
    the same seeded order again.

    Args:
        specs: from `load_specs`.
        reading: image size, rank, seed, train or not, threads.
        prompt_ids: instruction -> token ids up to where the actions start (`PrismaticProcessor.prompt_ids`).
        action_tokenizer: of the model.
        image_aug: OpenVLA's augmentation (training only).
        cache_gib: mixtures whose decoded frames fit are kept in memory, larger ones are streamed through a
            shuffle buffer.
    """

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        reading: Reading,
        prompt_ids: Callable[[str], Sequence[int]],
        action_tokenizer: ActionTokenizer,
        *,
        image_aug: bool = False,
        cache_gib: float = 4.0,
    ) -> None:
        super().__init__()
        self.specs, self.reading = list(specs), reading
        self.image_aug = image_aug and reading.train
        self._prompt_ids, self._action_tokenizer = prompt_ids, action_tokenizer
        self._prompt_cache: dict[str, np.ndarray] = {}
        needed = decoded_gib(specs, reading.image_size)
        self.in_memory = needed <= cache_gib
        self._source = (MemorySource if self.in_memory else StreamSource)(specs, reading)
        where = (
            "in memory"
            if self.in_memory
            else f"streamed, shuffle buffer {reading.shuffle_buffer_size}"
        )
        logger.info(
            "%d transitions of %d datasets, %.2f GiB of frames: %s",
            len(self),
            len(specs),
            needed,
            where,
        )

    def __len__(self) -> int:
        """Transitions of all datasets and ranks."""
        return sum(spec.num_transitions for spec in self.specs)

    @property
    def statistics(self) -> dict[str, Any]:
        """`dataset_statistics.json`: dataset name -> statistics."""
        return {spec.name: dict(spec.statistics) for spec in self.specs}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise ValueError(
                "RLDSDataset does its own prefetching: use num_workers=0 in the DataLoader"
            )
        for number, chunk in enumerate(self._source.chunks()):
            images = chunk.images_CHW3
            if self.image_aug:
                rng = np.random.default_rng(
                    (_AUGMENTATION, self.reading.seed, self.reading.rank, number)
                )
                images = augment(images, draw_params(len(chunk), rng))
            action_ids_CA = self._action_tokenizer.encode(chunk.actions_CA)
            for i in range(len(chunk)):
                yield {
                    "image": images[i],
                    "prompt_ids": self._tokenize(chunk.instructions[i]),
                    "action_ids": action_ids_CA[i],
                    "action": chunk.actions_CA[i],
                    "dataset_name": self.specs[chunk.dataset_index_C[i]].name,
                }

    def _tokenize(self, instruction: str) -> np.ndarray:
        if instruction not in self._prompt_cache:
            self._prompt_cache[instruction] = np.asarray(self._prompt_ids(instruction), np.int64)
        return self._prompt_cache[instruction]


@dataclass(frozen=True)
class ActionCollator:
    """Batch samples: prompt, 7 action tokens and EOS, padded on the right; labels on the actions and EOS only."""

    pad_token_id: int
    eos_token_id: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `images` (B, H, W, 3) uint8, normalised `actions` (B, A) and the text, all (B, L + A + 1) int64.

        The text is `input_ids`, `attention_mask` and `labels`.
        """
        longest = max(len(s["prompt_ids"]) for s in samples)
        action_ids_BA = np.stack([s["action_ids"] for s in samples])
        num_targets = action_ids_BA.shape[1] + 1
        shape = (len(samples), longest + num_targets)
        input_ids = np.full(shape, self.pad_token_id, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        for row, sample in enumerate(samples):
            start = len(sample["prompt_ids"])
            end = start + num_targets
            input_ids[row, :start] = sample["prompt_ids"]
            input_ids[row, start:end] = labels[row, start:end] = [
                *sample["action_ids"],
                self.eos_token_id,
            ]
            attention_mask[row, :end] = 1
        return {
            "images": torch.from_numpy(np.stack([s["image"] for s in samples])),
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "actions": torch.from_numpy(np.stack([s["action"] for s in samples])),
        }


def iterate_batches(
    dataset: RLDSDataset, batch_size: int, collator: ActionCollator
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches of `batch_size` in the dataset's order; a last partial batch comes only without training."""
    samples: list[dict[str, Any]] = []
    for sample in dataset:
        samples.append(sample)
        if len(samples) == batch_size:
            yield collator(samples)
            samples = []
    if samples:
        yield collator(samples)
