"""RLDS directories: written and read back, checked, transformed, normalised, mixed, sharded, collated."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from prismatic.model_files import write_checksums
from prismatic.vla.action_normalization import unnormalize_action
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets import mixtures
from prismatic.vla.datasets.dataset import ActionCollator, RLDSDataset, iterate_batches, load_specs
from prismatic.vla.datasets.rlds import RawEpisode, frame_decoder, iterate_episodes
from prismatic.vla.datasets.schema import check_dataset_dir, read_features
from prismatic.vla.datasets.sources import Reading, index_stream
from prismatic.vla.datasets.statistics import (
    compute_statistics,
    content_key,
    dataset_statistics,
    load_dataset_statistics,
)
from prismatic.vla.datasets.transforms import (
    LIBERO,
    DatasetTransform,
    get_transform,
    libero_actions,
    register_transform,
)
from prismatic.vla.datasets.writer import (
    Demonstration,
    drop_noops,
    encode_image,
    noop_steps,
    write_dataset,
)

SIZE = 16
TOKENIZER = ActionTokenizer(400)
LENGTHS = {"libero_small_no_noops": (5, 3, 4, 6, 2), "tabletop_no_noops": (4, 4, 2)}


def make_demo(name: str, episode: int, length: int) -> Demonstration:
    """Random frames; the first action dimension numbers the transition, dimension 3 is constant."""
    rng = np.random.default_rng((len(name), episode))
    actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    actions[:, 3] = 0.25
    actions[:, 6] = np.where(rng.random(length) < 0.5, -1, 1)
    return Demonstration(
        [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(length)],
        actions,
        rng.normal(size=(length, 8)).astype(np.float32),
        rng.normal(size=(length, 7)).astype(np.float32),
        np.eye(length, dtype=np.float32)[-1],
        f"Pick up number {episode % 2} of {name}",
        f"{name}/{episode}",
    )


def demos_of(name: str) -> list[Demonstration]:
    return [make_demo(name, i, length) for i, length in enumerate(LENGTHS[name])]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small PNG datasets in several shards."""
    root = tmp_path_factory.mktemp("data")
    for name in LENGTHS:
        folder = mixtures.dataset_dir(root, name)
        folder.mkdir(parents=True)
        write_dataset(
            folder,
            name,
            demos_of(name),
            image_size=SIZE,
            image_format="png",
            description="test",
            episodes_per_shard=2,
        )
    return root


def prompt_ids(instruction: str) -> list[int]:
    """A prompt as long as the instruction has words, so that lengths differ where words do."""
    return [1, *(3 + len(word) for word in instruction.split()), 4]


def make_dataset(
    root: Path, name: str, cache_gib: float = 1.0, image_aug: bool = False, **reading
) -> RLDSDataset:
    reading = {"image_size": (SIZE, SIZE), "chunk_size": 3, "shuffle_buffer_size": 7, **reading}
    specs = load_specs(root, name)
    return RLDSDataset(
        specs, Reading(**reading), prompt_ids, TOKENIZER, image_aug=image_aug, cache_gib=cache_gib
    )


def fingerprint(sample: dict) -> bytes:
    return sample["image"].tobytes()


def fingerprints(name: str) -> list[bytes]:
    return [image.tobytes() for demo in demos_of(name) for image in demo.images]


# ---- files ----


def test_what_was_written_is_read_back(data_root: Path) -> None:
    name = "libero_small_no_noops"
    folder = mixtures.dataset_dir(data_root, name)
    decode = frame_decoder(folder, (SIZE, SIZE))
    episodes = list(iterate_episodes(folder, images=True))
    assert [len(e.actions_T7) for e in episodes] == list(LENGTHS[name])
    for episode, demo in zip(episodes, demos_of(name), strict=True):
        assert np.array_equal(episode.actions_T7, demo.actions_T7)
        assert np.array_equal(episode.states_TS, demo.states_T8)
        assert episode.instruction == demo.instruction
        assert all(
            np.array_equal(decode(code).numpy(), image)
            for code, image in zip(episode.encoded_images_T, demo.images, strict=True)
        )


def test_tfds_reads_the_directory_with_liberos_features(data_root: Path) -> None:
    import tensorflow_datasets as tfds

    demo = demos_of("tabletop_no_noops")[0]
    builder = tfds.builder_from_directory(str(mixtures.dataset_dir(data_root, "tabletop_no_noops")))
    assert builder.info.splits["train"].num_examples == 3
    episode = next(iter(builder.as_dataset(split="train")))
    steps = list(episode["steps"].as_numpy_iterator())
    assert episode["episode_metadata"]["file_path"].numpy() == b"tabletop_no_noops/0"
    assert set(steps[0]) == {
        "action", "discount", "is_first", "is_last", "is_terminal", "language_instruction", "observation", "reward"
    }  # fmt: skip
    observation = steps[0]["observation"]
    assert {k: (v.shape, str(v.dtype)) for k, v in observation.items()} == {
        "image": ((SIZE, SIZE, 3), "uint8"),
        "wrist_image": ((SIZE, SIZE, 3), "uint8"),
        "state": ((8,), "float32"),
        "joint_state": ((7,), "float32"),
    }
    assert [s["is_first"] for s in steps] == [True, False, False, False]
    assert (
        [s["is_last"] for s in steps]
        == [s["is_terminal"] for s in steps]
        == [False, False, False, True]
    )
    assert [s["reward"] for s in steps] == [0, 0, 0, 1]
    assert np.array_equal([s["observation"]["joint_state"] for s in steps], demo.joint_states_T7)


def test_openvlas_pipeline_may_shuffle_and_interleave_the_files(data_root: Path) -> None:
    """The read configuration of `dlimp.DLataset.from_rlds`, which tfds refuses for ordered data sets."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    name = "libero_small_no_noops"
    builder = tfds.builder_from_directory(str(mixtures.dataset_dir(data_root, name)))
    assert len(builder.info.splits["train"].shard_lengths) == 3
    episodes = builder.as_dataset(
        split="train",
        shuffle_files=True,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(
            skip_prefetch=True,
            num_parallel_calls_for_interleave_files=tf.data.AUTOTUNE,
            interleave_cycle_length=tf.data.AUTOTUNE,
        ),
    )
    read = {
        episode["episode_metadata"]["file_path"].decode(): episode["steps"]["action"]
        for episode in episodes.as_numpy_iterator()
    }
    written = {demo.file_path: demo.actions_T7 for demo in demos_of(name)}
    assert read.keys() == written.keys()
    assert all(np.array_equal(read[path], written[path]) for path in written)


def test_directories_that_earlier_versions_marked_as_ordered_still_load(
    data_root: Path, tmp_path: Path
) -> None:
    """Order, samples and statistics do not depend on disableShuffling in dataset_info.json, which we used to write."""
    name = "libero_small_no_noops"
    new, old = mixtures.dataset_dir(data_root, name), mixtures.dataset_dir(tmp_path, name)
    shutil.copytree(new, old, ignore=shutil.ignore_patterns("dataset_statistics_*"))
    fields = json.loads((new / "dataset_info.json").read_text())
    assert "disableShuffling" not in fields
    (old / "dataset_info.json").write_text(json.dumps(fields | {"disableShuffling": True}))
    write_checksums(old)

    assert check_dataset_dir(old) == []
    paths = [[e.file_path for e in iterate_episodes(folder)] for folder in (new, old)]
    assert paths[0] == paths[1] == [demo.file_path for demo in demos_of(name)]
    assert load_dataset_statistics(tmp_path, name) == load_dataset_statistics(data_root, name)
    for cache_gib in (1.0, 0.0):  # in memory, streamed
        orders = [
            [
                fingerprint(sample)
                for sample in itertools.islice(make_dataset(root, name, cache_gib, seed=5), 40)
            ]
            for root in (data_root, tmp_path)
        ]
        assert orders[0] == orders[1]


def test_jpeg_keeps_small_coloured_things() -> None:
    import cv2

    image = np.full((64, 64, 3), 200, np.uint8)
    image[30:34, 30:34] = (255, 0, 0)
    decoded = cv2.imdecode(np.frombuffer(encode_image(image, "jpeg"), np.uint8), cv2.IMREAD_COLOR)[
        ..., ::-1
    ]
    # With subsampled chroma the corner pixel is off by more than 60 levels.
    assert np.abs(decoded.astype(int) - image)[30:34, 30:34].max() < 30


def test_frames_of_another_size_are_resized_with_lanczos(data_root: Path) -> None:
    import tensorflow as tf

    folder = mixtures.dataset_dir(data_root, "tabletop_no_noops")
    image = demos_of("tabletop_no_noops")[0].images[0]
    resized = frame_decoder(folder, (12, 10))(encode_image(image, "png")).numpy()
    wanted = tf.image.resize(image, (12, 10), method="lanczos3", antialias=True)
    assert np.array_equal(resized, np.clip(np.round(wanted.numpy()), 0, 255).astype(np.uint8))


def test_a_complete_directory_has_no_problems(data_root: Path) -> None:
    assert check_dataset_dir(mixtures.dataset_dir(data_root, "tabletop_no_noops")) == []
    features = read_features(mixtures.dataset_dir(data_root, "tabletop_no_noops"))
    assert features["steps/observation/image"].encoding == "png"
    assert features["steps/observation/image"].shape == (SIZE, SIZE, 3)


def test_missing_features_are_named(data_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "1.0.0"
    shutil.copytree(mixtures.dataset_dir(data_root, "tabletop_no_noops"), folder)
    tree = json.loads((folder / "features.json").read_text())
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"][
        "features"
    ]
    del steps["language_instruction"], steps["observation"]["featuresDict"]["features"]["image"]
    steps["action"]["tensor"]["shape"]["dimensions"] = ["6"]
    (folder / "features.json").write_text(json.dumps(tree))
    problems = check_dataset_dir(folder)
    assert len(problems) == 2
    assert "steps/observation/image, steps/language_instruction" in problems[0]
    assert "steps/action" in problems[1] and "(6,)" in problems[1]


def test_half_written_directories_are_refused(data_root: Path, tmp_path: Path) -> None:
    source = mixtures.dataset_dir(data_root, "tabletop_no_noops")
    for broken in ("tabletop_no_noops-train.tfrecord-00001", "features.json", "dataset_info.json"):
        folder = tmp_path / broken / "1.0.0"
        shutil.copytree(source, folder)
        (folder / broken).unlink()
        assert len(check_dataset_dir(folder)) == 1, broken
    (folder / "dataset_info.json").write_text('{"splits": [{"name": "train", "shard')
    assert "half-written" in check_dataset_dir(folder)[0]
    assert "not a directory" in check_dataset_dir(tmp_path / "nothing")[0]


# ---- transforms and statistics ----


def test_liberos_gripper_by_hand() -> None:
    actions = np.zeros((5, 7), np.float32)
    actions[:, 0] = [0.1, 0.2, 0.3, 0.4, 0.5]
    actions[:, 6] = [-1, 1, 0, 0.25, 3]
    transformed = libero_actions(actions)
    assert transformed[:, 6].tolist() == [1, 0, 1, 0.75, 0]  # open, closed, and in between
    assert np.array_equal(transformed[:, :6], actions[:, :6])
    assert actions[0, 6] == -1, "the stored action must not change"


def test_only_known_datasets_have_a_transform() -> None:
    assert get_transform("libero_10_no_noops") is LIBERO
    with pytest.raises(ValueError, match="no transform is known for dataset 'bridge_orig'"):
        get_transform("bridge_orig")
    halved = DatasetTransform("half", lambda a: a / 2, (True,) * 7)
    register_transform("my_robot_*", halved)
    assert get_transform("my_robot_2") is halved and get_transform("libero_10_no_noops") is LIBERO


def test_statistics_equal_numpys(data_root: Path) -> None:
    name = "libero_small_no_noops"
    actions = np.concatenate([libero_actions(d.actions_T7) for d in demos_of(name)]).astype(
        np.float64
    )
    states = np.concatenate([d.states_T8 for d in demos_of(name)]).astype(np.float64)
    statistics = dataset_statistics(mixtures.dataset_dir(data_root, name), LIBERO)
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (20, 5)
    assert statistics["action"]["mask"] == [True] * 6 + [False]
    for key, values in (("action", actions), ("proprio", states)):
        wanted = {
            "mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0),
            "q01": np.percentile(values, 1, axis=0), "q99": np.percentile(values, 99, axis=0),
        }  # fmt: skip
        for statistic, value in wanted.items():
            np.testing.assert_allclose(
                statistics[key][statistic], value, rtol=1e-6, atol=1e-7, err_msg=statistic
            )


def test_statistics_are_cached_by_content(data_root: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "1.0.0"
    shutil.copytree(mixtures.dataset_dir(data_root, "tabletop_no_noops"), folder)
    first = dataset_statistics(folder, LIBERO)
    module = "prismatic.vla.datasets.statistics.iterate_episodes"
    with monkeypatch.context() as patch:
        patch.setattr(module, lambda *a, **k: pytest.fail("computed again"))
        assert dataset_statistics(folder, LIBERO) == first
    key = content_key(folder, LIBERO)
    assert key != content_key(folder, DatasetTransform("other", libero_actions, LIBERO.action_mask))
    shard = next(folder.glob("*.tfrecord*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert content_key(folder, LIBERO) != key


def test_statistics_of_one_dataset_by_name(data_root: Path) -> None:
    wanted = dataset_statistics(mixtures.dataset_dir(data_root, "tabletop_no_noops"), LIBERO)
    assert load_dataset_statistics(data_root, "tabletop") == wanted
    with pytest.raises(
        ValueError, match="is a mixture: name one of libero_small_no_noops, tabletop_no_noops"
    ):
        load_dataset_statistics(data_root, "libero_small_no_noops,tabletop")
    with pytest.raises(ValueError, match="is not a directory"):
        load_dataset_statistics(data_root, "libero_goal_no_noops")


def test_statistics_refuse_what_cannot_be_learned_from() -> None:
    with pytest.raises(ValueError, match="no transitions"):
        compute_statistics([], LIBERO)
    actions = np.zeros((3, 7), np.float32)
    actions[1, 2] = np.nan
    with pytest.raises(ValueError, match="transition 1 has a non-finite action"):
        compute_statistics([RawEpisode(actions, None, "x", None)], LIBERO)


def test_actions_are_normalised_as_openvla_does(data_root: Path) -> None:
    spec = load_specs(data_root, "libero_small_no_noops")[0]
    stored = np.concatenate([d.actions_T7 for d in demos_of(spec.name)])
    policy = spec.policy_actions(stored)
    low, high = (np.array(spec.statistics["action"][q])[:3] for q in ("q01", "q99"))
    wanted = np.clip(2 * (stored[:, :3] - low) / (high - low + 1e-8) - 1, -1, 1)
    np.testing.assert_allclose(policy[:, :3], wanted, atol=1e-6)
    assert policy.min() == -1 and policy.max() == 1, (
        "the extremes lie outside q01..q99 and are clipped"
    )
    assert np.all(policy[:, 3] == 0), "constant dimensions become 0"
    assert np.array_equal(policy[:, 6], (stored[:, 6] < 0).astype(np.float32)), (
        "the gripper is not normalised"
    )
    inside = np.abs(policy[:, 0]) < 1
    back = unnormalize_action(policy, spec.statistics["action"])
    np.testing.assert_allclose(back[inside, 0], stored[inside, 0], atol=1e-6)


def test_noops_move_nothing_and_keep_the_gripper() -> None:
    actions = np.zeros((6, 7), np.float32)
    actions[:, 6] = [-1, 1, 1, 1, -1, -1]
    actions[3, 1] = 0.5
    assert noop_steps(actions).tolist() == [True, False, True, False, False, True]
    demo = make_demo("x", 0, 6)
    demo = drop_noops(Demonstration(demo.images, actions, *[np.arange(6)] * 3, "do", "path"))
    assert demo.rewards_T.tolist() == [1, 3, 4, 5], "the last step stays"
    assert len(demo.images) == 4


# ---- mixtures ----


def test_named_and_weighted_mixtures() -> None:
    four = dict(mixtures.resolve_mixture("libero_4_task_suites_no_noops"))
    assert set(four.values()) == {1.0} and len(four) == 4 and "libero_90_no_noops" not in four
    assert mixtures.resolve_mixture("tabletop") == (("tabletop_no_noops", 1.0),)
    assert mixtures.resolve_mixture("a:2, b") == (("a", 2.0), ("b", 1.0))
    for bad, message in (
        ("a,a", "twice"),
        ("a:-1", "positive"),
        ("a:x", "positive"),
        ("a,,b", "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            mixtures.resolve_mixture(bad)


def test_all_missing_datasets_are_reported_together(data_root: Path) -> None:
    problems = "\n".join(mixtures.check_mixture(data_root, "libero_4_task_suites_no_noops"))
    assert all(f"{name}/1.0.0 is not a directory" in problems for name in mixtures._LIBERO)
    assert "libero_small_no_noops, tabletop_no_noops" in problems, "says what there is"


def test_mixture_weights_are_honoured() -> None:
    indices = np.concatenate(list(itertools.islice(index_stream([1.0, 3.0], [20, 10], seed=0), 5)))
    share = np.mean(indices >= 20)
    assert abs(share - 3 * 10 / (20 + 3 * 10)) < 0.01  # sd 0.003
    counts = Counter(indices[indices < 20].tolist())
    assert max(counts.values()) - min(counts.values()) <= 1, (
        "within a dataset everything comes equally often"
    )


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_samples_follow_the_mixture(data_root: Path, cache_gib: float) -> None:
    dataset = make_dataset(data_root, "libero_small_no_noops:1,tabletop_no_noops:4", cache_gib)
    assert dataset.in_memory == (cache_gib > 0)
    names = [s["dataset_name"] for s in itertools.islice(dataset, 2000)]
    assert abs(names.count("tabletop_no_noops") / 2000 - 4 * 10 / (20 + 4 * 10)) < 0.05  # sd 0.01


# ---- the dataset ----


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_one_pass_gives_every_transition_as_stored(data_root: Path, cache_gib: float) -> None:
    names = list(LENGTHS)
    dataset = make_dataset(data_root, ",".join(names), cache_gib, train=False, image_aug=True)
    samples = list(dataset)
    assert len(samples) == len(dataset) == 30
    assert [fingerprint(s) for s in samples] == [f for name in names for f in fingerprints(name)]
    specs = {spec.name: spec for spec in dataset.specs}
    demos = [
        (name, demo, t)
        for name in names
        for demo in demos_of(name)
        for t in range(len(demo.actions_T7))
    ]
    for sample, (name, demo, t) in zip(samples, demos, strict=True):
        action = specs[name].policy_actions(demo.actions_T7[t])
        assert sample["dataset_name"] == name and np.array_equal(sample["action"], action)
        assert np.array_equal(sample["action_ids"], TOKENIZER.encode(action))
        assert sample["prompt_ids"].tolist() == prompt_ids(demo.instruction)
        assert sample["image"].dtype == np.uint8


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_ranks_are_disjoint_and_complete(data_root: Path, cache_gib: float) -> None:
    name = "libero_small_no_noops"
    shares = [
        list(
            map(
                fingerprint,
                make_dataset(data_root, name, cache_gib, train=False, rank=rank, world_size=3),
            )
        )
        for rank in range(3)
    ]
    together = [f for share in shares for f in share]
    assert all(shares) and len(set(together)) == len(together)
    assert set(together) == set(fingerprints(name))


def test_training_epochs_are_fresh_permutations_shared_by_the_ranks(data_root: Path) -> None:
    everything = sorted(fingerprints("libero_small_no_noops"))
    # Three ranks do not divide the 20 transitions: an epoch ends in the middle of a round.
    ranks = [
        iter(make_dataset(data_root, "libero_small_no_noops", rank=r, world_size=3, seed=3))
        for r in range(3)
    ]
    order = [fingerprint(next(rank)) for _ in range(20) for rank in ranks]
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_the_order_depends_on_the_seed_alone(data_root: Path, cache_gib: float) -> None:
    def order(seed: int) -> list[bytes]:
        dataset = make_dataset(data_root, "libero_small_no_noops", cache_gib, seed=seed)
        return [fingerprint(s) for s in itertools.islice(dataset, 40)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:20] != fingerprints("libero_small_no_noops"), "it is shuffled"


def test_streaming_needs_an_episode_for_every_rank(data_root: Path) -> None:
    with pytest.raises(ValueError, match="3 trajectories, fewer than the 4 ranks"):
        make_dataset(data_root, "tabletop_no_noops", 0.0, rank=0, world_size=4)


def test_labels_are_the_actions_and_eos_only() -> None:
    def sample(length: int, action: int) -> dict:
        return {
            "image": np.zeros((2, 2, 3), np.uint8),
            "prompt_ids": np.arange(10, 10 + length),
            "action_ids": np.arange(action, action + 7),
            "action": np.zeros(7, np.float32),
        }

    batch = ActionCollator(pad_token_id=0, eos_token_id=2)([sample(2, 300), sample(4, 350)])
    actions = list(range(300, 307)), list(range(350, 357))
    assert batch["input_ids"].tolist() == [
        [10, 11, *actions[0], 2, 0, 0],
        [10, 11, 12, 13, *actions[1], 2],
    ]
    assert batch["labels"].tolist() == [
        [-100] * 2 + [*actions[0], 2, -100, -100],
        [-100] * 4 + [*actions[1], 2],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 10 + [0] * 2, [1] * 12]
    assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (2, 2, 2, 3)


def test_batches_have_the_asked_size(data_root: Path) -> None:
    dataset = make_dataset(data_root, "libero_small_no_noops", train=False)
    sizes = [len(b["images"]) for b in iterate_batches(dataset, 8, ActionCollator(0, 2))]
    assert sizes == [8, 8, 4]
