"""Writing demonstrations as an RLDS directory in LIBERO's layout, with tfds itself.

Frames are encoded first, episode by episode (`encode_demonstration`, which any process can do), and written as they
come: memory holds one episode, whatever the size of the data set. T steps of an episode, H W image.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from prismatic.vla.datasets.schema import SPLIT, VERSION
from prismatic.vla.datasets.tensorflow_setup import load_tfds

IMAGE_FORMATS = ("jpeg", "png")
NOOP_THRESHOLD = 1e-4
# JPEG's artefacts are as large as the objects below this size.
SMALLEST_JPEG = 160


@dataclass(frozen=True)
class Demonstration:
    """One episode to write, recorded before each action.

    Attributes:
        images: T frames (H, W, 3) uint8, upright.
        actions_T7: float32, LIBERO's raw convention (gripper -1 open, +1 close).
        states_T8, joint_states_T7: float32 proprioception.
        rewards_T: float32.
        instruction: the task in words.
        file_path: where it came from, for `episode_metadata`.
        terminal: the episode ended by itself (not by its time limit).
        wrist_images: T frames of the same size, or None where the world has no wrist camera (black is written).
    """

    images: Sequence[np.ndarray]
    actions_T7: np.ndarray
    states_T8: np.ndarray
    joint_states_T7: np.ndarray
    rewards_T: np.ndarray
    instruction: str
    file_path: str
    terminal: bool = True
    wrist_images: Sequence[np.ndarray] | None = None


@dataclass(frozen=True)
class EncodedDemonstration:
    """A demonstration whose frames are JPEG or PNG files in memory; the other attributes are Demonstration's."""

    images: Sequence[bytes]
    actions_T7: np.ndarray
    states_T8: np.ndarray
    joint_states_T7: np.ndarray
    rewards_T: np.ndarray
    instruction: str
    file_path: str
    terminal: bool = True
    wrist_images: Sequence[bytes] | None = None


def noop_steps(actions_T7: np.ndarray) -> np.ndarray:
    """(T,) bool: steps that move nothing (norm of all but the gripper below 1e-4) and leave the gripper's command.

    OpenVLA's `is_noop`, where the gripper counts as open before the first step.
    """
    before_T = np.concatenate([[-1.0], actions_T7[:-1, -1]])
    still_T = np.linalg.norm(actions_T7[:, :-1], axis=1) < NOOP_THRESHOLD
    return still_T & (actions_T7[:, -1] == before_T)


def drop_noops(demo: Demonstration) -> Demonstration:
    """The demonstration without its no-op steps; the last step stays, it carries the reward."""
    keep_T = ~noop_steps(demo.actions_T7)
    keep_T[-1] = True

    def kept(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [frame for frame, keep in zip(frames, keep_T, strict=True) if keep]

    return replace(
        demo,
        images=kept(demo.images),
        wrist_images=None if demo.wrist_images is None else kept(demo.wrist_images),
        actions_T7=demo.actions_T7[keep_T],
        states_T8=demo.states_T8[keep_T],
        joint_states_T7=demo.joint_states_T7[keep_T],
        rewards_T=demo.rewards_T[keep_T],
    )


def encode_image(image_HW3: np.ndarray, image_format: str) -> bytes:
    """PNG (exact), or JPEG at quality 95 as tensorflow and with it tfds writes it: 4:2:0, the same pixels.

    Below SMALLEST_JPEG pixels the JPEG keeps the chroma whole (4:4:4): subsampled, a small object is a smear.
    """
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    if image_format == "jpeg":
        small = min(image_HW3.shape[:2]) < SMALLEST_JPEG
        sampling = (
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444 if small else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
        )
        options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    extension = {"jpeg": ".jpg", "png": ".png"}[image_format]
    return cv2.imencode(extension, cv2.cvtColor(image_HW3, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def encode_demonstration(demo: Demonstration, image_format: str) -> EncodedDemonstration:
    """Encode every frame as `image_format` (one of IMAGE_FORMATS)."""
    wrist = demo.wrist_images
    return EncodedDemonstration(
        [encode_image(image, image_format) for image in demo.images],
        demo.actions_T7,
        demo.states_T8,
        demo.joint_states_T7,
        demo.rewards_T,
        demo.instruction,
        demo.file_path,
        demo.terminal,
        None if wrist is None else [encode_image(image, image_format) for image in wrist],
    )


def libero_features(image_size: int, image_format: str) -> Any:
    """The feature tree of `modified_libero_rlds`, with images of `image_size` pixels square."""
    tfds = load_tfds()
    f = tfds.features

    def image(doc: str) -> Any:
        return f.Image(
            shape=(image_size, image_size, 3), dtype=np.uint8, encoding_format=image_format, doc=doc
        )

    def vector(size: int, doc: str) -> Any:
        return f.Tensor(shape=(size,), dtype=np.float32, doc=doc)

    observation = {
        "image": image("Main camera RGB observation."),
        "wrist_image": image("Wrist camera RGB observation; black where the world has none."),
        "state": vector(8, "End effector: position (3), axis-angle (3), gripper fingers (2)."),
        "joint_state": vector(7, "Joint angles."),
    }
    step = {
        "observation": f.FeaturesDict(observation),
        "action": vector(7, "End effector deltas (6) and gripper: -1 open, +1 close."),
        "discount": f.Scalar(dtype=np.float32),
        "reward": f.Scalar(dtype=np.float32),
        "is_first": f.Scalar(dtype=np.bool_),
        "is_last": f.Scalar(dtype=np.bool_),
        "is_terminal": f.Scalar(dtype=np.bool_),
        "language_instruction": f.Text(),
    }
    metadata = f.FeaturesDict({"file_path": f.Text()})
    return f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": metadata})


def write_dataset(
    folder: str | Path,
    name: str,
    demonstrations: Iterable[Demonstration | EncodedDemonstration],
    *,
    image_size: int,
    image_format: str,
    description: str,
    episodes_per_shard: int = 256,
) -> int:
    """Write `demonstrations` as dataset `name` into the existing, empty `folder`; returns how many were written.

    The folder holds features.json, dataset_info.json and the shards, as `builder_from_directory` wants them, and may
    be moved afterwards. Use it inside `utils.checkpoint_utils.atomic_directory`: an error leaves it incomplete.
    """
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image format {image_format!r}: use one of {', '.join(IMAGE_FORMATS)}")
    tfds = load_tfds()
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    # The episodes are written in order, but disable_shuffling stays off: OpenVLA's own pipeline
    # (dlimp) shuffles and interleaves the files, and tfds refuses to do that with ordered data.
    # `rlds.open_dataset` keeps the order by the way it reads.
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=description,
        features=libero_features(image_size, image_format),
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=episodes_per_shard)
    _serialize_in_key_order(writer, info)
    writer.initialize_splits([SPLIT])
    no_wrist_image = encode_image(np.zeros((image_size, image_size, 3), np.uint8), image_format)
    num_written = 0

    def examples() -> Iterator[dict[str, Any]]:
        nonlocal num_written
        for demo in demonstrations:
            encoded = (
                demo
                if isinstance(demo, EncodedDemonstration)
                else encode_demonstration(demo, image_format)
            )
            yield _example(encoded, no_wrist_image)
            num_written += 1

    writer.add_examples({SPLIT: examples()})  # one call: each rewrites the metadata files
    writer.close_all()
    return num_written


def _serialize_in_key_order(writer: Any, info: Any) -> None:
    """Make equal episodes equal bytes: protobuf otherwise orders an example's features anew in every process."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    class SortedSerializer(ExampleSerializer):
        def serialize_example(self, example: Any) -> bytes:
            return self.get_tf_example(example).SerializeToString(deterministic=True)

    writer._serializer = SortedSerializer(info.features.get_serialized_info())


def _example(demo: EncodedDemonstration, no_wrist_image: bytes) -> dict[str, Any]:
    last = len(demo.actions_T7) - 1
    steps = [
        {
            "observation": {
                "image": demo.images[t],
                "wrist_image": no_wrist_image
                if demo.wrist_images is None
                else demo.wrist_images[t],
                "state": demo.states_T8[t].astype(np.float32),
                "joint_state": demo.joint_states_T7[t].astype(np.float32),
            },
            "action": demo.actions_T7[t].astype(np.float32),
            "discount": 1.0,
            "reward": float(demo.rewards_T[t]),
            "is_first": t == 0,
            "is_last": t == last,
            "is_terminal": t == last and demo.terminal,
            "language_instruction": demo.instruction,
        }
        for t in range(last + 1)
    ]
    return {"steps": steps, "episode_metadata": {"file_path": demo.file_path}}
