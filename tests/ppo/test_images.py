"""The evaluation's preprocessing against tensorflow's own operations, which OpenVLA uses: the same bytes."""

import os
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from ppo.envs import images
from ppo.envs.base import ResetRequest
from ppo.envs.images import center_crop, jpeg_round_trip, policy_image, resize_lanczos3
from ppo.envs.tabletop import TabletopEnv


@pytest.fixture(scope="module")
def tf():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return pytest.importorskip("tensorflow")


def tabletop(size: int) -> np.ndarray:
    return TabletopEnv(size).reset(ResetRequest(3, init_state_id=7, seed=0))


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)


def gradient(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / (size - 1)
    return np.stack([255 * x, 255 * y, 127.5 * (x + y)], axis=-1).round().astype(np.uint8)


def blobs(size: int) -> np.ndarray:
    blurred = cv2.GaussianBlur(noise(size).astype(np.float32), (0, 0), size / 40)
    return np.clip(128 + 8 * (blurred - 128), 0, 255).astype(np.uint8)


PICTURES = pytest.mark.parametrize("picture", [noise, gradient, blobs, tabletop])


def tf_jpeg(tf, image: np.ndarray) -> np.ndarray:
    return tf.io.decode_image(
        tf.image.encode_jpeg(image), expand_animations=False, dtype=tf.uint8
    ).numpy()


def tf_resize(tf, image: np.ndarray, size: int) -> np.ndarray:
    resized = tf.image.resize(image, (size, size), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8).numpy()


def tf_center_crop(tf, image: np.ndarray, area: float) -> np.ndarray:
    """The crop of OpenVLA's evaluation, of one image."""
    unit = tf.image.convert_image_dtype(tf.convert_to_tensor(image), tf.float32)
    side = tf.reshape(tf.clip_by_value(tf.sqrt(area), 0, 1), (1,))
    offset = (1 - side) / 2
    boxes = tf.stack([offset, offset, offset + side, offset + side], axis=1)
    cropped = tf.image.crop_and_resize(unit[None], boxes, tf.range(1), image.shape[:2])[0]
    return tf.image.convert_image_dtype(
        tf.clip_by_value(cropped, 0, 1), tf.uint8, saturate=True
    ).numpy()


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@PICTURES
@pytest.mark.parametrize("size", [256, 224, 112, 64, 63])
def test_jpeg_is_tensorflows(tf, picture, size):
    assert np.array_equal(jpeg_round_trip(picture(size)), tf_jpeg(tf, picture(size)))


def test_a_jpeg_of_another_quality_chroma_or_transform_differs(tf, monkeypatch):
    image = blobs(256)
    expected = tf_jpeg(tf, image)
    assert largest_difference(expected, image) > 0
    full_chroma = tf.io.decode_image(tf.io.encode_jpeg(image, chroma_downsampling=False)).numpy()
    slow = tf.io.decode_jpeg(tf.image.encode_jpeg(image), dct_method="INTEGER_ACCURATE").numpy()
    assert largest_difference(full_chroma, expected) > 5 and largest_difference(slow, expected) > 5
    monkeypatch.setattr(images, "JPEG_QUALITY", 94)
    assert not np.array_equal(jpeg_round_trip(image), expected)


@PICTURES
@pytest.mark.parametrize(
    ("old", "new"),
    [(256, 224), (256, 112), (256, 64), (128, 224), (112, 112), (100, 33), (33, 256)],
)
def test_lanczos_is_tensorflows(tf, picture, old, new):
    assert np.array_equal(resize_lanczos3(picture(old), new), tf_resize(tf, picture(old), new))


def test_lanczos_of_an_oblong_image_is_tensorflows(tf):
    image = noise(256)[:150]
    assert np.array_equal(resize_lanczos3(image, 64), tf_resize(tf, image, 64))


def test_another_filter_differs(tf, monkeypatch):
    image = noise(256)
    expected = resize_lanczos3(image, 64)
    for method, antialias in [("lanczos3", False), ("bicubic", True), ("lanczos5", True)]:
        other = tf.image.resize(image, (64, 64), method=method, antialias=antialias)
        other = tf.cast(tf.clip_by_value(tf.round(other), 0, 255), tf.uint8).numpy()
        assert largest_difference(other, expected) > 5
    images._lanczos_taps.cache_clear()
    monkeypatch.setattr(images, "LANCZOS_RADIUS", 2.0)
    assert largest_difference(resize_lanczos3(image, 64), expected) > 5
    images._lanczos_taps.cache_clear()


@PICTURES
@pytest.mark.parametrize("size", [224, 112, 64, 37])
@pytest.mark.parametrize("area", [0.9, 0.5, 1.0])
def test_the_centre_crop_is_openvlas(tf, picture, size, area):
    assert np.array_equal(center_crop(picture(size), area), tf_center_crop(tf, picture(size), area))


def test_a_centre_crop_of_another_side_differs(tf):
    image = noise(224)
    assert largest_difference(center_crop(image, 0.9), tf_center_crop(tf, image, 0.81)) > 5
    assert not np.array_equal(center_crop(image, 0.9), tf_center_crop(tf, image, 0.895))


def test_a_batch_is_cropped_image_by_image():
    batch = np.stack([noise(64), gradient(64), tabletop(64)])
    assert np.array_equal(center_crop(batch), np.stack([center_crop(image) for image in batch]))


def test_the_centre_crop_keeps_the_middle_nine_tenths_of_the_area():
    ramp = np.broadcast_to(
        np.arange(0, 202, 2, dtype=np.uint8)[None, None, :, None], (2, 101, 101, 3)
    )
    cropped = center_crop(np.ascontiguousarray(ramp))
    position = 100 + np.sqrt(0.9) * (np.arange(0, 202, 2) - 100)
    np.testing.assert_allclose(
        cropped[1, 50, :, 2], position, atol=0.51 + 0.5
    )  # 255.5 x, not 255 x, is cut off
    np.testing.assert_allclose(cropped[0, 0, :, 0], position, atol=0.51 + 0.5)
    black_and_white = np.full((8, 8, 3), 255, np.uint8)
    black_and_white[:4] = 0
    assert center_crop(black_and_white)[[0, -1]].tolist() == black_and_white[[0, -1]].tolist()


@PICTURES
def test_what_the_policy_sees_is_the_jpeg_then_the_resize(tf, picture):
    image = picture(256)
    seen = policy_image(image, 224)
    assert np.array_equal(seen, tf_resize(tf, tf_jpeg(tf, image), 224))
    assert seen.flags["C_CONTIGUOUS"] and largest_difference(seen, resize_lanczos3(image, 224)) > 0


def test_the_source_is_left_alone_and_any_strides_will_do():
    image = noise(256)
    before, turned = image.copy(), image[::-1, ::-1]
    for function in (
        jpeg_round_trip,
        center_crop,
        lambda x: resize_lanczos3(x, 224),
        lambda x: policy_image(x, 64),
    ):
        assert np.array_equal(function(turned), function(np.ascontiguousarray(turned)))
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)]
)
def test_other_shapes_and_types_are_refused(wrong):
    for function in (jpeg_round_trip, center_crop, lambda image: resize_lanczos3(image, 4)):
        with pytest.raises(ValueError, match=r"height, width, 3\) uint8"):
            function(wrong)
    with pytest.raises(ValueError, match="size 0"):
        resize_lanczos3(noise(8), 0)
    with pytest.raises(ValueError, match="area 1.5"):
        center_crop(noise(8), 1.5)


def test_an_image_takes_a_few_milliseconds():
    image, seconds = tabletop(256), []
    for _ in range(10):
        start = time.thread_time()  # not what other processes take
        policy_image(image, 224)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.010  # 2.5 ms on an idle machine


def test_neither_tensorflow_nor_torch_is_imported():
    code = "import sys, ppo.envs.images; sys.exit(bool({'tensorflow', 'torch', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
