"""Reading RLDS episodes and transitions through tensorflow-datasets.

Steps are read still encoded (`SkipDecoding`): an episode then costs one record, not one nested dataset, and frames
that are not needed (the wrist camera, everything while statistics are computed) are never decoded.
T steps of an episode, N transitions, H W image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.model_files import reading
from prismatic.vla.datasets.schema import (
    SPLIT,
    STATE_FEATURE,
    check_dataset_dir,
    read_features,
    read_shard_lengths,
    shard_files,
)
from prismatic.vla.datasets.tensorflow_setup import load_tensorflow, load_tfds
from prismatic.vla.datasets.tfrecord import check_shards, find_damage

IMAGE_FEATURE = "steps/observation/image"
FILE_PATH_FEATURE = "episode_metadata/file_path"


@dataclass
class RawEpisode:
    """One episode as stored.

    Attributes:
        actions_T7: float32, the dataset's own convention.
        states_TS: float32 proprioception, or None where the dataset has none.
        instruction: of the first step.
        encoded_images_T: JPEG or PNG bytes (object array), or None if they were not asked for.
        file_path: where the episode came from, or None where the dataset does not say.
    """

    actions_T7: np.ndarray
    states_TS: np.ndarray | None
    instruction: str
    encoded_images_T: np.ndarray | None
    file_path: str | None = None


def open_dataset(
    dataset_dir: str | Path, *, num_threads: int = 1, shard: tuple[int, int] = (0, 1)
) -> Any:
    """The `train` split as a tf.data.Dataset of episodes with encoded steps, in stored order.

    `shard` (index, count): only the episodes index, index + count, ... The directory is untrusted: raises ValueError
    with every problem of an incomplete one, or naming the file that is damaged. Read the result with `numpy_iterator`.
    """
    problems = check_dataset_dir(dataset_dir)
    if problems:
        raise ValueError("\n".join(problems))
    lengths = read_shard_lengths(dataset_dir)
    if missing := [name for name in lengths if not (Path(dataset_dir) / name).is_file()]:
        raise ValueError(f"{Path(dataset_dir) / missing[0]} is missing, dataset_info.json names it")
    check_shards([Path(dataset_dir) / name for name in lengths], list(lengths.values()))
    tfds = load_tfds(num_threads)
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = num_threads
    options.deterministic = True
    # One file after the other, so that the order (and with it every seed) depends neither on the
    # number of shards nor on disableShuffling in dataset_info.json, which earlier versions wrote.
    config = tfds.ReadConfig(
        interleave_cycle_length=1,
        interleave_block_length=1,
        num_parallel_calls_for_decode=num_threads,
        num_parallel_calls_for_interleave_files=1,
        skip_prefetch=True,
        try_autocache=False,
        options=options,
    )
    with reading(dataset_dir, "the RLDS metadata"):
        builder = tfds.builder_from_directory(str(dataset_dir))
        dataset = builder.as_dataset(
            split=SPLIT,
            decoders={"steps": tfds.decode.SkipDecoding()},
            shuffle_files=False,
            read_config=config,
        )
    return dataset.shard(shard[1], shard[0]) if shard[1] > 1 else dataset


def numpy_iterator(dataset: Any, dataset_dirs: Sequence[str | Path]) -> Iterator[Any]:
    """The elements of a tf.data.Dataset made from these directories, as numpy arrays.

    Raises ValueError naming the shard whose CRCs do not match, or the directory whose records are not what its
    features say.
    """
    tf = load_tensorflow()
    try:
        yield from dataset.as_numpy_iterator()
    except (
        tf.errors.OpError,
        UnicodeDecodeError,
    ) as error:  # the latter where an error quotes a record's bytes
        damage = find_damage([file for folder in dataset_dirs for file in shard_files(folder)])
        where = ", ".join(map(str, dataset_dirs))
        reason = getattr(error, "message", "a record is no example")[:300]
        raise ValueError(
            damage or f"{where}: records do not match features.json: {reason}"
        ) from error


def decode_text(text: bytes, dataset_dir: str | Path) -> str:
    """UTF-8 text of a record. Raises ValueError naming the directory."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{dataset_dir}: a text is not UTF-8: {error}") from error


def iterate_episodes(
    dataset_dir: str | Path, *, images: bool = False, num_threads: int = 1
) -> Iterator[RawEpisode]:
    """Yield every episode in stored order; frames (still encoded) only with `images`."""
    features = read_features(dataset_dir)
    has_state, has_path = STATE_FEATURE in features, FILE_PATH_FEATURE in features

    def select(episode: dict[str, Any]) -> dict[str, Any]:
        steps = episode["steps"]
        selected = {"action": steps["action"], "instruction": steps["language_instruction"][0]}
        if has_state:
            selected["state"] = steps["observation"]["state"]
        if has_path:
            selected["file_path"] = episode["episode_metadata"]["file_path"]
        if images:
            selected["image"] = steps["observation"]["image"]
        return selected

    dataset = open_dataset(dataset_dir, num_threads=num_threads).map(select)
    for episode in numpy_iterator(dataset, [dataset_dir]):
        yield RawEpisode(
            np.asarray(episode["action"], np.float32),
            np.asarray(episode["state"], np.float32) if has_state else None,
            decode_text(episode["instruction"], dataset_dir),
            episode.get("image"),
            decode_text(episode["file_path"], dataset_dir) if has_path else None,
        )


def frame_decoder(dataset_dir: str | Path, image_size: tuple[int, int]) -> Callable[[Any], Any]:
    """A tensorflow function from one frame's bytes to (H, W, 3) uint8 at `image_size` (height, width).

    Frames stored at that size are only decoded. Others are resized as OpenVLA does it: Lanczos-3 with antialiasing,
    rounded, clipped.
    """
    tf = load_tensorflow()
    stored_size = read_features(dataset_dir)[IMAGE_FEATURE].shape[:2]

    def resize(frame: Any) -> Any:
        resized = tf.image.resize(frame, image_size, method="lanczos3", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    def decode(encoded: Any) -> Any:
        frame = tf.io.decode_image(encoded, channels=3, dtype=tf.uint8, expand_animations=False)
        if stored_size != tuple(image_size):
            # The features may leave the size open (None), so it is compared frame by frame.
            same = tf.reduce_all(tf.shape(frame)[:2] == image_size)
            frame = tf.cond(same, lambda: frame, lambda: resize(frame))
        return tf.ensure_shape(frame, (*image_size, 3))

    return decode
