"""Where transitions come from: a small mixture decoded into memory, or a large one streamed from its files.

Both yield chunks of raw transitions in a seeded order, for one rank of several.
N transitions in memory, C of a chunk, A action dimensions (7), H W image.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.vla.action_normalization import normalize_action
from prismatic.vla.datasets.mixtures import sampling_probabilities
from prismatic.vla.datasets.rlds import decode_text, frame_decoder, numpy_iterator, open_dataset
from prismatic.vla.datasets.tensorflow_setup import load_tensorflow
from prismatic.vla.datasets.transforms import DatasetTransform

logger = logging.getLogger("ppo_vla.data")

# Keeps the generator of this module apart from others made of the same seed.
_ORDER = 501


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a mixture.

    Attributes:
        name, path: its name and its directory.
        weight: relative to the other datasets, per transition.
        transform: how its actions are read.
        statistics: as `dataset_statistics` gives them.
    """

    name: str
    path: Path
    weight: float
    transform: DatasetTransform
    statistics: Mapping[str, Any]

    @property
    def num_transitions(self) -> int:
        """Steps over all episodes."""
        return int(self.statistics["num_transitions"])

    def policy_actions(self, actions_CA: np.ndarray) -> np.ndarray:
        """Stored actions -> transformed and normalised ones, float32 in [-1, 1] where they are normalised."""
        return normalize_action(self.transform.actions(actions_CA), self.statistics["action"])


@dataclass
class Chunk:
    """C transitions: `images_CHW3` uint8, normalised `actions_CA` float32, instructions, dataset indices."""

    images_CHW3: np.ndarray
    actions_CA: np.ndarray
    instructions: Sequence[str]
    dataset_index_C: np.ndarray

    def __len__(self) -> int:
        return len(self.actions_CA)


@dataclass(frozen=True)
class Reading:
    """How a source is read: image (height, width), rank of ranks, seed, whether to shuffle and repeat for ever."""

    image_size: tuple[int, int]
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    train: bool = True
    chunk_size: int = 64
    shuffle_buffer_size: int = 100_000
    num_threads: int = 1


def decoded_gib(specs: Sequence[DatasetSpec], image_size: tuple[int, int]) -> float:
    """Memory that the decoded frames of all datasets take."""
    return sum(s.num_transitions for s in specs) * image_size[0] * image_size[1] * 3 / 2**30


def index_stream(weights: Sequence[float], sizes: Sequence[int], seed: int) -> Iterator[np.ndarray]:
    """Endless blocks of indices into the concatenated datasets.

    With equal weights each block is a fresh permutation of everything. Otherwise each draw first picks a dataset
    with probability weight * size, then the next transition of that dataset's own endless permutations.
    """
    if len(set(weights)) == 1:
        for epoch in itertools.count():
            yield np.random.default_rng((_ORDER, seed, epoch)).permutation(sum(sizes))
    names = [str(i) for i in range(len(sizes))]
    probabilities = sampling_probabilities(
        dict(zip(names, weights, strict=True)), dict(zip(names, sizes, strict=True))
    )
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    streams = [_endless_permutations(size, (_ORDER, seed, 1 + i)) for i, size in enumerate(sizes)]
    rng = np.random.default_rng((_ORDER, seed, 0))
    while True:
        picked = rng.choice(len(sizes), size=4096, p=list(probabilities.values()))
        yield np.array([offsets[k] + next(streams[k]) for k in picked])


def _endless_permutations(size: int, key: tuple[int, ...]) -> Iterator[int]:
    for epoch in itertools.count():
        yield from np.random.default_rng((*key, epoch)).permutation(size).tolist()


class MemorySource:
    """All transitions of a mixture, decoded once.

    Every rank holds everything and takes every world_size-th index of one common order: over an epoch the ranks'
    shares are disjoint and complete.
    """

    def __init__(self, specs: Sequence[DatasetSpec], reading: Reading) -> None:
        self.reading = reading
        self._weights = [s.weight for s in specs]
        self._sizes = [s.num_transitions for s in specs]
        total = sum(self._sizes)
        self._images_NHW3 = np.empty((total, *reading.image_size, 3), np.uint8)
        self._actions_NA = np.empty((total, 7), np.float32)
        self._instruction_N = np.empty(total, np.int32)
        self._dataset_N = np.repeat(np.arange(len(specs), dtype=np.int32), self._sizes)
        self._instructions: list[str] = []
        start = 0
        for spec in specs:
            start = self._load(spec, start)

    def _load(self, spec: DatasetSpec, start: int) -> int:
        known = {text: i for i, text in enumerate(self._instructions)}
        stop = start + spec.num_transitions
        for images, actions, texts in _decoded_episodes(spec, self.reading):
            end = start + len(actions)
            if end > stop:
                break
            self._images_NHW3[start:end] = images
            self._actions_NA[start:end] = actions
            self._instruction_N[start:end] = [
                known.setdefault(decode_text(text, spec.path), len(known)) for text in texts
            ]
            start = end
        if start != stop:
            raise ValueError(
                f"{spec.path} does not hold {spec.num_transitions} transitions as its statistics say"
            )
        self._instructions = list(known)
        return stop

    def chunks(self) -> Iterator[Chunk]:
        """Chunks of this rank: endless and shuffled for training, else everything once in stored order."""
        pending = np.empty(0, np.int64)
        position = 0
        blocks = index_stream(self._weights, self._sizes, self.reading.seed)
        for block in blocks if self.reading.train else [np.arange(sum(self._sizes))]:
            # This rank's places of the endless order: rank, rank + world_size, ...
            first = (self.reading.rank - position) % self.reading.world_size
            position += len(block)
            pending = np.concatenate([pending, block[first :: self.reading.world_size]])
            while len(pending) >= self.reading.chunk_size:
                yield self._gather(pending[: self.reading.chunk_size])
                pending = pending[self.reading.chunk_size :]
        if len(pending):
            yield self._gather(pending)

    def _gather(self, index_C: np.ndarray) -> Chunk:
        return Chunk(
            self._images_NHW3[index_C],
            self._actions_NA[index_C],
            [self._instructions[i] for i in self._instruction_N[index_C]],
            self._dataset_N[index_C],
        )


def _decoded_episodes(
    spec: DatasetSpec, reading: Reading
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images (T, H, W, 3), policy actions (T, 7) and instructions (T,) bytes of each episode, in stored order."""
    tf = load_tensorflow(reading.num_threads)
    decode = frame_decoder(spec.path, reading.image_size)

    def read(episode: dict[str, Any]) -> tuple[Any, Any, Any]:
        steps = episode["steps"]
        images = tf.map_fn(decode, steps["observation"]["image"], fn_output_signature=tf.uint8)
        return images, steps["action"], steps["language_instruction"]

    dataset = open_dataset(spec.path, num_threads=reading.num_threads)
    dataset = dataset.map(read, num_parallel_calls=reading.num_threads)
    for images, actions, texts in numpy_iterator(dataset, [spec.path]):
        if not len(images) == len(actions) == len(texts):
            raise ValueError(
                f"{spec.path}: an episode has {len(images)} frames, {len(actions)} actions, {len(texts)} texts"
            )
        yield images, spec.policy_actions(actions), texts


class StreamSource:
    """A mixture read from its files again and again; frames stay encoded until they leave the shuffle buffer.

    Episodes are dealt to the ranks in turn, so the ranks' shares are disjoint and complete.
    """

    def __init__(self, specs: Sequence[DatasetSpec], reading: Reading) -> None:
        for spec in specs:
            if spec.statistics["num_trajectories"] < reading.world_size:
                raise ValueError(
                    f"{spec.path} has {spec.statistics['num_trajectories']} trajectories, fewer than the "
                    f"{reading.world_size} ranks: use fewer ranks, or raise --cache_gib to share single transitions"
                )
        self.specs, self.reading = list(specs), reading

    def chunks(self) -> Iterator[Chunk]:
        """Chunks of this rank: endless and shuffled for training, else everything once in stored order."""
        paths = [spec.path for spec in self.specs]
        for index_C, images, actions, texts in numpy_iterator(self._dataset(), paths):
            policy_actions = np.empty(actions.shape, np.float32)
            for i in np.unique(index_C):
                policy_actions[index_C == i] = self.specs[i].policy_actions(actions[index_C == i])
            yield Chunk(
                images,
                policy_actions,
                [decode_text(text, paths[i]) for text, i in zip(texts, index_C, strict=True)],
                index_C,
            )

    def _dataset(self) -> Any:
        tf = load_tensorflow(self.reading.num_threads)
        parts = [self._transitions(i) for i in range(len(self.specs))]
        if not self.reading.train:
            dataset = parts[0]
            for part in parts[1:]:
                dataset = dataset.concatenate(part)
        else:
            names = [spec.name for spec in self.specs]
            weights = sampling_probabilities(
                {s.name: s.weight for s in self.specs},
                {s.name: s.num_transitions for s in self.specs},
            )
            seed = self.reading.seed * 2
            dataset = tf.data.Dataset.sample_from_datasets(
                parts, [weights[n] for n in names], seed=seed
            )
            dataset = dataset.shuffle(self.reading.shuffle_buffer_size, seed=seed + 1)
        # The frames of all datasets come out at one size, so one decoder serves; it compares sizes where it must.
        decoders = [frame_decoder(spec.path, self.reading.image_size) for spec in self.specs]

        def decode(index: Any, encoded: Any, action: Any, text: Any) -> tuple[Any, ...]:
            frame = tf.switch_case(index, [lambda d=d: d(encoded) for d in decoders])
            return index, frame, action, text

        dataset = dataset.map(
            decode, num_parallel_calls=self.reading.num_threads, deterministic=True
        )
        return dataset.batch(self.reading.chunk_size)

    def _transitions(self, index: int) -> Any:
        """(dataset index, encoded frame, stored action, instruction) of each of this rank's transitions."""
        tf = load_tensorflow(self.reading.num_threads)
        shard = (self.reading.rank, self.reading.world_size)
        episodes = open_dataset(
            self.specs[index].path, num_threads=self.reading.num_threads, shard=shard
        )
        if self.reading.train:
            episodes = episodes.repeat()

        def flatten(episode: dict[str, Any]) -> Any:
            steps = episode["steps"]
            fields = (steps["observation"]["image"], steps["action"], steps["language_instruction"])
            return tf.data.Dataset.from_tensor_slices(
                (tf.fill(tf.shape(fields[0]), index), *fields)
            )

        return episodes.flat_map(flatten)
