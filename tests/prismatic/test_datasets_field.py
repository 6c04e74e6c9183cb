"""Directories as the field has them: `modified_libero_rlds`, built by tfds itself with the original feature tree.

The folder's name is the data set's (libero_spatial_no_noops); the name inside, and in the shards' names, is that of
the builder's class (libero_spatial, liber_o10).
"""

import json
from pathlib import Path

import numpy as np
import pytest

from ppo.envs.images import jpeg_round_trip, policy_image
from prismatic.vla.action_normalization import resolve_unnorm_key
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets import mixtures
from prismatic.vla.datasets.dataset import RLDSDataset, load_specs
from prismatic.vla.datasets.rlds import frame_decoder, iterate_episodes
from prismatic.vla.datasets.schema import check_dataset_dir, read_features
from prismatic.vla.datasets.sources import Reading
from prismatic.vla.datasets.writer import Demonstration, write_dataset

# Folder -> the name inside.
SUITES = {
    "libero_spatial_no_noops": "libero_spatial",
    "libero_object_no_noops": "libero_object",
    "libero_goal_no_noops": "libero_goal",
    "libero_10_no_noops": "liber_o10",
}
LENGTHS = {name: (3, 2, 4, 3)[: 2 + i % 3] for i, name in enumerate(SUITES)}


def frame(seed: int, size: int = 256) -> np.ndarray:
    """Coloured stripes with a bright square, different for every seed."""
    y, x = np.mgrid[:size, :size]
    image = np.stack([x, y, (x + y) // 2], -1) * (1 + seed % 3) // 3
    image[20 * (seed % 9) : 20 * (seed % 9) + 30, 40:70] = (255, 30, 10 * (seed % 20))
    return image.astype(np.uint8)


def demo_of(name: str, episode: int) -> Demonstration:
    length, rng = LENGTHS[name][episode], np.random.default_rng((len(name), episode))
    actions = rng.uniform(-0.9, 0.9, (length, 7)).astype(np.float32)
    actions[:, 6] = rng.choice([-1.0, 1.0], length)
    offset = 10 * episode + len(name)
    return Demonstration(
        [frame(offset + t) for t in range(length)],
        actions,
        rng.normal(size=(length, 8)).astype(np.float32),
        rng.normal(size=(length, 7)).astype(np.float32),
        np.eye(length, dtype=np.float32)[-1],
        f"pick up the black bowl number {episode} of {SUITES[name]}",
        f"/data/{SUITES[name]}/pick_up_the_black_bowl_demo.hdf5",
        wrist_images=[frame(offset + t + 5) for t in range(length)],
    )


def demos_of(name: str) -> list[Demonstration]:
    return [demo_of(name, i) for i in range(len(LENGTHS[name]))]


def original_features(tfds):
    """The feature tree of the published data sets' builders."""
    f = tfds.features

    def image(doc: str):
        return f.Image(shape=(256, 256, 3), dtype=np.uint8, encoding_format="jpeg", doc=doc)

    def flag(doc: str):
        return f.Scalar(dtype=np.bool_, doc=doc)

    observation = f.FeaturesDict({
        "image": image("Main camera RGB observation."),
        "wrist_image": image("Wrist camera RGB observation."),
        "state": f.Tensor(shape=(8,), dtype=np.float32, doc="Robot EEF state (6D pose, 2D gripper)."),
        "joint_state": f.Tensor(shape=(7,), dtype=np.float32, doc="Robot joint angles."),
    })  # fmt: skip
    steps = f.Dataset({
        "observation": observation,
        "action": f.Tensor(shape=(7,), dtype=np.float32, doc="Robot EEF action."),
        "discount": f.Scalar(dtype=np.float32, doc="Discount if provided, default to 1."),
        "reward": f.Scalar(dtype=np.float32, doc="Reward if provided, 1 on final step for demos."),
        "is_first": flag("True on first step of the episode."),
        "is_last": flag("True on last step of the episode."),
        "is_terminal": flag("True on last step of the episode if it is a terminal step, True for demos."),
        "language_instruction": f.Text(doc="Language Instruction."),
    })  # fmt: skip
    metadata = f.FeaturesDict({"file_path": f.Text(doc="Path to the original data file.")})
    return f.FeaturesDict({"steps": steps, "episode_metadata": metadata})


def build_with_tfds(root: Path, name: str) -> None:
    """`<root>/<name>/1.0.0` as the field's builders make it: two shards, frames encoded by tfds."""
    import tensorflow_datasets as tfds

    inside = SUITES[name]

    def generate(self):
        for i, demo in enumerate(demos_of(name)):
            steps = [
                {
                    "observation": {
                        "image": demo.images[t],
                        "wrist_image": demo.wrist_images[t],
                        "state": demo.states_T8[t],
                        "joint_state": demo.joint_states_T7[t],
                    },
                    "action": demo.actions_T7[t],
                    "discount": 1.0,
                    "reward": float(t == len(demo.images) - 1),
                    "is_first": t == 0,
                    "is_last": t == len(demo.images) - 1,
                    "is_terminal": t == len(demo.images) - 1,
                    "language_instruction": demo.instruction,
                }
                for t in range(len(demo.images))
            ]
            yield (
                f"{demo.file_path}_{i}",
                {"steps": steps, "episode_metadata": {"file_path": demo.file_path}},
            )

    class FieldBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = inside
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = root

        def _info(self):
            return self.dataset_info_from_configs(features=original_features(tfds))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        _generate_examples = generate

    builder = FieldBuilder(data_dir=root / "built")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    (root / name).mkdir()
    Path(builder.data_dir).rename(root / name / "1.0.0")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modified_libero_rlds")
    for name in SUITES:
        build_with_tfds(root, name)
    return root


def in_given_order(name: str, episodes) -> list[tuple]:
    """Pairs of what was read and what was built: tfds shuffles episodes when it builds."""
    by_instruction = {episode.instruction: episode for episode in episodes}
    return [(by_instruction[demo.instruction], demo) for demo in demos_of(name)]


@pytest.mark.parametrize("name", SUITES)
def test_the_published_directories_are_read_as_they_are(data_root: Path, name: str) -> None:
    folder = mixtures.dataset_dir(data_root, name)
    assert (
        sorted(p.name for p in folder.glob("*.tfrecord*"))[0]
        == f"{SUITES[name]}-train.tfrecord-00000-of-00002"
    )
    assert check_dataset_dir(folder) == [] and mixtures.check_mixture(data_root, name) == []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    episodes = list(iterate_episodes(folder, images=True))
    assert len(episodes) == len(LENGTHS[name])
    decode, decode_224 = frame_decoder(folder, (256, 256)), frame_decoder(folder, (224, 224))
    for episode, demo in in_given_order(name, episodes):
        assert np.array_equal(episode.actions_T7, demo.actions_T7)
        assert np.array_equal(episode.states_TS, demo.states_T8)
        assert episode.file_path == demo.file_path
        for code, image in zip(episode.encoded_images_T, demo.images, strict=True):
            # Training sees what evaluation shows the policy of the same render.
            assert np.array_equal(decode(code).numpy(), jpeg_round_trip(image))
            assert np.array_equal(decode_224(code).numpy(), policy_image(image, 224))
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_mixture_of_four_suites(data_root: Path) -> None:
    assert mixtures.check_mixture(data_root, "libero_4_task_suites_no_noops") == []
    specs = load_specs(data_root, "libero_4_task_suites_no_noops")
    assert [spec.name for spec in specs] == list(SUITES) and {spec.weight for spec in specs} == {
        1.0
    }
    dataset = RLDSDataset(
        specs, Reading((28, 28), train=False), lambda text: [1, len(text)], ActionTokenizer(400)
    )
    statistics = dataset.statistics
    assert list(statistics) == list(SUITES)
    for name, suite in zip(
        SUITES, ("libero_spatial", "libero_object", "libero_goal", "libero_10"), strict=True
    ):
        assert resolve_unnorm_key(statistics, suite) == name
        counts = (statistics[name]["num_transitions"], statistics[name]["num_trajectories"])
        assert counts == (sum(LENGTHS[name]), len(LENGTHS[name]))
        actions = np.concatenate([demo.actions_T7 for demo in demos_of(name)])
        np.testing.assert_allclose(
            statistics[name]["action"]["q99"][:6], np.quantile(actions, 0.99, 0)[:6], rtol=1e-6
        )
        # LIBERO's gripper, -1 open .. +1 close, becomes 1 open .. 0 closed, and is not normalised.
        assert np.isclose(statistics[name]["action"]["mean"][6], (actions[:, 6] < 0).mean())
        assert statistics[name]["action"]["mask"] == [True] * 6 + [False]
    samples = list(dataset)
    assert len(samples) == sum(map(sum, LENGTHS.values()))
    for name in SUITES:
        stored = np.concatenate([demo.actions_T7 for demo in demos_of(name)])
        grippers = [sample["action"][6] for sample in samples if sample["dataset_name"] == name]
        assert sorted(grippers) == sorted((stored[:, 6] < 0).astype(float))


def test_our_own_directories_have_the_same_features(data_root: Path, tmp_path: Path) -> None:
    name = "libero_spatial_no_noops"
    ours = mixtures.dataset_dir(tmp_path, name)
    ours.mkdir(parents=True)
    write_dataset(
        ours, name, demos_of(name), image_size=256, image_format="jpeg", description="test"
    )
    assert read_features(ours) == read_features(mixtures.dataset_dir(data_root, name))
    ours_tree, field_tree = (
        without_docs(json.loads((folder / "features.json").read_text()))
        for folder in (ours, mixtures.dataset_dir(data_root, name))
    )
    assert ours_tree == field_tree
    theirs = {
        e.instruction: e
        for e in iterate_episodes(mixtures.dataset_dir(data_root, name), images=True)
    }
    decode = frame_decoder(ours, (256, 256))
    for episode in iterate_episodes(ours, images=True):
        original = theirs[episode.instruction]
        assert np.array_equal(episode.actions_T7, original.actions_T7)
        for ours_code, their_code in zip(
            episode.encoded_images_T, original.encoded_images_T, strict=True
        ):
            assert np.array_equal(decode(ours_code).numpy(), decode(their_code).numpy())


def test_wrist_images_are_written(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    name = "libero_spatial_no_noops"
    write_dataset(
        tmp_path, name, demos_of(name), image_size=256, image_format="png", description="test"
    )
    episodes = tfds.builder_from_directory(str(tmp_path)).as_dataset(split="train")
    for episode, demo in zip(episodes, demos_of(name), strict=True):
        for t, step in enumerate(episode["steps"].as_numpy_iterator()):
            assert np.array_equal(step["observation"]["wrist_image"], demo.wrist_images[t])
            assert np.array_equal(step["observation"]["image"], demo.images[t])


def without_docs(node):
    """A features.json tree without descriptions."""
    if isinstance(node, dict):
        return {
            key: without_docs(value)
            for key, value in node.items()
            if key not in ("doc", "description")
        }
    return [without_docs(value) for value in node] if isinstance(node, list) else node
